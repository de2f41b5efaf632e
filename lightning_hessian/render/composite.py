"""One picture per class and measurement: input, gradient, Hessian and top eigenvectors of some samples."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lightning_hessian.record import Array, Record
from lightning_hessian.render.sheet import DIVERGING, Sheet, as_image, short

NUM_EIGENVECTORS = 3
CLIPPED_SHARE = 0.01  # of a Hessian's entries may lie beyond its colour scale: a few large ones hide the rest

# Inches.
MAP, MATRIX, GAP, MARGIN = 2.1, 3.2, 0.3, 0.25
HEADING, TITLE, FOOT = 0.45, 0.45, 0.75


def composite(record: Record, column: int) -> Figure:
    """Input, gradient, Hessian heatmap and top eigenvectors, one row for each sample with a kept matrix.

    Signed maps are red where positive and blue where negative, on symmetric scales. The Hessian's scale ends
    at the 99th percentile of |H|; its largest entry is told below it.

    Args:
        record: a measurement with ``hessian``.
        column: which of the K classes.

    Raises:
        ValueError: the record holds no matrices.
    """
    if record.hessian is None or len(record.hessian) == 0:
        raise ValueError(f"The record of step {record.step} holds no whole Hessians to draw.")
    vectors = min(NUM_EIGENVECTORS, 0 if record.vector_index is None else record.vector_index.shape[-1])
    width = 2 * MARGIN + (2 + vectors) * (MAP + GAP) + 0.3 + MATRIX
    row_height = TITLE + MATRIX + FOOT
    sheet = Sheet(width, HEADING + len(record.hessian) * row_height)
    heading = f"Input-Hessian of {record.target}, {record.columns[column].replace('_', ' ')}: {record.moment}"
    if record.diagnosis != "curved":
        heading += f" ({record.diagnosis.replace('_', ' ')}: exactly zero)"
    sheet.text(width / 2, HEADING - 0.1, heading, 13, fontweight="bold")
    for sample in range(len(record.hessian)):
        top = HEADING + sample * row_height + TITLE
        _draw_row(sheet, top, record, sample, column, vectors)
    return sheet.figure


def _draw_row(sheet: Sheet, top: float, record: Record, sample: int, column: int, vectors: int) -> None:
    middle = top + (MATRIX - MAP) / 2
    x = MARGIN
    _draw_input(sheet, x, middle, record, sample, column)
    x += MAP + GAP
    gradient = f"gradient\n‖g‖ = {short(record.gradient_norm[sample, column])}"
    _draw_map(sheet, x, middle, record.gradient[sample, column], record, gradient)
    x += MAP + GAP + 0.3
    _draw_hessian(sheet, x, top, record, sample, column)
    x += MATRIX + GAP
    for rank in range(vectors):
        _draw_eigenvector(sheet, x, middle, record, sample, column, rank)
        x += MAP + GAP


def _draw_input(sheet: Sheet, x: float, y: float, record: Record, sample: int, column: int) -> None:
    values = record.x[sample]
    known = [] if record.labels is None else [f"label {_name(record, record.labels[sample])}"]
    known.append(f"predicted {_name(record, record.predicted[sample])}")
    title = f"sample {sample}, looked at class {record.class_name(sample, column)}\n{', '.join(known)}"
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


def _draw_hessian(sheet: Sheet, x: float, y: float, record: Record, sample: int, column: int) -> None:
    assert record.hessian is not None
    matrix = record.hessian[sample, column]
    magnitudes = np.abs(matrix)
    largest = float(magnitudes.max())
    limit = float(np.quantile(magnitudes, 1 - CLIPPED_SHARE)) or largest or 1.0
    size = len(matrix)
    low, high = record.lambda_min[sample, column], record.lambda_max[sample, column]
    sheet.text(
        x + MATRIX / 2,
        y - 0.06,
        f"Hessian {size}×{size}, {record.target} per input unit²\nλ from {short(low)} to {short(high)}",
    )
    sheet.signed_image(x, y, MATRIX, MATRIX, matrix, limit)
    sheet.text(x - 0.05, y, "0", 8, ha="right", va="top")
    sheet.text(x - 0.05, y + MATRIX, f"{size - 1}", 8, ha="right")
    sheet.text(x - 0.08, y + MATRIX / 2, "input entry (row-major)", 8, ha="right", va="center", rotation=90)
    clipped = largest > limit
    sheet.bar(x, y + MATRIX, MATRIX, -limit, limit, DIVERGING, clipped=clipped)
    if clipped:
        sheet.text(x + MATRIX / 2, y + MATRIX + 0.5, f"largest |entry|: {short(largest)}", 8, va="top")


def _name(record: Record, k: int) -> str:
    return record.class_names[int(k)] if record.class_names else str(int(k))
