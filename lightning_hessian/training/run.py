"""One run of a Trainer, as a monitor sees it. Knows Trainers by their attributes; imports no Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from lightning_hessian.curvature.meter import duration
from lightning_hessian.errors import ConfigurationError, WritingError
from lightning_hessian.records.files import record_path, set_superseded_aside
from lightning_hessian.records.record import Record
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.output import RunOutput
from lightning_hessian.training.progress import MeasurementBar
from lightning_hessian.training.resume import explain_restored, from_state, to_state
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import Budget, TrainingPosition
from lightning_hessian.training.settings import MonitorSettings
from lightning_hessian.training.trainer_access import (
    chosen_batch,
    first_validation_batch,
    log_folder,
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
    ) -> None:
        self._settings = settings
        self._output = RunOutput(settings, warn, inform)
        self._group = process_group(trainer)
        self._budget = Budget(settings.max_overhead)
        # For validate and test; during a fit, every batch updates it.
        trained = TrainingPosition(logged_step=logged_step(trainer), epoch=max(0, trainer.current_epoch - 1))
        self._state = RunState(position=trained)
        self._num_records = 0
        self._started_at: int | None = None  # optimizer steps, of a fit
        self._samples_failure: Exception | None = None
        self._samples_restored = False
        if settings.samples.given is not None:
            self._state.samples = self._group.on_first(
                lambda: self._select(settings.samples.select, settings.samples.given)
            )
        elif trainer.state.fn == "fit" and not trainer.enable_validation:
            raise ConfigurationError(
                "There are no samples to measure at: there is no validation loader with a validation_step (or "
                "limit_val_batches is 0), and no samples were given. Give samples=x, samples=(x, labels) or "
                "samples=dataset."
            )
        if trainer.fast_dev_run:
            self._output.warn("fast_dev_run: measurements are made to test them, but nothing is saved or drawn.")
        elif not tensorboard_loggers(trainer.loggers) + picture_loggers(trainer.loggers):
            self._output.warn(
                "No TensorBoard logger: scalars go to the other loggers and records to files, but there are no "
                "pictures. Give Trainer(logger=TensorBoardLogger(...)) to see them."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return to_state(self._state, self._settings)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues the run whose checkpoint ``saved`` comes from."""
        given = None if self._settings.samples.given is None else self._state.samples
        self._state, warning = from_state(saved, self._settings, given)
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
            Exception: the batch cannot be used, and no training step was made yet.
        """
        if self._state.samples is not None:
            return
        try:
            chosen = chosen_batch(trainer, batch, dataloader_idx, self._settings.samples.val_dataloader_idx)
            if chosen is not None:
                self._state.samples, self._samples_failure = (
                    self._select(self._settings.samples.select_from_batch, chosen),
                    None,
                )
        except Exception as error:
            if self._group.size == 1 and optimizer_steps(trainer) == 0:
                raise
            self._samples_failure = error  # raised at the next measurement, where all processes meet

    def start_fit(self, trainer: Any, module: Any) -> bool:
        """Finds samples where no sanity check brought them.

        Returns:
            Whether a measurement is due: the one before training, or one that was due when a resumed run was killed.
        """
        step = self._started_at = optimizer_steps(trainer)
        self._state.samples = self._group.on_first(lambda: self._samples_before_training(trainer, module))
        if self._state.samples is None:
            self._output.warn(
                "No measurement before training: no validation batch is available yet, and reading one would disturb "
                "its loader. Give samples=... to measure before training too."
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

        Collectives, on every rank in this order: the samples, the log folder, the budget, opening the loggers, those of
        ``measurement.measure``, publishing. A failure in one leaves out those after it, on all ranks.

        Args:
            trainer: of this run.
            module: what is measured.
            at_logged_step: the loggers' step of the record; by default that of the last batch.
        """
        at = self._position_of(trainer, at_logged_step)
        before_training = at.step == 0 or trainer.state.fn != "fit"
        try:
            samples = self._state.samples = self._group.agreed(self._known_samples, NO_SAMPLES)
        except Exception as error:  # of a batch that came after training had begun, or of another process
            self._output.fail(error, at, before_training=before_training)
            return
        if samples is None:
            if trainer.state.fn != "fit":
                self._output.warn("No measurement: no batch came from the loader val_dataloader_idx. Give samples=...")
            return
        folder = log_folder(trainer)
        if not self._group.on_first(self._budget.allows):
            self._output.skip(self._budget.skip(), self._budget.num_skipped, at)
            self._state.measured_step = at.step
            return
        if self._num_records == 0:
            self._output.inform(f"measuring {len(samples)} samples, now and at later steps of the run.")
        try:
            with self._budget.measuring():
                self._group.on_first(lambda: self._output.open(trainer.loggers, folder))
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
                metrics, unwritten = self._group.on_first(lambda: self._publish(record, folder))
        except Exception as error:  # a user's model may fail in any way; training goes on
            untried = self._samples_restored and self._num_records == 0
            self._output.fail(explain_restored(error) if untried else error, at, before_training=before_training)
        else:
            _show(metrics, trainer)
            self._output.report(unwritten)
        self._output.advise(self._budget)
        self._state.measured_step = at.step  # only now: a checkpoint saved meanwhile must not call it measured

    def finish(self) -> None:
        """Waits until everything is written; a failure warns or raises, as ``on_error`` says. Collective."""
        self._output.report(self._group.on_first(self._output.flush))

    def close(self) -> None:
        """Ends writing, without raising."""
        self._output.close()

    def _position_of(self, trainer: Any, at_logged_step: int | None) -> TrainingPosition:
        step = self._state.position.logged_step if at_logged_step is None else at_logged_step
        return replace(self._state.position, step=optimizer_steps(trainer), logged_step=step)

    def _publish(self, record: Record | None, folder: str | None) -> tuple[dict[str, float], list[WritingError]]:
        """Runs on the first process, which has the record."""
        assert record is not None
        if self._num_records == 1:
            self._output.inform(
                f"method {record.method} ({record.reason}); the first measurement took {duration(record.seconds)}."
            )
            if folder is not None and self._started_at is not None:
                # Only now: an earlier run's records are superseded by a record, not by an attempt.
                warning = set_superseded_aside(folder, self._settings.measurement.name, self._started_at)
                if warning is not None:
                    self._output.warn(warning)
        record = replace(record, overhead=self._budget.overhead, skipped=self._budget.skipped)
        published = self._output.publish(record)
        self._state.record_path = None if folder is None else record_path(record, os.path.abspath(folder))
        return published

    def _samples_before_training(self, trainer: Any, module: Any) -> Samples | None:
        samples = self._known_samples()
        if samples is not None:
            return samples
        batch = first_validation_batch(trainer, module, self._settings.samples.val_dataloader_idx)
        return None if batch is None else self._select(self._settings.samples.select_from_batch, batch)

    def _known_samples(self) -> Samples | None:
        if self._samples_failure is not None:
            raise self._samples_failure
        return self._state.samples

    def _select(self, select: Callable[[Any], Samples], source: Any) -> Samples:
        wanted = self._settings.samples
        samples = select(source)
        self._settings.measurement.check_samples(samples)
        if wanted.sample_indices is None and len(samples) < wanted.num_samples:
            self._output.warn(
                f"num_samples={wanted.num_samples}, but the batch or dataset has only {len(samples)}; all of them are "
                f"measured. Give samples=... for more."
            )
        return samples


def _show(metrics: Mapping[str, float], trainer: Any) -> None:
    """Gives the scalars to callbacks that watch metrics, such as early stopping."""
    device = trainer.strategy.root_device
    watched = {k: torch.tensor(v, device=device) for k, v in metrics.items() if not k.startswith(SPREAD)}
    trainer.callback_metrics.update(watched)
