"""How much memory a measurement may take, and how much one HVP takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.derivatives import ReverseOverReverse
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.errors import MeasurementError

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


def product_bytes(problems: Problems) -> int:
    """Upper bound of the memory that one HVP of one sample's problems takes, from a count over two samples."""
    few = problems.select(slice(0, 2))
    with AllocatedBytes() as allocated:
        engine = ReverseOverReverse(few)
        engine.hvp(engine.gradient())
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
