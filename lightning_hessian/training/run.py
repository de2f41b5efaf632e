"""The measurements of one run: what they have in common, what they cost, and where they go. Knows no Trainer."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lightning_hessian.curvature.meter import Progress, silent
from lightning_hessian.errors import WritingError
from lightning_hessian.model.arguments import Model
from lightning_hessian.model.isolation import frozen_random_streams
from lightning_hessian.model.state_snapshot import unchanged
from lightning_hessian.records.files import record_path
from lightning_hessian.records.locations import absolute
from lightning_hessian.records.record import Record, Stage
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.output import RunOutput
from lightning_hessian.training.places import Places, RecordFolder, where_to_look
from lightning_hessian.training.resume import explain_restored, from_state, to_state
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.schedule import Budget, TrainingPosition
from lightning_hessian.training.settings import MonitorSettings

NO_MATRIX = "last_record keeps none; the saved record, which load_records returns, may."


@dataclass(frozen=True)
class Published:
    """A measurement that was made and written.

    Attributes:
        record: on rank 0; None on the others.
        metrics: its scalars by tag, on all ranks.
    """

    record: Record | None
    metrics: Mapping[str, float]


class MonitoringRun:
    """One run that measures, publishes and survives what goes wrong; a Trainer's or any other.

    Every process of the group calls the methods at the same points of the run, since some of them are collective.

    Args:
        settings: of the monitor or recorder.
        group: the processes.
        state: of the run, with its samples from the first measurement on.
        warn: shows a warning on the first process.
        inform: shows a message there.
        known: warnings that need no repetition.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        group: ProcessGroup,
        state: RunState,
        *,
        warn: Callable[[str], object],
        inform: Callable[[str], object],
        known: Collection[str] = (),
    ) -> None:
        self.settings = settings
        self.group = group
        self.state = state
        self.output: RunOutput = RunOutput(settings, warn, inform, known)
        self.budget = Budget(settings.max_overhead)
        self.num_records = 0
        self.last_record: Record | None = None  # without its whole matrices; on rank 0
        self._folder = RecordFolder(settings.measurement.name)
        self._saved_in = ""  # from the first record on
        self._is_claimed = self._is_claimed_for_fit = False
        self._samples_restored = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return to_state(self.state, self.settings)

    def load_state_dict(self, saved: Mapping[str, Any], *, strict: bool = False) -> None:
        """Continues the run whose checkpoint ``saved`` comes from.

        Raises:
            ConfigurationError: with ``strict``, it had other settings or samples; otherwise that is warned of.
        """
        given = None if self.settings.samples.given is None else self.state.samples
        try:
            self.state, warning = from_state(saved, self.settings, given, strict=strict)
        except Exception as error:  # of a damaged checkpoint
            if strict:
                raise
            self.state = RunState(given)
            warning = f"the checkpoint's state cannot be read ({type(error).__name__}: {error}), and was reset."
        self._samples_restored = given is None and self.state.samples is not None
        if warning is not None:
            self.output.warn(warning)

    def measure(
        self,
        model: Model,
        at: TrainingPosition,
        *,
        places: Places,
        loggers: Sequence[Any],
        started_at: int | None,
        before_training: bool,
        stage: Stage = "fit",
        progress: Progress = silent,
    ) -> Published | None:
        """Measures and publishes, within the time budget; failures warn or raise, as ``on_error`` says.

        Collectives, on every rank in this order: the budget, opening the loggers, those of ``measurement.measure``,
        publishing. A failure in one leaves out those after it, on all ranks.

        Args:
            model: what is measured.
            at: where training is.
            places: where records go.
            loggers: that get them.
            started_at: the step at which this run began, from which on it replaces what an earlier one has saved;
                None: it replaces nothing.
            before_training: whether wrong settings may still raise.
            stage: what the model is doing.
            progress: of the measurement.

        Returns:
            None where it was skipped or failed.
        """
        samples = self.state.samples
        assert samples is not None
        if not self.group.on_first(self.budget.allows):
            self.output.skip(self.budget.skip(), self.budget.num_skipped, at)
            self.state.measured_step = at.step
            return None
        published = None
        name = self.settings.measurement.name
        try:
            with self.budget.measuring(), self._undisturbed():
                self.group.on_first(lambda: self.output.open(loggers))
                record = measure(
                    model,
                    samples,
                    self.settings.measurement,
                    self.state,
                    position=at,
                    stage=stage,
                    group=self.group,
                    progress=progress,
                    expect=lambda expected: self.output.expect(expected, where_to_look(places, loggers, name)),
                )
                self.num_records += 1
                if record is not None:
                    record = replace(record, overhead=self.budget.overhead, skipped=self.budget.skipped)
                metrics, unwritten = self.group.on_first(lambda: self._publish(record, places, started_at))
        except Exception as error:  # a user's model may fail in any way; training goes on
            untried = self._samples_restored and self.num_records == 0
            self.output.fail(explain_restored(error) if untried else error, at, before_training=before_training)
            _clear_frames(error)
        else:
            published = Published(record, metrics)
            if record is not None:
                self.last_record = replace(record, hessian=None, why_no_matrix=NO_MATRIX)
            self.output.report(unwritten)
        self.output.advise(self.budget)
        self.state.measured_step = at.step  # only now: a checkpoint saved meanwhile must not call it measured
        return published

    def flush(self) -> None:
        """Waits until everything is written, where a failure warns or raises as ``on_error`` says. Collective."""
        self.output.report(self.group.on_first(self.output.flush))

    def close(self) -> None:
        """Ends writing, without raising."""
        self.output.close()
        self._folder.release()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Restores what the user's functions and loggers may write to or draw from; ``measure`` isolates the model."""
        wanted = self.settings.measurement
        with frozen_random_streams(), unchanged(wanted.forward_fn, wanted.output_fn, wanted.target):
            yield

    def _publish(
        self, record: Record | None, places: Places, started_at: int | None
    ) -> tuple[dict[str, float], list[WritingError]]:
        """Runs on the first process, which has the record."""
        assert record is not None
        if not self._is_claimed or (started_at is not None and not self._is_claimed_for_fit):
            # Only now: an earlier run's records are superseded by a record, not by an attempt.
            self._saved_in, warnings = self._folder.claim(places, started_at)
            self.output.save_in(self._saved_in)
            self._is_claimed, self._is_claimed_for_fit = True, started_at is not None
            for warning in warnings:
                self.output.warn(warning)
        published = self.output.publish(record)
        self.state.record_path = absolute(record_path(record, self._saved_in))
        return published


def _clear_frames(error: BaseException | None) -> None:
    """Frees what a failed forward had computed now, and not at the next garbage collection.

    Frames in the traceback of an error may refer to it in turn: those of ``ExitStack`` do, and those of generators from
    Python 3.12 on.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
