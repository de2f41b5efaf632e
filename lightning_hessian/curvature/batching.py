"""Work on a few samples at a time, and on fewer where the device runs out of memory; one result from those of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = TypeVar("Result")
T = TypeVar("T", bound="DataclassInstance")

# What PyTorch's CPU allocator, cuBLAS, cuDNN and Metal say where they raise a plain RuntimeError.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def in_groups(num_samples: int, size: int, work: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
    """``work`` on ``size`` samples after another; where the device runs out of memory, on half as many from then on.

    Raises:
        MeasurementError: the device runs out of memory with a single sample.
    """
    start = 0
    while start < num_samples:
        samples = slice(start, min(start + size, num_samples))
        try:
            result = work(samples)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            size = (samples.stop - start) // 2
            if size == 0:
                raise MeasurementError(
                    "The device ran out of memory with a single sample. Look at fewer classes, free memory, or "
                    "measure on another device."
                ) from error
            continue
        yield samples, result
        del result  # so that the next one has its memory
        start = samples.stop


def on_few(batch: TargetBatch, count: int, work: Callable[[TargetBatch], Result]) -> Result:
    """``work`` on the first ``count`` samples, or on fewer where the device runs out of memory, as ``in_groups``."""
    few = batch.select(slice(0, count))
    return next(in_groups(few.num_samples, few.num_samples, lambda samples: work(few.select(samples))))[1]


def attempted(work: Callable[[], Result]) -> Result | None:
    """What ``work`` gives, or None where it fails, except for lack of memory.

    A forward may not accept inputs beside the samples, in float64, or in another number; a device may lack float64.
    """
    try:
        return work()
    except Exception as error:
        if any(out_of_memory(each) for each in (error, error.__cause__) if each is not None):
            raise
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def concatenate(groups: Sequence[T]) -> T:
    """One result of all samples from those of groups of samples: every tensor is concatenated along its first axis.

    What is not a tensor is taken from the first group; a single group is returned as it is, without a copy.
    """
    return groups[0] if len(groups) == 1 else combine(groups, torch.cat)


def combine(results: Sequence[T], change: Callable[[list[Tensor]], Tensor]) -> T:
    """The first of some dataclasses of one kind, with ``change`` of all their tensors in place of each of its own."""

    def combined(values: list[Any]) -> Any:
        values = [value for value in values if value is not None]
        if values and isinstance(values[0], Tensor):
            return change(values)
        return combine(values, change) if values and is_dataclass(values[0]) else next(iter(values), None)

    names = [f.name for f in fields(results[0])]
    return replace(results[0], **{name: combined([getattr(result, name) for result in results]) for name in names})
