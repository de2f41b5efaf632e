"""Records as a pandas table: one row per sample, class and step. Pandas is loaded when a table is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.records.metrics import METRICS
from lightning_hessian.records.record import Record

if TYPE_CHECKING:
    import pandas

PER_STEP = ("step", "logged_step", "epoch", "target", "method", "autodiff_mode", "diagnosis", "network", "complete")
COSTS = ("seconds", "num_matvecs")


def to_dataframe(records: Record | Iterable[Record]) -> pandas.DataFrame:
    """A table with one row per sample, class and step.

    The columns are the step, sample and class (``sample``, ``class_id``, ``class``, ``class_name``, ``label``,
    ``predicted``), how they were computed (``method``, ``autodiff_mode``, ``diagnosis``, …), every metric with its
    standard error, ``max_residual`` and ``converged`` of the listed eigenvalues, ``finite_difference_error`` and
    ``valid``, and the cost of the measurement. Undefined values, and those of Hessians that are not valid, are NaN,
    unknown labels ``<NA>``. Needs pandas.

    Args:
        records: one record, or those of ``load_records``.

    Raises:
        ModuleNotFoundError: pandas is not installed.

    Example:
        >>> from lightning_hessian import to_dataframe
        >>> table = to_dataframe([record])  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> table[["step", "sample", "class", "lambda_max", "trace"]]
           step  sample  class  lambda_max  trace
        0     0       0      0         3.0    2.0
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_dataframe needs pandas, which is not installed: pip install 'lightning-hessian[notebook]'."
        ) from error
    tables = [pandas.DataFrame(_columns(r)) for r in ([records] if isinstance(records, Record) else records)]
    if not tables:
        raise ValueError("There are no records to make a table of: give at least one.")
    return pandas.concat(tables, ignore_index=True).astype({"label": "Int64"})


def _columns(record: Record) -> dict[str, Any]:
    samples, class_indices = (index.ravel() for index in np.indices(record.classes.shape))
    class_ids = [record.class_ids[k] for k in class_indices]
    return {
        **{name: getattr(record, name) for name in PER_STEP},
        "sample": samples,
        "class_id": class_ids,
        "class": record.classes.ravel(),
        "class_name": [record.output_name(k) for k in record.classes.ravel()],
        "label": [None] * len(samples) if record.labels is None else [int(k) for k in record.labels[samples]],
        "predicted": record.predicted[samples],
        **{metric.name: record.metrics[metric.name].ravel() for metric in METRICS},
        "max_residual": record.residuals.max(axis=-1, initial=0).ravel(),
        "converged": record.converged.all(axis=-1).ravel(),
        "finite_difference_error": record.finite_difference_error.ravel(),
        "valid": record.valid.ravel(),
        **{name: getattr(record, name) for name in COSTS},
    }
