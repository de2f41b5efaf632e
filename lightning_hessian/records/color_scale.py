"""Where the color scales of Hessians' pictures end: fixed over a run, so that pictures of different steps compare."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.matrices import Array

FAR_BEYOND = 3  # times the scale: a picture that exceeds it by more would show signs only
PERCENTILE = 99  # of |H|: a few large entries hide the rest
MAX_CLASSES = 10  # of which TensorBoard gets pictures and histograms
MAX_SAMPLES = 8  # of which scales are kept


def color_limit(matrix: Array) -> float:
    """The 99th percentile of |H|, or the largest entry where that is zero."""
    magnitudes = np.abs(matrix).ravel()
    return float(np.percentile(magnitudes, PERCENTILE)) or float(magnitudes.max())


def run_scale(previous: Array | None, hessian: Array | None) -> Array | None:
    """The scale for each sample and class that has a picture ``[S', K']``: the previous one, or a new one.

    A new one where it is zero or far exceeded: an untrained network may be a thousand times less curved than a trained
    one. A scale never shrinks.

    Args:
        previous: the ``color_scale`` of the previous measurement, or None.
        hessian: ``[S, K, D, D]``, NaN where not valid, or None where there are no pictures.
    """
    if hessian is None:
        return previous
    shape = min(len(hessian), MAX_SAMPLES), min(hessian.shape[1], MAX_CLASSES)
    scale = np.zeros(shape) if previous is None or previous.shape != shape else previous.copy()
    for index in np.ndindex(*shape):
        limit = color_limit(hessian[index])
        if limit > FAR_BEYOND * scale[index]:  # never where it is NaN
            scale[index] = limit
    return scale
