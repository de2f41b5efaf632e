"""When to measure: before training, at chosen epochs or steps, at the end; and for what price. Knows no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lightning_hessian.errors import ConfigurationError


@dataclass(frozen=True)
class Place:
    """Where a run was after its last batch; with it, a resumed run makes up for what a killed one did not finish.

    Attributes:
        step: optimizer steps so far.
        logged_step: the loggers' step of that batch.
        epoch: its epoch, from 0.
        ends_epoch: whether it was the epoch's last.
    """

    step: int = 0
    logged_step: int = 0
    epoch: int = 0
    ends_epoch: bool = False


@dataclass
class Schedule:
    """Says yes at chosen moments, and once per set of weights.

    Args:
        every_n_epochs: at the end of every n-th epoch; None: of none.
        epochs: at the end of exactly these epochs, counted from 0, in place of ``every_n_epochs``.
        every_n_train_steps: in addition, after every n-th optimizer step.
    """

    every_n_epochs: int | None = 1
    epochs: Collection[int] | None = None
    every_n_train_steps: int | None = None
    last_step: int | None = field(default=None, init=False)
    place: Place = field(default=Place(), init=False)

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_train_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1, or None.")
        if self.epochs is not None and any(not isinstance(e, int) or e < 0 for e in self.epochs):
            raise ConfigurationError(f"epochs={self.epochs!r} must be whole numbers, counted from 0.")

    def at_epoch_end(self, epoch: int, step: int) -> bool:
        """Whether to measure at the end of ``epoch`` (from 0), after ``step`` optimizer steps."""
        if self.epochs is not None:
            return epoch in self.epochs and self.is_new(step)
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0 and self.is_new(step)

    def after_step(self, step: int) -> bool:
        """Whether to measure after ``step`` optimizer steps, within an epoch."""
        return bool(self.every_n_train_steps) and step % (self.every_n_train_steps or 1) == 0 and self.is_new(step)

    def missed(self, step: int) -> bool:
        """Whether a run resumed after ``step`` optimizer steps has a measurement to make up for."""
        if step == 0:  # the one before training
            return self.is_new(0)
        due = self.after_step(step) or (self.place.ends_epoch and self.at_epoch_end(self.place.epoch, step))
        return self.place.step == step and due

    def is_new(self, step: int) -> bool:
        """Whether the weights after ``step`` optimizer steps have not been measured yet."""
        return step != self.last_step

    def restart(self) -> None:
        """Forget an earlier run."""
        self.last_step, self.place = None, Place()

    def done(self, step: int) -> None:
        """Take note of a measurement, made or failed, after ``step`` optimizer steps."""
        self.last_step = step


class Budget:
    """Keeps measuring within a share of the training time.

    With S the seconds spent measuring so far, L those of the last measurement and T the seconds of training so far
    (validation included, measuring not), a measurement is made where S + L ≤ max_overhead · T. The first one is always
    made: what it costs is not known. S, L and T are those of one fit; a resumed one begins anew.

    Args:
        max_overhead: largest S/T, in (0, 1]; None: whatever it costs.
        clock: in seconds.
    """

    def __init__(self, max_overhead: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        is_number = isinstance(max_overhead, (int, float)) and not isinstance(max_overhead, bool)
        if max_overhead is not None and not (is_number and 0 < max_overhead <= 1):
            raise ConfigurationError(
                f"max_overhead={max_overhead!r} must be a number above 0 and up to 1, the share of the training time "
                f"that may go into measuring (0.05 for a twentieth), or None for no limit."
            )
        self.max_overhead = max_overhead
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        """Forgets everything, for another run."""
        self.num_skipped = 0
        self._began: tuple[float, float] | None = None  # when training began, and what had been spent by then
        self._measuring_since: float | None = None
        self._spent = 0.0
        self._last: float | None = None

    def start(self) -> None:
        """Training begins now."""
        self._began = self.clock(), self._spent

    def allows(self) -> bool:
        """Whether a measurement may be made now."""
        if self.max_overhead is None or self._last is None:
            return True
        return self._spent + self._last <= self.max_overhead * self._training_time()

    def skip(self) -> str:
        """Counts a measurement that is not made, and says why in words."""
        self.num_skipped += 1
        return (
            f"it would take more than max_overhead={self.max_overhead} of the training time. More may be skipped: "
            f"hessian_cost/skipped counts them."
        )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What happens inside, drawing and writing included, is time spent measuring."""
        begin = self._measuring_since = self.clock()
        try:
            yield
        finally:
            self._last = self.clock() - begin
            self._spent += self._last
            self._measuring_since = None

    @property
    def overhead(self) -> float | None:
        """S/T now, what is being measured included; None before there was any training."""
        running = 0.0 if self._measuring_since is None else self.clock() - self._measuring_since
        trained = self._training_time()
        return (self._spent + running) / trained if trained > 0 else None

    @property
    def skipped(self) -> int | None:
        """How many measurements were skipped so far; None where there is no limit."""
        return None if self.max_overhead is None else self.num_skipped

    def _training_time(self) -> float:
        """T: up to now, or up to the beginning of the measurement that is being made."""
        if self._began is None:
            return 0.0
        began, spent_before = self._began
        until = self.clock() if self._measuring_since is None else self._measuring_since
        return until - began - (self._spent - spent_before)
