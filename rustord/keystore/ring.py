"""Ring: the journal of one device, batch behind batch in a reserved region, the oldest overwritten first."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from rustord.blockdevice import BlockDevice
from rustord.errors import FormatError, RustordError
from rustord.journal import BATCH, Batch, batch_length, decode_batch, encode_batch
from rustord.label import Geometry

POSITION = struct.Struct("<QQ")
"""number, block: the number of a batch, and where in the ring it begins, in blocks"""

_SCAN_BYTES = 1 << 20
_CARRY_FROM = 0.25
"""How much of a ring is in use when what must be kept of the oldest batches is written once more, to let them go."""


class RingFull(RustordError):
    """There is no room for a batch until older ones have reached the index; never seen by users."""


class _Live(NamedTuple):
    number: int
    block: int
    end: int
    sequence: int


class Ring:
    """The batches of one device.

    ``number`` is that of the next batch, ``block`` where in the ring it will begin. A batch is contiguous: where the
    rest of the ring is too short for it, it begins at the ring's start. Batches stay until `release` lets go of them.
    """

    def __init__(self, device: BlockDevice, device_uuid: bytes, geometry: Geometry, secret: bytes) -> None:
        self.device_uuid = device_uuid
        self.number = 1
        self.block = 0
        self._device = device
        self._secret = secret
        self._block_size = geometry.block_size
        self._offset = geometry.journal_offset
        self._block_count = geometry.journal_length // geometry.block_size
        self._live: deque[_Live] = deque()
        self._lock = threading.Lock()  # batches are let go by another thread than the one that appends

    @property
    def batch_bytes_max(self) -> int:
        """The longest batch: half of the ring, which is free once all older batches have been let go."""
        return self._block_count * self._block_size // 2

    @property
    def used(self) -> float:
        """The part of the ring that is taken by batches the index does not hold yet, 0.0 to 1.0."""
        with self._lock:
            return self._used()

    def _used(self) -> float:
        if not self._live:
            return 0.0
        first, last = self._live[0].block, self._live[-1].end
        return (last - first if last > first else last - first + self._block_count) / self._block_count

    def is_held_by(self, sequence: int, repeated: int = 0) -> bool:
        """Whether a good part of the ring is taken and stays so, because batches from ``sequence`` on must stay.

        The ``repeated`` bytes that would have to be written once more count for nothing, as far as they are no more
        than such a part themselves: they would be held in turn.
        """
        with self._lock:
            kept = min(repeated / (self._block_count * self._block_size), _CARRY_FROM)
            return self._used() > _CARRY_FROM + kept and self._live[0].sequence >= sequence

    @property
    def position(self) -> bytes:
        """Where the next batch goes, for the index to remember."""
        return POSITION.pack(self.number, self.block)

    def append(self, entries: Sequence[bytes], durable: int, sequence: int) -> None:
        """Write a batch of encoded entries, the newest of which is ``sequence``; durable with the device's next flush.

        Raises RingFull (nothing was written), or DeviceError.
        """
        batch = encode_batch(entries, self.device_uuid, self.number, durable, self._secret)
        padding = -len(batch) % self._block_size
        block_count = (len(batch) + padding) // self._block_size
        with self._lock:
            block = self._room(block_count)
        self._device.write(self._offset + block * self._block_size, (batch, bytes(padding)) if padding else (batch,))
        self._live.append(_Live(self.number, block, block + block_count, sequence))
        self.number += 1
        self.block = block + block_count

    def _room(self, block_count: int) -> int:
        """Where in the ring ``block_count`` blocks go."""
        oldest = self._live[0].block if self._live else self._block_count
        if self._live and self.block <= oldest:  # the newest batch is at the start already, the oldest behind it
            if self.block + block_count <= oldest:
                return self.block
        elif self.block + block_count <= self._block_count:
            return self.block
        elif block_count <= (oldest if self._live else self._block_count):
            return 0
        raise RingFull(f"the journal has no room for {block_count} blocks")

    def release(self, number: int, sequence: int) -> None:
        """Let go of the oldest batches, those before batch ``number`` with nothing newer than ``sequence``."""
        live = self._live
        with self._lock:
            while live and live[0].number < number and live[0].sequence <= sequence:
                live.popleft()

    def replay(self, position: bytes | None) -> list[Batch]:
        """The batches from ``position`` on, in order, after which the ring goes on behind them.

        Without a position the whole ring is searched, and the run of batches that ends with the newest is returned.
        """
        if position and len(position) != POSITION.size:
            raise FormatError("a place in a journal, as the index has it, is damaged", hint="rebuild the index")
        found = list(self._follow(*POSITION.unpack(position))) if position else self._search()
        for block, batch in found:
            end = block + -(-batch.length // self._block_size)
            newest = max((entry.sequence for entry in batch.entries), default=0)
            self._live.append(_Live(batch.number, block, end, newest))
            self.number, self.block = batch.number + 1, end
        return [batch for _, batch in found]

    def is_broken(self) -> bool:
        """Whether newer batches lie behind the end that `replay` found.

        Then a batch between is damaged, or the position is an old one: these batches were written over what followed
        upon it, and if they went around the ring, one of them is at its start.
        """
        count = max(0, min(_SCAN_BYTES // self._block_size, self._block_count - self.block))
        data = self._read_bytes(self.block, count * self._block_size)
        heads = [block for block in range(count) if batch_length(data[block * self._block_size :]) is not None]
        there = [self._read(block) for block in (0, *(self.block + head for head in heads))]
        return any(batch is not None and batch.number > self.number for batch in there)

    def is_torn(self, number: int, block: int) -> bool:
        """Whether batch ``number``, which is not there whole, was begun in ``block`` or at the start of the ring."""
        for at in {block, 0} - {self._block_count}:
            head = self._read_bytes(at, self._block_size)
            if batch_length(head) is not None and BATCH.unpack_from(head)[3] == number:
                return True
        return False

    def _follow(self, number: int, block: int) -> Iterator[tuple[int, Batch]]:
        self.number, self.block = number, block
        while True:
            for at in (block, 0):
                batch = self._read(at)
                if batch is not None and batch.number == number:
                    break
            else:
                return
            yield at, batch
            number, block = number + 1, at + -(-batch.length // self._block_size)

    def _read(self, block: int) -> Batch | None:
        if block >= self._block_count:
            return None
        head = self._read_bytes(block, self._block_size)
        length = batch_length(head)
        if length is None or block * self._block_size + length > self._block_count * self._block_size:
            return None
        data = head if length <= len(head) else self._read_bytes(block, length)
        return decode_batch(data, self.device_uuid, self._secret)

    def _read_bytes(self, block: int, length: int) -> memoryview:
        data = memoryview(bytearray(length))
        self._device.read(self._offset + block * self._block_size, (data,))
        return data

    def _search(self) -> list[tuple[int, Batch]]:
        return newest_run(self.batches())

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Every whole batch that stands in the ring, and in which of its blocks; also those that were let go."""
        step = _SCAN_BYTES // self._block_size
        for first in range(0, self._block_count, step):
            count = min(step, self._block_count - first)
            data = self._read_bytes(first, count * self._block_size)
            for block in range(count):
                start = block * self._block_size
                if batch_length(data[start : start + BATCH.size]) is not None:
                    batch = self._read(first + block)
                    if batch is not None:
                        yield first + block, batch


