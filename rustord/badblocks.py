"""BadBlocks: the blocks of one device that are never used again, and the table in which the device keeps them.

Two copies of the table stand in the reserved ends of the device, behind the first and the last copy of the label. They
are written one after the other, so that a crash leaves at least one. FORMAT.md has the tables.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import attrgetter
from typing import NamedTuple

from xxhash import xxh3_64_digest

from rustord.errors import FormatError

TABLE = struct.Struct("<8s8s16sQII")
"""magic, checksum, device_uuid, number, run_count, reserved"""
RUN = struct.Struct("<QII")
"""block, count, dead"""

MAGIC = b"rustbad\0"
TABLE_BYTES = 65536
"""Room for one copy of the table."""
RUN_COUNT_MAX = (TABLE_BYTES - TABLE.size) // RUN.size
_SUMMED_FROM = 16


class BadRun(NamedTuple):
    """``count`` bad blocks from ``block`` on.

    ``dead`` if what they hold has been deleted and could not be erased: then nothing in them counts, no footer either.
    """

    block: int
    count: int  # type: ignore[assignment]  # tuple.count, which nobody needs here
    dead: bool = False

    @property
    def end(self) -> int:
        return self.block + self.count


_END = attrgetter("end")


@dataclass(frozen=True)
class BadBlocks:
    """The bad blocks of one device: ``runs`` ascend and do not overlap. ``number`` counts the tables written."""

    runs: tuple[BadRun, ...] = ()
    number: int = 0

    @property
    def block_count(self) -> int:
        return sum(run.count for run in self.runs)

    def within(self, block: int, count: int) -> list[BadRun]:
        """What is bad of the ``count`` blocks from ``block`` on."""
        end = block + count
        first = bisect_right(self.runs, block, key=_END)
        return [
            BadRun(max(run.block, block), min(run.end, end) - max(run.block, block), run.dead)
            for run in takewhile(lambda run: run.block < end, islice(self.runs, first, None))
        ]

    def without(self, block: int, count: int) -> list[tuple[int, int]]:
        """What is not bad of the ``count`` blocks from ``block`` on, as (block, count)."""
        end = block + count
        good = []
        for run in self.within(block, count):
            if run.block > block:
                good.append((block, run.block - block))
            block = run.end
        if end > block:
            good.append((block, end - block))
        return good

    def adding(self, block: int, count: int, *, dead: bool = False) -> BadBlocks:
        """These and ``count`` blocks from ``block`` on. What is dead stays so."""
        outside = [
            BadRun(start, length, run.dead)
            for run in self.runs
            for start, length in BadBlocks((BadRun(block, count),)).without(run.block, run.count)
        ]
        inside = [BadRun(run.block, run.count, run.dead or dead) for run in self.within(block, count)]
        inside += [BadRun(start, length, dead) for start, length in self.without(block, count)]
        return BadBlocks(tuple(_joined(sorted(outside + inside))), self.number)

    def encode(self, device_uuid: bytes) -> bytes:
        """The table as it stands on the device, a multiple of 4 KiB long."""
        assert len(self.runs) <= RUN_COUNT_MAX
        runs = b"".join([RUN.pack(*run) for run in self.runs])
        rest = TABLE.pack(b"", b"", device_uuid, self.number, len(self.runs), 0)[_SUMMED_FROM:] + runs
        table = MAGIC + xxh3_64_digest(rest) + rest
        return table + bytes(-len(table) % 4096)


def _joined(runs: Iterable[BadRun]) -> Iterator[BadRun]:
    """Runs that touch and are both dead, or both not, made one."""
    last: BadRun | None = None
    for run in runs:
        if last is not None and (last.end, last.dead) == (run.block, run.dead):
            last = BadRun(last.block, last.count + run.count, last.dead)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def decode_bad_blocks(data: bytes | memoryview, device_uuid: bytes) -> BadBlocks | None:
    """The table that begins ``data`` (`TABLE_BYTES` long); None if there is none, or another device's.

    Raises FormatError if there is one that is damaged.
    """
    view = memoryview(data)
    magic, checksum, owner, number, run_count, _ = TABLE.unpack_from(view)
    if magic != MAGIC:
        if any(magic):
            raise FormatError("the table of bad blocks is damaged")
        return None
    end = TABLE.size + run_count * RUN.size
    if end > len(view) or xxh3_64_digest(view[_SUMMED_FROM:end]) != checksum:
        raise FormatError("the table of bad blocks does not match its checksum")
    if owner != device_uuid:
        return None
    runs = (BadRun(block, count, bool(dead)) for block, count, dead in RUN.iter_unpack(view[TABLE.size : end]))
    return BadBlocks(tuple(runs), number)


def choose_bad_blocks(copies: Iterable[BadBlocks | FormatError | None]) -> BadBlocks:
    """The newest good one of the copies; empty if there is none. Raises FormatError if none is good and one damaged."""
    found = list(copies)
    good = [copy for copy in found if isinstance(copy, BadBlocks)]
    if good:
        return max(good, key=lambda table: table.number)
    for copy in found:
        if isinstance(copy, FormatError):
            raise copy
    return BadBlocks()
