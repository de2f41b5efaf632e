"""The measurements of one run of a Trainer: made by all processes together, published by the first, failures told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from lightning_hessian.errors import ConfigurationError, WritingError
from lightning_hessian.records.files import set_superseded_aside
from lightning_hessian.records.retention import KeepMatrices
from lightning_hessian.training.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_hessian.training.measurement import Monitor
from lightning_hessian.training.progress import MeasurementBar
from lightning_hessian.training.resume import at_restored
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import Budget
from lightning_hessian.training.trainer_access import log_folder, steps
from lightning_hessian.writers.publisher import Publisher
from lightning_hessian.writers.scalars import SPREAD


class Visits:
    """Measures when it is told to, and sees to what follows from it. Knows Trainers by what they have.

    Every process calls ``visit`` at the same places, and asks ``ranks`` in the same order there: nothing before it
    may return early on one process alone.

    Args:
        monitor: what is measured.
        budget: what it may cost.
        keep_matrices: which whole matrices saved files hold; None: none.
        on_error: whether failures are warned of or raised.
        warn: tells a warning on the first process.
        inform: tells a piece of news there.
    """

    def __init__(
        self,
        monitor: Monitor,
        budget: Budget,
        *,
        keep_matrices: KeepMatrices | None,
        on_error: Literal["warn", "raise"],
        warn: Callable[[str], object],
        inform: Callable[[str], object],
    ) -> None:
        self.ranks: ProcessGroup = SINGLE_PROCESS
        self._monitor = monitor
        self._budget = budget
        self._keep_matrices = keep_matrices
        self._on_error = on_error
        self._tell_warning, self._inform = warn, inform
        self._publisher: Publisher | None = None  # on the first process, while a run lasts
        self._num_records = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_publisher": None}  # it belongs to a run, not to the monitor

    def restart(self, ranks: ProcessGroup) -> None:
        """Makes ready for a new run."""
        self.ranks, self._num_records = ranks, 0
        self._budget.restart()

    def begin(self, trainer: Any) -> None:
        """Begins a session of a fit, whose files tell which run they are of."""
        folder = log_folder(trainer)
        if self.ranks.rank == 0:
            set_superseded_aside(folder, self._monitor.name, steps(trainer))

    def visit(
        self, trainer: Any, module: Any, samples: Samples, *, logged_step: int, epoch: int, restored: bool
    ) -> None:
        """One measurement, unless the first process, whose clock counts, finds that it would cost too much.

        Raises:
            ConfigurationError: what was asked for cannot be measured, and no training step was made yet.
            Exception: a failure, where ``on_error`` is ``"raise"``.
        """
        folder = log_folder(trainer)
        if not self.ranks.first(self._budget.allows):
            self._skip(steps(trainer), logged_step)
            return
        try:
            with self._budget.measuring():
                metrics, unwritten = self._measure(trainer, module, samples, folder, logged_step, epoch)
        except Exception as error:  # a user's model may fail in any way; the run goes on
            untried = restored and self._num_records == 0
            self.fail(at_restored(error) if untried else error, trainer, logged_step)
            return
        device = trainer.strategy.root_device
        watched = {k: torch.tensor(v, device=device) for k, v in metrics.items() if not k.startswith(SPREAD)}
        trainer.callback_metrics.update(watched)
        self.tell(unwritten)

    def _measure(
        self, trainer: Any, module: Any, samples: Samples, folder: str | None, logged_step: int, epoch: int
    ) -> tuple[dict[str, float], list[WritingError]]:
        """Measures and, on the first process, publishes; gives the scalars, and what could not be written."""
        first = self._num_records == 0
        if first:
            self._inform(f"{self._monitor.title}: measuring {len(samples)} samples, now and then during the run.")
        self.ranks.first(lambda: self._open(trainer, folder))
        with MeasurementBar(trainer.progress_bar_callback) as bar:
            record = self._monitor.measure(
                module,
                samples,
                step=steps(trainer),
                logged_step=logged_step,
                epoch=epoch,
                stage=trainer.state.fn.value,
                group=self.ranks,
                progress=bar,
            )
        self._num_records += 1

        def write() -> tuple[dict[str, float], list[WritingError]]:
            assert record is not None  # on the first process it is not
            assert self._publisher is not None
            if first:
                self._inform(
                    f"{self._monitor.title}: method {record.method} ({record.reason}); the first measurement took "
                    f"{record.seconds:.2g} s."
                )
            costly = replace(record, overhead=self._budget.overhead, skipped=self._budget.skipped)
            metrics = self._publisher.publish(costly)
            return metrics, self.flush() if self._on_error == "raise" else self._publisher.faults()

        return self.ranks.first(write)

    def _open(self, trainer: Any, folder: str | None) -> None:
        if self._publisher is None:
            self._publisher = Publisher(
                trainer.loggers, folder, keep_matrices=self._keep_matrices, name=self._monitor.name
            )

    def _skip(self, step: int, logged_step: int) -> None:
        """Tells that a measurement is missing because of its price."""
        reason = self._budget.skip()
        self.warn(f"no measurement at step {step}: {reason}", key=reason)
        if self._publisher is not None:
            self._publisher.publish_skip(self._budget.num_skipped, logged_step)

    def fail(self, error: Exception, trainer: Any, logged_step: int) -> None:
        """Raises what must be mended before training, and what ``on_error`` asks for; tells about the rest."""
        early = steps(trainer) == 0 or trainer.state.fn != "fit"
        if self._on_error == "raise" or (early and isinstance(error, ConfigurationError)):
            raise error
        self.warn(
            f"no measurement at step {steps(trainer)}, and the run goes on. {type(error).__name__}: {error}",
            key=str(error),
        )
        if self._publisher is not None:
            self._publisher.publish_failure(str(error), logged_step)

    def wait_for_files(self) -> None:
        """Waits until the files of what was measured are written."""
        if self._publisher is not None:
            self._publisher.wait_for_files()

    def flush(self) -> list[WritingError]:
        """Waits until everything is written; gives what could not be."""
        if self._publisher is None:
            return []
        self._publisher.flush()
        return self._publisher.faults()

    def close(self) -> None:
        """Ends writing without raising: training has ended, or is ending for a reason of its own."""
        for error in self.flush():
            self.warn(str(error), key=error.cause)
        self._publisher = None

    def tell(self, unwritten: list[WritingError]) -> None:
        """Raises what could not be saved or shown, or warns of it, as ``on_error`` asks for."""
        for error in unwritten:
            if self._on_error == "raise":
                raise error
            self.warn(f"{error} The run goes on.", key=error.cause)

    def warn(self, message: str, key: str | None = None) -> None:
        """Warns on the first process, once per cause, whatever the numbers in it."""
        cause = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", key or message)
        if cause not in self._warned:
            self._warned.add(cause)
            self._tell_warning(f"{self._monitor.title}: {message}")
