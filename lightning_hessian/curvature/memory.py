"""The device's memory: how much is free, and how much a piece of work allocates."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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
    """Counts the bytes of the tensors made inside the context.

    Attributes:
        total: of every new tensor, an upper bound of what is used at once.
        peak: the most that was in use at once.
        count: new tensors.
        operations: that were called.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.total = self.peak = self.count = 0
        self.operations: set[Any] = set()
        self._in_use = 0
        self._alive: dict[int, object] = {}  # references to storages made here, by address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(func)
        if _returns_argument(func):
            return result
        for made in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):  # the first is much faster
            if _is_plain(made):
                storage = made.untyped_storage()
                address = storage._cdata
                if address not in self._alive and not _is_of(address, args):
                    self._add(address, storage)
        return result

    def _add(self, address: int, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()
        self.count += 1
        self.total += num_bytes
        self._in_use += num_bytes
        self.peak = max(self.peak, self._in_use)
        self._alive[address] = weakref.ref(storage, lambda _: self._free(address, num_bytes))

    def _free(self, address: int, num_bytes: int) -> None:
        self._in_use -= num_bytes
        self._alive.pop(address, None)


@cache
def _returns_argument(func: Any) -> bool:
    """Whether an operation returns what it was given, or views of it, by its schema."""
    return all(result.alias_info is not None for result in func._schema.returns)


def _is_of(address: int, args: tuple[Any, ...]) -> bool:
    """Whether a storage is that of the first argument, which a few operations return without saying so."""
    return bool(args) and _is_plain(args[0]) and args[0].untyped_storage()._cdata == address


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with memory of its own, or a view of one: zero tensors of forward mode have none."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value._is_zerotensor()


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


# What a user sets in the environment to say how glibc is to allocate: it is left as it is then.
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
UNLIMITED = 2**31 - 1  # the largest int
# The values between which glibc adapts its thresholds end here: in a process that has freed tensors of this size, they
# are what it had before.
MMAP_THRESHOLD, TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20

# Of what is resident over what is in use: before 2.38, glibc does not put an aligned tensor where one of the same size
# was freed. Seen up to 2.4 for blocks of columns.
FRAGMENTATION = 3

_resident_before: int | None = None  # while a context is open: the thresholds are the process's, not the caller's


def keeps_pages(device: torch.device) -> bool:
    """Whether freed memory stays with the process for good: CUDA's caching allocator, or as the environment says."""
    return device.type != "cpu" or int(os.environ.get("MALLOC_TRIM_THRESHOLD_", "0")) > TRIM_THRESHOLD


@contextmanager
def kept_pages(device: torch.device) -> Iterator[None]:
    """Freed memory stays with the process inside the context; at its end, all but 64 MiB go back to the kernel.

    By default, glibc returns every large block that is freed at once, and the kernel clears each page again when the
    next tensor touches it: up to three quarters of the time of whole Hessians on a CPU. Its thresholds cannot be read:
    afterwards they are set to the highest values that glibc chooses by itself (32 and 64 MiB), and no longer adapt.
    Does nothing for other devices and C libraries, or where the environment sets glibc's thresholds.
    """
    global _resident_before
    libc = _adjustable_glibc() if device.type == "cpu" else None
    if libc is None or _resident_before is not None:
        yield
        return
    before = _resident_before = _resident_bytes()  # a name of its own: another thread may leave its context first
    libc.mallopt(M_MMAP_THRESHOLD, UNLIMITED)
    libc.mallopt(M_TRIM_THRESHOLD, UNLIMITED)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        if _resident_bytes() - before > TRIM_THRESHOLD:  # what glibc keeps by itself is not worth the time
            libc.malloc_trim(TRIM_THRESHOLD)
        _resident_before = None


def return_pages(limit: int) -> None:
    """Returns what ``kept_pages`` keeps to the kernel where resident memory has grown by more than ``limit`` bytes."""
    before = _resident_before
    if before is not None and _resident_bytes() - before > limit:
        libc = _adjustable_glibc()
        assert libc is not None
        libc.malloc_trim(0)


@cache
def _adjustable_glibc() -> ctypes.CDLL | None:
    """This process's C library if it is glibc and the environment does not say how it is to allocate."""
    if os.name != "posix" or any(name in os.environ for name in MALLOC_SETTINGS):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _resident_bytes() -> int:
    """Without the pages of files, such as libraries, which the kernel takes and gives as it likes."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def readable(num_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
