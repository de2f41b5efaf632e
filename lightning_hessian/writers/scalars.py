"""The scalars of a record, for any logger: one tag per metric and class, never one per sample."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records import event_format
from lightning_hessian.records.record import Array, Record

METRICS = (
    "lambda_max",
    "lambda_min",
    "trace",
    "frobenius_norm",
    "gradient_norm",
    "normalized_curvature",
    "linear_radius",
    "gauss_newton_share",
    "top_eigenvector_cosine",
    "top_subspace_overlap",
)
TITLES = {name: event_format.METRICS[name] for name in METRICS}
PERCENTILES = (10, 90)
SPREAD = "hessian_spread/"


def scalars(record: Record) -> dict[str, float]:
    """Tags and values: per class the mean over samples, and percentiles in a group of their own.

    ``hessian_<metric>/<target>_<class>`` is the mean and ``hessian_spread/<metric>_<target>_<class>_p10`` a
    percentile; a monitor's name goes before the target. Samples where a metric is not finite (the linear
    radius of a zero Hessian) are left out, and a metric that is finite for none is not logged. Where eigenvalues
    are iterated, ``hessian_error/not_converged_<target>_<class>`` counts those that have not converged,
    over all samples.
    """
    values: dict[str, float] = {}
    for column, class_id in enumerate(record.class_ids):
        slot = record.tag_suffix(class_id)
        for metric in METRICS:
            finite = finite_samples(record, metric, column)
            if len(finite):
                values[f"hessian_{metric}/{slot}"] = float(finite.mean())
                for percentile in PERCENTILES:
                    values[spread_tag(metric, slot, percentile)] = float(np.percentile(finite, percentile))
        values |= {f"hessian_error/{name}_{slot}": error for name, error in mean_errors(record, column).items()}
        if record.method == "lanczos":
            values[f"hessian_error/not_converged_{slot}"] = float((~record.converged[:, column]).sum())
    return values | costs(record)


def costs(record: Record) -> dict[str, float]:
    """What the measurement cost, as far as it is known."""
    known = {
        "seconds": record.seconds,
        "hvps": record.num_matvecs,
        "peak_memory_mib": record.memory / 2**20 if record.memory is not None and record.memory_exact else None,
        "overhead": record.overhead,
        "skipped": record.skipped,
    }
    return {f"hessian_cost/{record.tag(name)}": value for name, value in known.items() if value is not None}


def mean_errors(record: Record, column: int) -> dict[str, float]:
    """How far the means over samples may be off, where they are not exact to rounding.

    Of the extreme eigenvalues the mean residual; of trace, Frobenius norm and head share the mean standard error,
    which is at least that of the mean: all samples share their random vectors, so their errors do not cancel.
    """
    if record.method != "lanczos":
        return {}
    standard = {
        name: float(getattr(record, f"{name}_error")[:, column].mean())
        for name in ("trace", "frobenius_norm", "gauss_newton_share")
    }
    ends = {"lambda_max": 0, "lambda_min": -1}
    residual = {name: float(record.residuals[:, column, place].mean()) for name, place in ends.items()}
    return {**residual, **standard}


def num_not_converged(record: Record, metric: str, column: int) -> int:
    """Of how many samples a metric rests on an eigenvalue that has not converged; 0 where it rests on none."""
    converged, values = record.converged[:, column], record.eigenvalues[:, column]
    places = {"lambda_max": np.zeros(len(values), int), "lambda_min": np.full(len(values), values.shape[-1] - 1)}
    places |= dict.fromkeys(("normalized_curvature", "linear_radius"), np.abs(values).argmax(axis=-1))
    if metric not in places:
        return 0
    return int((~np.take_along_axis(converged, places[metric][:, None], axis=-1)).sum())


def spread_tag(metric: str, slot: str, percentile: int) -> str:
    """The tag of a percentile over samples."""
    return f"{SPREAD}{metric}_{slot}_p{percentile}"


def finite_samples(record: Record, metric: str, column: int) -> Array:
    """A metric's values over the samples of one class column, without those that are not finite."""
    over_samples = getattr(record, metric)[:, column].astype(np.float64)
    return over_samples[np.isfinite(over_samples)]
