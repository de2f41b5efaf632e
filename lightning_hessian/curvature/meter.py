"""How far a measurement is, what it costs (time, matrix-vector products, memory), and whether it will be in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lightning_hessian.curvature.memory import current_and_peak_memory

Progress = Callable[[str, int, int | None], None]
"""What is counted, how many of them are done, and of how many (None: not known in advance)."""


clock = time.perf_counter
# How many times slower the first part of some work may be than the others: kernels are chosen, memory is touched for
# the first time and counted.
SLOW_START = 3.0


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
        self._begin = clock()
        self._before = current_and_peak_memory(device)

    def limit(self, max_seconds: float | None) -> TimeLimit:
        """A limit for what this measures, preparation included."""
        return TimeLimit(max_seconds, self._begin, self._device)

    def cost(self, num_matvecs: int) -> Cost:
        """The cost up to now."""
        seconds = clock() - self._begin
        after = current_and_peak_memory(self._device)
        if self._before is None or after is None:
            return Cost(seconds, num_matvecs)
        (start, peak_before), (_, peak) = self._before, after
        return Cost(seconds, num_matvecs, max(0, peak - start), peak > peak_before)


@dataclass(frozen=True)
class TimeLimit:
    """When a measurement is to end, by the clock of this process.

    Attributes:
        max_seconds: from ``begin``; None: no limit.
        begin: when the measurement began.
        device: whose work is waited for before the clock is read.
    """

    max_seconds: float | None = None
    begin: float = 0.0
    device: torch.device | None = None

    @property
    def seconds_left(self) -> float:
        """Until the end; infinite without a limit, which reads no clock."""
        if self.max_seconds is None:
            return math.inf
        if self.device is not None:
            synchronize(self.device)
        return self.begin + self.max_seconds - clock()

    def part(self, share: float) -> TimeLimit:
        """That of a part of the work: a share of the time that is left."""
        if self.max_seconds is None:
            return self
        return replace(self, max_seconds=self.max_seconds - (1 - share) * max(0.0, self.seconds_left))


UNLIMITED = TimeLimit()


class Pace:
    """Whether work in equal units will be done in time, from how long those took that are done.

    The first report counts what is slow once; a later rate is that of the units since then.

    Args:
        limit: of the work.
        total: units.
    """

    def __init__(self, limit: TimeLimit, total: int) -> None:
        self._limit, self._total = limit, total
        self._left_at_start = limit.seconds_left
        self._first: tuple[int, float] | None = None  # units done by the first report, and seconds left then

    def lateness(self, done: int, seconds_after: float = 0.0) -> tuple[float, float] | None:
        """Seconds that the whole work is expected to take, and those it had, where it will not be in time.

        Args:
            done: units so far.
            seconds_after: that are needed once all units are done.
        """
        if self._limit.max_seconds is None or done == self._total:
            return None
        left = self._limit.seconds_left
        if self._first is None or done <= self._first[0]:  # or the work began again in another way
            self._first = done, left
            expected = (self._left_at_start - left) / done * (self._total - done)
            least = expected / SLOW_START
        else:
            expected = least = (self._first[1] - left) / (done - self._first[0]) * (self._total - done)
        if least + seconds_after <= left:
            return None
        return self._left_at_start - left + expected + seconds_after, self._left_at_start


class Stopwatch:
    """Seconds that the work inside takes, on its device too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize(self._device)
        self._begin = clock()
        return self

    def __exit__(self, *exception: object) -> None:
        synchronize(self._device)
        self.seconds = clock() - self._begin


def duration(seconds: float) -> str:
    """Seconds in words: ``7.5 s``, ``12 min`` or ``3.5 h``."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 99.5 * size:  # which two digits round to 100
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.3g} h"


def synchronize(device: torch.device) -> None:
    """Waits until the device has computed all that was asked of it, so that a clock measures the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
