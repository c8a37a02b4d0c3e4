"""Relocation: an Object, or parts of it, on the way to other blocks, before a cycle makes them the Object's own."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate

from rustord.allocator import Allocator
from rustord.blockdevice import BlockDevice
from rustord.blockstore import BlockStore
from rustord.errors import Damaged, DeviceError, NoSpace, NotFound
from rustord.extent import Extent, block_count, cut, extend, trim, without
from rustord.footer import footer_blocks
from rustord.manifest import CHUNK_BYTES, Data
from rustord.objkey import uuid_text
from rustord.placer import Striped
from rustord.record import Record, RecordId

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""How much is read and written at once, and how often a caller can slow it down or stop it."""


class Relocation:
    """Copies what lies on the blocks to leave to new ones; used by one thread at a time.

    First `place` takes the new blocks; then the journals have to say so (`Relocations.announce`), since what is copied
    outlives a crash, and the Object may be deleted after that; then `copy` copies. `take_back` and `abort` are for any
    thread: who deletes the Object meanwhile erases the copy with it.

    The data keeps its checksums, and is read from whichever copy is right. What is right nowhere is taken along as it
    is: it stays an error. The last, broken block of each copy and its footer always move, since a footer names all of
    the Object's blocks; they are written by the cycle that commits. What has been written is nobody's until a `Move`
    of it is durable; `abort` hands it back.

    ``record`` is the Object before the move, ``copies`` is where it will be, ``new`` what of that is not the Object's
    yet, ``id`` that of the GRAVE by which the journals know these blocks, None before. ``rest`` is the data of the
    broken block, ``damaged`` holds the ranges of bytes, (offset, end), that are right nowhere.
    """

    def __init__(
        self,
        record: Record,
        allocator: Allocator,
        blocks: BlockStore,
        abandon: Callable[[Relocation, list[Extent]], None],
        *,
        salvage: bool = False,
    ) -> None:
        """``abandon`` erases new blocks, which a GRAVE names if there is an ``id``, and gives them back.

        With ``salvage``, bytes that the device cannot read any more become zeros, which match no checksum.
        """
        self.record = record
        self.copies: list[list[Extent]] = [[] for _ in record.copies]
        self.new: list[Extent] = []
        self.id: RecordId | None = None
        self.rest: Data = b""
        self.damaged: list[tuple[int, int]] = []
        self._allocator = allocator
        self._blocks = blocks
        self._abandon = abandon
        self._salvage = salvage
        self._moves: list[tuple[int, int, Extent]] = []  # number of the copy, offset in bytes, new blocks
        self._devices: dict[int, BlockDevice] = {}
        self._copying = threading.Lock()  # held while it is placed, and for each piece of up to `PIECE_BYTES`

    @property
    def body_block_count(self) -> int:
        """How many blocks of each copy are full of data, and so are not written by the cycle that commits."""
        count: int = self.record.size // self._blocks.block_size
        return count

    def copy(self, pace: Callable[[int], None]) -> None:
        """Copy to the new blocks, of which the journals say durably that they are being filled.

        ``pace`` is told the length of each piece that has been copied, and may wait or raise. Raises DeviceError, or
        NotFound if the blocks have been taken back; the caller has to `abort` then.
        """
        for number, offset, extent in self._moves:
            self._copy(number, offset, extent, pace)
        body = self.body_block_count * self._blocks.block_size
        if body < self.record.size:
            self.rest = self._read(0, body, self.record.size - body)

    def place(self, leave: Sequence[Extent], avoid: Collection[int]) -> None:
        """Take new blocks for what is on the blocks ``leave``, on no device of ``avoid``, and make up ``copies``.

        What is new of a copy goes to the devices that the copy stays on, if these have room; but what is new of a
        striped Object goes to those that have nothing of it yet: a device stands in for the one that is left. Raises
        NoSpace; the caller has to `abort` then.
        """
        with self._copying:  # who takes it back meanwhile would give back what is not needed once more
            self._place(leave, avoid)

    def _place(self, leave: Sequence[Extent], avoid: Collection[int]) -> None:
        plans = [self._plan(copy, leave) for copy in self.record.copies]
        layouts = [_Layout((extent, start) for extent, start, leaves in plan if not leaves) for plan in plans]
        tail_count = self._tail_count(sum(map(len, plans)) + len(plans))
        tail = (self.body_block_count, self.body_block_count + tail_count)
        stays = [{piece.device for piece, leaves in cut(copy, leave) if not leaves} for copy in self.record.copies]
        # First the copies that stay somewhere: so their ends do, and what moves as a whole goes elsewhere as a whole.
        for number in sorted(range(len(plans)), key=lambda number: not stays[number]):
            plan = plans[number]
            best = stays[number] - {*avoid}
            if self.record.layout == Striped.name:
                best = {*self._blocks.accepting_indices()} - stays[number] - {*avoid}
            ranges = [(start, start + extent.count) for extent, start, leaves in plan if leaves]
            places = self._take([*ranges, tail], layouts[:number] + layouts[number + 1 :], best, avoid)
            for extent, start, leaves in plan:
                parts = places.pop(0) if leaves else [extent]
                extend(self.copies[number], parts)
                for part in parts if leaves else ():
                    self._moves.append((number, start * self._blocks.block_size, part))
                    start += part.count
            extend(self.copies[number], places.pop())
            layouts[number] = _Layout.of(self.copies[number])
        self._fit(layouts, stays, avoid)

    def _plan(self, copy: Sequence[Extent], leave: Sequence[Extent]) -> list[tuple[Extent, int, bool]]:
        """The blocks of a copy that are full of data: (extent, number of its first block in the copy, leaves)."""
        body = list(copy)
        trim(body, block_count(body) - self.body_block_count)
        pieces = cut(body, leave)
        starts = accumulate((piece.count for piece, _ in pieces), initial=0)
        return [(piece, start, leaves) for (piece, leaves), start in zip(pieces, starts, strict=False)]

    def _tail_count(self, extent_count: int) -> int:
        """Blocks behind those that are full of data, if all copies have ``extent_count`` extents together."""
        size, block_size = self.record.size, self._blocks.block_size
        broken = 1 if size % block_size else 0
        return broken + footer_blocks(size, self.record.moved_length(extent_count), block_size)

    def _take(
        self,
        ranges: Sequence[tuple[int, int]],
        others: Sequence[_Layout],
        best: Collection[int],
        avoid: Collection[int],
    ) -> list[list[Extent]]:
        """Blocks for each of the half-open ``ranges`` of blocks of a copy, on no device that has them in the others."""
        taken: dict[frozenset[int], list[Extent]] = {}
        apart = [frozenset[int]().union(*(other.devices(*range) for other in others)) for range in ranges]
        for devices in dict.fromkeys(apart):
            count = sum(end - start for (start, end), not_on in zip(ranges, apart, strict=True) if not_on == devices)
            taken[devices] = self._take_apart(count, devices, best, avoid)
        return [_pop(taken[not_on], end - start) for (start, end), not_on in zip(ranges, apart, strict=True)]

    def _take_apart(
        self, count: int, devices: Collection[int], best: Collection[int], avoid: Collection[int]
    ) -> list[Extent]:
        if not count:
            return []
        try:
            new = self._allocator.place_on(count, lambda device: device in best and device not in devices)
        except NoSpace:
            new = self._allocator.place_on(count, lambda device: device not in devices and device not in avoid)
        self.new += new
        return new

    def _fit(self, layouts: Sequence[_Layout], stays: Sequence[Collection[int]], avoid: Collection[int]) -> None:
        """Make each copy just as long as it has to be: more extents make a longer Record, and so a longer footer."""
        while True:
            need = self.body_block_count + self._tail_count(sum(map(len, self.copies)))
            have = block_count(self.copies[0])
            if have == need:
                return
            for number, copy in enumerate(self.copies):
                if have < need:
                    others = [*layouts[:number], *layouts[number + 1 :]]
                    (more,) = self._take([(have, need)], others, {*stays[number]} - {*avoid}, avoid)
                    extend(copy, more)
                    layouts[number].add(more, have)
                else:
                    self._give_back(trim(copy, have - need))

    def _give_back(self, unused: list[Extent]) -> None:
        self.new = without(self.new, unused)
        self._allocator.release(unused)

    def _copy(self, number: int, offset: int, extent: Extent, pace: Callable[[int], None]) -> None:
        device, block, count = extent
        block_size = self._blocks.block_size
        self._devices.setdefault(device, self._blocks.writable(device))
        for done in range(0, count * block_size, PIECE_BYTES):
            length = min(PIECE_BYTES, count * block_size - done)
            target = Extent(device, block + done // block_size, length // block_size)
            with self._copying:
                if not self.new:
                    raise NotFound(f"Object {uuid_text(self.record.uuid)} has gone meanwhile", hint="leave it")
                assert self.id is not None
                self._blocks.write(target, (self._read(number, offset + done, length),))
                self._blocks.start_writeback(target, length)
            pace(length)

    def _read(self, number: int, offset: int, length: int) -> Data:
        """Bytes of the Object, verified where they are right in any copy; otherwise as they are in copy ``number``."""
        try:
            data = self._blocks.read(self.record, offset, length)
            assert data is not None
            return data
        except (Damaged, DeviceError) as error:
            end = offset + length
            if offset // CHUNK_BYTES == (end - 1) // CHUNK_BYTES:
                return self._read_damaged(number, offset, length, error)
        starts = [offset, *range((offset // CHUNK_BYTES + 1) * CHUNK_BYTES, end, CHUNK_BYTES)]
        return b"".join(
            [self._read(number, at, stop - at) for at, stop in zip(starts, [*starts[1:], end], strict=True)]
        )

    def _read_damaged(self, number: int, offset: int, length: int, problem: Damaged | DeviceError) -> Data:
        """A chunk, or part of one, that is right in no copy that is there; ``problem`` says so.

        A device that is away may come back with the right bytes, and one that cannot read now may do so once more:
        without `salvage` nothing is given up.
        """
        away = not all(map(self._blocks.is_there, self.record.copies))
        if away and not self._salvage:
            raise problem
        copies = self.record.copies
        for copy in (copies[number], *copies[:number], *copies[number + 1 :]):
            try:
                data: Data = self._blocks.read_copy(copy, offset, length)
                break
            except DeviceError:
                continue
        else:
            if away or not self._salvage:
                raise problem
            data = bytes(length)
        self.damaged.append((offset, offset + length))
        log.error("Object %s is damaged, and stays so, from byte %d on", uuid_text(self.record.uuid), offset)
        return data

    def finish(self) -> None:
        """Raise DeviceError if a device that was written to has gone: what was not flushed may be lost, unnoticed."""
        self._blocks.check_unchanged(self._devices)

    def commit(self) -> list[list[Extent]]:
        """The blocks, which are the Object's from now on: `abort` gives nothing back."""
        self.new = []
        return self.copies

    def abort(self) -> None:
        """Give everything back; fine at any time, and more than once."""
        with self._copying:  # who takes it back after that finds what was abandoned
            new, self.new = self.new, []
            if new:
                self._abandon(self, new)

    def take_back(self) -> list[Extent]:
        """The blocks that are not the Object's yet; nothing is read of the old ones, nor written to these, any more."""
        with self._copying:
            new, self.new = self.new, []
        return new


class _Layout:
    """Which blocks of a copy are where."""

    def __init__(self, pieces: Iterable[tuple[Extent, int]]) -> None:
        """``pieces`` are (extent, number of its first block in the copy), ascending."""
        self._pieces = list(pieces)
        self._starts = [start for _, start in self._pieces]

    @classmethod
    def of(cls, copy: Sequence[Extent]) -> _Layout:
        return cls(zip(copy, accumulate((extent.count for extent in copy), initial=0), strict=False))

    def add(self, extents: Iterable[Extent], start: int) -> None:
        """Go on with ``extents``."""
        for extent in extents:
            self._pieces.append((extent, start))
            self._starts.append(start)
            start += extent.count

    def devices(self, first: int, end: int) -> set[int]:
        """The devices that hold any of the blocks from ``first`` to before ``end``."""
        at = max(bisect_right(self._starts, first) - 1, 0)
        return {
            extent.device
            for extent, start in self._pieces[at : bisect_left(self._starts, end)]
            if start + extent.count > first
        }


def _pop(extents: list[Extent], count: int) -> list[Extent]:
    """Take the first ``count`` blocks off ``extents``, which has at least as many."""
    taken = []
    while count:
        device, block, length = extents[0]
        used = min(length, count)
        taken.append(Extent(device, block, used))
        extents[:1] = [Extent(device, block + used, length - used)] if used < length else []
        count -= used
    return taken
