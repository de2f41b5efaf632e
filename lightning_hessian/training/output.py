"""What a run shows: its records, its skipped and failed measurements, and its warnings, each once per cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from lightning_hessian.errors import ConfigurationError, WritingError
from lightning_hessian.records.record import Record
from lightning_hessian.records.summary import of_training_time
from lightning_hessian.training.decision import Expectation
from lightning_hessian.training.schedule import Budget, TrainingPosition
from lightning_hessian.training.settings import MonitorSettings
from lightning_hessian.writers.publisher import Publisher

LONG = 10.0  # seconds that a measurement is expected to take, above which it is announced


class RunOutput:
    """Publishes on the first process, where ``open`` was called; elsewhere it only warns and raises.

    Args:
        settings: of the monitor.
        warn: shows a warning on the first process.
        inform: shows a message there.
        known: warnings about the Trainer and the model that need no repetition.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        warn: Callable[[str], object],
        inform: Callable[[str], object],
        known: Collection[str] = (),
    ) -> None:
        self._on_error = settings.on_error
        self._title = settings.measurement.title
        self._show_warning, self._show_message = warn, inform
        self._warned: set[str] = set()
        self.notices = set(known)
        self.failure: str | None = None  # the last one
        self._is_open = False
        self._expected = 0.0  # seconds, as last announced
        self._num_expected = 0
        self._advised = False
        self._make = partial(Publisher, keep_matrices=settings.keep_matrices, name=settings.measurement.name)
        self._publisher = self._make(())

    def open(self, loggers: Sequence[Any]) -> None:
        """Publishes to these loggers from now on."""
        if not self._is_open:
            self._publisher, self._is_open = self._make(loggers), True

    def save_in(self, folder: str) -> None:
        """Saves records in this directory from now on."""
        self._publisher.save_in(folder)

    def publish(self, record: Record) -> tuple[dict[str, float], list[WritingError]]:
        """Publishes a record; returns its scalars, and what could not be written so far."""
        metrics = self._publisher.publish(record)
        for delay in self._publisher.delays():
            self.warn(delay)
        return metrics, self.flush() if self._on_error == "raise" else self._publisher.faults()

    def skip(self, reason: str, num_skipped: int, at: TrainingPosition) -> None:
        """Says that a measurement is missing because of its cost."""
        self.warn(f"no measurement at step {at.step}: {reason}", cause=reason)
        self._publisher.publish_skip(num_skipped, at.logged_step)

    def fail(self, error: Exception, at: TrainingPosition, *, before_training: bool) -> None:
        """Raises a failed measurement where ``on_error`` says so or the settings are at fault; else warns."""
        if self.must_raise(error, before_training=before_training):
            raise error
        self.failure = f"{type(error).__name__}: {error}"
        self.warn(
            f"no measurement at step {at.step}, and the run continues. {self.failure}",
            cause=getattr(error, "cause", str(error)),
        )
        self._publisher.publish_failure(str(error), at.logged_step)

    def survive(self, error: Exception) -> None:
        """Warns of a failure outside of the measurements."""
        self.failure = f"{type(error).__name__}: {error}"
        self.warn(f"an unexpected failure, and the run continues. {self.failure}")

    def must_raise(self, error: Exception, *, before_training: bool) -> bool:
        """Whether a failure ends the run: ``on_error`` says so, or the settings are at fault and nothing is lost."""
        return self._on_error == "raise" or (before_training and isinstance(error, ConfigurationError))

    def report(self, unwritten: Sequence[WritingError]) -> None:
        """Raises what could not be saved or shown where ``on_error`` says so; else warns."""
        for error in unwritten:
            if self._on_error == "raise":
                raise error
            self.warn(f"{error} The run continues.", cause=error.cause)

    def wait_for_files(self) -> None:
        """Waits until the files of all records are written."""
        self._publisher.wait_for_files()

    def flush(self) -> list[WritingError]:
        """Waits until everything is written; returns what could not be."""
        self._publisher.flush()
        return self._publisher.faults()

    def close(self) -> None:
        """Ends writing without raising: training has ended, or is ending for a reason of its own."""
        for error in self.flush():
            self.warn(str(error), cause=error.cause)
        self._publisher, self._is_open = self._make(()), False

    def expect(self, expected: Expectation, where: str) -> None:
        """Says once what is measured and ``where`` to look; later only where a measurement takes twice as long.

        The second measurement is expected to take as long as the first one did, which also did what a run does once.
        """
        self._num_expected += 1
        seconds, is_first = expected.seconds or 0.0, self._num_expected == 1
        if not is_first and (self._num_expected == 2 or seconds <= max(LONG, 2 * self._expected)):
            return
        self._expected = seconds
        remedy = f" To shorten it: {expected.remedy}." if seconds > LONG else ""
        if is_first:
            self.inform(f"{expected.what}: {expected.how_long} per measurement.{remedy} To see the results: {where}")
        else:
            self.inform(f"a measurement now takes {expected.how_long}.{remedy}")

    def advise(self, budget: Budget) -> None:
        """Says once that measuring takes much of the time, and what would change that."""
        if budget.takes_much and budget.overhead is not None and not self._advised:
            self._advised = True
            self.inform(
                f"so far, measuring has taken {of_training_time(budget.overhead)}. max_overhead=0.05 limits it to a "
                f"twentieth; fewer num_samples and heatmap_samples=0 make each measurement shorter."
            )

    def inform(self, message: str) -> None:
        """Shows a message on the first process."""
        self._show_message(f"{self._title}: {message}")

    def notice(self, message: str) -> None:
        """Warns about the Trainer, once for a fit and the validations and tests after it."""
        if message not in self.notices:
            self.notices.add(message)
            self.warn(message)

    def warn(self, message: str, cause: str | None = None) -> None:
        """Warns on the first process, once per cause, ignoring numbers in the message."""
        cause = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", cause or message)
        if cause not in self._warned:
            self._warned.add(cause)
            self._show_warning(f"{self._title}: {message}")
