"""When to measure: before training, at chosen epochs or steps, and at the end. Knows no torch."""

from __future__ import annotations

from collections.abc import Collection
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
