"""A row for a pool that is 95 % full and as fragmented as can be, beside one that is empty."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.effort import KIB, MIB, Effort
from benchmarks.report import Row, Times
from benchmarks.subject import Rustord

FILLED = 0.995
FULL = 0.95
CONNECTIONS = 16
SIZES = tuple(size * KIB for size in (2, 4, 8, 12, 20, 28, 60))
BATCH_BYTES = 16 * MIB
PART_OF_FREE = 0.2
"""How much of what is free one turn stores: it must not end elsewhere than at 95 %."""


class Space(NamedTuple):
    """Bytes of a pool's data area."""

    total: int
    free: int


def fullness(full: Rustord, empty: Rustord, data_size: int, effort: Effort) -> Iterator[Row]:
    """Durable PUT into both, in turns."""
    fill_up(full, random.Random(1))
    count = round(PART_OF_FREE * space(full).free / (2 * data_size))
    figures: dict[str, list[float]] = {"rustord": [], "empty pool": []}
    for _ in range(max(effort.rounds, 3)):
        for name, pool in (("rustord", full), ("empty pool", empty)):
            os.sync()
            figures[name].append(pool.put_count(CONNECTIONS, count).rate)
    work = f"durable PUT at {FULL:.0%} full and fragmented, {CONNECTIONS} connections"
    yield Row(work, "op/s", figures, (Times(0.8, ("empty pool",)),))


def fill_up(pool: Rustord, chance: random.Random) -> None:
    """Fills a pool with objects of all sizes, then deletes some here and there until FULL of it is in use."""
    sizes: list[tuple[str, int]] = []
    while (now := space(pool)).free > (1 - FILLED) * now.total + BATCH_BYTES:
        size = chance.choice(SIZES)
        pool.fill(BATCH_BYTES // (size + 4 * KIB), os.urandom(size))
        sizes += [(uuid, size) for uuid in pool.filled()[len(sizes) :]]
    chance.shuffle(sizes)
    while (now := space(pool)).free < (1 - FULL) * now.total:
        lacking = (1 - FULL) * now.total - now.free
        gone: set[str] = set()
        while lacking > 0:
            uuid, size = sizes.pop()
            gone.add(uuid)
            lacking -= size + 4 * KIB
        pool.delete_filled(gone)


def space(pool: Rustord) -> Space:
    """What the pool says of itself."""
    told = pool.pool()
    return Space(told["size_bytes"], told["free_bytes"])
