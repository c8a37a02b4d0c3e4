"""Flusher: a thread for the flushes of a connection that has more to do meanwhile.

While one is under way the connection goes on with what else its client asks for; the flushes that are asked for by then
are done together as the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from rustord.wire.transmission import Waiting

_WAITING_MAX = 4096
"""Who asks for more has to wait until a flush is done."""


class Flusher:
    """Calls ``flush``, which must not raise, with all that wait; begins with the first. Used by one other thread."""

    def __init__(self, flush: Callable[[list[Waiting]], None]) -> None:
        self._flush = flush
        self._waiting: list[Waiting] = []
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        """Of the three."""
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    def put(self, waiting: list[Waiting]) -> None:
        """Have these answered after a flush that begins from now on. RuntimeError: there can be no thread."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="nbd flusher", daemon=True)
            thread.start()
            self._thread = thread
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < _WAITING_MAX)
            self._waiting += waiting
            self._is_busy = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when it has nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy)

    def close(self) -> None:
        """End once all is done. Returns then, and lets go of whom it calls."""
        if self._thread is not None:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            self._thread.join()
        del self._flush

    def _run(self) -> None:
        while waiting := self._next():
            self._flush(waiting)

    def _next(self) -> list[Waiting]:
        """All that wait, once some do; none when it has been closed."""
        with self._changed:
            if not self._waiting:
                self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            waiting, self._waiting = self._waiting, []
            return waiting
