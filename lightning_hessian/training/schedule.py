"""When to measure: before training, after chosen epochs or steps, and at the end; and at what cost. Knows no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_hessian.errors import store_whole_numbers, whole_numbers


@dataclass(frozen=True)
class TrainingPosition:
    """Where training was after its last batch.

    A checkpoint holds it, so that a resumed run can make up for a measurement that was due when the run was killed.

    Attributes:
        step: optimizer steps so far.
        logged_step: the loggers' step of that batch.
        epoch: its epoch, from 0.
        ends_epoch: whether it was the last batch of that epoch.
    """

    step: int = 0
    logged_step: int = 0
    epoch: int = 0
    ends_epoch: bool = False


START = TrainingPosition()


@dataclass(frozen=True)
class Schedule:
    """After which epochs and steps to measure: arguments of ``InputHessianMonitor``.

    Raises:
        ConfigurationError: an argument is not a whole number in its range.
    """

    every_n_epochs: int | None = 1
    epochs: Collection[int] | None = None
    every_n_train_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_train_steps"):
            if getattr(self, name) is not None:
                store_whole_numbers(self, **{name: 1})
        if self.epochs is not None:
            object.__setattr__(self, "epochs", frozenset(whole_numbers("epochs", self.epochs)))

    def after_epoch(self, epoch: int) -> bool:
        """Whether to measure at the end of ``epoch``, counted from 0."""
        if self.epochs is not None:
            return epoch in self.epochs
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def after_step(self, step: int) -> bool:
        """Whether to measure after ``step`` optimizer steps, within an epoch."""
        return bool(self.every_n_train_steps) and step % (self.every_n_train_steps or 1) == 0

    def missed(self, step: int, position: TrainingPosition, measured_step: int | None) -> bool:
        """Whether a run that starts or resumes after ``step`` optimizer steps has a measurement to make up for.

        Args:
            step: optimizer steps so far.
            position: where training was when the checkpoint was saved.
            measured_step: optimizer steps before the last measurement; None where there was none.
        """
        due = self.after_step(step) or (position.ends_epoch and self.after_epoch(position.epoch))
        return step != measured_step and (step == 0 or (due and position.step == step))


MUCH = 0.25  # share of the training time above which a message says that measuring takes much of it,
NOTICEABLE = 1.0  # if measuring has taken more than this many seconds


class Budget:
    """Limits measuring to a share of the training time of one run.

    With S the seconds spent measuring so far, L those of the last measurement and T the seconds of training so far
    (validation included, measuring excluded), a measurement is allowed where S + L ≤ max_overhead · T. The first one is
    always allowed: its cost is not known.

    Args:
        max_overhead: largest S/T, in (0, 1]; None: no limit.
        clock: in seconds.
    """

    def __init__(self, max_overhead: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_skipped = 0
        self.num_measurements = 0
        self._max_overhead = max_overhead
        self._clock = clock
        self._started: tuple[float, float] | None = None  # when training started, and the seconds spent by then
        self._measuring_since: float | None = None
        self._spent = 0.0
        self._last: float | None = None

    def start(self) -> None:
        """Training starts now."""
        self._started = self._clock(), self._spent

    def allows(self) -> bool:
        """Whether a measurement may be made now."""
        if self._max_overhead is None or self._last is None:
            return True
        return self._spent + self._last <= self._max_overhead * self._training_time()

    def skip(self) -> str:
        """Counts a measurement that is not made, and says why."""
        self.num_skipped += 1
        return (
            f"it would take more than max_overhead={self._max_overhead} of the training time. More may be skipped: "
            f"hessian_cost/skipped counts them."
        )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts the time inside, drawing and writing included, as spent measuring."""
        begin = self._measuring_since = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - begin
            self._spent += self._last
            self._measuring_since = None
            self.num_measurements += 1

    @property
    def overhead(self) -> float | None:
        """S/T now, the current measurement included; None before training."""
        running = 0.0 if self._measuring_since is None else self._clock() - self._measuring_since
        trained = self._training_time()
        return (self._spent + running) / trained if trained > 0 else None

    @property
    def takes_much(self) -> bool:
        """Whether two measurements or more took over a quarter of the training time so far, and nobody set a limit."""
        unlimited = self._max_overhead is None and self.num_measurements >= 2
        return unlimited and self._spent > NOTICEABLE and (self.overhead or 0.0) > MUCH

    @property
    def skipped(self) -> int | None:
        """How many measurements were skipped so far; None where there is no limit."""
        return None if self._max_overhead is None else self.num_skipped

    def _training_time(self) -> float:
        """T, up to now or to the start of the current measurement."""
        if self._started is None:
            return 0.0
        started, spent_before = self._started
        until = self._clock() if self._measuring_since is None else self._measuring_since
        return until - started - (self._spent - spent_before)
