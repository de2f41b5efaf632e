"""Which file belongs to a measurement. The server builds its name; what a request says is never a path."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_hessian.records.event_format import FOLDER, PLUGIN_NAME, file_name
from lightning_hessian.tensorboard_plugin.refusal import DamagedFile, Refused
from lightning_hessian.tensorboard_plugin.safe_file import SafeFile

TAG = re.compile(rf"{PLUGIN_NAME}(?:_(validate|test))?(?:/([A-Za-z0-9_-]+))?")
ELSEWHERE = "Spectra and curves are in the event file and are shown all the same."


class RunFiles:
    """Finds the files that lie beside event files.

    Args:
        logdir: what TensorBoard was started with, or None.
        flags: of TensorBoard, or None.
    """

    def __init__(self, logdir: str | None, flags: argparse.Namespace | None) -> None:
        self._logdir = Path(os.path.expanduser(logdir)) if logdir else None
        if getattr(flags, "logdir_spec", None):
            self._why_none: str | None = (
                "TensorBoard was started with --logdir_spec, under which a run's name does not tell where its files "
                f"lie. Start it with --logdir to see matrices, gradients and inputs. {ELSEWHERE}"
            )
        elif self._logdir is None or "://" in str(logdir) or not self._logdir.is_dir():
            self._why_none = (
                "Matrices, gradients and inputs are read from files beside the event files, and this TensorBoard has "
                f"no local --logdir. {ELSEWHERE}"
            )
        else:
            self._why_none = None

    def why_none(self, run: str, tag: str) -> str | None:
        """Why a run has no files here, in words; None where it has."""
        try:
            folder = self._folder(run, tag)
        except Refused as refused:
            return str(refused)
        if any(folder.glob("step_*.safetensors")):
            return None
        return (
            f"There are no files in {FOLDER} beside the events of this run: they were removed, or not copied "
            f"with it. {ELSEWHERE}"
        )

    @contextmanager
    def open(self, run: str, tag: str, step: int) -> Iterator[SafeFile]:
        """The file of the measurement after ``step`` optimizer steps.

        Raises:
            Refused: there is none that may be read, or it is damaged.
        """
        folder = self._folder(run, tag)
        stage: Any = _parts(tag)[0]
        path = Path(os.path.realpath(folder / file_name(step, stage)))
        # only a regular file: a named pipe would wait for ever
        if not path.is_relative_to(folder) or not path.is_file():
            raise Refused(404, f"The file of step {step} is not beside the events of this run. {ELSEWHERE}")
        try:
            with path.open("rb") as source:
                yield SafeFile(source, os.fstat(source.fileno()).st_size)
        except DamagedFile as error:
            raise Refused(404, f"The file of step {step} is damaged: {error}.") from error
        except OSError as error:
            raise Refused(404, f"The file of step {step} cannot be read: {error.strerror}. {ELSEWHERE}") from error

    def _folder(self, run: str, tag: str) -> Path:
        """The real folder of a tag's files, which lies in the run's, which lies in the logdir."""
        if self._why_none is not None or self._logdir is None:
            raise Refused(404, self._why_none or "")
        _, name = _parts(tag)
        logdir, own = Path(os.path.realpath(self._logdir)), Path(os.path.realpath(self._logdir / run))
        folder = Path(os.path.realpath(own / FOLDER / name))
        if not own.is_relative_to(logdir) or not folder.is_relative_to(own):
            raise Refused(
                404,
                "The files of this run lie outside of the log directory, behind a symbolic link, and are not read. "
                f"Start TensorBoard with --logdir at the real directory. {ELSEWHERE}",
            )
        return folder


def _parts(tag: str) -> tuple[str, str]:
    """The stage of the Trainer and the name of the monitor that a tag tells.

    Raises:
        Refused: it is no tag of a monitor.
    """
    found = TAG.fullmatch(tag)
    if found is None:
        raise Refused(404, f"{tag!r} is not the tag of a monitor, so there are no files. {ELSEWHERE}")
    return found.group(1) or "fit", found.group(2) or ""
