"""Mean and percentiles over samples, as scalars, texts, tab and report show them. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PERCENTILES = (10, 90)


@dataclass(frozen=True)
class Statistics:
    """Of the finite values among those of all samples; NaN where none is finite.

    Attributes:
        mean: their mean.
        p10: their 10th percentile, linear between neighbors.
        p90: their 90th percentile.
        num_finite: how many there are.
    """

    mean: Array
    p10: Array
    p90: Array
    num_finite: Array


def over_samples(values: Array, axis: int = 0) -> Statistics:
    """Statistics over one axis of ``values``, that of the samples; the other axes remain.

    Example:
        >>> found = over_samples(np.array([[1.0], [np.inf], [3.0]]))
        >>> found.mean, found.num_finite
        (array([2.]), array([2]))
    """
    values = np.ascontiguousarray(np.moveaxis(values.astype(np.float64), axis, -1))
    is_finite = np.isfinite(values)
    num_finite = is_finite.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        mean = np.where(is_finite, values, 0).sum(axis=-1) / num_finite
    in_order = np.sort(np.where(is_finite, values, np.inf), axis=-1)
    p10, p90 = (_percentile(in_order, num_finite, percent) for percent in PERCENTILES)
    return Statistics(mean, p10, p90, num_finite)


def _percentile(in_order: Array, count: Array, percent: int) -> Array:
    """The percentile of the first ``count`` values, as ``np.percentile`` computes it."""
    rank = np.maximum(count - 1, 0) * (percent / 100)
    below = np.floor(rank).astype(np.intp)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low, high = (np.take_along_axis(in_order, i[..., None], axis=-1)[..., 0] for i in (below, above))
    low, high = (np.where(count > 0, value, np.nan) for value in (low, high))
    share = rank - below
    return np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))
