"""One picture per class and measurement: input, gradient, Hessian and top eigenvectors of some samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from lightning_hessian.records.color_scale import FAR_BEYOND, MAX_SAMPLES, color_limit
from lightning_hessian.records.record import Array, ClassId, Record, class_title
from lightning_hessian.render.canvas import TITLE_GAP, Canvas
from lightning_hessian.render.maps import DIVERGING, eigenvector_maps, gradient_map, input_map, short

NUM_EIGENVECTORS = 3

# Inches.
MAP, MATRIX, GAP, MARGIN = 2.1, 3.2, 0.3, 0.25
HEADING, TITLE, FOOT = 0.45, 0.45, 0.95


def composite(record: Record, class_id: ClassId) -> Figure:
    """Input, gradient, Hessian heatmap and top eigenvectors, one row for each sample with a whole matrix.

    Signed maps are red where positive and blue where negative, on symmetric scales. The Hessian's scale is that of
    the run (``Record.color_scale``): a picture of a later step shows growth by its colors, and says below how much
    lies beyond the scale. Without one, it ends at this record's own 99th percentile of |H|. Where a Hessian is not
    valid, gray panels say so.

    Args:
        record: a measurement with ``hessian``, of which at most 8 samples are drawn, or with all eigenvectors, from
            which the first sample's matrix is reconstructed.
        class_id: one of ``record.class_ids``.

    Raises:
        ValueError: the record holds no matrices.
    """
    num_rows = 1 if record.hessian is None else min(MAX_SAMPLES, len(record.hessian))
    is_valid = [record.valid[record.indices(n, class_id)] for n in range(num_rows)]
    matrices = [record.matrix(n, class_id) if valid else None for n, valid in enumerate(is_valid)]
    num_vectors = min(NUM_EIGENVECTORS, 0 if record.vector_index is None else record.vector_index.shape[-1])
    width = 2 * MARGIN + (2 + num_vectors) * (MAP + GAP) + 0.3 + MATRIX
    row_height = TITLE + MATRIX + FOOT
    canvas = Canvas(width, HEADING + len(matrices) * row_height)
    heading = f"Input-Hessian of {record.target}, {class_title(class_id)}: {record.when}"
    known = [matrix for matrix in matrices if matrix is not None]
    if known and not any(matrix.any() for matrix in known):
        kind = "" if record.diagnosis == "curved" else f"{record.diagnosis.replace('_', ' ')}: "
        heading += f" ({kind}exactly zero)"
    if record.hessian is not None and len(record.hessian) > MAX_SAMPLES:
        heading += f" (the first {MAX_SAMPLES} of {len(record.hessian)} samples)"
    canvas.text(width / 2, HEADING - 0.1, heading, 13, fontweight="bold")
    for sample, matrix in enumerate(matrices):
        _draw_row(canvas, HEADING + sample * row_height + TITLE, record, matrix, sample, class_id)
    return canvas.figure


def _draw_row(canvas: Canvas, top: float, record: Record, matrix: Array | None, sample: int, class_id: ClassId) -> None:
    x, middle = MARGIN, top + (MATRIX - MAP) / 2
    shown = input_map(record, sample)
    title = f"sample {sample}, class {record.class_name(sample, class_id)}\n{shown.title}"
    canvas.map(x, middle, MAP, replace(shown, title=title))
    x += MAP + GAP
    if matrix is None:
        canvas.text(x + MAP / 2, middle - TITLE_GAP, "gradient")
        canvas.blank(x, middle, MAP, "not valid")
        x += MAP + GAP + 0.3
        canvas.text(x + MATRIX / 2, top - TITLE_GAP, "Hessian")
        canvas.blank(x, top, MATRIX, "not valid:\nsee the diagnosis")
        return
    canvas.map(x, middle, MAP, gradient_map(record, sample, class_id))
    x += MAP + GAP + 0.3
    _draw_hessian(canvas, x, top, record, matrix, sample, class_id)
    x += MATRIX + GAP
    for vector in eigenvector_maps(record, sample, class_id, NUM_EIGENVECTORS):
        if vector is None:
            canvas.text(x + MAP / 2, middle + MAP / 2, "no direction:\nλ = 0")
        else:
            canvas.map(x, middle, MAP, vector)
        x += MAP + GAP


def _draw_hessian(
    canvas: Canvas, x: float, y: float, record: Record, matrix: Array, sample: int, class_id: ClassId
) -> None:
    index = record.indices(sample, class_id)
    limit, is_of_run = _limit(record, matrix, index)
    size = len(matrix)
    low, high = (
        f"{short(record.metrics[name][index])}{'' if record.converged[index][end] else '*'}"
        for name, end in (("lambda_min", -1), ("lambda_max", 0))
    )
    mark = " (*not converged)" if "*" in low + high else ""
    title = f"Hessian {size}×{size}, {record.target} per input unit²\nλ from {low} to {high}{mark}"
    canvas.text(x + MATRIX / 2, y - TITLE_GAP, title)
    is_clipped = float(np.abs(matrix).max()) > limit
    canvas.image(x, y, MATRIX, matrix, -limit, limit, DIVERGING, clipped=is_clipped)
    canvas.text(x - 0.05, y, "0", 8, ha="right", va="top")
    canvas.text(x - 0.05, y + MATRIX, f"{size - 1}", 8, ha="right")
    canvas.text(x - 0.08, y + MATRIX / 2, "input entry (row-major)", 8, ha="right", va="center", rotation=90)
    canvas.text(x + MATRIX / 2, y + MATRIX + 0.5, _about_scale(matrix, limit, is_of_run), 8, va="top")


def _limit(record: Record, matrix: Array, index: tuple[int, int]) -> tuple[float, bool]:
    """Where the color scale ends, and whether it is that of the run."""
    scale = record.color_scale
    if scale is not None and all(i < n for i, n in zip(index, scale.shape, strict=True)) and scale[index] > 0:
        return float(scale[index]), True
    return color_limit(matrix) or 1.0, False


def _about_scale(matrix: Array, limit: float, is_of_run: bool) -> str:
    """What the color scale is, and how the entries lie on it."""
    magnitudes = np.abs(matrix)
    largest = f"{'scale of the run; ' if is_of_run else ''}largest |entry|: {short(magnitudes.max())}"
    ratio = color_limit(matrix) / limit
    if ratio > FAR_BEYOND:
        return f"{largest}\nCLIPPED: {(magnitudes > limit).mean():.0%} of the entries lie beyond the scale"
    if 0 < ratio < 1 / FAR_BEYOND:
        return f"{largest}\nFAINT: 99% of the entries lie within ±{short(color_limit(matrix))}"
    return largest
