"""How much is measured: enough to quote, or just enough to see that it works."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    disk_size: int
    """The device for small objects, and the one for the peers."""
    nearly_full_size: int
    """The device that is filled to 95 %."""

    @property
    def huge_disk_size(self) -> int:
        """A device that has room for the huge object."""
        return self.huge_size + GIB

    @property
    def start_disk_size(self) -> int:
        """A device that has room for the last of `start_counts`, of small objects with their footers."""
        return 9 * KIB * self.start_counts[-1] + GIB


FULL = Effort(3, 5.0, 60_000, 8, 8 * GIB, (10_000, 100_000, 1_000_000), 8 * GIB, 4 * GIB)
QUICK = Effort(1, 1.0, 10_000, 3, 256 * MIB, (1_000, 10_000), 2 * GIB, 512 * MIB)
