"""An Object as a block device: right bytes or an error, whatever happens to the Object meanwhile."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from rustord.change import Delete, Put
from rustord.errors import Damaged, InUse, NotFound, ReadOnly
from rustord.export import Run, State
from rustord.extent import Extent
from rustord.manifest import CHUNK_BYTES
from rustord.objectexport import ObjectExport
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId
from rustord.record import Metadata, Record
from rustord.volumes import Volumes
from rustord.writer import Writer

MIB = 1 << 20


Export = Callable[[ObjectId], ObjectExport]


@pytest.fixture
def export(store: ObjectStore) -> Iterator[Export]:
    """Opens Objects; closes them in the end."""
    made: list[ObjectExport] = []

    def make(uuid: ObjectId) -> ObjectExport:
        made.append(ObjectExport(store, store.pins.begin_export(uuid)))
        return made[-1]

    yield make
    for opened in made:
        opened.close()


def read(opened: ObjectExport, offset: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    opened.read(offset, memoryview(buffer))
    return bytes(buffer)


def flip(store: ObjectStore, uuid: ObjectId, offset: int) -> None:
    """Change a byte of an Object on its device."""
    device, block, _ = store.stat(uuid).copies[0][0]
    at = block * store.label.block_size + offset
    byte = bytearray(1)
    disk = store.blocks.device(device)
    disk.read(at, (byte,))
    disk.write(at, (bytes((byte[0] ^ 1,)),))


@pytest.mark.parametrize("size", [1, 511, 512, 513, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * MIB + 77])
def test_any_range_reads_as_the_object_does_with_zeros_behind_it(
    store: ObjectStore, export: Export, size: int, seed: int
) -> None:
    random_ = random.Random(seed)
    data = random_.randbytes(size)
    opened = export(store.put(data).uuid)
    assert opened.size == len(padded := data + bytes(-size % 512))
    for _ in range(200):
        offset = random_.randrange(opened.size)
        length = random_.randrange(1, min(opened.size - offset, random_.choice((1, 600, 5000, MIB))) + 1)
        assert read(opened, offset, length) == padded[offset : offset + length]
    assert read(opened, 0, opened.size) == padded


def test_an_empty_object_has_no_bytes(store: ObjectStore, export: Export) -> None:
    assert export(store.put(b"").uuid).size == 0


def test_damage_is_an_error_and_all_else_is_still_there(store: ObjectStore, export: Export) -> None:
    data = os.urandom(4 * CHUNK_BYTES)
    uuid = store.put(data).uuid
    flip(store, uuid, CHUNK_BYTES + 5)
    opened = export(uuid)
    for offset in (CHUNK_BYTES, CHUNK_BYTES + 4096, 2 * CHUNK_BYTES - 1):
        with pytest.raises(Damaged):
            read(opened, offset, 1)
    with pytest.raises(Damaged):
        read(opened, 0, len(data))
    assert read(opened, 0, CHUNK_BYTES) == data[:CHUNK_BYTES]
    assert read(opened, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES) == data[2 * CHUNK_BYTES :]


def test_what_leaves_the_page_cache_is_compared_again(store: ObjectStore, export: Export) -> None:
    data = os.urandom(4 * CHUNK_BYTES)
    uuid = store.put(data).uuid
    opened = export(uuid)
    assert read(opened, 0, len(data)) == data
    flip(store, uuid, CHUNK_BYTES + 5)
    device = store.blocks.device(0)
    device.flush()
    os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # type: ignore[attr-defined]
    with pytest.raises(Damaged):
        read(opened, CHUNK_BYTES + 4096, 100)
    assert read(opened, 0, 100) == data[:100]


def test_it_is_only_read(store: ObjectStore, export: Export) -> None:
    opened = export(store.put(b"data").uuid)
    assert opened.read_only
    with pytest.raises(ReadOnly):
        opened.write(0, memoryview(b"x"))
    with pytest.raises(ReadOnly):
        opened.trim(0, 512)
    with pytest.raises(ReadOnly):
        opened.zero(0, 512, keep=False, fast=False)
    opened.flush()
    assert list(opened.runs(100, 412)) == [Run(412, State.DATA)]


def test_it_is_not_deleted_as_long_as_it_is_open(store: ObjectStore) -> None:
    uuid = store.put(b"data" * 1000).uuid
    first, second = (ObjectExport(store, store.pins.begin_export(uuid)) for _ in range(2))
    for opened, clients in ((first, 2), (second, 1)):
        with pytest.raises(InUse, match=f"by {clients} connections"):
            store.delete(uuid)
        assert read(opened, 0, 4) == b"data"
        opened.close()
    store.delete(uuid)
    with pytest.raises(NotFound):
        store.pins.begin_export(uuid)


def test_when_another_gets_its_name_its_blocks_stay(store: ObjectStore, export: Export) -> None:
    data = os.urandom(MIB)
    before = store.allocator.free_count(0)
    uuid = store.put(data, name="disk").uuid
    opened = ObjectExport(store, store.pins.begin_export(uuid))
    store.put(b"another", name="disk")
    for _ in range(5):
        store.cycle(())
    assert read(opened, 0, MIB) == data
    held = store.allocator.free_count(0)
    opened.close()
    store.cycle(store.cycle(()).following)
    assert held < store.allocator.free_count(0) <= before


def test_a_moved_object_is_read_where_it_is_and_its_old_blocks_are_given_back(store: ObjectStore) -> None:
    data = os.urandom(MIB)
    uuid = store.put(data).uuid
    opened = ObjectExport(store, store.pins.begin_export(uuid))
    assert read(opened, 0, MIB) == data
    old = store.stat(uuid)
    free = store.allocator.free_count(0)
    changes = [store.relocations.prepare(old, old.extents)]
    for _ in range(5):
        store.keystore.checkpoint()
        changes = store.cycle(changes).following  # type: ignore[assignment]
    assert store.stat(uuid).extents != old.extents
    assert store.allocator.free_count(0) < free
    assert read(opened, 0, MIB) == data
    opened.follow()
    for _ in range(5):
        changes = store.cycle(changes).following  # type: ignore[assignment]
    assert store.allocator.free_count(0) == free
    assert read(opened, 0, MIB) == data
    with pytest.raises(InUse):
        store.delete(uuid)
    opened.close()
    opened.follow()
    store.delete(uuid)


def test_a_deletion_that_began_before_is_seen(store: ObjectStore) -> None:
    uuid = store.put(b"data").uuid
    cycle = store.cycle([Delete(uuid)])
    with pytest.raises(NotFound):
        store.pins.begin_export(uuid)
    while cycle.following:
        cycle = store.cycle(cycle.following)


@pytest.mark.parametrize("size", [MIB // 2, 3 * MIB])
def test_an_object_that_is_open_stays_when_the_last_clone_of_it_is_deleted(store: ObjectStore, size: int) -> None:
    writer = Writer(store)
    volumes = Volumes(store, writer)
    try:
        data = random.Random(size).randbytes(size)
        ((_, record),) = writer.make([Put(data, Metadata("image"))], 10)
        assert isinstance(record, Record)
        opened = ObjectExport(store, writer.call(lambda: store.pins.begin_export(record.uuid)))
        volumes.clone("image", "disk")
        writer.make([Put(b"new", Metadata("image"))], 10)
        volumes.delete("disk")  # which waits for no reader
        assert read(opened, 0, size) == data
        opened.close()
        writer.make([Put(b"newer", Metadata("image"))], 10)  # whose cycle takes what was held
        writer.close()
        assert all(is_zero(store, extent) for extent in record.extents)
    finally:
        writer.close()


def is_zero(store: ObjectStore, extent: Extent) -> bool:
    return not any(store.blocks.read_copy((extent,), 0, extent.count * store.label.block_size))
