"""Gate: lets any number of operations in, and keeps them out while something must change that they use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Any number of operations may be inside; `shut` waits until none is, and keeps them outside."""

    def __init__(self) -> None:
        self._inside = 0
        self._shut = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._shutting = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:  # not by way of the condition, whose methods are in Python: every read comes through here
            while self._shut:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._shut and not self._inside:
                self._changed.notify_all()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Nobody is inside; one thread at a time, and not from within."""
        with self._shutting:
            with self._changed:
                self._shut = True
                while self._inside:
                    self._changed.wait()
            try:
                yield
            finally:
                with self._changed:
                    self._shut = False
                    self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all have left that are inside now."""
        with self.shut():
            pass
