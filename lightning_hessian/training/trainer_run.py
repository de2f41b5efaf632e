"""One fit, validation or test of a Trainer, as a monitor sees it. Knows Trainers by their attributes only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.records.record import Record
from lightning_hessian.training.output import RunOutput
from lightning_hessian.training.places import Places, notice_of, places_of
from lightning_hessian.training.progress import MeasurementBar, line_beside
from lightning_hessian.training.run import MonitoringRun
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.sample_finder import SampleFinder
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.training.settings import MonitorSettings
from lightning_hessian.training.trainer_access import (
    logged_step,
    optimizer_steps,
    process_group,
    show_metrics,
    training_position,
)

NO_SAMPLES = (
    "its samples are the ones that are measured, and it has received no validation batch. Give samples=..., or every "
    "rank a validation batch."
)


class TrainerRun:
    """One fit, validation or test: its samples, and when they are measured.

    Every process calls the methods at the same points of the run, since some of them are collective.

    Args:
        settings: of the monitor.
        trainer: about to run; every method that needs it is given it again.
        warn: shows a warning on the first process.
        inform: shows a message there.
        before: the run that this validation or test follows, if any: of the same module, the same target is measured.

    Raises:
        ConfigurationError: the Trainer's strategy is not supported, or there are no samples to measure at.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        trainer: Any,
        *,
        warn: Callable[[str], object],
        inform: Callable[[str], object],
        before: TrainerRun | None = None,
    ) -> None:
        # For validate and test; during a fit, every batch updates it.
        trained = TrainingPosition(logged_step=logged_step(trainer), epoch=max(0, trainer.current_epoch - 1))
        known = () if before is None else before._output.notices
        self._run: MonitoringRun = MonitoringRun(
            settings, process_group(trainer), RunState(position=trained), warn=warn, inform=inform, known=known
        )
        self._module = weakref.ref(trainer.lightning_module)
        if before is not None and before._module() is self._module():
            self._state.target = before._state.target
        self._started_at: int | None = None  # optimizer steps, of a fit
        self._places: Places | None = None  # from the first measurement on
        self._finder = SampleFinder(settings, self._output.warn)
        self._samples_failure: Exception | None = None
        if settings.samples.given is not None:
            self._state.samples = self._run.group.on_first(self._finder.given)
        elif trainer.state.fn == "fit" and not trainer.enable_validation:
            raise ConfigurationError(
                "There are no samples to measure at: there is no validation loader with a validation_step (or "
                "limit_val_batches is 0), and no samples were given. Give samples=x, samples=(x, labels) or "
                "samples=dataset."
            )

    @property
    def _state(self) -> RunState:
        return self._run.state

    @property
    def _output(self) -> RunOutput:
        return self._run.output

    @property
    def last_record(self) -> Record | None:
        """Of the last measurement, without its whole matrices; on the first process."""
        return self._run.last_record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return self._run.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues the run whose checkpoint ``saved`` comes from."""
        self._run.load_state_dict(saved)

    def complete_checkpoint(self, trainer: Any, saved: dict[str, Any]) -> None:
        """Corrects the position where a callback saves before this batch was noted; waits for the records' files."""
        self._output.wait_for_files()
        if self._state.position.step != optimizer_steps(trainer):
            saved["position"] = asdict(training_position(trainer))

    def take_batch(self, trainer: Any, batch: Any, dataloader_idx: int) -> None:
        """Takes the samples from the first validation or test batch.

        Raises:
            ConfigurationError: the batch cannot be used with these settings, and no training step was made yet.
        """
        if self._state.samples is not None:
            return
        try:
            self._state.samples = self._finder.of_batch(trainer, batch, dataloader_idx)
            if self._state.samples is not None:
                self._samples_failure = None
        except Exception as error:
            if self._run.group.size == 1 and self._output.must_raise(error, before_training=self._is_before(trainer)):
                raise
            self._samples_failure = error  # raised at the next measurement, where all processes meet

    def start_fit(self, trainer: Any) -> bool:
        """Finds samples where no sanity check brought them.

        Returns:
            Whether a measurement is due: the one before training, or one that was due when a resumed run was killed.
        """
        step = self._started_at = optimizer_steps(trainer)
        try:
            self._state.samples = self._run.group.on_first(lambda: self._samples_before_training(trainer))
        except Exception as error:
            if self._output.must_raise(error, before_training=step == 0):
                raise
            self._samples_failure = error
        if self._state.samples is None and self._samples_failure is None:
            self._output.warn(
                "No measurement before training: no validation batch is available yet, and reading one would disturb "
                "its loader or run batch-transfer hooks once more. Give samples=... to measure before training too."
            )
            return False
        return self._run.settings.schedule.missed(step, self._state.position, self._state.measured_step)

    def start_clock(self) -> None:
        """The time of training counts from now on."""
        self._run.budget.start()

    def is_due_after_batch(self, trainer: Any) -> bool:
        """Notes the end of a batch, and says whether to measure."""
        self._state.position = training_position(trainer)
        return self._run.settings.schedule.after_step(self._state.position.step) and self.is_new(trainer)

    def is_due_after_epoch(self, trainer: Any) -> bool:
        """Whether to measure at the end of the current epoch."""
        return self._run.settings.schedule.after_epoch(trainer.current_epoch) and self.is_new(trainer)

    def is_new(self, trainer: Any) -> bool:
        """Whether the current weights have not been measured yet."""
        return self._state.measured_step != optimizer_steps(trainer)

    def measure(self, trainer: Any, module: Any, at_logged_step: int | None = None) -> None:
        """Measures and publishes, within the time budget; failures warn or raise, as ``on_error`` says.

        Collectives, on every rank in this order: the samples, the places (once), the budget, opening the loggers, those
        of ``measurement.measure``, publishing. A failure in one leaves out those after it, on all ranks.

        Args:
            trainer: of this run.
            module: what is measured.
            at_logged_step: the loggers' step of the record; by default that of the last batch.
        """
        at = self._position_of(trainer, at_logged_step)
        before_training = self._is_before(trainer)
        try:
            samples = self._state.samples = self._run.group.agreed(self._known_samples, NO_SAMPLES)
        except Exception as error:  # of a batch that came after training had begun, or of another process
            self._output.fail(error, at, before_training=before_training)
            return
        if samples is None:
            if trainer.state.fn != "fit":
                self._output.warn("No measurement: no batch came from the loader val_dataloader_idx. Give samples=...")
            return
        if self._places is None:
            self._places = places_of(trainer)
            if (notice := notice_of(self._places, trainer)) is not None:
                self._output.notice(notice)
        with MeasurementBar(partial(line_beside, trainer.progress_bar_callback)) as progress:
            published = self._run.measure(
                module,
                at,
                stage=trainer.state.fn.value,
                places=self._places,
                loggers=trainer.loggers,
                started_at=self._started_at,
                before_training=before_training,
                progress=progress,
            )
        if published is not None:
            show_metrics(published.metrics, trainer)

    def finish(self) -> None:
        """Ends a fit: waits until everything is written, where a failure warns or raises as ``on_error`` says.

        Says so if nothing was measured. Collective.
        """
        self._run.flush()
        if self._run.num_records == 0 and (self._output.failure is not None or self._state.samples is None):
            no_batch = "no validation batch came from the loader val_dataloader_idx. Give samples=..."
            self._output.warn(f"this fit ended without a single record. The reason: {self._output.failure or no_batch}")

    def close(self) -> None:
        """Ends writing, without raising."""
        self._run.close()

    def must_raise(self, error: Exception, trainer: Any) -> bool:
        """Whether what a hook raised ends the run: with several processes always, or they would part."""
        return self._run.group.size > 1 or self._output.must_raise(error, before_training=self._is_before(trainer))

    def survive(self, error: Exception) -> None:
        """Warns of what a hook raised, in place of raising it."""
        self._output.survive(error)

    def _is_before(self, trainer: Any) -> bool:
        """Whether no training would be lost by an exception."""
        return trainer.state.fn != "fit" or optimizer_steps(trainer) == 0

    def _position_of(self, trainer: Any, at_logged_step: int | None) -> TrainingPosition:
        step = self._state.position.logged_step if at_logged_step is None else at_logged_step
        return replace(self._state.position, step=optimizer_steps(trainer), logged_step=step)

    def _samples_before_training(self, trainer: Any) -> Samples | None:
        samples = self._known_samples()
        return self._finder.ahead(trainer) if samples is None else samples

    def _known_samples(self) -> Samples | None:
        if self._samples_failure is not None:
            raise self._samples_failure
        return self._state.samples
