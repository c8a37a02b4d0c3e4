"""How much is measured: enough to quote, or just enough to see that it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LARGE_SIZE = 64 * MIB


@dataclass(frozen=True)
class Effort:
    """Counts are of objects, sizes in bytes."""

    rounds: int
    seconds: float
    """How long each round of a row for small objects takes."""
    small_count: int
    """Objects that GET picks from, and that DELETE deletes."""
    large_repeats: int
    """Transfers of 64 MiB in each round."""
    huge_size: int
    """The one large object while memory is watched."""
    start_counts: tuple[int, ...]
    """Objects in the pool at a crash; memory is read at the last."""
    warm_up_count: int
    """Small objects that are stored and deleted before anything is measured, so that every log's files exist."""
    disk_size: int
    """The device for small objects, and the one for the peers."""
    nearly_full_size: int
    """The device that is filled to 95 %."""

    @property
    def huge_disk_size(self) -> int:
        """A device that has room for the huge object."""
        return self.huge_size + 256 * MIB

    @property
    def start_disk_size(self) -> int:
        """A device that has room for the last of `start_counts`, of small objects with their footers."""
        return 9 * KIB * self.start_counts[-1] + 256 * MIB

    @property
    def large_disk_size(self) -> int:
        """A device that has room for all large objects: each goes where nothing was before."""
        return self.rounds * self.large_repeats * LARGE_SIZE + 512 * MIB


def rotated(contestants: Sequence[T], number: int) -> list[T]:
    """In the order of a round: each begins with another one."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


FULL = Effort(3, 5.0, 60_000, 8, 8 * GIB, (10_000, 100_000, 1_000_000), 100_000, 8 * GIB, 4 * GIB)
QUICK = Effort(1, 1.0, 10_000, 3, 256 * MIB, (1_000, 10_000), 30_000, 1 * GIB, 512 * MIB)
