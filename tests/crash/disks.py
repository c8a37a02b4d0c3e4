"""Volumes of a Story, and what they may hold after a power cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

from rustord.errors import DeviceError
from rustord.layermover import LayerMover
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES
from rustord.testing.device import SECTOR_BYTES
from rustord.volume import Volume
from rustord.volumes import Volumes
from tests.simulation import Direct

if TYPE_CHECKING:
    from tests.crash.story import Content, Story


class Disk(NamedTuple):
    """What a volume may hold: what was ``flushed``, and in each sector also what has been ``written`` since.

    ``written`` are (offset, data), in order.
    """

    flushed: bytes
    written: tuple[tuple[int, bytes], ...] = ()

    def versions(self) -> list[bytes]:
        """What it held after each write, the newest last."""
        versions = [self.flushed]
        for offset, data in self.written:
            versions.append(versions[-1][:offset] + data + versions[-1][offset + len(data) :])
        return versions

    def overwritten(self, offset: int, data: bytes) -> Disk:
        """What it may hold after a write that was flushed, and perhaps nothing else was."""
        written = tuple((at, _patched(old, offset - at, data)) for at, old in self.written)
        return Disk(_patched(self.flushed, offset, data), written)

    def may_be(self, data: bytes) -> bool:
        versions = self.versions()
        sectors = (slice(at, at + SECTOR_BYTES) for at in range(0, len(self.flushed), SECTOR_BYTES))
        return data in versions or (
            len(data) == len(self.flushed)
            and all(any(data[sector] == version[sector] for version in versions) for sector in sectors)
        )


def _patched(old: bytes, offset: int, data: bytes) -> bytes:
    """``old`` with as much of ``data`` as lies within it, from ``offset`` on."""
    begin, end = max(offset, 0), max(offset + len(data), 0)
    return (old[:begin] + data[max(-offset, 0) :] + old[end:])[: len(old)]


def found_disks(
    store: ObjectStore, expected: Mapping[str, Disk], unsure: Mapping[str, bytes], objects: Collection[bytes]
) -> dict[str, Disk]:
    """Assert that the volumes are as users ``expected`` them; returns what they hold.

    The ``unsure`` ones are being made or deleted, or become an Object of that data; ``objects`` is what all have.
    """
    there = {name: _content(store, name) for name in store.layers.volumes}
    assert there.keys() <= expected.keys(), "a deleted volume came back"
    for name, disk in expected.items():
        is_object = bool(unsure.get(name)) and unsure[name] in objects
        if name in there:
            assert disk.may_be(there[name]), f"volume {name} has changed"
            assert not is_object, f"volume {name} is an Object as well"
        else:
            assert name in unsure, f"volume {name} is lost"
            assert is_object or not unsure[name], f"volume {name} has become nothing"
    return {name: Disk(data) for name, data in there.items()}


def _content(store: ObjectStore, name: str) -> bytes:
    layer = store.layers.volumes[name]
    buffer = bytearray(layer.head.size)
    store.layers.fill(store.layers.chain(layer), 0, memoryview(buffer))
    return bytes(buffer)


class Disks:
    """Does to volumes what users do, and lets the stage of the ``story`` know what they are told."""

    def __init__(self, story: Story) -> None:
        self._stage = story.stage
        self._store = story.store
        self._volumes = Volumes(story.store, Direct(story.store))

    def create(self, name: str, chunk_count: int) -> None:
        with self._unsure(name, Disk(bytes(chunk_count * CHUNK_BYTES))):
            self._volumes.create(name, chunk_count * CHUNK_BYTES)

    def clone(self, object_name: str, name: str) -> None:
        told = self._stage.told
        uuid, data = next((uuid, one.data) for uuid, one in told.objects.items() if one.name == object_name)
        self._stage.tell(told._replace(bases=told.bases | {uuid}))
        with self._unsure(name, Disk(data)):
            self._volumes.clone(object_name, name)

    def write(self, name: str, offset: int, data: bytes) -> None:
        self._written(name, offset, data)
        with self._opened(name) as volume:
            volume.write(offset, memoryview(data))

    def trim(self, name: str, chunk: int, count: int = 1) -> None:
        self._written(name, chunk * CHUNK_BYTES, bytes(count * CHUNK_BYTES))
        with self._opened(name) as volume:
            volume.trim(chunk * CHUNK_BYTES, count * CHUNK_BYTES)

    def flush(self, name: str) -> None:
        with self._opened(name) as volume:
            volume.flush()
        self._set(name, Disk(self.newest(name)))

    def overwrite(self, name: str, offset: int, data: bytes) -> bool:
        """Write and flush, whatever else may be unflushed; False if a device refuses that."""
        before = self._stage.told.disks[name]
        self._written(name, offset, data)
        try:
            with self._opened(name) as volume:
                volume.write(offset, memoryview(data))
                volume.flush()
        except DeviceError:
            return False
        self._set(name, before.overwritten(offset, data))
        return True

    def freeze(self, name: str, content: Content) -> None:
        """Make an Object of it, which then has that content."""
        stage = self._stage
        stage.tell(stage.told._replace(putting=(*stage.told.putting, content)))
        with self._unsure(name, None, content.data):
            record = self._volumes.freeze(name, content.name)
        told = stage.told.at(record)
        putting = tuple(one for one in told.putting if one is not content)
        stage.tell(told._replace(objects={**told.objects, record.uuid: content}, putting=putting))

    def snapshot(self, name: str, content: Content) -> None:
        """Make an Object of what it has, and build on that."""
        stage = self._stage
        stage.tell(stage.told._replace(putting=(*stage.told.putting, content)))
        with stage.determined():
            record = self._volumes.snapshot(name, content.name)
        told = stage.told.at(record)
        putting = tuple(one for one in told.putting if one is not content)
        objects = {**told.objects, record.uuid: content}
        disks = {**told.disks, name: Disk(content.data)}
        stage.tell(told._replace(objects=objects, putting=putting, disks=disks, bases=told.bases | {record.uuid}))

    def move(self, device: int = -1) -> None:
        """Have the chunks of all volumes on other blocks of any device, or those on ``device`` on others."""
        run = self._store.allocator.run
        mover = LayerMover(self._store, self._volumes)
        if device >= 0:
            mover.run({device: 1 << 60}, lambda length: None, slots=False)
            assert mover.problem is None
            return
        with patch.object(self._store.allocator, "run", lambda count, device=-1, avoid=(): run(count, device)):
            mover.run(dict.fromkeys(self._store.blocks.slots, 1 << 60), lambda length: None, slots=False)
        assert mover.problem is None

    def home(self, name: str) -> int:
        """The device of its map."""
        return self._store.layers.volumes[name].home

    def delete(self, name: str) -> None:
        """Delete it; nothing of what it had by itself is to be found then."""
        layer = self._store.layers.volumes[name]
        extents = frozenset(layer.extents(self._store.layers.chunk_blocks))
        stage = self._stage
        stage.tell(stage.told.leaving(layer.uuid, extents, self.newest(name)))
        with self._unsure(name, None):
            self._volumes.delete(name)
        stage.tell(stage.told._replace(erased=stage.told.erased | {layer.uuid}))

    @contextmanager
    def _unsure(self, name: str, after: Disk | None, data: bytes = b"") -> Iterator[None]:
        """Nobody knows meanwhile whether there is such a volume; after it there is, or none."""
        stage, told = self._stage, self._stage.told
        disks = {**told.disks, name: after} if after else told.disks
        stage.tell(told._replace(unsure={**told.unsure, name: data}, disks=disks))
        with stage.determined():
            yield
        disks = {other: disk for other, disk in disks.items() if other != name or after}
        stage.tell(stage.told._replace(unsure=told.unsure, disks=disks))

    @contextmanager
    def _opened(self, name: str) -> Iterator[Volume]:
        volume = self._volumes.open(name)
        yield volume
        volume.close()

    def settle(self) -> None:
        """What failed has happened, as is known by now."""
        self._stage.tell(self._stage.told._replace(unsure={}))

    def newest(self, name: str) -> bytes:
        """What it has, if all that was written stays."""
        return self._stage.told.disks[name].versions()[-1]

    def _written(self, name: str, offset: int, data: bytes) -> None:
        disk = self._stage.told.disks[name]
        self._set(name, disk._replace(written=(*disk.written, (offset, data))))

    def _set(self, name: str, disk: Disk) -> None:
        told = self._stage.told
        self._stage.tell(told._replace(disks={**told.disks, name: disk}))
