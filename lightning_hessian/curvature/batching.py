"""Work on a few samples at a time, and on fewer where the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

Result = TypeVar("Result")

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
        start = samples.stop


def on_few(batch: TargetBatch, count: int, work: Callable[[TargetBatch], Result]) -> Result:
    """``work`` on the first ``count`` samples, or on fewer where the device runs out of memory, as ``in_groups``."""
    few = batch.select(slice(0, count))
    return next(in_groups(few.num_samples, few.num_samples, lambda samples: work(few.select(samples))))[1]


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
