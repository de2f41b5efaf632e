"""Work off the training thread: one job after another, in order, with a short queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

LONGEST_QUEUE = 2  # jobs that wait, each holding a record: matrices of all its samples and classes


class Background:
    """Runs jobs in the order they came, on one daemon thread that lives only while there is work.

    Nothing is started at construction, so that whoever holds an idle one may be pickled or forked. One thread
    gives the jobs; where two wait already, it waits too. A job tells of its own failure: what escapes it ends the
    thread as in any other, and the jobs after it run on a new one.
    """

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Runs ``job`` soon; waits while the queue is full."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < LONGEST_QUEUE)
            self._jobs.append(job)
            if self._thread is None:
                self._start()

    def drain(self) -> None:
        """Waits until every job has run."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="lightning-hessian-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread is to be had, or the interpreter is ending: slower, but nothing is lost
            self._work()

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        finally:
            with self._changed:
                self._thread = None
                if self._jobs:
                    self._start()
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            job = self._jobs.popleft() if self._jobs else None
            self._changed.notify_all()
            return job
