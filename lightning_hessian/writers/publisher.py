"""A record to every logger of a Trainer, and to a file. Each is served, whatever happens to the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning_hessian.errors import WritingError
from lightning_hessian.records import event_format
from lightning_hessian.records.files import Session, record_folder, save_record
from lightning_hessian.records.record import Array, Record, named
from lightning_hessian.records.retention import KeepMatrices, MatrixKeeper, keep_policy
from lightning_hessian.writers.background import Background
from lightning_hessian.writers.loggers import give_picture, picture_loggers, tensorboard_loggers
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tab import add_payload
from lightning_hessian.writers.tensorboard import (
    Histogram,
    about_skipped,
    add_histograms,
    add_layout,
    add_pictures,
    add_text,
    diagnosis_tag,
    diagnosis_text,
    draw,
    histograms,
)


class Publisher:
    """Saves, logs and draws the records of one run, in their order.

    Scalars go to the loggers at once, on the thread that calls: loggers are not made for several. Files, and what
    TensorBoard shows besides scalars, follow on a thread of their own, through the ``SummaryWriter`` of the logger,
    which is. Pictures for other loggers are drawn there too and handed over by the next ``publish`` or ``flush``.
    What fails is kept as a ``WritingError`` until ``faults`` is asked, and nothing else is left out for it.

    Args:
        loggers: of the Trainer; all get the scalars, those that can get pictures, TensorBoard gets everything.
        folder: where records are saved, or None for nowhere.
        keep_matrices: which whole matrices the saved files hold, see ``keep_policy``.
        name: of the monitor, in tags.
        session: that the files are to tell.
    """

    def __init__(
        self,
        loggers: Sequence[Any],
        folder: str | None,
        *,
        keep_matrices: bool | int | Mapping[str, Any] | KeepMatrices | None,
        name: str | None = None,
        session: Session | None = None,
    ) -> None:
        self._loggers = list(loggers)
        self._picture_loggers = picture_loggers(loggers)
        self._folder = folder
        records = None if folder is None else record_folder(folder, name)
        self._keeper = MatrixKeeper(keep_policy(keep_matrices), records)
        self._name, self._session = name, session
        self._background = Background()
        self._drawn: deque[tuple[int, dict[str, Array]]] = deque()
        self._saved = threading.Event()
        self._saved.set()
        self._faults: deque[WritingError] = deque()
        self._has_layout = False
        self._writers = []
        for logger in tensorboard_loggers(loggers):
            with self._kept("opening the event file", "Mend the logger or remove it."):
                self._writers.append(logger.experiment)

    def publish(self, record: Record) -> dict[str, float]:
        """Logs the scalars of ``record``, gives them, and sees to the rest."""
        metrics = scalars(record)
        self._hand_over()
        self._log(metrics, record.logged_step)
        kept = self._keeper.kept(record)
        spectra: dict[str, Histogram] = {}
        payload = b""
        if self._writers:
            with self._kept("making the histograms", "Please report it; the file and the scalars are whole."):
                # Here, not in the background: it decomposes matrices, and BLAS does not survive a fork (by a
                # DataLoader's workers) while another thread is inside it.
                spectra = histograms(record)
                payload = event_format.pack_summary(
                    record, None if self._session is None else asdict(self._session), kept
                )
        saved = threading.Event()
        lay_out = record.stage == "fit" and not self._has_layout
        self._has_layout |= lay_out
        self._background.submit(partial(self._write, record, kept, spectra, payload, saved, lay_out))
        self._saved = saved  # not before: an interrupted submit would leave it unset for ever
        return metrics

    def publish_failure(self, message: str, logged_step: int) -> None:
        """Tells TensorBoard in words why there is no measurement at this step."""
        self._say(f"**No measurement here.** {message}", logged_step)

    def publish_skip(self, num_skipped: int, logged_step: int) -> None:
        """Tells every logger how many measurements were skipped so far, TensorBoard at the first one in words too."""
        self._log({f"hessian_cost/{named(self._name, 'skipped')}": float(num_skipped)}, logged_step)
        if num_skipped == 1:
            self._say(f"**Skipped here.** {about_skipped(1)}", logged_step)

    def wait_for_files(self) -> None:
        """Waits until the files of all records are written, or have failed."""
        self._saved.wait()

    def flush(self) -> None:
        """Waits until everything is written, and hands over the last pictures."""
        self._background.drain()
        self._hand_over()

    def faults(self) -> list[WritingError]:
        """What failed since this was asked last."""
        return [self._faults.popleft() for _ in range(len(self._faults))]

    def _log(self, metrics: dict[str, float], logged_step: int) -> None:
        for logger in self._loggers:
            with self._kept(f"logging scalars to {type(logger).__name__}", "Mend the logger or remove it."):
                logger.log_metrics(dict(metrics), step=logged_step)

    def _say(self, words: str, logged_step: int) -> None:
        self._background.submit(partial(self._add, "the text", add_text, diagnosis_tag(self._name), words, logged_step))

    def _write(
        self,
        record: Record,
        kept: Record,
        spectra: dict[str, Histogram],
        payload: bytes,
        saved: threading.Event,
        first: bool,
    ) -> None:
        """What is done in the background for one record; ``kept`` is what its file holds."""
        try:
            self._save(kept)
        finally:
            saved.set()
        pictures: dict[str, Array] = {}
        if self._writers or self._picture_loggers:
            with self._kept("drawing the pictures", "heatmap_samples=0 draws none."):
                pictures = draw(record)
        if self._picture_loggers and pictures:
            self._drawn.append((record.logged_step, pictures))
        if payload:
            tag = event_format.tag(record.name, record.stage)
            self._add("the numbers of the tab", add_payload, tag, payload, record.logged_step)
        if first:
            self._add("the layout of charts", add_layout, record)
        self._add("the histograms", add_histograms, spectra, record.logged_step)
        self._add("the pictures", add_pictures, pictures, record.logged_step)
        self._add("the text", add_text, diagnosis_tag(self._name), diagnosis_text(record), record.logged_step)

    def _save(self, record: Record) -> None:
        if self._folder is None:
            return
        remedy = (
            f"Free space in {self._folder} or make it writable, or give the Trainer another directory for its logs."
        )
        with self._kept("saving the record", remedy):
            save_record(record, self._folder, self._session, self._keeper.storage)

    def _add(self, what: str, add: Any, *arguments: Any) -> None:
        """Adds something to every event file."""
        for number, writer in enumerate(self._writers):
            which = "the event file" if len(self._writers) == 1 else f"event file {number}"
            with self._kept(f"adding {what} to {which}", "Mend the TensorBoard logger or remove it."):
                add(writer, *arguments)

    def _hand_over(self) -> None:
        """Gives drawn pictures to the loggers that take them.

        Right before newer scalars, as W&B puts what a user logs without a step at the last step it was told.
        """
        while self._drawn:
            step, pictures = self._drawn.popleft()
            for logger in self._picture_loggers:
                with self._kept(f"logging pictures to {type(logger).__name__}", "heatmap_samples=0 draws none."):
                    for tag, image in pictures.items():
                        give_picture(logger, tag, image, step)

    @contextmanager
    def _kept(self, deed: str, remedy: str) -> Iterator[None]:
        """Keeps a failure for ``faults``."""
        try:
            yield
        except Exception as error:  # a disk, a logger or a picture may fail in any way
            name = type(error).__name__
            fault = WritingError(f"{deed[0].upper()}{deed[1:]} failed. {name}: {error}. {remedy}", f"{deed}: {name}")
            fault.__cause__ = error
            self._faults.append(fault)
