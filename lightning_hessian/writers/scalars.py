"""The scalars of a record, for any logger: one tag per metric and class, never one per sample."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.metrics import LOGGED, Metric
from lightning_hessian.records.record import Record
from lightning_hessian.records.statistics import PERCENTILES, over_samples
from lightning_hessian.writers.tags import cost_tag, error_tag, metric_tag, spread_tag

ENDS = {"largest": 0, "smallest": -1}  # positions among the eigenvalues


def scalars(record: Record) -> dict[str, float]:
    """Tags and values: per class the mean over samples, and percentiles in a group of their own.

    ``hessian_<metric>/<target>_<class>`` is the mean and ``hessian_spread/<metric>_<target>_<class>_p10`` a
    percentile; a monitor's name goes before the target. Samples where a metric is not finite (the linear radius of a
    zero Hessian, anything of a Hessian that is not valid) are left out, and a metric that is finite for none is not
    logged. For the method ``lanczos``, ``hessian_error/not_converged_<target>_<class>`` counts the eigenvalues that
    have not converged, over all samples.
    """
    statistics = {metric.name: over_samples(record.metrics[metric.name]) for metric in LOGGED}
    values: dict[str, float] = {}
    for k, class_id in enumerate(record.class_ids):
        suffix = record.tag_suffix(class_id)
        for name, found in statistics.items():
            if found.num_finite[k]:
                values[metric_tag(name, suffix)] = float(found.mean[k])
                for percent, percentile in zip(PERCENTILES, (found.p10, found.p90), strict=True):
                    values[spread_tag(name, suffix, percent)] = float(percentile[k])
        values |= {error_tag(name, suffix): error for name, error in mean_errors(record, k).items()}
        if record.method == "lanczos" and record.valid[:, k].any():
            values[error_tag("not_converged", suffix)] = float(record.not_converged[:, k].sum())
    return values | costs(record)


def costs(record: Record) -> dict[str, float]:
    """What the measurement cost, as far as it is known."""
    known = {
        "seconds": record.seconds,
        "matvecs": record.num_matvecs,
        "peak_memory_mib": record.memory / 2**20 if record.memory is not None and record.memory_exact else None,
        "overhead": record.overhead,
        "skipped": record.skipped,
    }
    return {cost_tag(name, record.name): value for name, value in known.items() if value is not None}


def mean_errors(record: Record, class_index: int) -> dict[str, float]:
    """How far the means over samples may be off, where they are not exact to rounding.

    For the extreme eigenvalues the mean residual; for trace, Frobenius norm and Gauss–Newton share the mean standard
    error, which is at least that of the mean: all samples share their random vectors, so their errors do not cancel.
    """
    if record.method != "lanczos":
        return {}
    residuals = {m.name: record.residuals[:, class_index, ENDS[m.depends_on]] for m in LOGGED if m.depends_on in ENDS}
    errors = {m.name: record.metrics[f"{m.name}_error"][:, class_index] for m in LOGGED if m.has_error}
    means = {name: over_samples(values).mean for name, values in {**residuals, **errors}.items()}
    return {name: float(mean) for name, mean in means.items() if not np.isnan(mean)}


def num_not_converged(record: Record, metric: Metric, class_index: int) -> int:
    """For how many samples the eigenvalue that decides a metric has not converged; 0 where no single one does."""
    if metric.depends_on in (None, "both ends"):
        return 0
    eigenvalues = record.eigenvalues[:, class_index]
    if metric.depends_on in ENDS:
        index = np.full(len(eigenvalues), ENDS[metric.depends_on])
    else:
        index = np.abs(eigenvalues).argmax(axis=-1)
    return int(record.not_converged[np.arange(len(index)), class_index, index].sum())
