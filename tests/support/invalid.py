"""Records of which some Hessians are not valid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_hessian import Record
from lightning_hessian.records.validity import BY_ENTRY, without_invalid

MESSAGE = (
    "The target is a curved function of the input. At samples 1 and 2, the derivatives disagree with finite "
    "differences of the values by up to 40 %: look for .detach() or torch.no_grad() over part of the forward, and for "
    "a custom autograd.Function whose backward is wrong "
    "(my_package.layers.activations.TheirVeryOwnGatedActivationFunction)."
)
FOUR_SAMPLES = {
    "one sample": [[1, 1], [1, 1], [0, 0], [1, 1]],
    "one class of one sample": [[1, 1], [1, 0], [1, 1], [1, 1]],
    "the first sample": [[0, 0], [1, 1], [1, 1], [1, 1]],
    "all but one": [[0, 0], [0, 0], [0, 0], [0, 1]],
    "all": [[0, 0], [0, 0], [0, 0], [0, 0]],
}


def invalidated(record: Record, valid: object) -> Record:
    """The record as it is where only the entries marked in ``valid [N, K]`` are valid; three in four were checked."""
    valid = np.array(valid, bool)
    error = np.where(valid, 3e-7, 0.4)
    error[3::4] = np.nan
    return without_invalid(replace(record, valid=valid, finite_difference_error=error, message=MESSAGE))


def of_samples(record: Record, samples: list[int]) -> Record:
    """The record of some of its samples."""
    names = (*BY_ENTRY, "x", "labels", "predicted", "classes", "vector_index", "converged")
    names += ("finite_difference_error", "valid")
    arrays = {n: getattr(record, n) for n in names}
    chosen = {n: a[[i for i in samples if i < len(a)]] for n, a in arrays.items() if a is not None}
    return replace(record, **chosen, metrics={n: a[samples] for n, a in record.metrics.items()})
