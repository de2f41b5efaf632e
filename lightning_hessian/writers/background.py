"""Jobs that run one after another on a thread, which exists only while there are any."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

THREAD_NAME = "lightning-hessian-writer"


class BackgroundJobs:
    """Runs jobs in their order, off the calling thread.

    The thread ends with the last job: DataLoaders fork their workers meanwhile, and Python warns of a fork beside
    another thread. When the interpreter exits, it waits for the jobs that are left.

    Args:
        max_unfinished: how many jobs there may be, the running one included; ``submit`` waits for room.
        on_error: is called with what a job raises on the thread.
    """

    def __init__(self, max_unfinished: int, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error
        self._room = threading.BoundedSemaphore(max_unfinished)
        self._waiting: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None  # the last one
        self._is_running = False
        self._lock = threading.Lock()  # of what is waiting and running

    def submit(self, job: Callable[[], object]) -> None:
        """Runs a job after those before it; at once, on this thread, where no other one can be started."""
        self._room.acquire()
        with self._lock:
            if self._is_running:
                self._waiting.append(job)
                return
            thread = threading.Thread(target=self._run, args=(job,), name=THREAD_NAME)
            try:
                thread.start()
                self._thread, self._is_running = thread, True
                return
            except RuntimeError:  # too many threads, or the interpreter is exiting
                pass
        try:
            job()
        finally:
            self._room.release()

    def wait(self) -> None:
        """Waits until all jobs are done."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, job: Callable[[], object] | None) -> None:
        while job is not None:
            try:
                job()
            except BaseException as error:  # nobody else would hear of it
                self._on_error(error)
            finally:
                self._room.release()
            with self._lock:
                job = self._waiting.popleft() if self._waiting else None
                self._is_running = job is not None
