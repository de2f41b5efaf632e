"""Measurements of saved checkpoints, in a process of their own: ``lightning-hessian measure``."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.meter import duration
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.recorder import InputHessianRecorder
from lightning_hessian.records.event_format import FOLDER
from lightning_hessian.records.files import FILE_NAME
from lightning_hessian.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    ModelSource,
    find_checkpoints,
    number_in_name,
    read_checkpoint,
)
from lightning_hessian.training.sample_files import read_samples
from lightning_hessian.training.settings import RecorderOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

STEP_DIGITS = 9  # in the name of a record, at least
STATE = "offline_state.pt"  # beside the records: what the next run continues from
OF_CHECKPOINT = "checkpoint"  # in place of a file of samples
LAST = "last"  # how the name of a training's final checkpoint begins
PAUSES = 3  # so many times the longest pause between the checkpoints of two steps end a watch,
UNKNOWN = 10  # and so many times the patience, before there are two pauses


def measure_checkpoints(
    model: str,
    checkpoints: Sequence[str],
    samples: str,
    log_dir: str,
    *,
    device: str | None = None,
    watch: bool = False,
    poll: float = 5.0,
    patience: float = 60.0,
    say: Callable[[str], object] = print,
    **options: Unpack[RecorderOptions],
) -> int:
    """Measures checkpoints in order of their steps, but for those that were measured before in this directory.

    A file that cannot be read is skipped, and tried again once it has changed.

    Args:
        model: ``package.module:Class`` or ``module:function``, see ``ModelSource``.
        checkpoints: paths, glob patterns and directories.
        samples: a file (see ``read_samples``), or ``"checkpoint"`` for those that the run's monitor has stored.
        log_dir: directory of these measurements, which belongs to them alone.
        device: by default a CUDA device if there is one, else the CPU.
        watch: whether to go on and measure new checkpoints as they come, until it is interrupted, or ``last.ckpt`` is
            there and nothing has changed for three times the longest pause between checkpoints.
        poll: seconds between two looks.
        patience: seconds without a change that are waited for at least.
        say: shows progress.
        options: of ``InputHessianRecorder``, ``classes`` and ``target`` included.

    Returns:
        How many were measured.

    Raises:
        ConfigurationError: an argument is not allowed, or does not fit the model; or no checkpoint could be measured.
    """
    if not (poll > 0 and patience >= 0):
        raise ConfigurationError(
            f"poll={poll:g} must be more than 0 seconds, and patience={patience:g} not less than 0."
        )
    work = _Offline(ModelSource(model), samples, log_dir, _device(device), say, options)
    with work.closing(), _terminable():
        try:
            work.measure_new(_found(checkpoints))
            if watch:
                work.follow(lambda: _found(checkpoints), poll, patience)
        except KeyboardInterrupt:
            say(f"Interrupted. {work.summary}")
            return work.num_measured
    if not work.num_measured and not work.num_known:
        patterns = ", ".join(map(repr, checkpoints))
        raise ConfigurationError(work.last_failure or f"There is no checkpoint that matches {patterns}.")
    say(f"{work.summary} To see the results: tensorboard --logdir {shlex.quote(log_dir)}")
    return work.num_measured


class _Offline:
    """Which checkpoints are measured, and what comes of them.

    Attributes:
        num_measured: checkpoints measured here.
        num_known: checkpoints whose weights were measured already.
        last_failure: why a checkpoint was skipped.
    """

    def __init__(
        self,
        source: ModelSource,
        samples: str,
        log_dir: str,
        device: torch.device,
        say: Callable[[str], object],
        options: RecorderOptions,
    ) -> None:
        self.num_measured = self.num_known = 0
        self.last_failure: str | None = None
        self._source, self._log_dir, self._device, self._say, self._options = source, log_dir, device, say, options
        self._state_path = Path(log_dir) / FOLDER / (options.get("name") or "") / STATE
        self._seen: dict[Path, tuple[int, int]] = {}  # size and time of change of files, measured or not
        self._skipped: set[Path] = set()
        self._fingerprints: dict[int, str] = {}  # of the weights that were measured, by their steps
        self._written: dict[int, float] = {}  # when the checkpoint of each step was
        self._recorder = None if samples == OF_CHECKPOINT else self._open(read_samples(Path(samples)))

    def measure_new(self, paths: Sequence[Path]) -> bool:
        """Measures what has not been measured as it is now; whether there was something new."""
        news = False
        for path in sorted(paths, key=_order):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed since, as ModelCheckpoint does
                continue
            if self._seen.get(path) == (stat.st_size, stat.st_mtime_ns):
                continue
            self._seen[path], news = (stat.st_size, stat.st_mtime_ns), True
            self._skipped.discard(path)
            try:
                self._measure(path)
            except (CheckpointError, MeasurementError, FileNotFoundError) as error:
                self._skipped.add(path)
                self.last_failure = str(error)
                self._say(f"Skipped {path.name}. {error}")
        return news

    @property
    def summary(self) -> str:
        """What was done, in words."""
        skipped = f", {len(self._skipped)} skipped" if self._skipped else ""
        return f"{self.num_measured} measured, {self.num_known} already measured{skipped}."

    def follow(self, find: Callable[[], Sequence[Path]], poll: float, patience: float) -> None:
        """Measures new checkpoints until the last one is final."""
        self._say("Waiting for checkpoints. Stop with Ctrl-C.")
        changed = time.monotonic()
        while True:
            time.sleep(poll)
            if self.measure_new(find()):
                changed = time.monotonic()
            written = sorted(self._written.values())
            longest = max((b - a for a, b in pairwise(written)), default=0.0)
            limit = max(patience, PAUSES * longest) if len(written) > 2 else UNKNOWN * patience
            has_last = any(path.stem.startswith(LAST) for path in self._seen)
            if has_last and time.monotonic() - changed > limit:
                self._say(f"No new checkpoint beside {LAST}.ckpt for {duration(limit)}: the training seems to be over.")
                return

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Writes what is left at the end."""
        try:
            yield
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def _measure(self, path: Path) -> None:
        with path.open("rb") as file:
            checkpoint = read_checkpoint(path, file)
            at = checkpoint.position
            if self._recorder is None:
                self._recorder = self._open_with(checkpoint)
            if not path.stem.startswith(LAST):
                self._written[at.step] = os.fstat(file.fileno()).st_mtime
            fingerprint = checkpoint.fingerprint
            known = self._fingerprints.get(at.step)
            if known == fingerprint:
                self.num_known += 1
                return
            if known is not None:
                raise CheckpointError(
                    f"{path} has other weights or buffers than the checkpoint of step {at.step} that was measured in "
                    f"{self._log_dir}, which holds one measurement of a step. If it is of another training, give "
                    f"another log_dir."
                )
            model = self._source.load(checkpoint, file, self._device)
        record = self._recorder.measure(model, at.step, epoch=at.epoch, logged_step=at.logged_step)
        assert record is not None  # what fails has raised
        self._recorder.flush()
        self._fingerprints[at.step] = fingerprint
        self._save_state(self._recorder)
        self.num_measured += 1
        self._say(f"{path.name}: {record.when}, {record.method}, {duration(record.seconds)}.")

    def _open_with(self, checkpoint: Checkpoint) -> InputHessianRecorder:
        """A recorder of the samples that a monitor has stored in a checkpoint."""
        found = checkpoint.samples_of_monitor(self._options.get("name"))
        if found is None:
            raise CheckpointError(
                f"{checkpoint.path} holds no samples of an InputHessianMonitor: give them in a file, --samples FILE."
            )
        of_all: RecorderOptions = {"num_samples": len(tree_leaves(found[0])[0]), "input_fn": _as_stored}
        self._options = {**of_all, **self._options}
        return self._open(found)

    def _open(self, samples: Any) -> InputHessianRecorder:
        """A recorder that goes on where an earlier run has stopped.

        Raises:
            ConfigurationError: the directory holds other measurements.
        """
        options: RecorderOptions = {**self._options, "on_error": "raise"}
        wrt = options.get("wrt")
        if isinstance(wrt, str) and wrt.isdecimal() and _are_by_position(samples):
            options["wrt"] = int(wrt)
        recorder = InputHessianRecorder(self._log_dir, samples, keep_earlier=True, **options)
        try:
            state = torch.load(self._state_path, weights_only=True)
            recorder.load_state_dict(state["run"], strict=True)
            # A step whose record is there but not named here was interrupted before all was written.
            self._fingerprints = state["weights"]
        except FileNotFoundError as error:
            if any(self._state_path.parent.glob("step_*")):
                raise ConfigurationError(
                    f"{self._log_dir} holds the records of another run. Give a log_dir for these measurements alone: "
                    f"TensorBoard shows both where it is given the directory above."
                ) from error
            self._save_state(recorder)  # before the first record, which says by this whose it is
        except Exception as error:  # of other settings, or of a damaged file
            raise ConfigurationError(
                f"The measurements in {self._log_dir} cannot be continued: {error} Give another log_dir."
            ) from error
        return recorder

    def _save_state(self, recorder: InputHessianRecorder) -> None:
        self._state_path.parent.mkdir(parents=True, exist_ok=True)
        new = self._state_path.with_suffix(".new")
        torch.save({"run": recorder.state_dict(), "weights": self._fingerprints}, new)
        new.replace(self._state_path)


