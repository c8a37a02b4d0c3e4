"""What a store must be able to do to take part in the rows for small objects."""

from __future__ import annotations

from abc import ABC, abstractmethod

from benchmarks.load import Load


class Contestant(ABC):
    """A running store that takes its turns. Each method leaves the store ready for any other one."""

    name: str
    """As in the heading of the table."""

    pipelines: bool = False
    """Whether a connection can have more than one request under way."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The server's process, or our own for a store that works in-process."""

    @abstractmethod
    def put(self, connections: int, seconds: float) -> Load:
        """Stores new objects durably for that long."""

    @abstractmethod
    def fill(self, count: int) -> None:
        """Stores that many objects, by the quickest way there is."""

    @abstractmethod
    def get(self, connections: int, depth: int, seconds: float) -> Load:
        """Reads objects that `fill` stored, at random, for that long."""

    @abstractmethod
    def delete(self, connections: int) -> Load:
        """Deletes everything that `fill` stored, each object by a request of its own, durably."""

    @abstractmethod
    def clear(self) -> None:
        """Makes the store empty."""
