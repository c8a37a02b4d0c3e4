"""Pipeline: a second thread for long replies and payloads of a connection.

While it sends one the first thread reads the next from the pool; while it writes one to the pool the first receives the
next. Each step copies the data once, so two CPUs do both in little more than half the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class Pipeline:
    """Does one job at a time in a thread of its own, which begins with the first. Used by one other thread."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._idle = threading.Lock()
        """Held by whoever has given it a job, and let go when that is done."""
        self._thread: threading.Thread | None = None

    def put(self, job: Job) -> None:
        """Begin with ``job``, which must not raise, once the last one is done. RuntimeError: there can be no thread."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="nbd pipeline", daemon=True)
            thread.start()
            self._thread = thread
        self._idle.acquire()
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when it has nothing to do."""
        with self._idle:
            pass

    def close(self) -> None:
        """End once the last job is done. Returns then."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while job := self._jobs.get():
            try:
                job()
            finally:
                self._idle.release()