def _found(patterns: Sequence[str]) -> list[Path]:
    """The checkpoints, without the records that a pattern may match too."""
    return [path for path in find_checkpoints(patterns) if not _is_of_records(path)]


def _is_of_records(path: Path) -> bool:
    """Whether it is a record, or the state beside them; a user's own folder may be named as theirs is."""
    record = FILE_NAME.fullmatch(path.name)
    is_named_so = path.name == STATE or (record is not None and len(record[1]) >= STEP_DIGITS)
    return is_named_so and FOLDER in path.absolute().parts[-4:-1]  # perhaps with a name, and superseded


def _as_stored(samples: tuple[Any, Any]) -> tuple[Any, Any]:
    """The inputs and labels of a monitor, which has found them already."""
    return samples


def _are_by_position(samples: Any) -> bool:
    """Whether there are several inputs without names, ``((a, b), labels)``: else a number is the name of a layer."""
    return isinstance(samples, (list, tuple)) and bool(samples) and isinstance(samples[0], (list, tuple))


def _order(path: Path) -> tuple[bool, int, float]:
    """By the step in the name; those without one after the others, in the order in which they were written."""
    step = number_in_name(path, "step")
    try:
        written = path.stat().st_mtime
    except FileNotFoundError:
        written = 0.0
    return step is None, step or 0, written


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigurationError(f"device={name!r} is not available here: {error}") from error
    return device


@contextmanager
def _terminable() -> Iterator[None]:
    """A request to terminate ends the work as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
