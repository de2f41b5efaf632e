"""How far a measurement is, and what it costs: time, matrix-vector products, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_hessian.curvature.memory import current_and_peak_memory

Progress = Callable[[str, int, int | None], None]
"""What is counted, how many of them are done, and of how many (None: not known in advance)."""


def silent(what: str, done: int, total: int | None) -> None:
    """Reports no progress."""


@dataclass(frozen=True)
class Cost:
    """What a measurement cost.

    Attributes:
        seconds: wall time.
        num_matvecs: HVPs per problem.
        memory: bytes by which memory rose, at its peak, above what was in use when the measurement began: what torch
            has allocated on a CUDA device, or what the whole process has resident for the CPU (by the kernel's
            counters, which may be off by some hundred KiB). None where the system does not report it.
        memory_exact: whether ``memory`` is that number. False: more had been in use before, which hides the peak of
            the measurement, and ``memory`` is an upper bound.
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
        self._before = current_and_peak_memory(device)

    def cost(self, num_matvecs: int) -> Cost:
        """The cost up to now."""
        seconds = time.perf_counter() - self._begin
        after = current_and_peak_memory(self._device)
        if self._before is None or after is None:
            return Cost(seconds, num_matvecs)
        (start, peak_before), (_, peak) = self._before, after
        return Cost(seconds, num_matvecs, max(0, peak - start), peak > peak_before)


def synchronize(device: torch.device) -> None:
    """Waits until the device has computed all that was asked of it, so that a clock measures the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
