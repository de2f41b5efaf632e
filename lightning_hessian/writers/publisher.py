"""A record to every logger of a Trainer, and to a file. If one of them fails, the others still get it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning_hessian.errors import WritingError
from lightning_hessian.records import event_format
from lightning_hessian.records.files import record_folder, save_record
from lightning_hessian.records.histogram import Histogram
from lightning_hessian.records.locations import is_in_memory
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.record import Record
from lightning_hessian.records.retention import KeepMatrices, MatrixRetention
from lightning_hessian.records.summary import about_skipped
from lightning_hessian.writers.background import BackgroundJobs
from lightning_hessian.writers.layout import margin_charts
from lightning_hessian.writers.loggers import log_picture, picture_loggers, tensorboard_loggers
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tags import cost_tag, diagnosis_tag
from lightning_hessian.writers.tensorboard import (
    add_histograms,
    add_layout,
    add_payload,
    add_pictures,
    add_text,
    histograms,
    pictures,
)
from lightning_hessian.writers.text import diagnosis_text

MAX_UNFINISHED = 3  # jobs, one running and two waiting, each holding a record: matrices of all its samples and classes
MAX_IN_MEMORY = 2**28  # bytes of records of a run for which Lightning writes no files
SLOW = 10.0  # seconds that training waits for a logger, above which a warning says so


class Publisher:
    """Saves, logs and plots the records of one run, in their order.

    Scalars go to the loggers at once, on the calling thread: loggers are not thread-safe. Files, and what
    TensorBoard shows besides scalars, follow on a thread of their own, through the ``SummaryWriter`` of the logger,
    which is. Pictures for other loggers are drawn there, too, and logged by the next ``publish`` or ``flush``. Each
    failure is reported by ``faults`` as a ``WritingError``, and everything else is still written.

    Args:
        loggers: of the Trainer; all get the scalars, some also pictures, TensorBoard gets everything.
        keep_matrices: which whole matrices the saved files hold; None: none.
        name: of the monitor, in tags.
    """

    def __init__(self, loggers: Sequence[Any], *, keep_matrices: KeepMatrices | None, name: str | None = None) -> None:
        self._loggers = list(loggers)
        self._picture_loggers = picture_loggers(loggers)
        self._keep_matrices, self._name = keep_matrices, name
        self.save_in(None)
        self._jobs = BackgroundJobs(
            MAX_UNFINISHED, lambda error: self._add_fault("writing in the background", "Please report it.", error)
        )
        self._delays: deque[str] = deque()
        self._drawn: deque[tuple[int, dict[str, Array]]] = deque()
        self._saved = threading.Event()
        self._saved.set()
        self._faults: deque[WritingError] = deque()
        self._has_layout = False
        self._writers = []
        for logger in tensorboard_loggers(loggers):
            with self._reported("opening the event file", "Fix the logger or remove it."):
                self._writers.append(logger.experiment)

    def save_in(self, folder: str | None) -> None:
        """Saves records in this directory from now on, by default nowhere."""
        self._folder = folder
        place = None if folder is None else record_folder(folder, self._name)
        self._retention = MatrixRetention(self._keep_matrices, place)
        self._num_bytes = 0

    def publish(self, record: Record) -> dict[str, float]:
        """Logs the scalars of ``record``, returns them, and arranges for the rest."""
        values = scalars(record)
        self._log_pictures()
        self._log(values, record.logged_step)
        stored = self._retention.apply(record)
        by_tag: dict[str, Histogram] = {}
        payload = b""
        if self._writers:
            with self._reported(
                "computing the histograms", "Please report this bug; the file and the scalars are unaffected."
            ):
                # Here, not in the background: it decomposes matrices, and BLAS does not survive a fork (by a
                # DataLoader's workers) while another thread is inside it.
                by_tag = histograms(record)
                payload = event_format.pack_summary(record, stored)
        saved = threading.Event()

        def write() -> None:
            try:
                self._save(stored)
            finally:
                saved.set()
            self._show(record, by_tag, payload)

        self._jobs.submit(write)
        self._saved = saved  # not before: an interrupted submit would leave it unset for ever
        return values

    def publish_failure(self, message: str, logged_step: int) -> None:
        """Explains in TensorBoard why there is no measurement at this step."""
        self._publish_text(f"**No measurement here.** {message}", logged_step)

    def publish_skip(self, num_skipped: int, logged_step: int) -> None:
        """Logs how many measurements were skipped so far; TensorBoard gets an explanation at the first one."""
        self._log({cost_tag("skipped", self._name): float(num_skipped)}, logged_step)
        if num_skipped == 1:
            self._publish_text(f"**Skipped here.** {about_skipped(num_skipped)}", logged_step)

    def wait_for_files(self) -> None:
        """Waits until the files of all records are written, or have failed."""
        self._saved.wait()

    def flush(self) -> None:
        """Waits until everything is written, and logs the last pictures."""
        if self._has_layout:
            self._jobs.submit(partial(self._add_layout, None))
        self._jobs.wait()
        self._log_pictures()

    def faults(self) -> list[WritingError]:
        """What has failed since the last call."""
        return [self._faults.popleft() for _ in range(len(self._faults))]

    def delays(self) -> list[str]:
        """The loggers for which training has waited long since the last call."""
        return [self._delays.popleft() for _ in range(len(self._delays))]

    def _log(self, values: dict[str, float], logged_step: int) -> None:
        for logger in self._loggers:
            begin, name = time.perf_counter(), type(logger).__name__
            with self._reported(f"logging scalars to {name}", "Fix the logger or remove it."):
                logger.log_metrics(dict(values), step=logged_step)
            if (seconds := time.perf_counter() - begin) > SLOW:
                self._delays.append(f"logging scalars to {name} took {seconds:.0f} s, for which training waited.")

    def _publish_text(self, markdown: str, logged_step: int) -> None:
        if self._writers:
            tag = diagnosis_tag(self._name)
            self._jobs.submit(partial(self._add, "the text", add_text, tag, markdown, logged_step))

    def _show(self, record: Record, by_tag: Mapping[str, Histogram], payload: bytes) -> None:
        """Everything but scalars and the file, in the background."""
        drawn: dict[str, Array] = {}
        with self._reported("drawing the pictures", "heatmap_samples=0 draws none."):
            if self._writers:
                drawn = pictures(record)
            if self._picture_loggers and (large := pictures(record, scale=3)):
                self._drawn.append((record.logged_step, large))
        if payload:
            tag = event_format.tag(record.name, record.stage)
            self._add("the numbers of the tab", add_payload, tag, payload, record.logged_step)
        self._add_layout(record)
        self._add("the histograms", add_histograms, by_tag, record.logged_step)
        self._add("the pictures", add_pictures, drawn, record.logged_step)
        self._add("the text", add_text, diagnosis_tag(self._name), diagnosis_text(record), record.logged_step)

    def _add_layout(self, record: Record | None) -> None:
        """Lays out the charts of a fit's first record; later, only what others have replaced is put back."""
        is_first = record is not None and record.stage == "fit" and not self._has_layout
        if self._writers and (is_first or self._has_layout):
            self._has_layout = True
            category = margin_charts(record) if is_first and record is not None else None
            self._add("the custom scalar charts", add_layout, category)

    def _save(self, record: Record) -> None:
        if self._folder is None:
            return
        remedy = f"Free space in {self._folder} or make it writable, or give this run another directory for its logs."
        if is_in_memory(self._folder):
            remedy = "Give the Trainer a logger or a default_root_dir, and records are saved there."
        with self._reported("saving the record", remedy):
            if is_in_memory(self._folder) and self._num_bytes > MAX_IN_MEMORY:
                raise MemoryError(f"the records of this run take {self._num_bytes / 2**20:.4g} MiB already")
            path = save_record(record, self._folder)
            if is_in_memory(self._folder):
                self._num_bytes += path.stat().st_size

    def _add(self, what: str, add: Any, *arguments: Any) -> None:
        """Adds something to every event file."""
        for number, writer in enumerate(self._writers):
            which = "the event file" if len(self._writers) == 1 else f"event file {number}"
            with self._reported(f"adding {what} to {which}", "Fix the logger or its SummaryWriter, or remove it."):
                add(writer, *arguments)

    def _log_pictures(self) -> None:
        """Logs pictures that were drawn, to the loggers that accept them.

        Right before newer scalars, as W&B puts what a user logs without a step at the last step it was given.
        """
        while self._drawn:
            step, drawn = self._drawn.popleft()
            for logger in self._picture_loggers:
                with self._reported(f"logging pictures to {type(logger).__name__}", "heatmap_samples=0 draws none."):
                    for tag, image in drawn.items():
                        log_picture(logger, tag, image, step)

    @contextmanager
    def _reported(self, action: str, remedy: str) -> Iterator[None]:
        """Notes an exception for ``faults``."""
        try:
            yield
        except Exception as error:  # a disk, a logger or a picture may fail in any way
            self._add_fault(action, remedy, error)

    def _add_fault(self, action: str, remedy: str, error: BaseException) -> None:
        name = type(error).__name__
        message = f"{action[0].upper()}{action[1:]} failed. {name}: {error}. {remedy}"
        fault = WritingError(message, f"{action}: {name}")
        fault.__cause__ = error
        self._faults.append(fault)
