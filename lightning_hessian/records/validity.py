"""Which Hessians of a measurement are valid, and how far they agree with finite differences. Numpy only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.records.matrices import Array

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

AGREEMENT = 1e-2  # the largest relative error that is called agreement: the tolerance of the finite-difference check
BY_ENTRY = (
    *("eigenvalues", "eigenvectors", "residuals", "gradient", "diagonal", "diagonal_error"),
    *("density_nodes", "density_weights", "hessian"),
)


def without_invalid(record: Record) -> Record:
    """The record with NaN for every number of a sample and class whose Hessian is not valid, and nothing converged.

    Means, percentiles, histograms and pictures, which are of finite numbers, leave them out. ``valid`` and
    ``finite_difference_error`` stay: they say which ones, and how wrong.
    """
    if record.valid.all():
        return record

    def blank(values: Array) -> Array:
        values = values.copy()
        values[~record.valid[: len(values)]] = np.nan  # of whole matrices, only those of the first samples are there
        return values

    arrays = {name: getattr(record, name) for name in BY_ENTRY}
    blanked: dict[str, Any] = {name: blank(values) for name, values in arrays.items() if values is not None}
    metrics = {name: blank(values) for name, values in record.metrics.items()}
    return replace(record, **blanked, converged=record.converged & record.valid[..., None], metrics=metrics)


def about_validity(finite_difference_error: Array, valid: Array) -> str:
    """How far the Hessians of a measurement agree with finite differences, and which are not valid, in words.

    Args:
        finite_difference_error: ``[N, K]``, NaN where not checked.
        valid: ``[N, K]``.

    Example:
        >>> about_validity(np.array([[3e-7], [np.nan], [0.4]]), np.array([[True], [True], [False]]))
        'Agrees with finite differences to 3e-7 (at 1 of 3 samples). 1 of 3 samples has no valid Hessian and is \
excluded from means; the diagnosis says why.'
    """
    valid = valid.astype(bool)
    return " ".join(filter(None, [_about_agreement(finite_difference_error, valid), _about_invalid(valid)]))


def _about_agreement(errors: Array, valid: Array) -> str:
    """The largest error of those that were checked and are valid."""
    checked = np.isfinite(errors) & valid
    if not checked.any():
        return "Not compared with finite differences at this step." if valid.any() else ""
    largest = float(errors[checked].max())
    verb = "Agrees with finite differences to" if largest <= AGREEMENT else "Differs from finite differences by up to"
    number = f"{largest:.1g}".replace("e-0", "e-")
    return f"{verb} {number} (at {int(checked.any(axis=1).sum())} of {len(valid)} samples)."


def _about_invalid(valid: Array) -> str:
    """How many are not valid: samples, or single classes of some."""
    if valid.all():
        return ""
    if not valid.any():
        return "No Hessian is valid, so there are no numbers; the diagnosis says why."
    num_samples, num_classes = valid.shape
    num_entries, num_whole = int((~valid).sum()), int((~valid).all(axis=1).sum())
    if num_entries == num_whole * num_classes:
        verbs = "has no valid Hessian and is" if num_whole == 1 else "have no valid Hessian and are"
        return f"{num_whole} of {num_samples} samples {verbs} excluded from means; the diagnosis says why."
    verbs = "is not valid and is" if num_entries == 1 else "are not valid and are"
    all_of_them = f"{valid.size} Hessians ({num_samples} samples × {num_classes} classes)"
    return f"{num_entries} of {all_of_them} {verbs} excluded from means; the diagnosis says why."
