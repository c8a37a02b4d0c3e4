"""Extent: a run of blocks on one device."""

from __future__ import annotations

from typing import NamedTuple


class Extent(NamedTuple):
    """``count`` blocks of device ``device`` from block ``block`` on.

    ``device`` is the device's index in the pool (0 to 65,535), ``block`` and ``count`` are in blocks of the pool's
    block size; ``block`` counts from the start of the device, ``count`` is 1 to 2**32 - 1.
    """

    device: int
    block: int
    count: int

    @property
    def end(self) -> int:
        """The first block behind the extent."""
        return self.block + self.count


def block_count(extents: tuple[Extent, ...] | list[Extent]) -> int:
    """Sum of the extents' blocks."""
    return sum(extent.count for extent in extents)
