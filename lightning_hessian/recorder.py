"""InputHessianRecorder: the measurements of ``InputHessianMonitor`` in any training loop."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

from lightning_hessian.errors import ConfigurationError, check_choice, warn, whole_number
from lightning_hessian.model.arguments import Model, Target
from lightning_hessian.records.locations import LogDir
from lightning_hessian.records.record import Record, Stage
from lightning_hessian.training.distributed import current_process_group
from lightning_hessian.training.places import Places
from lightning_hessian.training.progress import MeasurementBar, line_of_its_own, no_line
from lightning_hessian.training.run import MonitoringRun
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.sample_finder import SampleFinder
from lightning_hessian.training.schedule import Schedule, TrainingPosition
from lightning_hessian.training.settings import MonitorOptions, check_known, monitor_settings
from lightning_hessian.writers.loggers import EventFile

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

NEVER = Schedule(every_n_epochs=None)
logger = logging.getLogger("lightning_hessian")


class InputHessianRecorder:
    """Measures how curved chosen outputs are around fixed inputs, in a training loop of your own.

    It does what ``InputHessianMonitor`` does for a Lightning Trainer, whenever ``measure`` is called: the same
    measurement, which leaves model and random streams as they were, and the same event file, records, pictures, tab and
    report. It works with plain PyTorch, Fabric and the Hugging Face Trainer. Where torch.distributed is initialized,
    every process must make the same calls; the samples are divided among them.

    Args:
        log_dir: directory of the run, for its event file and records; not needed if you pass ``writer``.
        samples: a tensor ``[N, *shape]``, ``(x, labels)``, or a map-style dataset. If there are several processes, only
            the first one needs samples and writer.
        classes: as for ``InputHessianMonitor``.
        target: as for ``InputHessianMonitor``.
        writer: the ``SummaryWriter`` of that directory, if the loop already has one (with Fabric:
            ``fabric.logger.experiment``). It stays open.
        keep_earlier: whether to keep all records that an earlier run saved in this directory. By default, those from
            the step of the first measurement on are set aside, as for a run that starts over.
        progress_bar: whether measurements that take longer than a second show their progress on the terminal.
        options: all other arguments of ``InputHessianMonitor``, except those that say when to measure. For
            ``max_overhead``, all the time that the recorder exists and does not measure counts as training.

    Raises:
        ConfigurationError: an argument is invalid, or the samples cannot be used; the message says what to do.

    Cost: see ``input_spectrum``. A background thread writes files and draws pictures; ``close`` and the end of a
    ``with`` block wait for it.

    Example:
        >>> import tempfile, torch
        >>> from lightning_hessian import InputHessianRecorder, load_records
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> folder = tempfile.mkdtemp()
        >>> with InputHessianRecorder(folder, samples=torch.randn(3, 4), classes=[0, 1]) as recorder:
        ...     for step in (0, 100):
        ...         record = recorder.measure(model, step=step)
        >>> [record.step for record in load_records(folder)]
        [0, 100]
    """

    def __init__(
        self,
        log_dir: LogDir = None,
        samples: Any = None,
        classes: int | Sequence[int] | str = "label",
        target: Target | Literal["auto"] = "auto",
        *,
        writer: Any = None,
        keep_earlier: bool = False,
        progress_bar: bool = True,
        **options: Unpack[MonitorOptions],
    ) -> None:
        check_known("InputHessianRecorder", options, MonitorOptions)
        arguments = {**options, "samples": samples, "classes": classes, "target": target}
        settings = monitor_settings("InputHessianRecorder", NEVER, arguments)
        group = current_process_group()
        folder = group.on_first(lambda: _checked_folder(log_dir, writer, samples))
        warns, informs = (warn, logger.info) if group.rank == 0 else (_say_nothing, _say_nothing)
        finder = SampleFinder(settings, warns)
        state = RunState(group.on_first(finder.given))
        self._places = Places(folder, folder)
        self._event_file = EventFile(folder, writer)
        self._run = MonitoringRun(settings, group, state, warn=warns, inform=informs)
        if options.get("max_overhead") is not None:
            self._run.budget.start()
        self._keep_earlier = keep_earlier
        self._new_line = line_of_its_own if progress_bar and group.rank == 0 else no_line
        self._close_at_exit = weakref.finalize(self, _close, self._run, self._event_file)

    def measure(
        self,
        model: Model,
        step: SupportsIndex,
        *,
        epoch: SupportsIndex = 0,
        logged_step: SupportsIndex | None = None,
        stage: Stage = "fit",
    ) -> Record | None:
        """Measures the model as it is now. Collective where torch.distributed is initialized.

        Args:
            model: what to measure: the module itself, or as wrapped by DDP or Fabric.
            step: the number of training steps so far, as an int or a whole number of NumPy or torch.
            epoch: the current epoch, from 0.
            logged_step: the step at which TensorBoard shows it; by default ``step``.
            stage: ``"fit"``, or ``"validate"`` or ``"test"`` for a measurement that is not part of the training curve.

        Returns:
            The record; None if the measurement failed or was skipped, and on processes other than the first.

        Raises:
            ConfigurationError: the arguments do not fit the model; only at the first measurement.
            Exception: anything else with ``on_error="raise"``.
        """
        if not self._close_at_exit.alive:
            raise ConfigurationError("This recorder is closed: make a new one, with keep_earlier=True to go on.")
        check_choice("stage", stage, get_args(Stage))
        step, epoch = whole_number("step", step, 0), whole_number("epoch", epoch, 0)
        logged_step = step if logged_step is None else whole_number("logged_step", logged_step, 0)
        started_at = sys.maxsize if self._keep_earlier else step
        with MeasurementBar(self._new_line) as progress:
            published = self._run.measure(
                model,
                TrainingPosition(step, logged_step, epoch),
                places=self._places,
                loggers=[self._event_file],
                started_at=started_at if stage == "fit" else None,
                before_training=self._run.num_records == 0,
                stage=stage,
                progress=progress,
            )
        return None if published is None else published.record

    @property
    def last_record(self) -> Record | None:
        """The last measurement, without its whole matrices, which the record that ``measure`` returns has.

        None before the first measurement, and on processes other than the first.
        """
        return self._run.last_record

    def state_dict(self) -> dict[str, Any]:
        """The samples and what keeps curves comparable, for a checkpoint: tensors and plain values."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = False) -> None:
        """Continues from a checkpoint.

        Raises:
            ConfigurationError: with ``strict``, if it had different settings or samples; otherwise these warn.
        """
        self._run.load_state_dict(state_dict, strict=strict)

    def flush(self) -> None:
        """Waits until everything is written. Failures to write warn or raise, depending on ``on_error``."""
        try:
            self._run.flush()
        finally:
            self._event_file.flush()

    def close(self) -> None:
        """Writes what is left and ends. Called at the end of the program if you do not call it."""
        self._close_at_exit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _checked_folder(log_dir: LogDir, writer: Any, samples: Any) -> str:
    """The directory of the run. Of several processes only the first one needs these, and may be alone to have them."""
    if log_dir is None and writer is None:
        raise ConfigurationError("Give log_dir, the directory of the run, or writer, its SummaryWriter.")
    if writer is not None and not hasattr(writer, "add_scalar"):
        raise ConfigurationError(f"writer={writer!r} is no SummaryWriter. Of a logger, give logger.experiment.")
    if samples is None:
        raise ConfigurationError("Give samples=x, samples=(x, labels) or samples=dataset.")
    return os.fspath(writer.log_dir if log_dir is None else log_dir)


def _close(run: MonitoringRun, event_file: EventFile) -> None:
    run.close()
    try:
        event_file.close()
    except Exception as error:  # a full disk; what ends the loop is another matter
        warn(f"InputHessianRecorder: closing the event file failed ({type(error).__name__}: {error}).")


def _say_nothing(message: str) -> None:
    """On processes other than the first."""
