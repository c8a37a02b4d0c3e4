"""ObjectExport: a stored Object as a block device that is only read.

What is guaranteed: every byte comes from a chunk (64 KiB) that has been compared with its checksum since the client
opened the Object, and the comparison counts only as long as the chunk stays in the page cache: what has to be read from
a device again is compared again. (One way past that is left: a page that the kernel reads ahead, of a chunk that was
compared before and has left the cache without anybody noticing.) A chunk that does not match is tried once more and
then on every other copy, as for a GET, and answered with EIO if none is right.

An Object that is open cannot be deleted. It may be replaced by name; its blocks then stay until nobody reads them any
more. It may be moved to other blocks; then it is read there from then on. Behind the last byte there are zeros up to a
multiple of 512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from typing import NoReturn

from rustord.errors import ReadOnly
from rustord.export import Run, State
from rustord.manifest import CHUNK_BYTES, chunk_count
from rustord.objectstore import ObjectStore
from rustord.record import Record

SECTOR_BYTES = 512
AROUND_CHUNKS = 64
"""When a chunk has left the page cache, so many on either side are compared again: the kernel may read ahead."""


class ObjectExport:
    """One client's view of an Object that `ObjectStore.begin_export` holds; see `rustord.export.Export`."""

    read_only = True
    block_size = 4096

    def __init__(
        self, store: ObjectStore, record: Record, on_close: Callable[[ObjectExport], None] = lambda export: None
    ) -> None:
        slots = store.blocks.slots
        devices = [slots[index].device for index in record.devices if index in slots]
        self.rotational = any(device is not None and device.rotational for device in devices)
        self.size = -(-record.size // SECTOR_BYTES) * SECTOR_BYTES
        self._store = store
        self._on_close = on_close
        self._reading = Lock()
        self._closed = False
        self._take(record)

    def _take(self, record: Record) -> None:
        self._record = record
        self._copy = self._store.blocks.preferred(record)
        self._verified = bytearray(chunk_count(record.size))
        """Whether each chunk has been compared, on this copy."""

    def follow(self) -> None:
        """Let go of the blocks that the Object had before it was moved. Called now and then by another thread."""
        store, old = self._store, self._record
        now = store.keystore.get(old.uuid)
        if now is None or now.id == old.id or not self._reading.acquire(blocking=False):
            return
        try:
            if not self._closed and store.continue_export(old, now):
                self._take(now)
        finally:
            self._reading.release()

    def read(self, offset: int, buffer: memoryview) -> None:
        with self._reading:
            self._read(self._record, offset, buffer)

    def _read(self, record: Record, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > record.size:
            inside = max(record.size - offset, 0)
            buffer[inside:] = bytes(len(buffer) - inside)
            buffer = buffer[:inside]
            if not inside:
                return
        first, end = offset // CHUNK_BYTES, (offset + len(buffer) - 1) // CHUNK_BYTES + 1
        if self._verified.find(0, first, end) < 0:
            if self._store.blocks.read_copy_now(record, self._copy, offset, buffer):
                return
            around = slice(max(first - AROUND_CHUNKS, 0), min(end + AROUND_CHUNKS, len(self._verified)))
            self._verified[around] = bytes(around.stop - around.start)
        self._read_verified(record, first, end, offset, buffer)

    def _read_verified(self, record: Record, first: int, end: int, offset: int, buffer: memoryview) -> None:
        """The same by whole chunks; remembers which match. Raises Damaged, DeviceError or NotFound."""
        start = first * CHUNK_BYTES
        length = min(end * CHUNK_BYTES, record.size) - start
        chunks = buffer if length == len(buffer) else memoryview(bytearray(length))
        if self._store.blocks.read_copy_now(record, self._copy, start, chunks, verify=True):
            self._verified[first:end] = bytes((1,)) * (end - first)
        else:
            # From the device or another copy: not to be remembered before it is found in the cache, on this copy.
            chunks = self._store.read(record, start, length)
        if chunks is not buffer:
            buffer[:] = chunks[offset - start : offset - start + len(buffer)]

    def runs(self, offset: int, length: int) -> Iterable[Run]:
        return (Run(length, State.DATA),)

    def flush(self) -> None:
        """There is nothing to be flushed."""

    def write(self, offset: int, data: memoryview) -> NoReturn:
        raise ReadOnly("an Object is immutable", hint="make a volume from it: 'rustorctl volume clone'")

    def trim(self, offset: int, length: int) -> NoReturn:
        raise ReadOnly("an Object is immutable")

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> NoReturn:
        raise ReadOnly("an Object is immutable")

    def close(self) -> None:
        self._on_close(self)
        with self._reading:
            self._closed = True
            self._store.end_export(self._record)
