"""Where the colours of Hessians' pictures end: fixed over a run, so that pictures of different steps compare. Numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PERCENTILE = 99  # of |H|: a few large entries hide the rest
MAX_COLUMNS = 10  # class columns of which TensorBoard gets pictures and histograms
MAX_ROWS = 8  # samples of one picture


def percentile(matrix: Array) -> float:
    """The 99th percentile of |H|, or the largest entry where that is zero."""
    magnitudes = np.abs(matrix).ravel()
    return float(np.percentile(magnitudes, PERCENTILE)) or float(magnitudes.max())


def run_scale(before: Array | None, hessian: Array | None) -> Array | None:
    """The scale of each problem that has a picture ``[S, K]``: that of ``before``, or where it is zero a new one.

    Args:
        before: of the measurement before, or None.
        hessian: ``[S, K, D, D]``, or None where there are no pictures.
    """
    if hessian is None:
        return before
    rows, columns = min(len(hessian), MAX_ROWS), min(hessian.shape[1], MAX_COLUMNS)
    fixed = np.zeros((rows, columns)) if before is None or before.shape != (rows, columns) else before.copy()
    for sample, column in zip(*np.nonzero(fixed == 0), strict=True):
        fixed[sample, column] = percentile(hessian[sample, column])
    return fixed
