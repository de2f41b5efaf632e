"""How much memory a measurement may take, what a piece of work takes, and what to do where it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

Result = TypeVar("Result")

UNKNOWN_MEMORY = 4 * 2**30  # bytes taken for free where the system does not tell
SHARE_OF_FREE_MEMORY = 0.5  # the other half stays for the training that goes on beside us


def available_memory(device: torch.device) -> int:
    """Bytes that a measurement may use by default: half of what is free on ``device`` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * SHARE_OF_FREE_MEMORY)
    return int(_free_host_memory() * SHARE_OF_FREE_MEMORY)


def _free_host_memory() -> int:
    """Bytes that the kernel can still give, caches included, within the limit of a container."""
    told = [UNKNOWN_MEMORY]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        told += [] if limit == "max" else [max(0, int(limit) - int(used))]
    except OSError:  # not Linux, or no container
        pass
    return min(told)


class AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own class
    """Counts the bytes of every new tensor made inside the context: an upper bound of what it holds at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        for t in tree_leaves(result):
            if _is_plain(t) and t.untyped_storage().data_ptr() not in given:
                self.total += t.untyped_storage().nbytes()
        return result


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def group_size(num_samples: int, bytes_per_sample: int, max_memory: int, what: str) -> int:
    """How many samples may be worked on at a time.

    Raises:
        MeasurementError: not even one fits.
    """
    if bytes_per_sample > max_memory:
        raise MeasurementError(
            f"{what} of one sample takes {readable(bytes_per_sample)}, and {readable(max_memory)} may be used "
            f"(max_memory). Look at fewer classes, allow more memory, or ask for single products with input_hvp."
        )
    return min(num_samples, max_memory // bytes_per_sample)


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
    """``work`` on the first ``count`` samples, or on fewer where the device runs out of memory.

    Raises:
        MeasurementError: the device runs out of memory with a single sample.
    """
    few = batch.select(slice(0, count))
    return next(in_groups(few.num_samples, few.num_samples, lambda samples: work(few.select(samples))))[1]


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every part of all groups, one group's samples after another's."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def allocated_per_sample(batch: TargetBatch, work: Callable[[TargetBatch], object]) -> int:
    """Bytes of the tensors that ``work`` makes for each sample, at least 1.

    Counted over two samples, as some networks squeeze the axis of a single one; where the device has no room for
    two, over one.
    """

    def count(few: TargetBatch) -> int:
        with AllocatedBytes() as allocated:
            work(few)
        return max(1, -(-allocated.total // few.num_samples))

    return on_few(batch, 2, count)


# How PyTorch's CPU allocator, cuBLAS, cuDNN and Metal say it where they raise a plain RuntimeError.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def readable(num_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
