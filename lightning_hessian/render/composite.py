"""One picture per class and measurement: input, gradient, Hessian and top eigenvectors of some samples."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lightning_hessian.records.color_scale import FAR_BEYOND, MAX_ROWS, percentile
from lightning_hessian.records.record import Array, Record, class_title
from lightning_hessian.render.canvas import DIVERGING, Sheet, as_image, short

NUM_EIGENVECTORS = 3

# Inches.
MAP, MATRIX, GAP, MARGIN = 2.1, 3.2, 0.3, 0.25
HEADING, TITLE, FOOT = 0.45, 0.45, 0.95


def composite(record: Record, column: int) -> Figure:
    """Input, gradient, Hessian heatmap and top eigenvectors, one row for each sample with a kept matrix.

    Signed maps are red where positive and blue where negative, on symmetric scales. The Hessian's scale is that of
    the run (``Record.picture_scale``): a picture of a later step shows growth by its colours, and tells below it how
    much lies beyond the scale. Without one, it ends at this record's own 99th percentile of |H|.

    Args:
        record: a measurement with ``hessian``, of which at most 8 samples are drawn, or with all eigenvectors, of which
            the first sample's matrix is made.
        column: which of the K classes.

    Raises:
        ValueError: the record holds no matrices.
    """
    matrices = [record.matrix(n, record.class_ids[column]) for n in range(_num_rows(record))]
    vectors = min(NUM_EIGENVECTORS, 0 if record.vector_index is None else record.vector_index.shape[-1])
    width = 2 * MARGIN + (2 + vectors) * (MAP + GAP) + 0.3 + MATRIX
    row_height = TITLE + MATRIX + FOOT
    sheet = Sheet(width, HEADING + len(matrices) * row_height)
    heading = f"Input-Hessian of {record.target}, {class_title(record.class_ids[column])}: {record.when}"
    if record.diagnosis != "curved":
        heading += f" ({record.diagnosis.replace('_', ' ')}: exactly zero)"
    if record.hessian is not None and len(record.hessian) > MAX_ROWS:
        heading += f" (the first {MAX_ROWS} of {len(record.hessian)} samples)"
    sheet.text(width / 2, HEADING - 0.1, heading, 13, fontweight="bold")
    for sample, matrix in enumerate(matrices):
        top = HEADING + sample * row_height + TITLE
        _draw_row(sheet, top, record, matrix, sample, column, vectors)
    return sheet.figure


def _num_rows(record: Record) -> int:
    return 1 if record.hessian is None else min(MAX_ROWS, len(record.hessian))


def _draw_row(sheet: Sheet, top: float, record: Record, matrix: Array, sample: int, column: int, vectors: int) -> None:
    middle = top + (MATRIX - MAP) / 2
    x = MARGIN
    _draw_input(sheet, x, middle, record, sample, column)
    x += MAP + GAP
    gradient = f"gradient\n‖g‖ = {short(record.gradient_norm[sample, column])}"
    _draw_map(sheet, x, middle, record.gradient[sample, column], record, gradient)
    x += MAP + GAP + 0.3
    _draw_hessian(sheet, x, top, record, matrix, sample, column)
    x += MATRIX + GAP
    for rank in range(vectors):
        _draw_eigenvector(sheet, x, middle, record, sample, column, rank)
        x += MAP + GAP


def _draw_input(sheet: Sheet, x: float, y: float, record: Record, sample: int, column: int) -> None:
    values = record.x[sample]
    known = [] if record.labels is None else [f"label {_name(record, record.labels[sample])}"]
    known.append(f"predicted {_name(record, record.predicted[sample])}")
    title = (
        f"sample {sample}, looked at class {record.class_name(sample, record.class_ids[column])}\n{', '.join(known)}"
    )
    sheet.text(x + MAP / 2, y - 0.06, title)
    low, high = float(values.min()), float(values.max())
    if values.ndim == 1:
        limit = max(abs(low), abs(high)) or 1.0
        sheet.line(x, y, MAP, MAP, values, limit)
        sheet.text(x + MAP / 2, y + MAP + 0.08, f"input entries, ±{short(limit)}", 8, va="top")
    elif values.ndim == 3 and len(values) == 3:
        sheet.image(x, y, MAP, MAP, (values.transpose(1, 2, 0) - low) / max(high - low, 1e-12))
        sheet.text(x + MAP / 2, y + MAP + 0.08, f"{short(low)} to {short(high)} shown as 0 to 1", 8, va="top")
    else:
        sheet.image(x, y, MAP, MAP, as_image(values), cmap="gray")
        sheet.bar(x, y + MAP, MAP, low, high, "gray")


def _draw_eigenvector(sheet: Sheet, x: float, y: float, record: Record, sample: int, column: int, rank: int) -> None:
    assert record.eigenvectors is not None
    assert record.vector_index is not None
    place = record.vector_index[sample, column, rank]
    value, residual = (a[sample, column, place] for a in (record.eigenvalues, record.residuals))
    if value == 0:  # any vector is as good an eigenvector as another: there is no direction to show
        sheet.text(x + MAP / 2, y + MAP / 2, "no direction:\nλ = 0")
        return
    mark = "" if record.converged[sample, column, place] else " (not converged)"
    title = f"eigenvector {rank + 1} by |λ|\nλ = {short(value)} ± {residual:.0e}{mark}"
    _draw_map(sheet, x, y, record.eigenvectors[sample, column, rank], record, title)


def _draw_map(sheet: Sheet, x: float, y: float, values: Array, record: Record, title: str) -> None:
    """A signed quantity per input entry, in the input's shape."""
    sheet.text(x + MAP / 2, y - 0.06, title)
    shape = record.x.shape[1:]
    limit = float(np.abs(values).max()) or 1.0
    if len(shape) == 1:
        sheet.line(x, y, MAP, MAP, values, limit)
        sheet.text(x + MAP / 2, y + MAP + 0.08, f"input entries, ±{short(limit)}", 8, va="top")
        return
    sheet.signed_image(x, y, MAP, MAP, as_image(values.reshape(shape)), limit)
    sheet.bar(x, y + MAP, MAP, -limit, limit, DIVERGING)


