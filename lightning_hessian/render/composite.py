"""One picture per class and measurement, in the size in which TensorBoard shows it."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.color_scale import FAR_BEYOND, PERCENTILE, color_limit
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.record import ClassId, Record
from lightning_hessian.render.canvas import GRAY, PALE, Box, Canvas, colored
from lightning_hessian.render.maps import (
    DIVERGING,
    InputMap,
    about_outputs,
    compact,
    eigenvector_maps,
    gradient_map,
    input_map,
)

# TensorBoard's *Images* shows every picture 350 pixels wide, *Time Series* at most 215 high, both without
# interpolation: letters survive only in a picture of just that size.
WIDTH, HEIGHT = 350, 215
TOP = 31  # of the panels, below two lines of title
MATRIX_LEFT, MATRIX = 4, 132
MAPS_LEFT, MAP_WIDTH, MAP_HEIGHT, COLUMN, ROW = 148, 96, 76, 102, 92
LINE = 13
MAX_ASPECT = 2  # beyond it a map is stretched to its panel


def composite(record: Record, class_id: ClassId, *, scale: int = 1) -> Canvas:
    """Hessian heatmap, input, gradient and the two top eigenvectors of one sample.

    The sample is the first with a whole matrix that is valid; where none is, the picture says why. Signed maps are red
    where positive and blue where negative, on symmetric scales. The Hessian's scale is that of the run
    (``Record.color_scale``): a picture of a later step shows growth by its colors, and says below how much lies beyond
    the scale. Without one, it ends at this record's own 99th percentile of |H|. A map of the input ends at its own
    largest magnitude.

    Args:
        record: a measurement with ``hessian``, or with all eigenvectors, from which the first sample's matrix is
            reconstructed.
        class_id: one of ``record.class_ids``.
        scale: 1 for TensorBoard, where the picture is 350 × 215 pixels; more for other places.

    Raises:
        ValueError: the record holds no matrices.
    """
    sample, matrix = _first_valid(record, class_id)
    canvas = Canvas(WIDTH, HEIGHT, scale)
    _draw_title(canvas, record, sample, class_id)
    if matrix is None:
        _draw_invalid(canvas, record, sample, class_id)
        return canvas
    _draw_hessian(canvas, record, matrix, sample, class_id)
    panels: list[tuple[int, InputMap]] = [(0, input_map(record, sample)), (1, gradient_map(record, sample, class_id))]
    if matrix.any():
        vectors = enumerate(eigenvector_maps(record, sample, class_id, 2), 2)
        panels += [(place, vector) for place, vector in vectors if vector is not None]
    else:
        left, top = _place(2)
        canvas.note((left, top, left + COLUMN + MAP_WIDTH, top + MAP_HEIGHT), "no curved directions:\nall λ are zero")
    for place, shown in panels:
        _draw_map(canvas, *_place(place), shown)
    if any(shown.brief.endswith("*") for _, shown in panels):
        canvas.text(WIDTH - 4, 16, "*not converged", anchor="ra")
    return canvas


def _first_valid(record: Record, class_id: ClassId) -> tuple[int, Array | None]:
    """The sample to show, and its matrix."""
    num_samples = 1 if record.hessian is None else len(record.hessian)
    for sample in range(num_samples):
        if record.valid[record.indices(sample, class_id)]:
            return sample, record.matrix(sample, class_id)
    return 0, None


def _draw_title(canvas: Canvas, record: Record, sample: int, class_id: ClassId) -> None:
    """What was differentiated, at which sample, and when."""
    outputs = about_outputs(record, sample)
    of_class = f"{record.target} of {record.output_words(sample, class_id)}"
    canvas.text(WIDTH - 4, 2, f"sample {sample}", size=11, bold=True, anchor="ra")
    canvas.text(4, 2, of_class, size=11, bold=True, width=WIDTH - 80)
    when = record.when.replace("after ", "").replace("optimizer ", "")
    canvas.text(4, 16, f"{f'{outputs} – ' if outputs else ''}{when}", width=WIDTH - 8, color=GRAY)


def _draw_invalid(canvas: Canvas, record: Record, sample: int, class_id: ClassId) -> None:
    """The input, and in place of the rest why there are no numbers."""
    error = float(record.finite_difference_error[record.indices(sample, class_id)])
    why = f"It differs from finite\ndifferences by {error:.0%}." if np.isfinite(error) else "It is not finite."
    box = (MATRIX_LEFT, TOP + LINE, MATRIX_LEFT + MATRIX, TOP + LINE + MATRIX)
    canvas.note(box, f"Hessian not valid\n\n{why}\n\nhessian_diagnosis\n(Text) says more.", fill=PALE)
    _draw_map(canvas, *_place(0), input_map(record, sample))


def _draw_hessian(canvas: Canvas, record: Record, matrix: Array, sample: int, class_id: ClassId) -> None:
    size = len(matrix)
    box = (MATRIX_LEFT, TOP + LINE, MATRIX_LEFT + MATRIX, TOP + LINE + MATRIX)
    left, _, right, bottom = box
    canvas.text(left, TOP, f"Hessian {size}×{size}", width=MATRIX)
    if not matrix.any():
        kind = "" if record.diagnosis == "curved" else f"\n({record.diagnosis.replace('_', ' ')})"
        canvas.note(box, f"exactly zero{kind}")
        return
    limit = _limit(record, matrix, record.indices(sample, class_id))
    canvas.image(box, colored(matrix, -limit, limit, DIVERGING))
    bar: Box = (left, bottom + 4, right, bottom + 12)
    canvas.image(bar, colored(np.linspace(-limit, limit, 66)[None], -limit, limit, DIVERGING))
    is_clipped = float(np.abs(matrix).max()) > limit
    less, more = ("≤", "≥") if is_clipped else ("", "")
    canvas.text(left, bottom + 14, f"{less}{compact(-limit)}")
    canvas.text((left + right) / 2, bottom + 14, "0", anchor="ma")
    canvas.text(right, bottom + 14, f"{more}{compact(limit)}", anchor="ra")
    canvas.text(left, bottom + 26, _about_scale(matrix, limit), color=GRAY, width=MATRIX + 10)


def _draw_map(canvas: Canvas, left: float, top: float, shown: InputMap) -> None:
    """A map with its title above, as large as its shape allows."""
    canvas.text(left, top - LINE, shown.brief, width=MAP_WIDTH + 4)
    box = (left, top, left + MAP_WIDTH, top + MAP_HEIGHT)
    if shown.values.ndim == 1:
        canvas.bars(box, shown.values, shown.high)
        return
    colors = _colors(shown)
    height, width = colors.shape[:2]
    if max(height, width) < MAX_ASPECT * min(height, width):
        factor = min(MAP_WIDTH / width, MAP_HEIGHT / height)
        box = (left, top, left + round(width * factor), top + round(height * factor))
    canvas.image(box, colors)


def _colors(shown: InputMap) -> Array:
    """The colors of an image, channels in as many rows as make them largest."""
    if shown.cmap is None:
        return (255 * shown.values).round().astype(np.uint8)
    channels = np.split(colored(shown.values, shown.low, shown.high, shown.cmap), shown.num_channels, axis=1)
    height, width = channels[0].shape[:2]

    def size(num_columns: int) -> float:
        return min(MAP_WIDTH / (num_columns * width), MAP_HEIGHT / (-(-len(channels) // num_columns) * height))

    num_columns = max(range(1, len(channels) + 1), key=size)
    blank = np.full_like(channels[0], 255)
    channels += [blank] * (-len(channels) % num_columns)
    rows = [np.concatenate(channels[i : i + num_columns], axis=1) for i in range(0, len(channels), num_columns)]
    return np.concatenate(rows)


def _place(number: int) -> tuple[float, float]:
    """The upper left corner of one of four maps."""
    row, column = divmod(number, 2)
    return MAPS_LEFT + column * COLUMN, TOP + LINE + row * ROW


def _limit(record: Record, matrix: Array, index: tuple[int, int]) -> float:
    """Where the color scale ends: that of the run, if there is one."""
    scale = record.color_scale
    if scale is not None and all(i < n for i, n in zip(index, scale.shape, strict=True)) and scale[index] > 0:
        return float(scale[index])
    return color_limit(matrix) or 1.0


def _about_scale(matrix: Array, limit: float) -> str:
    """How the entries lie on the color scale."""
    magnitudes = np.abs(matrix)
    share = (100 - PERCENTILE) / 100
    if (magnitudes > FAR_BEYOND * limit).mean() > share:
        return f"{(magnitudes > limit).mean():.0%} lie beyond the scale"
    if (magnitudes > limit / FAR_BEYOND).mean() < share:
        return f"faint: {PERCENTILE}% within ±{compact(color_limit(matrix))}"
    return f"largest |entry| {compact(magnitudes.max())}"
