"""DeviceMap: how full each part of a device is, for a picture of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rustord.label import Geometry


class DeviceMap(NamedTuple):
    """A device in cells of equal size, in blocks from its beginning.

    ``used`` is the part of each cell that is taken, 0.0 to 1.0, where labels and journals count as taken; ``reserved``
    are the cells that hold nothing else, ``bad`` those with blocks that are never used again.
    """

    used: Sequence[float]
    reserved: Sequence[int]
    bad: Sequence[int]


def draw(
    geometry: Geometry, free: Iterable[tuple[int, int]], bad: Iterable[tuple[int, int]], cell_count: int
) -> DeviceMap:
    """The map of a device whose ``free`` and ``bad`` blocks are given as (block, count).

    It has ``cell_count`` cells, or as many as the device has blocks if those are fewer.
    """
    block_count = geometry.block_count
    cell_count = min(cell_count, block_count)
    free_blocks = _per_cell(free, block_count, cell_count)
    data_blocks = _per_cell(geometry.data_runs, block_count, cell_count)
    sizes = [(cell + 1) * block_count // cell_count - cell * block_count // cell_count for cell in range(cell_count)]
    return DeviceMap(
        [1.0 - unused / size for unused, size in zip(free_blocks, sizes, strict=True)],
        [cell for cell, count in enumerate(data_blocks) if not count],
        [cell for cell, count in enumerate(_per_cell(bad, block_count, cell_count)) if count],
    )


def _per_cell(runs: Iterable[tuple[int, int]], block_count: int, cell_count: int) -> list[int]:
    """How many blocks of ``runs`` lie in each cell; cell c begins at block c * block_count // cell_count."""
    counts = [0] * cell_count
    for block, count in runs:
        end = block + count
        while block < end:
            cell = ((block + 1) * cell_count - 1) // block_count
            cell_end = min(end, (cell + 1) * block_count // cell_count)
            counts[cell] += cell_end - block
            block = cell_end
    return counts
