"""How much memory a measurement may take, and how much one HVP takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.derivatives import ReverseOverReverse, gradients
from lightning_hessian.curvature.problems import Problems
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


def product_bytes(problems: Problems) -> int:
    """Upper bound of the memory that one HVP of one sample's problems takes, from a count over two samples."""

    def product(few: Problems) -> None:
        engine = ReverseOverReverse(few)
        engine.hvp(engine.gradient())

    return allocated_per_sample(problems, product)


def gradient_bytes(problems: Problems) -> int:
    """The same for one gradient of one of one sample's outputs."""
    return allocated_per_sample(replace(problems, classes=problems.classes[:, :1]), gradients)


def allocated_per_sample(problems: Problems, work: Callable[[Problems], object]) -> int:
    """Bytes of the tensors that ``work`` makes for each sample, at least 1; counted over two samples."""
    few = problems.select(slice(0, 2))
    with AllocatedBytes() as allocated:
        work(few)
    return max(1, -(-allocated.total // few.num_samples))


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def readable(num_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