def lost_batches(batches: Iterable[tuple[int, Batch]], block_size: int, block_count: int) -> Iterator[int]:
    """The numbers of batches that are missing between ``batches`` though no newer one was written over them.

    Where the numbers go on to the right of a batch, nobody has come around since: that would have overwritten it first.
    Where they go on at the start of the ring, what came between may have been there, and be overwritten by newer ones,
    which begin before what was left of it, or in the first block. What is behind the newest one may have been hit by
    another that a power cut tore: that leaves any of the sectors there as they were, also those of the first batches.
    If it did not fit before the end of the ring, of ``block_count`` blocks, that is so from its start on.
    """
    found = sorted(batches, key=lambda item: item[1].number)
    ends = [block + -(-batch.length // block_size) for block, batch in found]
    longest = max((end - block for end, (block, _) in zip(ends, found, strict=True)), default=0)
    safe_end = ends[-1] if found and ends[-1] + longest <= block_count else 0
    for at, ((block, batch), (next_block, following)) in enumerate(pairwise(found)):
        missing = range(batch.number + 1, following.number)
        if missing and next_block < block + -(-batch.length // block_size):
            is_overwritten = any(start < next_block for start, _ in found[at + 2 :])
            if is_overwritten or (next_block == 0 and len(missing) > 1):
                continue
        if block < safe_end:
            yield from missing


def newest_run(batches: Iterable[tuple[int, Batch]]) -> list[tuple[int, Batch]]:
    """Those of ``batches`` that make up the journal: the longest run of numbers that ends with the highest one."""
    found = {batch.number: (block, batch) for block, batch in batches}
    number = max(found, default=0)
    run = []
    while number in found:
        run.append(found[number])
        number -= 1
    return run[::-1]
