"""What a measurement costs: time, products, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")  # of this process; on Linux


@dataclass(frozen=True)
class Cost:
    """What a measurement cost.

    Attributes:
        seconds: wall time.
        num_matvecs: HVPs per problem.
        memory: bytes by which memory rose, at its peak, above what was held when the measurement began: what torch
            has allocated on a CUDA device, or what the whole process has resident for the CPU (by the kernel's
            counters, which may be off by some hundred KiB). None where the system does not tell.
        memory_exact: whether ``memory`` is that number. False: more had been held before, so that the peak of the
            measurement does not show, and ``memory`` is an upper bound.
    """

    seconds: float
    num_matvecs: int
    memory: int | None = None
    memory_exact: bool = False


class Meter:
    """Starts where a measurement begins; reads peaks and resets none: those statistics are the user's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = time.perf_counter()
        self._before = held_and_peak(device)

    def cost(self, num_matvecs: int) -> Cost:
        """The cost up to now."""
        seconds = time.perf_counter() - self._begin
        after = held_and_peak(self._device)
        if self._before is None or after is None:
            return Cost(seconds, num_matvecs)
        (fixed, peak_before), (_, peak) = self._before, after
        return Cost(seconds, num_matvecs, max(0, peak - fixed), peak > peak_before)


def held_and_peak(device: torch.device) -> tuple[int, int] | None:
    """Bytes held now and at most so far, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    # not ru_maxrss, which starts at the peak of the process that started this one
    sizes = dict(line.split(":") for line in STATUS.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    if len(sizes) < 2:
        return None
    fixed, peak = (1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return fixed, peak
