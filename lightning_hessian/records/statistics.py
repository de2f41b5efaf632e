"""Mean and percentiles over samples, and how far the means may be off, as everything shows them. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.records.matrices import Array
from lightning_hessian.records.metrics import LOGGED, Metric

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

PERCENTILES = (10, 90)
EIGENVALUES = ("lambda_max", "lambda_min", "spectral_norm")  # metrics whose error is a residual
ENDS = {"largest": 0, "smallest": -1}  # positions among the eigenvalues


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


def mean_errors(record: Record, class_index: int) -> dict[str, float]:
    """How far the means over samples may be off, where they are not exact to rounding.

    For the extreme eigenvalues the mean residual; for trace, Frobenius norm and Gauss–Newton share the mean standard
    error, which is at least that of the mean: all samples share their random vectors, so their errors do not cancel.
    """
    if record.method != "lanczos":
        return {}
    residuals = {
        m.name: _at_deciding(m, record, class_index, record.residuals) for m in LOGGED if m.name in EIGENVALUES
    }
    errors = {m.name: record.metrics[f"{m.name}_error"][:, class_index] for m in LOGGED if m.has_error}
    means = {name: over_samples(values).mean for name, values in {**residuals, **errors}.items()}
    return {name: float(mean) for name, mean in means.items() if not np.isnan(mean)}


def num_not_converged(record: Record, metric: Metric, class_index: int) -> int:
    """For how many samples the eigenvalue that decides a metric has not converged; 0 where no single one does."""
    if metric.depends_on in (None, "both ends"):
        return 0
    return int(_at_deciding(metric, record, class_index, record.not_converged).sum())


def _at_deciding(metric: Metric, record: Record, class_index: int, values: Array) -> Array:
    """``[N]``, of values for each listed eigenvalue ``[N, K, n]``, those of the eigenvalue that decides a metric."""
    index = np.abs(record.eigenvalues[:, class_index]).argmax(axis=-1)
    if metric.depends_on in ENDS:
        index = np.full_like(index, ENDS[metric.depends_on])
    return values[np.arange(len(index)), class_index, index]


def _percentile(in_order: Array, count: Array, percent: int) -> Array:
    """The percentile of the first ``count`` values, as ``np.percentile`` computes it."""
    rank = np.maximum(count - 1, 0) * (percent / 100)
    below = np.floor(rank).astype(np.intp)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low, high = (np.take_along_axis(in_order, i[..., None], axis=-1)[..., 0] for i in (below, above))
    low, high = (np.where(count > 0, value, np.nan) for value in (low, high))
    share = rank - below
    return np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))