def _draw_hessian(sheet: Sheet, x: float, y: float, record: Record, matrix: Array, sample: int, column: int) -> None:
    limit, of_run = _limit(record, matrix, sample, column)
    size = len(matrix)
    low, high = (
        f"{short(getattr(record, name)[sample, column])}{'' if record.converged[sample, column, place] else '*'}"
        for name, place in (("lambda_min", -1), ("lambda_max", 0))
    )
    mark = " (*not converged)" if "*" in low + high else ""
    sheet.text(
        x + MATRIX / 2,
        y - 0.06,
        f"Hessian {size}×{size}, {record.target} per input unit²\nλ from {low} to {high}{mark}",
    )
    sheet.signed_image(x, y, MATRIX, MATRIX, matrix, limit)
    sheet.text(x - 0.05, y, "0", 8, ha="right", va="top")
    sheet.text(x - 0.05, y + MATRIX, f"{size - 1}", 8, ha="right")
    sheet.text(x - 0.08, y + MATRIX / 2, "input entry (row-major)", 8, ha="right", va="center", rotation=90)
    largest = float(np.abs(matrix).max())
    sheet.bar(x, y + MATRIX, MATRIX, -limit, limit, DIVERGING, clipped=largest > limit)
    sheet.text(x + MATRIX / 2, y + MATRIX + 0.5, _about_scale(matrix, limit, of_run), 8, va="top")


def _limit(record: Record, matrix: Array, sample: int, column: int) -> tuple[float, bool]:
    """Where the colours end, and whether the run fixed it."""
    scale = record.picture_scale
    if scale is not None and sample < len(scale) and column < scale.shape[1] and scale[sample, column] > 0:
        return float(scale[sample, column]), True
    return percentile(matrix) or 1.0, False


def _about_scale(matrix: Array, limit: float, of_run: bool) -> str:
    """What the colour scale is, and how the entries lie on it."""
    magnitudes = np.abs(matrix)
    told = f"{'scale of the run; ' if of_run else ''}largest |entry|: {short(magnitudes.max())}"
    ratio = percentile(matrix) / limit
    if ratio > FAR_BEYOND:
        return f"{told}\nCLIPPED: {(magnitudes > limit).mean():.0%} of the entries lie beyond the scale"
    if 0 < ratio < 1 / FAR_BEYOND:
        return f"{told}\nFAINT: 99% of the entries lie within ±{short(percentile(matrix))}"
    return told


def _name(record: Record, k: int) -> str:
    return record.class_names[int(k)] if record.class_names else str(int(k))
