"""Where the colours of Hessians' pictures end: kept over a run, so that pictures of different steps compare. Numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FAR_BEYOND = 3  # times the scale: a picture that is beyond it by more would show signs only
PERCENTILE = 99  # of |H|: a few large entries hide the rest
MAX_COLUMNS = 10  # class columns of which TensorBoard gets pictures and histograms
MAX_ROWS = 8  # samples of one picture


def percentile(matrix: Array) -> float:
    """The 99th percentile of |H|, or the largest entry where that is zero."""
    magnitudes = np.abs(matrix).ravel()
    return float(np.percentile(magnitudes, PERCENTILE)) or float(magnitudes.max())


def run_scale(before: Array | None, hessian: Array | None) -> Array | None:
    """The scale of each problem that has a picture ``[S, K]``: that of ``before``, or a new one.

    A new one where it is zero, or exceeded far: an untrained network may bend a thousand times less than a trained
    one. A scale never shrinks.

    Args:
        before: of the measurement before, or None.
        hessian: ``[S, K, D, D]``, or None where there are no pictures.
    """
    if hessian is None:
        return before
    rows, columns = min(len(hessian), MAX_ROWS), min(hessian.shape[1], MAX_COLUMNS)
    fixed = np.zeros((rows, columns)) if before is None or before.shape != (rows, columns) else before.copy()
    for sample, column in np.ndindex(rows, columns):
        present = percentile(hessian[sample, column])
        if fixed[sample, column] == 0 or present > FAR_BEYOND * fixed[sample, column]:
            fixed[sample, column] = present
    return fixed
