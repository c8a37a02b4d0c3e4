"""Extent: a run of blocks on one device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

LAYERS = 0xFFFF
"""In place of a device's index: the blocks are those of a Layer (`rustord.layer`)."""
LAYER_SHIFT = 32
"""Block ``number << LAYER_SHIFT`` of `LAYERS` is the first one of the Layer with that number."""


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


COUNT_MAX = 2**32 - 1
"""Blocks of the longest extent; a longer run is several."""


def block_count(extents: Iterable[Extent]) -> int:
    """Sum of the extents' blocks."""
    return sum(extent.count for extent in extents)


def extend(copy: list[Extent], more: Iterable[Extent]) -> None:
    """Append ``more`` to ``copy``; extents that adjoin become one, as far as one may be as long."""
    for extent in more:
        if copy and copy[-1].device == extent.device and copy[-1].end == extent.block:
            last = copy.pop()
            extent = Extent(last.device, last.block, last.count + extent.count)
        while extent.count > COUNT_MAX:
            copy.append(Extent(extent.device, extent.block, COUNT_MAX))
            extent = Extent(extent.device, extent.block + COUNT_MAX, extent.count - COUNT_MAX)
        copy.append(extent)


def cut(extents: Iterable[Extent], others: Iterable[Extent]) -> list[tuple[Extent, bool]]:
    """``extents`` in their order, cut where ``others`` begin and end; with each piece whether it is one of the others'.

    ``others`` do not overlap one another.
    """
    edges = sorted(others)
    pieces = []
    for device, block, count in extents:
        end = block + count
        at = max(bisect_right(edges, (device, block, COUNT_MAX)) - 1, 0)
        while block < end:
            while at < len(edges) and (edges[at].device, edges[at].end) <= (device, block):
                at += 1
            inside = at < len(edges) and edges[at].device == device and edges[at].block < end
            first, last = (edges[at].block, edges[at].end) if inside else (end, end)
            is_other = first <= block
            stop = min(last if is_other else first, end)
            pieces.append((Extent(device, block, stop - block), is_other))
            block = stop
    return pieces


def without(extents: Iterable[Extent], others: Iterable[Extent]) -> list[Extent]:
    """What ``others`` leave of ``extents``."""
    return [piece for piece, is_other in cut(extents, others) if not is_other]


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


def part(copy: Iterable[Extent], first: int, end: int) -> list[Extent]:
    """The blocks of ``copy`` from its ``first`` to before its ``end``."""
    found = []
    for device, block, count in copy:
        skip, stop = max(first, 0), min(end, count)
        if skip < stop:
            found.append(Extent(device, block + skip, stop - skip))
        first, end = first - count, end - count
    return found
