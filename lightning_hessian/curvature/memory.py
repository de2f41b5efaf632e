"""The device's memory: how much is free, and how much a piece of work allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.batching import on_few
from lightning_hessian.curvature.target_batch import TargetBatch

UNKNOWN_MEMORY = 4 * 2**30  # bytes assumed to be free where the system does not report any
SHARE_OF_FREE_MEMORY = 0.5  # the other half is left for training
STATUS = Path("/proc/self/status")  # of this process; on Linux


def available_memory(device: torch.device) -> int:
    """Bytes that a measurement may use by default: half of what is free on ``device`` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * SHARE_OF_FREE_MEMORY)
    return int(_free_host_memory() * SHARE_OF_FREE_MEMORY)


def _free_host_memory() -> int:
    """Bytes that the kernel can still give, caches included, within the limit of a container."""
    reported = [UNKNOWN_MEMORY]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        reported = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        reported += [] if limit == "max" else [max(0, int(limit) - int(used))]
    except OSError:  # not Linux, or no container
        pass
    return min(reported)


def current_and_peak_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use now and at most so far, or None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    # not ru_maxrss, which starts at the peak of the process that started this one
    sizes = dict(line.split(":") for line in STATUS.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    if len(sizes) < 2:
        return None
    current, peak = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return current, peak


class AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own class
    """Counts the bytes of every new tensor made inside the context: an upper bound of what it uses at once."""

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


def allocated_per_sample(batch: TargetBatch, work: Callable[[TargetBatch], object]) -> int:
    """Bytes of the tensors that ``work`` makes for each sample, at least 1.

    Counted over two samples, as some networks squeeze the axis of a single one, or over one where two do not fit the
    device.
    """

    def count(few: TargetBatch) -> int:
        with AllocatedBytes() as allocated:
            work(few)
        return max(1, -(-allocated.total // few.num_samples))

    return on_few(batch, 2, count)


def readable(num_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
