"""Where a run saves its records: where Lightning writes, and nowhere else; to itself while it trains."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_hessian.records.files import point_to, record_folder, set_superseded_aside
from lightning_hessian.records.locations import in_memory, is_in_memory, location
from lightning_hessian.writers.loggers import picture_loggers, tensorboard_loggers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment] # only where it is a module


@dataclass(frozen=True)
class Places:
    """The directories of a run.

    Attributes:
        folder: in which records are saved; in memory where Lightning writes nothing.
        log_dir: ``trainer.log_dir``, by which users look for them.
    """

    folder: str
    log_dir: str | None


def places_of(trainer: Any) -> Places:
    """Where this run's records go: beside the event file if there is one. Collective."""
    log_dir = trainer.log_dir  # Lightning broadcasts it
    loggers = tensorboard_loggers(trainer.loggers)
    folder = loggers[0].log_dir if loggers else log_dir
    if folder is None and _has_given_root(trainer):
        folder = trainer.default_root_dir
    if folder is None or not writes_files(trainer):
        return Places(str(in_memory(log_dir)), log_dir)
    return Places(os.fspath(folder), log_dir)


def where_to_look(places: Places, loggers: Sequence[Any], name: str | None = None) -> str:
    """What shows the measurements of the monitor ``name``: a command, or an expression in Python."""
    named = "" if name is None else f", name={name!r}"
    if is_in_memory(places.folder):
        return f"load_records({places.log_dir!r}{named}), until this process ends"
    if tensorboard_loggers(loggers):
        return f"tensorboard --logdir {shlex.quote(places.folder.rstrip(os.sep))}"
    return f"load_records({places.folder!r}{named})"


def writes_files(trainer: Any) -> bool:
    """Whether Lightning writes files: there is a logger, or a directory was given."""
    quiet = trainer.fast_dev_run or getattr(trainer, "barebones", False)
    return not quiet and (bool(trainer.loggers) or _has_given_root(trainer))


def notice_of(places: Places, trainer: Any) -> str | None:
    """What a user may miss who looks for records or pictures, or None."""
    if trainer.fast_dev_run:
        return "fast_dev_run: measurements are made to test them, but nothing is saved or drawn."
    until_end = "load_records(trainer.log_dir) returns the records until this process ends. Give "
    if not writes_files(trainer):
        return (
            f"Without a logger or a default_root_dir, Lightning writes no files, and nothing is saved or drawn here "
            f"either: {until_end}Trainer(logger=TensorBoardLogger(...)) to keep them."
        )
    has_pictures = bool(tensorboard_loggers(trainer.loggers) + picture_loggers(trainer.loggers))
    if is_in_memory(places.folder):
        return (
            f"The loggers name no directory, and records are not saved: {until_end}Trainer(default_root_dir=...) to "
            f"keep them{'' if has_pictures else ', and a TensorBoardLogger to see pictures'}."
        )
    if not has_pictures:
        return (
            "No TensorBoard logger: scalars go to the other loggers and records to files, but there are no pictures. "
            "Give Trainer(logger=TensorBoardLogger(...)) to see them."
        )
    return None


def _has_given_root(trainer: Any) -> bool:
    return bool(trainer.default_root_dir != os.getcwd())


class RecordFolder:
    """The folder of one run's records, which a fit has to itself from its first record to its end.

    Args:
        name: of the monitor, or None.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._lock: int | None = None

    def claim(self, places: Places, step: int | None) -> tuple[str, list[str]]:
        """Clears the way for a fit that starts after ``step`` optimizer steps, or (None) for a validation or test.

        Where another fit is writing, this one gets a new directory inside.

        Returns:
            The directory to save records in; and warnings.
        """
        folder, log_dir, warnings = places.folder, places.log_dir, []
        if step is not None and not self._acquired(record_folder(folder, self._name)):
            when = datetime.now(timezone.utc).strftime("concurrent_%Y-%m-%dT%H.%M.%S.%fZ")
            folder, taken = os.path.join(folder, when), folder
            warnings.append(
                f"Another fit is saving its records in {taken}: those of this one go to {folder}. Give each run a log "
                f"directory of its own, or TensorBoard will mix their curves."
            )
        try:
            if not is_in_memory(folder):
                set_superseded_aside(str(in_memory(log_dir)), self._name, 0)  # of a run that wrote no files
                if location(folder) != location(log_dir):
                    point_to(folder, str(in_memory(log_dir)) if warnings else log_dir, self._name, step)
        except Exception as error:
            warnings.append(f"load_records({log_dir!r}) will not find the records in {folder} ({error}).")
        if step is not None and (warning := set_superseded_aside(folder, self._name, step)) is not None:
            warnings.append(warning)
        return folder, warnings

    def release(self) -> None:
        """Lets other fits write there."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough while a forked worker has a copy
            os.close(self._lock)
            self._lock = None

    def _acquired(self, folder: Any) -> bool:
        """Whether no other fit, of any process, holds this folder; True where locks are not available."""
        if fcntl is None or not isinstance(folder, Path):
            return True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
        except OSError:  # reported when a record cannot be saved
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError:  # a network file system without locks
            os.close(lock)
            return True
        self._lock = lock
        return True
