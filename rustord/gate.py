"""Gate: lets any number of operations in, and keeps them out while something must change that they use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

Recall = Callable[[Collection[int] | None], None]
"""Has somebody leave some places, or all; what numbers these have is between him and who changes them."""


class Gate:
    """Any number of operations may be inside; `shut` waits until none is, and keeps them outside.

    Others, in other processes, may do the same without coming through: they are recalled when it is shut.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._shut = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._shutting = threading.Lock()
        self._recalls: tuple[Recall, ...] = ()
        self._kept = 0

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
    def shut(self, places: Collection[int] | None = None) -> Iterator[None]:
        """Nobody is inside; one thread at a time, and not from within. ``places`` are for who is elsewhere."""
        with self._shutting:
            with self._changed:
                self._shut = True
                while self._inside:
                    self._changed.wait()
            try:
                self.recall(places)
                yield
            finally:
                with self._changed:
                    self._shut = False
                    self._changed.notify_all()

    def drain(self, places: Collection[int] | None = None) -> None:
        """Wait until all have left that are inside now. Who is elsewhere is recalled from ``places``, if given."""
        with self.shut(places):
            pass

    # Those who do not come through

    def extend(self, recall: Recall) -> None:
        """From now on ``recall`` is called whenever something must change; it may be called from inside."""
        with self._shutting:
            self._recalls = (*self._recalls, recall)

    def withdraw(self, recall: Recall) -> None:
        """The opposite of `extend`."""
        with self._shutting:
            self._recalls = tuple(other for other in self._recalls if other != recall)

    def recall(self, places: Collection[int] | None = None) -> None:
        """Those in other processes have left all or these places, and will ask again. May be called from inside."""
        for recall in self._recalls:
            recall(places)

    @property
    def is_kept(self) -> bool:
        """Whether nothing may be granted to other processes."""
        return bool(self._kept)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done is done from inside: there is somebody here who changes things as he goes."""
        with self._lock:
            self._kept += 1
        self.recall()
        try:
            yield
        finally:
            with self._lock:
                self._kept -= 1
            self.recall()  # so that they ask again
