"""Devices for tests: in memory, losing what was not flushed when the power goes off, and failing as they are told to.

A whole store runs on them, so a test can try what a real disk does once in ten years. Nothing here is random: whoever
cuts the power says what survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rustord.blockdevice import BlockDevice, Buffer
from rustord.errors import DeviceError

SECTOR_BYTES = 512
"""What a device writes whole or not at all."""

_ZEROS = bytes(SECTOR_BYTES)


class PowerCut(Exception):
    """The power went off; nothing more can be done with any device."""


class Power:
    """Lets the power go off at the n-th operation: after ``left`` more writes and flushes, if that is not None."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.used = 0

    def spend(self) -> None:
        self.used += 1
        if self.left is not None:
            if self.left <= 0:
                raise PowerCut
            self.left -= 1


class Write(NamedTuple):
    """``data`` was written to device number ``device`` at byte ``offset``. Whole sectors."""

    device: int
    offset: int
    data: bytes


class Flush(NamedTuple):
    """Whatever had been written to device number ``device`` was made durable."""

    device: int


class MemoryDevice:
    """A `BlockDevice` in memory. ``sectors`` has those that are not zero, by their number, and may be shared."""

    def __init__(self, size: int, sectors: Mapping[int, bytes] | None = None, path: str = "memory") -> None:
        self.path = path
        self.size = size
        self.block_size = SECTOR_BYTES
        self.rotational = False
        self.read_only = False
        self.failed = ""
        self.sectors: dict[int, bytes] = dict(sectors or {})

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        if not 0 <= offset <= self.size - length:
            raise DeviceError(f"{self.path}: {length} bytes at byte {offset} are not all on the device")
        first, end = offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES)
        data = b"".join([self.sectors.get(number, _ZEROS) for number in range(first, end)])
        at = offset - first * SECTOR_BYTES
        for buffer in buffers:
            memoryview(buffer)[:] = data[at : at + len(buffer)]
            at += len(buffer)

    def block(self, number: int, block_size: int = 4096) -> bytes:
        """What block ``number`` holds."""
        data = bytearray(block_size)
        self.read(number * block_size, (data,))
        return bytes(data)

    def read_now(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self.read(offset, buffers)
        return True

    def reread(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        assert not (offset | len(data)) % SECTOR_BYTES, f"a write of {len(data)} bytes at byte {offset}"
        if not 0 <= offset <= self.size - len(data):
            raise DeviceError(f"{self.path}: {len(data)} bytes at byte {offset} are not all on the device")
        put_sectors(self.sectors, offset, data)

    def flush(self) -> None:
        pass

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, (bytes(length),))

    def scratch(self, offset: int, length: int) -> None:
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        pass

    def start_writeback(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


def put_sectors(
    sectors: dict[int, bytes], offset: int, data: bytes, keep: Callable[[int], bool] = lambda number: True
) -> None:
    """Put ``data`` into ``sectors`` from byte ``offset`` on, but only those whose number ``keep`` says yes to."""
    first = offset // SECTOR_BYTES
    for number in range(first, first + len(data) // SECTOR_BYTES):
        if keep(number):
            at = (number - first) * SECTOR_BYTES
            sector = data[at : at + SECTOR_BYTES]
            if sector == _ZEROS:
                sectors.pop(number, None)
            else:
                sectors[number] = sector


class _Unflushed(NamedTuple):
    offset: int
    old: bytes
    new: bytes


class VolatileDevice:
    """A `BlockDevice` over another one (an image file, say) that may lose whatever has not been flushed.

    Writes go to the device below at once, and what they replaced is kept; `cut_power` puts that back, but for the
    sectors of which it is told that they had reached the medium. A flush makes everything so far durable, unless it
    has been told to fail. As of a kernel, a failure is reported once: a flush that is tried again succeeds, though what
    the first one should have made durable may be lost. It is for the store not to believe it.
    """

    def __init__(
        self,
        below: BlockDevice,
        power: Power | None = None,
        number: int = 0,
        record: Callable[[Write | Flush], None] = lambda event: None,
    ) -> None:
        """``record`` is told of each write, and of each flush that succeeded, with the ``number`` of the device."""
        self.path = below.path
        self.size = below.size
        self.block_size = below.block_size
        self.rotational = below.rotational
        self.read_only = below.read_only
        self.failed = ""
        self.flush_count = 0
        """How many flushes succeeded."""
        self.fail_flushes = 0
        """How many of the next flushes fail."""
        self.fail_writes: bool | range = False
        """Whether writes fail: all, or those that touch a byte of a range."""
        self.fail_reads: bool | range = False
        """Whether reads fail: all, or those that touch a byte of a range."""
        self.fail_scratches = False
        self.stall: Callable[[str], None] = lambda operation: None
        """Called before each "read", "write" and "flush"; it may wait as long as the device is to hang."""
        self.gone = False
        """Whether the device has disappeared: everything fails, reads too."""
        self.strict = True
        """Whether the device refuses everything after a failure, as `BlockDevice` demands."""
        self._below = below
        self._power = power or Power()
        self._number = number
        self._record = record
        self._unflushed: list[_Unflushed] = []
        self._lost: list[_Unflushed] = []

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.stall("read")
        if self.gone or _touches(self.fail_reads, offset, sum(map(len, buffers))):
            raise DeviceError(f"{self.path}: reading at byte {offset} fails, as it was told to")
        self._below.read(offset, buffers)

    def read_now(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        fails = self.gone or _touches(self.fail_reads, offset, sum(map(len, buffers)))
        return not fails and self._below.read_now(offset, buffers)

    def reread(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.gone or _touches(self.fail_reads, offset, sum(map(len, buffers))):
            raise DeviceError(f"{self.path}: reading at byte {offset} fails, as it was told to")
        self._below.reread(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.stall("write")
        self._power.spend()
        self._refuse_if_failed()
        new = b"".join(buffers)
        if self.gone or _touches(self.fail_writes, offset, len(new)):
            self._fail("a write failed, as it was told to")
        head = offset % SECTOR_BYTES
        old = bytearray(head + len(new) + -(offset + len(new)) % SECTOR_BYTES)
        self._below.read(offset - head, (old,))
        sectors = bytes(old[:head] + new + old[head + len(new) :])  # whole ones, as the page cache writes them
        self._unflushed.append(_Unflushed(offset - head, bytes(old), sectors))
        self._record(Write(self._number, offset - head, sectors))
        self._below.write(offset - head, (sectors,))

    def flush(self) -> None:
        self.stall("flush")
        self._power.spend()
        self._refuse_if_failed()
        if self.gone or self.fail_flushes:
            self.fail_flushes = max(0, self.fail_flushes - 1)
            self._lost += self._unflushed
            self._unflushed = []
            self._fail("a flush failed, as it was told to")
        self.flush_count += 1
        self._unflushed = []
        if not self._lost:  # a flush behind one that failed makes nothing durable of what was before
            self._record(Flush(self._number))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, (bytes(length),))

    def scratch(self, offset: int, length: int) -> None:
        if self.gone or self.fail_scratches:
            raise DeviceError(f"{self.path}: zeroing at byte {offset} fails, as it was told to")
        self._record(Write(self._number, offset, bytes(length)))
        self._below.write(offset, (bytes(length),))

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, (b"\xdb" * length,))  # it may read as anything, so not as zeros

    def start_writeback(self, offset: int, length: int) -> None:
        pass

    def flip(self, offset: int, mask: int = 0x08) -> None:
        """Flip bits of the byte at ``offset``, on the medium, as if it had decayed."""
        start = offset // SECTOR_BYTES * SECTOR_BYTES
        sector = bytearray(SECTOR_BYTES)
        self._below.read(start, (sector,))
        sector[offset - start] ^= mask
        self._below.write(start, (sector,))

    def close(self) -> None:
        if self._power.left != 0:  # otherwise `cut_power` is still to come
            self._below.close()

    def cut_power(self, keep: Callable[[int], bool] = lambda offset: False) -> None:
        """Lose what was not flushed, but for the sectors for whose offset ``keep`` says yes; and close the device."""
        unflushed = self._lost + self._unflushed
        self._below.failed = ""
        for offset, old, _ in reversed(unflushed):
            self._below.write(offset, (old,))
        for offset, _, new in unflushed:
            for at in range(0, len(new), SECTOR_BYTES):
                if keep(offset + at):
                    self._below.write(offset + at, (new[at : at + SECTOR_BYTES],))
        self._below.close()

    def _refuse_if_failed(self) -> None:
        if self.failed and self.strict:
            raise DeviceError(f"{self.path} takes no writes any more: {self.failed}")

    def _fail(self, why: str) -> None:
        self.failed = self.failed or why
        raise DeviceError(f"{self.path}: {why}")


def _touches(fails: bool | range, offset: int, length: int) -> bool:
    if isinstance(fails, bool):
        return fails
    return fails.start < offset + length and offset < fails.stop
