"""ObjectExport: a stored Object as a block device that is only read.

What is guaranteed: every byte comes from a chunk (64 KiB) that has been compared with its checksum since the client
opened the Object, and the comparison counts only as long as the chunk stays in the page cache: what has to be read from
a device again is compared again (see `rustord.objectreader`). A chunk that does not match is tried once more and then
on every other copy, as for a GET, and answered with EIO if none is right.

An Object that is open cannot be deleted. It may be replaced by name; its blocks then stay until nobody reads them any
more. It may be moved to other blocks; then it is read there from then on. Behind the last byte there are zeros up to a
multiple of 512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

from rustord.blockdevice import BlockDevice
from rustord.errors import ReadOnly
from rustord.export import Kind, Run, State
from rustord.gate import Gate
from rustord.lease import Place
from rustord.objectreader import ObjectReader
from rustord.objectstore import ObjectStore
from rustord.record import Record

SECTOR_BYTES = 512


class ObjectExport:
    """One client's view of an Object that `Pins.begin_export` holds; see `rustord.export.Export`."""

    kind = Kind.OBJECT
    read_only = True
    block_size = 4096

    def __init__(
        self, store: ObjectStore, record: Record, on_close: Callable[[ObjectExport], None] = lambda export: None
    ) -> None:
        slots = store.blocks.slots
        devices = [slots[index].device for index in record.devices if index in slots]
        self.key = str(record.key)
        self.rotational = any(device is not None and device.rotational for device in devices)
        self.size = -(-record.size // SECTOR_BYTES) * SECTOR_BYTES
        self._store = store
        self._on_close = on_close
        self._gate = Gate()
        self._closed = False
        self._reader = ObjectReader(store.blocks, record)

    def follow(self) -> None:
        """Let go of the blocks that the Object had before it was moved. Called now and then by another thread."""
        store, old = self._store, self._reader.record
        now = store.keystore.get(old.uuid)
        if now is None or now.id == old.id:
            return
        with self._gate.shut():
            if not self._closed and store.pins.continue_export(old, now):
                self._reader = ObjectReader(store.blocks, now)

    def read(self, offset: int, buffer: memoryview) -> None:
        with self._gate:
            reader = self._reader
            inside = reader.record.size - offset
            if len(buffer) > inside:
                inside = max(inside, 0)
                buffer[inside:] = bytes(len(buffer) - inside)
                buffer = buffer[:inside]
            if buffer and not reader.read_now(offset, buffer):
                buffer[:] = self._store.read(reader.record, offset, len(buffer))

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
        with self._gate.shut():
            self._closed = True
            self._store.pins.end_export(self._reader.record)

    # Of `rustord.lease.Grantor`

    @property
    def grantor(self) -> ObjectExport:
        return self

    @property
    def gates(self) -> tuple[Gate, Gate]:
        return self._gate, self._store.layers.gate

    def grant(self, first: int, end: int) -> list[Place | None]:
        with self._gate, self._store.layers.gate:
            return self._reader.places(first, end)

    def dirtied(self, devices: Iterable[tuple[int, BlockDevice]]) -> None:
        """Nothing writes to an Object."""

    def flushed(self, slot: int, taken_s: float) -> None:
        """Nobody flushes it."""
