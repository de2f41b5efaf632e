"""Shows the progress of a long measurement, beside a Trainer's bars if there are any; imports no torch or Lightning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

DELAY = 1.0  # seconds before anything is shown, so that short measurements do not flicker
OWN = "input_hessian"  # field that marks our tasks in Rich's display


class MeasurementBar:
    """A progress bar for one measurement; ``measure`` calls it.

    Args:
        new_line: makes a line with a text and a total, or None where there is no display.
        clock: in seconds.
    """

    def __init__(self, new_line: NewLine, clock: Callable[[], float] = time.perf_counter) -> None:
        self._new_line = new_line
        self._clock = clock
        self._begin = clock()
        self._line: Line | None = None
        self._counted = ""

    def __enter__(self) -> MeasurementBar:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Exception):
            self._close()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Shows that ``done`` of ``total`` columns, samples or products (``what``) are finished."""
        if self._clock() - self._begin < DELAY:
            return
        try:
            self._show(what, done, total)
        except Exception:  # a closed terminal must not abort a measurement
            self._new_line = no_line

    def _show(self, what: str, done: int, total: int | None) -> None:
        if what != self._counted:
            self._close()
            self._line = self._new_line(f"Input Hessian, {what}", total)
            self._counted = what
        if self._line is not None:
            self._line.update(done)

    def _close(self) -> None:
        line, self._line, self._counted = self._line, None, ""
        if line is not None:
            line.close()


class Line(Protocol):
    """One line of a display."""

    def update(self, done: int) -> None:
        """So many are done."""

    def close(self) -> None:
        """Removes the line."""


NewLine = Callable[[str, "int | None"], "Line | None"]


def no_line(text: str, total: int | None) -> None:
    """Nothing is shown."""


def line_of_its_own(text: str, total: int | None) -> Line:
    """A new line of tqdm, which every installation of Lightning has."""
    from tqdm.auto import tqdm

    return _TqdmLine(tqdm, text, total)


def line_beside(trainers_bar: Any, text: str, total: int | None) -> Line | None:
    """A new line in the Trainer's display, or None where there is no display.

    Args:
        trainers_bar: ``trainer.progress_bar_callback``: a ``TQDMProgressBar`` or ``RichProgressBar`` of ``lightning``
            or ``pytorch_lightning``, recognized by name. For any other, a disabled one, or None, there is none.
        text: of the line.
        total: at which it is full; None: not known.
    """
    for kind in type(trainers_bar).__mro__:
        if kind.__name__ == "TQDMProgressBar" and trainers_bar.is_enabled:
            return _TqdmLine(sys.modules[kind.__module__].Tqdm, text, total)
        if kind.__name__ == "RichProgressBar" and trainers_bar.is_enabled and trainers_bar.progress is not None:
            return _RichLine(trainers_bar, text, total)
    return None


class _TqdmLine:
    """A bar of the same class as the Trainer's own, so that it takes the first free line below them."""

    def __init__(self, tqdm: Any, text: str, total: int | None) -> None:
        self._bar = tqdm(desc=text, total=total, leave=False, dynamic_ncols=True, file=sys.stdout)

    def update(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _RichLine:
    """A task in the Trainer's display: hidden, never removed, and reused.

    Lightning finds its own tasks by their index in the list, which a removal would shift.
    """

    def __init__(self, trainers_bar: Any, text: str, total: int | None) -> None:
        self._trainers_bar, self._progress = trainers_bar, trainers_bar.progress
        size = float("inf") if total is None else total  # Lightning's display does not accept None
        kind = "endless" if total is None else "counted"  # Lightning uses another class of tasks for endless ones
        own = [task.id for task in self._progress.tasks if task.fields.get(OWN) == kind]
        if own:
            self._progress.reset(own[0], total=size, visible=True, description=text)
        else:
            own = [self._progress.add_task(text, total=size, **{OWN: kind})]
        self._task = own[0]

    def update(self, done: int) -> None:
        self._progress.update(self._task, completed=done)
        self._trainers_bar.refresh()

    def close(self) -> None:
        self._progress.update(self._task, visible=False)
        self._trainers_bar.refresh()
