"""Placement: what is written where, in as few writes as can be."""

from __future__ import annotations

import random
from itertools import pairwise

from rustord.extent import Extent
from rustord.placement import Placement, writes
from tests.simulation import Simulation

BLOCK = 4096
DATA = random.Random(3).randbytes(10_000)


def placement(skip: int, data: bytes, *copies: list[Extent]) -> Placement:
    """Whose tails are blocks of dots."""
    size = BLOCK * (sum(extent.count for extent in copies[0]) - skip)
    return Placement(None, None, list(copies), skip, data, [b"." * (size - len(data)) for _ in copies])  # type: ignore[arg-type]


def written(*placements: Placement) -> list[tuple[Extent, bytes]]:
    return [(extent, b"".join(buffers)) for extent, buffers in writes(placements, BLOCK)]


def test_what_adjoins_is_one_write() -> None:
    first = placement(0, b"a" * BLOCK, [Extent(0, 10, 2)])
    second = placement(0, b"b" * BLOCK, [Extent(0, 12, 2)])
    apart = placement(0, b"c", [Extent(0, 20, 1)])
    other = placement(0, b"d", [Extent(1, 14, 1)])
    assert written(other, second, apart, first) == [
        (Extent(0, 10, 4), b"a" * BLOCK + b"." * BLOCK + b"b" * BLOCK + b"." * BLOCK),
        (Extent(0, 20, 1), b"c" + b"." * (BLOCK - 1)),
        (Extent(1, 14, 1), b"d" + b"." * (BLOCK - 1)),
    ]


def test_what_has_been_written_before_is_skipped() -> None:
    copies = [[Extent(0, 10, 3), Extent(0, 50, 1)], [Extent(1, 7, 4)]]
    rest = placement(2, b"x" * 5000, *copies)
    tail = b"." * (2 * BLOCK - 5000)
    assert written(rest) == [
        (Extent(0, 12, 1), b"x" * BLOCK),
        (Extent(0, 50, 1), b"x" * (5000 - BLOCK) + tail),
        (Extent(1, 9, 2), b"x" * 5000 + tail),
    ]


def test_objects_are_laid_out_side_by_side(simulation: Simulation) -> None:
    store = simulation.open()
    records = [store.stat(store.put(DATA).uuid) for _ in range(5)]
    extents = [record.extents[0] for record in records]
    assert all(first.end == second.block for first, second in pairwise(extents))
