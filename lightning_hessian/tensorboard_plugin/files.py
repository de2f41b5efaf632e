"""Which file belongs to a measurement. The server makes its name; nothing in a request becomes a path."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_hessian.records.answers.sample import check_file
from lightning_hessian.records.event_format import FOLDER, PLUGIN_NAME, Summary, file_name
from lightning_hessian.records.payload import ArrayFile, DamagedDataError, open_arrays
from lightning_hessian.tensorboard_plugin.request import RequestError

TAG = re.compile(rf"{PLUGIN_NAME}(?:_(validate|test))?(?:/([A-Za-z0-9_-]+))?")
STILL_SHOWN = "Spectra and curves come from the event file and are shown all the same."


class RunFiles:
    """Finds the files beside the event files.

    Args:
        logdir: what TensorBoard was started with, or None.
        flags: of TensorBoard, or None.
    """

    def __init__(self, logdir: str | None, flags: argparse.Namespace | None) -> None:
        self._logdir = Path(os.path.expanduser(logdir)) if logdir else None
        self._why_none: str | None = None
        if getattr(flags, "logdir_spec", None):
            self._why_none = (
                "TensorBoard was started with --logdir_spec, where the name of a run does not say in which directory "
                f"its files are. Start it with --logdir to see matrices, gradients and inputs. {STILL_SHOWN}"
            )
        elif self._logdir is None or "://" in str(logdir) or not self._logdir.is_dir():
            self._why_none = (
                "Matrices, gradients and inputs are read from files beside the event files, and this TensorBoard has "
                f"no local --logdir. {STILL_SHOWN}"
            )

    def why_none(self, run: str, tag: str) -> str | None:
        """Why a run has no files here, in words; None where it has."""
        try:
            folder = self._folder(run, tag)
        except RequestError as error:
            return str(error)
        if any(folder.glob("step_*.safetensors")):
            return None
        return (
            f"There are no files in {FOLDER} beside the events of this run: they were removed, or not copied with "
            f"it. {STILL_SHOWN}"
        )

    @contextmanager
    def open(self, run: str, tag: str, summary: Summary) -> Iterator[ArrayFile]:
        """The file of a measurement.

        Raises:
            RequestError: there is none that may be read, or it is damaged.
            MissingError: it is of another measurement.
        """
        folder, step = self._folder(run, tag), summary.meta["step"]
        stage: Any = _split(tag)[0]
        path = Path(os.path.realpath(folder / file_name(step, stage)))
        # only a regular file: opening a named pipe would block forever
        if not path.is_relative_to(folder) or not path.is_file():
            raise RequestError(404, f"The file of step {step} is not beside the events of this run. {STILL_SHOWN}")
        try:
            with open_arrays(path) as file:
                check_file(file, summary)
                yield file
                file.check_unchanged()
        except DamagedDataError as error:
            raise RequestError(404, f"The file of step {step} is damaged: {error}.") from error
        except OSError as error:
            reason = error.strerror or error
            raise RequestError(404, f"The file of step {step} cannot be read: {reason}. {STILL_SHOWN}") from error

    def _folder(self, run: str, tag: str) -> Path:
        """The real folder of a tag's files, which is inside that of the run, which is inside the logdir."""
        if self._why_none is not None or self._logdir is None:
            raise RequestError(404, self._why_none or "")
        _, name = _split(tag)
        logdir, own = Path(os.path.realpath(self._logdir)), Path(os.path.realpath(self._logdir / run))
        folder = Path(os.path.realpath(own / FOLDER / name))
        if not own.is_relative_to(logdir) or not folder.is_relative_to(own):
            raise RequestError(
                404,
                "The files of this run are outside of the log directory, behind a symbolic link, and are not read. "
                f"Start TensorBoard with --logdir at the real directory. {STILL_SHOWN}",
            )
        return folder


def _split(tag: str) -> tuple[str, str]:
    """The stage of the Trainer and the name of the monitor in a tag.

    Raises:
        RequestError: it is not the tag of a monitor.
    """
    found = TAG.fullmatch(tag)
    if found is None:
        raise RequestError(404, f"{tag!r} is not the tag of a monitor, so there are no files. {STILL_SHOWN}")
    return found.group(1) or "fit", found.group(2) or ""
