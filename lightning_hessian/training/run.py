"""One run of a Trainer, as a monitor sees it. Knows Trainers by their attributes; imports no Lightning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from lightning_hessian.curvature.meter import duration
from lightning_hessian.errors import ConfigurationError, MeasurementError, WritingError
from lightning_hessian.model.isolation import frozen_random_streams
from lightning_hessian.model.state_snapshot import unchanged
from lightning_hessian.records.files import record_path
from lightning_hessian.records.locations import absolute
from lightning_hessian.records.record import Record
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.output import RunOutput
from lightning_hessian.training.places import Places, RecordFolder, places, writes_files
from lightning_hessian.training.progress import MeasurementBar
from lightning_hessian.training.resume import explain_restored, from_state, to_state
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.sample_finder import SampleFinder
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import Budget, TrainingPosition
from lightning_hessian.training.settings import MonitorSettings
from lightning_hessian.training.trainer_access import (
    logged_step,
    optimizer_steps,
    process_group,
    training_position,
)
from lightning_hessian.writers.loggers import picture_loggers, tensorboard_loggers
from lightning_hessian.writers.tags import SPREAD

NO_SAMPLES = (
    "its samples are the ones that are measured, and it has received no validation batch. Give samples=..., or every "
    "rank a validation batch."
)


class MonitoringRun:
    """One fit, validation or test: its samples, when and what was measured, and its output.

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
        before: MonitoringRun | None = None,
    ) -> None:
        self._settings = settings
        self._output: RunOutput = RunOutput(
            settings, warn, inform, known=() if before is None else before._output.notices
        )
        self._group = process_group(trainer)
        self._budget = Budget(settings.max_overhead)
        # For validate and test; during a fit, every batch updates it.
        trained = TrainingPosition(logged_step=logged_step(trainer), epoch=max(0, trainer.current_epoch - 1))
        self._state = RunState(position=trained)
        self._module = weakref.ref(trainer.lightning_module)
        if before is not None and before._module() is self._module():
            self._state.target = before._state.target
        self._num_records = 0
        self._started_at: int | None = None  # optimizer steps, of a fit
        self._places: Places | None = None  # from the first measurement on
        self._folder = RecordFolder(settings.measurement.name)
        self._finder = SampleFinder(settings, self._output.warn)
        self._samples_failure: Exception | None = None
        self._samples_restored = False
        if settings.samples.given is not None:
            self._state.samples = self._group.on_first(self._finder.given)
        elif trainer.state.fn == "fit" and not trainer.enable_validation:
            raise ConfigurationError(
                "There are no samples to measure at: there is no validation loader with a validation_step (or "
                "limit_val_batches is 0), and no samples were given. Give samples=x, samples=(x, labels) or "
                "samples=dataset."
            )
        if trainer.fast_dev_run:
            self._output.notice("fast_dev_run: measurements are made to test them, but nothing is saved or drawn.")
        elif not writes_files(trainer):
            self._output.notice(
                "Without a logger or a default_root_dir, Lightning writes no files, and nothing is saved or drawn here "
                "either: load_records(trainer.log_dir) returns the records until this process ends. Give "
                "Trainer(logger=TensorBoardLogger(...)) to keep them."
            )
        elif not tensorboard_loggers(trainer.loggers) + picture_loggers(trainer.loggers):
            self._output.notice(
                "No TensorBoard logger: scalars go to the other loggers and records to files, but there are no "
                "pictures. Give Trainer(logger=TensorBoardLogger(...)) to see them."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return to_state(self._state, self._settings)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues the run whose checkpoint ``saved`` comes from."""
        given = None if self._settings.samples.given is None else self._state.samples
        try:
            self._state, warning = from_state(saved, self._settings, given)
        except Exception as error:  # of a damaged checkpoint
            self._state = RunState(given)
            warning = f"the checkpoint's state cannot be read ({type(error).__name__}: {error}), and was reset."
        self._samples_restored = given is None and self._state.samples is not None
        if warning is not None:
            self._output.warn(warning)

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
            if self._group.size == 1 and self._output.must_raise(error, before_training=self._is_before(trainer)):
                raise
            self._samples_failure = error  # raised at the next measurement, where all processes meet

    def start_fit(self, trainer: Any) -> bool:
        """Finds samples where no sanity check brought them.

        Returns:
            Whether a measurement is due: the one before training, or one that was due when a resumed run was killed.
        """
        step = self._started_at = optimizer_steps(trainer)
        try:
            self._state.samples = self._group.on_first(lambda: self._samples_before_training(trainer))
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
        return self._settings.schedule.missed(step, self._state.position, self._state.measured_step)

    def start_clock(self) -> None:
        """The time of training counts from now on."""
        self._budget.start()

    def is_due_after_batch(self, trainer: Any) -> bool:
        """Notes the end of a batch, and says whether to measure."""
        self._state.position = training_position(trainer)
        return self._settings.schedule.after_step(self._state.position.step) and self.is_new(trainer)

    def is_due_after_epoch(self, trainer: Any) -> bool:
        """Whether to measure at the end of the current epoch."""
        return self._settings.schedule.after_epoch(trainer.current_epoch) and self.is_new(trainer)

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
            samples = self._state.samples = self._group.agreed(self._known_samples, NO_SAMPLES)
        except Exception as error:  # of a batch that came after training had begun, or of another process
            self._output.fail(error, at, before_training=before_training)
            return
        if samples is None:
            if trainer.state.fn != "fit":
                self._output.warn("No measurement: no batch came from the loader val_dataloader_idx. Give samples=...")
            return
        self._places = self._places or places(trainer)
        if not self._group.on_first(self._budget.allows):
            self._output.skip(self._budget.skip(), self._budget.num_skipped, at)
            self._state.measured_step = at.step
            return
        if self._num_records == 0:
            self._output.inform(f"measuring {len(samples)} samples, now and at later steps of the run.")
        try:
            with self._budget.measuring(), self._undisturbed():
                _check_initialized(module)
                self._group.on_first(lambda: self._output.open(trainer.loggers))
                with MeasurementBar(trainer.progress_bar_callback) as progress:
                    record = measure(
                        module,
                        samples,
                        self._settings.measurement,
                        self._state,
                        position=at,
                        stage=trainer.state.fn.value,
                        group=self._group,
                        progress=progress,
                        expect=self._output.expect,
                    )
                self._num_records += 1
                metrics, unwritten = self._group.on_first(lambda: self._publish(record))
        except Exception as error:  # a user's model may fail in any way; training goes on
            untried = self._samples_restored and self._num_records == 0
            self._output.fail(explain_restored(error) if untried else error, at, before_training=before_training)
        else:
            _show(metrics, trainer)
            self._output.report(unwritten)
        self._output.advise(self._budget)
        self._state.measured_step = at.step  # only now: a checkpoint saved meanwhile must not call it measured

    def finish(self) -> None:
        """Ends a fit: waits until everything is written, where a failure warns or raises as ``on_error`` says.

        Says so if nothing was measured. Collective.
        """
        self._output.report(self._group.on_first(self._output.flush))
        if self._num_records == 0 and (self._output.failure is not None or self._state.samples is None):
            no_batch = "no validation batch came from the loader val_dataloader_idx. Give samples=..."
            self._output.warn(f"this fit ended without a single record. The reason: {self._output.failure or no_batch}")

    def close(self) -> None:
        """Ends writing, without raising."""
        self._output.close()
        self._folder.release()

    def must_raise(self, error: Exception, trainer: Any) -> bool:
        """Whether what a hook raised ends the run: with several processes always, or they would part."""
        return self._group.size > 1 or self._output.must_raise(error, before_training=self._is_before(trainer))

    def survive(self, error: Exception) -> None:
        """Warns of what a hook raised, in place of raising it."""
        self._output.failure = f"{type(error).__name__}: {error}"
        self._output.warn(f"an unexpected failure, and the run continues. {self._output.failure}")

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Restores what the user's functions and loggers may write to or draw from; ``measure`` isolates the model."""
        wanted = self._settings.measurement
        with frozen_random_streams(), unchanged(wanted.forward_fn, wanted.output_fn, wanted.target):
            yield

    def _is_before(self, trainer: Any) -> bool:
        """Whether no training would be lost by an exception."""
        return trainer.state.fn != "fit" or optimizer_steps(trainer) == 0

    def _position_of(self, trainer: Any, at_logged_step: int | None) -> TrainingPosition:
        step = self._state.position.logged_step if at_logged_step is None else at_logged_step
        return replace(self._state.position, step=optimizer_steps(trainer), logged_step=step)

    def _publish(self, record: Record | None) -> tuple[dict[str, float], list[WritingError]]:
        """Runs on the first process, which has the record."""
        assert record is not None
        assert self._places is not None
        if self._num_records == 1:
            self._output.inform(
                f"method {record.method} ({record.reason}); the first measurement took {duration(record.seconds)}."
            )
            # Only now: an earlier run's records are superseded by a record, not by an attempt.
            folder, warnings = self._folder.claim(self._places, self._started_at)
            self._places = replace(self._places, folder=folder)
            self._output.save_in(folder)
            for warning in warnings:
                self._output.warn(warning)
        record = replace(record, overhead=self._budget.overhead, skipped=self._budget.skipped)
        published = self._output.publish(record)
        self._state.record_path = absolute(record_path(record, self._places.folder))
        return published

    def _samples_before_training(self, trainer: Any) -> Samples | None:
        samples = self._known_samples()
        return self._finder.ahead(trainer) if samples is None else samples

    def _known_samples(self) -> Samples | None:
        if self._samples_failure is not None:
            raise self._samples_failure
        return self._state.samples


def _check_initialized(module: Any) -> None:
    """Raises where parameters have no values: a first forward pass would make them, or they are elsewhere."""
    lazy = [name for name, parameter in module.named_parameters() if torch.nn.parameter.is_lazy(parameter)]
    if lazy:
        raise MeasurementError(
            f"The model's lazy layers have no parameters yet ({_some(lazy)}). The first training step makes them; to "
            f"measure before it, run one forward pass in configure_model or keep the sanity check "
            f"(num_sanity_val_steps)."
        )
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise MeasurementError(
            f"The model's parameters are on the meta device at this point and have no values ({_some(empty)}). Measure "
            f"where they are on a real device: choose epochs, every_n_epochs or every_n_train_steps."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if names[3:] else ''}"


def _show(metrics: Mapping[str, float], trainer: Any) -> None:
    """Gives the scalars to callbacks that watch metrics, such as early stopping."""
    device = trainer.strategy.root_device
    watched = {k: torch.tensor(v, device=device) for k, v in metrics.items() if not k.startswith(SPREAD)}
    trainer.callback_metrics.update(watched)
