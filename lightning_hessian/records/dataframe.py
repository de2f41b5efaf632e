"""Records as a pandas table: one row per problem and step. Numpy until the table itself is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.records.event_format import METRICS
from lightning_hessian.records.record import Record

if TYPE_CHECKING:
    import pandas

PER_STEP = ("step", "logged_step", "epoch", "target", "method", "autodiff_mode", "diagnosis", "network", "complete")
COSTS = ("seconds", "num_matvecs")


def to_dataframe(records: Record | Iterable[Record]) -> pandas.DataFrame:
    """A table with one row per problem (sample and class column) and step.

    The columns are the step, the problem (``sample``, ``class_id``, ``class``, ``class_name``, ``label``,
    ``predicted``), how it was computed (``method``, ``autodiff_mode``, ``diagnosis``, …), every derived quantity and
    its error, ``max_residual`` and ``converged`` of the listed eigenvalues, and what the measurement cost. What is not
    defined is NaN; unknown labels are ``<NA>``. Needs pandas.

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
            "to_dataframe makes a pandas table, and pandas is not installed: pip install 'lightning-hessian[notebook]'."
        ) from error
    several = [records] if isinstance(records, Record) else list(records)
    tables = [pandas.DataFrame(_columns(record)) for record in several]
    if not tables:
        raise ValueError("There are no records to make a table of: give at least one.")
    table = pandas.concat(tables, ignore_index=True)
    return table.astype({"label": "Int64"})


def _columns(record: Record) -> dict[str, Any]:
    num_samples, num_columns = record.classes.shape
    samples, columns = (index.ravel() for index in np.indices((num_samples, num_columns)))
    labels = [None] * len(samples) if record.labels is None else [int(k) for k in record.labels[samples]]
    return {
        **{name: getattr(record, name) for name in PER_STEP},
        "sample": samples,
        "class_id": [record.class_ids[k] for k in columns],
        "class": record.classes.ravel(),
        "class_name": [record.class_name(n, record.class_ids[k]) for n, k in zip(samples, columns, strict=True)],
        "label": labels,
        "predicted": record.predicted[samples],
        **{metric: getattr(record, metric).ravel() for metric in METRICS},
        "max_residual": record.residuals.max(axis=-1, initial=0).ravel(),
        "converged": record.converged.all(axis=-1).ravel(),
        **{name: getattr(record, name) for name in COSTS},
    }
