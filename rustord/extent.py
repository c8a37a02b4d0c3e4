"""Extent: a run of blocks on one device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Extent(NamedTuple):
    """``count`` blocks of device ``device`` from block ``block`` on.

    ``device`` is the device's index in the pool (0 to 65,535), ``block`` and ``count`` are in blocks of the pool's
    block size; ``block`` counts from the start of the device, ``count`` is 1 to 2**32 - 1.
    """

    device: int
    block: int
    count: int  # type: ignore[assignment]  # tuple.count, which nobody needs here

    @property
    def end(self) -> int:
        """The first block behind the extent."""
        return self.block + self.count


def block_count(extents: Iterable[Extent]) -> int:
    """Sum of the extents' blocks."""
    return sum(extent.count for extent in extents)


def extend(copy: list[Extent], more: Iterable[Extent]) -> None:
    """Append ``more`` to ``copy``; extents that adjoin become one."""
    for extent in more:
        if copy and copy[-1].device == extent.device and copy[-1].end == extent.block:
            last = copy.pop()
            extent = Extent(last.device, last.block, last.count + extent.count)
        copy.append(extent)


def trim(copy: list[Extent], count: int) -> list[Extent]:
    """Cut the last ``count`` blocks off ``copy``, which has at least as many, and return them."""
    cut: list[Extent] = []
    while count:
        device, block, length = copy.pop()
        keep = max(length - count, 0)
        if keep:
            copy.append(Extent(device, block, keep))
        cut.append(Extent(device, block + keep, length - keep))
        count -= length - keep
    return cut
