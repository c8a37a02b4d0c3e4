from __future__ import annotations

from collections.abc import Iterator

import pytest

from rustord.errors import Forbidden, InUse, NotFound
from rustord.frontends.exports import Exports, Offered
from rustord.objectstore import ObjectStore
from rustord.volumes import Volumes
from rustord.wire.api import Role
from rustord.writer import Writer


@pytest.fixture
def volumes(store: ObjectStore) -> Iterator[Volumes]:
    writer = Writer(store)
    yield Volumes(store, writer)
    assert writer.close()


@pytest.fixture
def exports(store: ObjectStore, volumes: Volumes) -> Exports:
    return Exports(store, volumes._writer, volumes)  # type: ignore[arg-type]


def test_names_are_told_with_what_they_are(store: ObjectStore, exports: Exports) -> None:
    store.put(b"x" * 5000, name="b")
    store.put(b"", name="a")
    store.put(b"without a name")
    assert list(exports.names()) == [("a", "Object, 0 B"), ("b", "Object, 4.9 KiB")]


def test_objects_are_found_by_name_and_uuid(store: ObjectStore, exports: Exports) -> None:
    key = store.put(b"x" * 5000, name="disk")
    for name in ("disk", str(key), str(key).upper(), str(key).replace("-", "")):
        export, description = exports.look(name, Role.READER)
        assert (export.size, description) == (5120, "Object, 4.9 KiB")
    for name in ("", "Disk", "disk ", "n" * 4096, "0" * 31, "0" * 32):
        with pytest.raises(NotFound):
            exports.look(name, Role.READER)
        with pytest.raises(NotFound):
            exports.open(name, Role.READER)
    assert not store.pins._exports


def test_a_name_goes_before_a_uuid(store: ObjectStore, exports: Exports) -> None:
    key = store.put(b"x" * 512)
    store.put(b"y" * 1024, name=str(key))
    assert exports.look(str(key), Role.READER)[0].size == 1024


def test_what_is_open_follows_until_it_is_closed(store: ObjectStore, exports: Exports) -> None:
    store.put(b"x" * 5000, name="disk")
    export, _ = exports.open("disk", Role.READER)
    assert store.pins._exports
    exports.follow()
    export.close()
    exports.follow()
    assert not store.pins._exports
    assert not exports._open


def test_a_role_is_needed(store: ObjectStore, exports: Exports) -> None:
    store.put(b"x", name="disk")
    nobody, reader = Offered(exports, Role.NOBODY), Offered(exports, Role.READER)
    for ask in (nobody.names, lambda: nobody.look("disk"), lambda: nobody.open("disk")):
        with pytest.raises(Forbidden):
            ask()
    assert list(reader.names())
    assert reader.look("disk")
    reader.open("disk")[0].close()


def test_volumes_go_before_objects(store: ObjectStore, volumes: Volumes, exports: Exports) -> None:
    store.put(b"x" * 5000, name="disk")
    store.put(b"x" * 5000, name="other")
    volumes.create("disk", 1 << 20)
    assert list(exports.names()) == [("disk", "Volume, 1.0 MiB"), ("other", "Object, 4.9 KiB")]
    shape, description = exports.look("disk", Role.WRITER)
    assert (shape.size, shape.read_only, shape.block_size, description) == (1 << 20, False, 65536, "Volume, 1.0 MiB")
    opened, _ = exports.open("disk", Role.WRITER)
    opened.write(100, memoryview(b"data"))
    assert (opened.size, opened.block_size) == (1 << 20, 65536)
    with pytest.raises(InUse):
        volumes.delete("disk")
    opened.close()
    volumes.delete("disk")
    assert exports.look("disk", Role.WRITER)[1] == "Object, 4.9 KiB"


def test_a_reader_does_not_write_to_a_volume(volumes: Volumes, exports: Exports) -> None:
    volumes.create("disk", 1 << 20)
    writing, reading = exports.open("disk", Role.WRITER)[0], exports.open("disk", Role.READER)[0]
    assert (exports.look("disk", Role.READER)[0].read_only, reading.read_only, writing.read_only) == (True, True, False)
    writing.write(100, memoryview(b"data"))
    buffer = memoryview(bytearray(4))
    reading.read(100, buffer)
    assert buffer == b"data"
    assert [run.length for run in reading.runs(0, 131072)] == [65536, 65536]
    reading.flush()
    for change in (
        lambda: reading.write(0, buffer),
        lambda: reading.trim(0, 512),
        lambda: reading.zero(0, 512, keep=False, fast=False),
    ):
        with pytest.raises(Forbidden):
            change()
    reading.close()
    writing.close()
    assert volumes.stat("disk").open_count == 0
