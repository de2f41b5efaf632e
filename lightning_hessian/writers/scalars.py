"""The scalars of a record, for any logger: one tag per metric and class, never one per sample."""

from __future__ import annotations

from lightning_hessian.records.metrics import LOGGED
from lightning_hessian.records.record import Record
from lightning_hessian.records.statistics import PERCENTILES, mean_errors, over_samples
from lightning_hessian.writers.tags import cost_tag, error_tag, metric_tag, spread_tag


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
