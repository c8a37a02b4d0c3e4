from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import rustord
from rustord.errors import Forbidden, NotFound
from rustord.frontends.exports import Exports, Offered
from rustord.objectstore import ObjectStore
from rustord.wire.api import Role
from rustord.writer import Writer
from tests.daemon import make_pool


@pytest.fixture
def store(image: Path) -> Iterator[ObjectStore]:
    make_pool(image)
    with rustord.open(image) as opened:
        yield opened


@pytest.fixture
def exports(store: ObjectStore) -> Iterator[Exports]:
    writer = Writer(store)
    yield Exports(store, writer)
    assert writer.close()


def test_names_are_told_with_what_they_are(store: ObjectStore, exports: Exports) -> None:
    store.put(b"x" * 5000, name="b")
    store.put(b"", name="a")
    store.put(b"without a name")
    assert list(exports.names()) == [("a", "Object, 0 B"), ("b", "Object, 4.9 KiB")]


def test_objects_are_found_by_name_and_uuid(store: ObjectStore, exports: Exports) -> None:
    key = store.put(b"x" * 5000, name="disk")
    for name in ("disk", str(key), str(key).upper(), str(key).replace("-", "")):
        export, description = exports.look(name)
        assert (export.size, description) == (5120, "Object, 4.9 KiB")
    for name in ("", "Disk", "disk ", "n" * 4096, "0" * 31, "0" * 32):
        with pytest.raises(NotFound):
            exports.look(name)
        with pytest.raises(NotFound):
            exports.open(name)
    assert not store._exports


def test_a_name_goes_before_a_uuid(store: ObjectStore, exports: Exports) -> None:
    key = store.put(b"x" * 512)
    store.put(b"y" * 1024, name=str(key))
    assert exports.look(str(key))[0].size == 1024


def test_what_is_open_follows_until_it_is_closed(store: ObjectStore, exports: Exports) -> None:
    store.put(b"x" * 5000, name="disk")
    export, _ = exports.open("disk")
    assert store._exports
    exports.follow()
    export.close()
    exports.follow()
    assert not store._exports
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
