"""Volumes against a model, with power cuts; and what becomes of blocks that are shared."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from rustord.change import Delete
from rustord.errors import (
    DeviceError,
    InUse,
    InvalidRequest,
    NoSpace,
    NotFound,
    PreconditionFailed,
    ReadOnly,
    Unavailable,
)
from rustord.extent import Extent
from rustord.keystore.lmdb import LmdbBackend
from rustord.label import Standing
from rustord.layer import Layer
from rustord.layermerger import LayerMerger
from rustord.membership import detach_device, set_standing
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import BASE, CHUNK_BYTES, PAGE_CHUNKS, SLOT_COUNT, ZEROS, Head, extent_at
from rustord.placer import Contiguous, FirstFit, Mirrored, Striped
from rustord.pool import open_devices
from rustord.rebuild import rebuild
from rustord.record import Record
from rustord.testing.device import SECTOR_BYTES
from rustord.volume import Volume
from rustord.volumes import Volumes
from rustord.writer import Writer
from tests.crash.scenarios import OnDevice
from tests.simulation import MIB, Direct, PowerCut, Simulation, check_sound, free_count, live, run

T = TypeVar("T")
SIZE = 40 * CHUNK_BYTES


class Bench:
    """A pool in a simulation, and its volumes."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.store = simulation.open()
        self.volumes = Volumes(self.store, Direct(self.store))

    def reopen(self, *, lose_index: bool = False, clean: bool = True) -> None:
        if clean:
            self.volumes.close()
            self.simulation.close()
        else:
            self.simulation.cut_power()
        if lose_index:
            self.simulation.lose_index()
        self.store = self.simulation.open()
        self.volumes = Volumes(self.store, Direct(self.store))
        LayerMerger(self.store, self.volumes).run()

    def check(self) -> None:
        """Nothing leaks: every block is free or named once."""
        run(self.store)
        check_sound(self.store)


@pytest.fixture
def bench(disk_path: Path) -> Iterator[Bench]:
    bench = Bench(Simulation(disk_path, (32 * MIB, 32 * MIB)))
    yield bench
    bench.simulation.close()


def read(volume: Volume, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    volume.read(offset, memoryview(buffer))
    return bytes(buffer)


def write(volume: Volume, offset: int, data: bytes) -> None:
    volume.write(offset, memoryview(data))


def make_written(bench: Bench, length: int) -> Volume:
    """A volume "disk" of `SIZE` that begins with ``length`` bytes "x", durably; it is closed."""
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * length)
    volume.flush()
    volume.close()
    return volume


def content(bench: Bench, name: str) -> bytes:
    volume = bench.volumes.open(name)
    try:
        return read(volume, 0, volume.size)
    finally:
        volume.close()


def test_a_volume_keeps_what_is_written(bench: Bench) -> None:
    before = free_count(bench.store)
    info = bench.volumes.create("disk", 100 * MIB)
    assert (info.size, info.own_bytes, info.shared_bytes) == (100 * MIB, 0, 0)
    volume = bench.volumes.open("disk")
    assert read(volume, 99 * MIB, MIB) == bytes(MIB)
    write(volume, 70_000, b"hello")
    write(volume, 3 * CHUNK_BYTES - 2, b"over the edge")
    assert read(volume, 69_998, 9) == b"\0\0hello\0\0"
    assert read(volume, 3 * CHUNK_BYTES - 3, 15) == b"\0over the edge\0"
    volume.flush()
    volume.close()
    assert bench.volumes.stat("disk").own_bytes == 3 * CHUNK_BYTES
    bench.check()
    for _ in range(2):
        bench.reopen()
        bench.check()
    bench.reopen(clean=False)
    volume = bench.volumes.open("disk")
    assert read(volume, 69_998, 9) == b"\0\0hello\0\0"
    volume.close()
    bench.volumes.delete("disk")
    bench.check()
    assert free_count(bench.store) == before
    assert bench.volumes.names() == []


def test_what_is_trimmed_is_given_back_and_reads_as_zeros(bench: Bench) -> None:
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    before = free_count(bench.store)
    write(volume, 0, b"x" * SIZE)
    volume.flush()
    used = before - free_count(bench.store)
    volume.trim(1, SIZE - 1)
    volume.flush()
    run(bench.store)
    assert read(volume, 0, SIZE) == b"x" * CHUNK_BYTES + bytes(SIZE - CHUNK_BYTES)
    volume.zero(10, 20, keep=False, fast=False)
    volume.zero(CHUNK_BYTES, 20, keep=True, fast=False)
    volume.flush()
    assert read(volume, 0, CHUNK_BYTES) == b"x" * 10 + bytes(20) + b"x" * (CHUNK_BYTES - 30)
    assert before - free_count(bench.store) < used // 10
    assert [run.length for run in volume.runs(0, SIZE)] == [2 * CHUNK_BYTES, SIZE - 2 * CHUNK_BYTES]
    volume.close()
    bench.check()
    free = bytes(CHUNK_BYTES)
    for block, count in bench.store.allocator._free[0]:
        assert bench.simulation.read(0, block, min(count, 16)) == free[: min(count, 16) * 4096]


def test_freeze_makes_an_object_and_moves_nothing(bench: Bench) -> None:
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 5 * CHUNK_BYTES, b"abc" * 50_000)
    with pytest.raises(InUse):
        bench.volumes.freeze("disk")
    volume.close()
    expected = content(bench, "disk")
    record = bench.volumes.freeze("disk")
    assert bench.volumes.names() == []
    assert (record.size, record.name) == (SIZE, "disk")
    assert bench.store.get(record.uuid) == expected
    bench.check()
    for clean in (True, False):
        bench.reopen(clean=clean)
        assert bench.store.get(record.uuid) == expected
        bench.check()
    bench.store.delete(record.uuid)
    bench.check()
    assert not bench.store.layers.by_uuid


@pytest.mark.parametrize("reopen", [False, True])
def test_everything_is_freed_with_the_last_that_needs_it(bench: Bench, seed: int, *, reopen: bool) -> None:
    chance = random.Random(seed)
    bench.volumes.close()
    run(bench.store)
    before = free_count(bench.store)
    image = chance.randbytes(10 * CHUNK_BYTES + 4321)
    for _ in range(8 if not reopen else 4):
        original = bench.store.put(image, name="image")
        bench.volumes.clone("image", "one")
        bench.volumes.clone(uuid_text(original.uuid), "two")
        assert bench.volumes.stat("one").shared_bytes == 11 * CHUNK_BYTES
        volume = bench.volumes.open("one")
        write(volume, 100_000, b"changed")
        snapshot = bench.volumes.snapshot("one", "snap")
        write(volume, 200_000, b"changed again")
        volume.trim(0, CHUNK_BYTES)
        volume.flush()
        volume.close()
        bench.volumes.clone("snap", "three")
        volume = bench.volumes.open("three")
        write(volume, 300_000, b"third")
        volume.close()
        frozen = bench.volumes.freeze("three", "fourth")
        padded = image + bytes(-len(image) % CHUNK_BYTES)
        snap = padded[:100_000] + b"changed" + padded[100_007:]
        one = bytes(CHUNK_BYTES) + snap[CHUNK_BYTES:200_000] + b"changed again" + snap[200_013:]
        fourth = snap[:300_000] + b"third" + snap[300_005:]
        left: list[tuple[bytes | str, bytes]] = [
            (original.uuid, image),
            (snapshot.uuid, snap),
            (frozen.uuid, fourth),
            ("one", one),
            ("two", padded),
        ]
        chance.shuffle(left)
        while left:
            bench.check()
            for key, expected in left:
                assert (content(bench, key) if isinstance(key, str) else bench.store.get(key)) == expected
            key, _ = left.pop()
            if isinstance(key, str):
                bench.volumes.delete(key)
            else:
                bench.store.delete(key)
            if reopen:
                bench.reopen(clean=chance.random() < 0.5)
        bench.check()
        assert not bench.store.layers.by_uuid
        assert not bench.store.keystore.bases()
        assert free_count(bench.store) == before
        for index, runs in bench.store.allocator._free.items():
            for block, count in runs:
                assert not any(bench.simulation.read(index, block, count)), "what is free was not erased"


def test_an_image_that_is_replaced_stays_below_its_clones(bench: Bench) -> None:
    bench.store.put(b"old" * 100_000, name="image")
    bench.volumes.clone("image", "disk")
    bench.store.put(b"new" * 100_000, name="image")
    bench.check()
    bench.reopen(clean=False)
    assert content(bench, "disk")[:300_000] == b"old" * 100_000
    bench.volumes.delete("disk")
    bench.check()
    assert len(live(bench.store)) == 1


def is_in_journal(offset: int) -> bool:
    return MIB <= offset < 5 * MIB


def test_a_chunk_is_in_its_old_place_or_whole_in_the_new_one(disk_path: Path) -> None:
    """The journal may be durable before anything else that was written since the last flush."""
    image = b"base" * (CHUNK_BYTES // 2)
    written = b"new!" * 1024 + image[4096:]
    outcomes = set()
    for count in range(8):
        directory = disk_path / str(count)
        directory.mkdir()
        bench = Bench(Simulation(directory))
        bench.store.put(image, name="image")
        bench.volumes.clone("image", "disk")
        volume = bench.volumes.open("disk")
        write(volume, 0, written[:4096])
        bench.simulation.power.left = count
        with suppress(PowerCut):
            volume.flush()
            outcomes.add("flushed")
        bench.simulation.power.left = 0
        bench.simulation.cut_power(is_in_journal)
        bench.store = bench.simulation.open()
        bench.volumes = Volumes(bench.store, Direct(bench.store))
        found = content(bench, "disk")
        assert found in (image, written)
        outcomes.add("new" if found == written else "old")
        bench.check()
        bench.simulation.close()
    assert outcomes == {"old", "new", "flushed"}


def test_a_volume_that_is_being_frozen_is_a_volume_or_an_object(disk_path: Path) -> None:
    outcomes = set()
    for count in range(16):
        directory = disk_path / str(count)
        directory.mkdir()
        bench = Bench(Simulation(directory))
        bench.volumes.create("disk", SIZE)
        volume = bench.volumes.open("disk")
        write(volume, 0, b"content")
        volume.flush()
        volume.close()
        bench.simulation.power.left = count
        with suppress(PowerCut):
            bench.volumes.freeze("disk", "image")
        bench.simulation.power.left = 0
        bench.simulation.cut_power(lambda offset: True)
        bench.store = bench.simulation.open()
        bench.volumes = Volumes(bench.store, Direct(bench.store))
        uuid = bench.store.resolve("image")
        assert (bench.volumes.names() == ["disk"]) == (uuid is None)
        outcomes.add(uuid is None)
        if uuid is not None:
            bench.store.delete(uuid)
            bench.reopen(clean=False)
            assert bench.volumes.names() == []
            assert not bench.store.layers.by_uuid
        bench.check()
        bench.simulation.close()
    assert outcomes == {True, False}


def test_an_object_on_a_layer_and_one_below_can_be_moved(bench: Bench) -> None:
    image = bench.store.put(b"image" * 50_000, name="image")
    bench.volumes.clone("image", "one")
    bench.volumes.clone("image", "two")
    for name in ("one", "two"):
        volume = bench.volumes.open(name)
        write(volume, 100_000, name.encode())
        volume.close()
    frozen = bench.volumes.freeze("one")
    expected = content(bench, "two"), bench.store.get(frozen.uuid)
    for uuid in (image.uuid, frozen.uuid, frozen.uuid):
        record = bench.store.stat(uuid)
        (outcome,) = run(bench.store, bench.store.relocations.prepare(record, record.extents))
        assert isinstance(outcome, Record)
        assert not set(outcome.extents) & set(record.extents)
        bench.store.keystore.checkpoint()
        bench.check()
        assert (content(bench, "two"), bench.store.get(frozen.uuid)) == expected
    bench.volumes.delete("two")
    for clean in (True, False):
        bench.reopen(clean=clean)
        bench.check()
        assert bench.store.get(frozen.uuid) == expected[1]
    bench.store.delete(frozen.uuid)
    bench.store.delete(image.uuid)
    bench.check()
    assert not bench.store.layers.by_uuid


def test_a_volume_may_be_read_when_the_pool_takes_no_changes(bench: Bench) -> None:
    bench.volumes.create("disk", SIZE)
    bench.store.read_only = "it was told to"
    volume = bench.volumes.open("disk")
    assert volume.read_only
    assert read(volume, 0, 4096) == bytes(4096)
    volume.close()
    with pytest.raises(ReadOnly):
        bench.volumes.create("other", SIZE)
    bench.store.read_only = ""


def test_a_full_pool_fails_the_write_and_nothing_else(disk_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Simulation(disk_path, (16 * MIB,)))
    assert not bench.volumes.warning()
    bench.volumes.create("disk", 100 * MIB)
    volume = bench.volumes.open("disk")
    written = 0
    with suppress(NoSpace):
        while written < 16 * MIB:
            write(volume, written, b"%08d" % written * 8192)
            written += CHUNK_BYTES
            volume.flush()
    assert 4 * MIB < written < 16 * MIB
    assert [record.levelname for record in caplog.records if "volumes may soon fail" in record.message] == ["WARNING"]
    assert bench.volumes.warning()
    volume.flush()
    write(volume, written - 8, b"in place")
    for at in range(0, written - CHUNK_BYTES, CHUNK_BYTES):
        assert read(volume, at, CHUNK_BYTES) == b"%08d" % at * 8192
    volume.trim(0, 2 * CHUNK_BYTES)
    write(volume, written, b"there is room again")
    volume.flush()
    volume.close()
    bench.check()
    bench.reopen(clean=False)
    volume = bench.volumes.open("disk")
    assert read(volume, written, 19) == b"there is room again"
    volume.close()
    bench.check()
    bench.simulation.close()


def test_bad_input_gets_a_clear_error_and_changes_nothing(bench: Bench) -> None:
    volumes = bench.volumes
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    write(volume, 10 * CHUNK_BYTES, b"x")
    for act in (lambda: volumes.delete("disk"), lambda: volumes.resize("disk", 20 * CHUNK_BYTES)):
        with pytest.raises(InUse, match="in use"):
            act()
    volume.close()
    with pytest.raises(InvalidRequest, match="beyond"):
        volumes.resize("disk", 10 * CHUNK_BYTES)
    assert volumes.resize("disk", 11 * CHUNK_BYTES).size == 11 * CHUNK_BYTES
    with pytest.raises(PreconditionFailed, match="already"):
        volumes.create("disk", SIZE)
    with pytest.raises(NotFound):
        volumes.clone("0190b8f0-0000-7000-8000-000000000000", "new")
    with pytest.raises(NotFound):
        volumes.clone("no such name", "new")
    for name in ("", "a/b", "x" * 129, "\n", "0190b8f0-0000-7000-8000-000000000000"):
        with pytest.raises(InvalidRequest):
            volumes.create(name, SIZE)
    for size in (0, -1, 1 << 60):
        with pytest.raises(InvalidRequest):
            volumes.create("new", size)
    bench.store.put(b"taken", name="taken")
    for act in (lambda: volumes.freeze("disk", "taken"), lambda: volumes.snapshot("disk", "taken")):
        with pytest.raises(PreconditionFailed, match="already"):
            act()
    for offset, length in ((-1, 1), (0, SIZE), (11 * CHUNK_BYTES, 1)):
        with pytest.raises(InvalidRequest):
            volume.read(offset, memoryview(bytearray(length)))
    assert volumes.names() == ["disk"]
    bench.check()


class Model:
    """What each sector of a volume may hold: the newest content, and after a cut any since the last flush."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.maybe: dict[int, list[bytes]] = {}

    def put(self, offset: int, data: bytes) -> None:
        first, last = offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES
        for sector in range(first, last + 1):
            self.maybe.setdefault(sector, [self.sector(sector)])
        self.data[offset : offset + len(data)] = data
        for sector in range(first, last + 1):
            self.maybe[sector].append(self.sector(sector))

    def sector(self, number: int) -> bytes:
        return bytes(self.data[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES])

    def flushed(self) -> None:
        self.maybe.clear()

    def copy(self) -> Model:
        return Model(bytes(self.data))

    def check_after_cut(self, found: bytes) -> None:
        assert len(found) == len(self.data)
        if found != bytes(self.data):
            for number in range(len(found) // SECTOR_BYTES):
                sector = found[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
                if sector != self.sector(number):
                    assert sector in self.maybe.get(number, ()), f"sector {number} is neither old nor new"
        self.data[:] = found
        self.maybe.clear()


class Run:
    """Random work on volumes and Objects, which a power cut ends; then everything has to be as one of its models."""

    def __init__(self, bench: Bench, chance: random.Random) -> None:
        self.bench = bench
        self.chance = chance
        self.volumes: dict[str, Model] = {}
        self.objects: dict[str, bytes] = {}
        self.unsure: set[str] = set()  # volumes and Objects that may or may not be there, since a cut came in between

    def step(self) -> None:
        chance = self.chance
        if not self.volumes or (chance.random() < 0.05 and len(self.volumes) < 4):
            self.create()
            return
        name = chance.choice(sorted(self.volumes))
        kinds = {"write": 60, "flush": 15, "trim": 8, "snapshot": 3, "freeze": 1, "delete": 1, "clone": 2, "object": 4}
        kinds |= {"remove": 3, "checkpoint": 6, "merge": 3}
        kind = chance.choices([*kinds], [*kinds.values()])[0]
        getattr(self, kind)(name)

    def fresh(self) -> str:
        return f"v{self.chance.getrandbits(40)}"

    def create(self) -> None:
        name = self.fresh()
        self.unsure.add(name)
        self.volumes[name] = Model(bytes(12 * CHUNK_BYTES))
        self.bench.volumes.create(name, 12 * CHUNK_BYTES)
        self.unsure.discard(name)

    def opened(self, name: str, work: Callable[[Volume], None]) -> None:
        volume = self.bench.volumes.open(name)
        try:
            work(volume)
        finally:
            volume.close()

    def write(self, name: str) -> None:
        model, chance = self.volumes[name], self.chance
        offset = chance.randrange(len(model.data))
        length = min(chance.choice((1, 512, 4096, 100_000, 200_000)), len(model.data) - offset)
        if chance.random() < 0.7:
            offset -= offset % 4096
        data = chance.randbytes(length)
        model.put(offset, data)
        self.opened(name, lambda volume: volume.write(offset, memoryview(data)))

    def flush(self, name: str) -> None:
        self.opened(name, lambda volume: volume.flush())
        self.volumes[name].flushed()

    def trim(self, name: str) -> None:
        model, chance = self.volumes[name], self.chance
        first = chance.randrange(len(model.data) // CHUNK_BYTES)
        offset, length = first * CHUNK_BYTES, chance.randrange(1, 4) * CHUNK_BYTES
        length = min(length, len(model.data) - offset)
        model.put(offset, bytes(length))
        if chance.random() < 0.5:
            self.opened(name, lambda volume: volume.trim(offset, length))
        else:
            keep = chance.random() < 0.5
            self.opened(name, lambda volume: volume.zero(offset, length, keep=keep, fast=False))

    def snapshot(self, name: str) -> None:
        label = self.fresh()
        self.objects[label] = bytes(self.volumes[name].data)
        self.unsure.add(label)
        self.bench.volumes.snapshot(name, label)
        self.volumes[name].flushed()
        self.unsure.discard(label)

    def freeze(self, name: str) -> None:
        label = self.fresh()
        self.objects[label] = bytes(self.volumes[name].data)
        self.unsure |= {name, label}
        self.bench.volumes.freeze(name, label)
        self.unsure -= {name, label}
        del self.volumes[name]

    def delete(self, name: str) -> None:
        self.unsure.add(name)
        self.bench.volumes.delete(name)
        self.unsure.discard(name)
        del self.volumes[name]

    def clone(self, name: str) -> None:
        del name
        sure = sorted(self.objects.keys() - self.unsure)
        if sure and len(self.volumes) < 5:
            label, source = self.fresh(), self.chance.choice(sure)
            data = self.objects[source]
            self.volumes[label] = Model(data + bytes(-len(data) % CHUNK_BYTES))
            self.unsure.add(label)
            self.bench.volumes.clone(source, label)
            self.unsure.discard(label)

    def object(self, name: str) -> None:
        del name
        label = self.fresh()
        self.objects[label] = self.chance.randbytes(self.chance.choice((10, 4096, 70_000, 300_000)))
        self.unsure.add(label)
        self.bench.store.put(self.objects[label], name=label)
        self.unsure.discard(label)

    def remove(self, name: str) -> None:
        del name
        if self.objects:
            label = self.chance.choice(sorted(self.objects))
            uuid = self.bench.store.resolve(label)
            assert uuid is not None
            self.unsure.add(label)
            self.bench.store.delete(uuid)
            self.unsure.discard(label)
            del self.objects[label]

    def merge(self, name: str) -> None:
        del name
        LayerMerger(self.bench.store, self.bench.volumes).run()

    def checkpoint(self, name: str) -> None:
        del name
        self.bench.store.keystore.checkpoint()

    def check(self) -> None:
        """After a cut, and a new opening."""
        bench = self.bench
        there = set(bench.volumes.names())
        names = {record.name for record in live(bench.store)}
        assert there <= self.volumes.keys()
        assert self.volumes.keys() - self.unsure <= there
        assert names <= self.objects.keys()
        assert self.objects.keys() - self.unsure <= names
        self.volumes = {name: model for name, model in self.volumes.items() if name in there}
        self.objects = {name: data for name, data in self.objects.items() if name in names}
        self.unsure.clear()
        for name, model in self.volumes.items():
            model.check_after_cut(content(bench, name))
        for name, data in self.objects.items():
            uuid = bench.store.resolve(name)
            assert uuid is not None
            assert bench.store.get(uuid) == data
        bench.check()


def rebuild_index(simulation: Simulation) -> None:
    simulation.lose_index()
    devices = open_devices(simulation.paths, read_only=True)
    rebuild(devices, backend=LmdbBackend(), directory=simulation.index)


@pytest.mark.parametrize("clean", [True, False])
def test_the_devices_alone_bring_back_every_volume(bench: Bench, seed: int, *, clean: bool) -> None:
    chance = random.Random(seed)
    image = bench.store.put(chance.randbytes(5 * CHUNK_BYTES), name="image")
    bench.volumes.create("disk", 40 * MIB)
    bench.volumes.clone("image", "clone")
    bench.volumes.create("gone", SIZE)
    for name in ("gone", "disk", "clone"):
        volume = bench.volumes.open(name)
        for _ in range(10):
            write(volume, chance.randrange(volume.size - 5000), chance.randbytes(5000))
            volume.flush()
        volume.close()
    bench.volumes.delete("gone")
    snapshot = bench.volumes.snapshot("disk", "snapshot")
    bench.store.delete(image.uuid)
    for _ in range(2):
        for turn in range(2):
            volume = bench.volumes.open("disk")
            write(volume, turn * 10_000, b"after the snapshot")
            volume.flush()
            volume.close()
            if turn == 0:
                for _ in range(1200):  # until no journal has anything of what was before
                    bench.store.put(b"x", name="filler", text="t" * 7500)
        before = {name: content(bench, name) for name in bench.volumes.names()}
        frozen = bench.store.get(snapshot.uuid)
        if clean:
            bench.volumes.close()
            bench.simulation.close()
        else:
            bench.simulation.cut_power()
        rebuild_index(bench.simulation)
        bench.store = bench.simulation.open()
        bench.volumes = Volumes(bench.store, Direct(bench.store))
        assert sorted(before) == bench.volumes.names() == ["clone", "disk"]
        assert {name: content(bench, name) for name in before} == before
        assert bench.store.get(snapshot.uuid) == frozen
        assert {record.name for record in live(bench.store)} == {"snapshot", "filler"}
        bench.check()
    bench.volumes.delete("clone")
    bench.volumes.delete("disk")
    bench.store.delete(snapshot.uuid)
    bench.check()
    assert not bench.store.layers.by_uuid


def test_what_was_a_volume_long_ago_is_not_written_when_the_index_is_lost(disk_path: Path) -> None:
    """That it was erased is known to the index alone, and its blocks are an Object's."""
    bench = Bench(Simulation(disk_path))
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"content")
    volume.flush()
    volume.close()
    (extent, *_) = bench.store.layers.volumes["disk"].extents(bench.store.layers.chunk_blocks)
    bench.volumes.delete("disk")
    bench.store.keystore.checkpoint()
    bench.reopen(clean=False)
    record = bench.store.stat(bench.store.put(bytes(range(256)) * 2000).uuid)
    assert any(own.block <= extent.block < own.end for own in record.extents)
    bench.reopen(clean=False, lose_index=True)
    assert bench.volumes.names() == []
    bench.check()
    bench.simulation.close()


def test_a_volume_that_only_the_journal_of_another_device_tells_of_is_gone(bench: Bench) -> None:
    """That was away when the volume was deleted; the home's journal has gone around since, and the index is lost."""
    bench.volumes.create("disk", SIZE)
    home = bench.store.layers.volumes["disk"].home
    bench.simulation.close()
    bench.store = bench.simulation.open(without=[1 - home])
    bench.volumes = Volumes(bench.store, Direct(bench.store))
    bench.volumes.delete("disk")
    bench.simulation.placer = OnDevice(home)
    bench.reopen()
    for _ in range(1200):
        bench.store.put(b"x", name="filler", text="t" * 7500)
    stored = {bench.store.put(bytes((number,)) * 3000).uuid: bytes((number,)) * 3000 for number in range(50)}
    bench.simulation.close()
    rebuild_index(bench.simulation)
    bench.store = bench.simulation.open()
    assert not bench.store.read_only
    assert not bench.store.layers.by_uuid
    assert {uuid: bench.store.get(uuid) for uuid in stored} == stored
    bench.check()


def test_a_page_that_is_torn_has_another_slot(disk_path: Path) -> None:
    """The journal has nothing any more of what is in the pages, and the power goes off while they are written."""
    simulation = Simulation(disk_path)
    bench = Bench(simulation)
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"old")
    volume.flush()
    volume.close()
    for _ in range(700):
        bench.store.put(b"x", name="filler", text="t" * 7500)
    bench.volumes.close()
    simulation.close()
    before = simulation.paths[0].read_bytes()
    for count in range(4):
        simulation.paths[0].write_bytes(before)
        rebuild_index(simulation)
        bench = Bench(simulation)
        volume = bench.volumes.open("disk")
        write(volume, CHUNK_BYTES, b"new")
        volume.flush()
        simulation.power.left = count
        with suppress(PowerCut):
            bench.store.keystore.checkpoint()
        simulation.power.left = 0
        simulation.cut_power(lambda offset: offset // SECTOR_BYTES % 8 == 7)  # of a page, the last sector
        rebuild_index(simulation)
        bench = Bench(simulation)
        assert content(bench, "disk") == b"old" + bytes(CHUNK_BYTES - 3) + b"new" + bytes(SIZE - CHUNK_BYTES - 3)
        bench.check()
        simulation.close()


def cut(bench: Bench, run: Run, chance: random.Random) -> None:
    """Cut the power; of what was not flushed all, nothing or some stays. Sometimes the index is lost as well."""
    part = chance.choice((0.0, 0.5, 0.5, 0.9, 1.0))
    bench.simulation.cut_power(lambda _: chance.random() < part)
    fate = chance.random()
    if fate < 0.15:
        bench.simulation.lose_index()
    elif fate < 0.4:
        rebuild_index(bench.simulation)
    bench.store = bench.simulation.open()
    bench.volumes = Volumes(bench.store, Direct(bench.store))
    if chance.random() < 0.5:
        check_sound(bench.store)
    LayerMerger(bench.store, bench.volumes).run()
    run.check()


@pytest.mark.timeout(3600)
def test_a_power_cut_at_any_moment_loses_nothing_that_was_flushed(
    disk_path: Path, seed: int, pytestconfig: pytest.Config
) -> None:
    rounds = 400 if pytestconfig.getoption("long") else 40
    for number in range(rounds):
        chance = random.Random(seed + number)
        directory = disk_path / str(number)
        directory.mkdir()
        count = chance.choice((1, 2))
        placer = chance.choice((Contiguous(), Mirrored() if count == 2 else FirstFit(), Striped(4)))
        bench = Bench(Simulation(directory, (24 * MIB,) * count, placer=placer))
        work = Run(bench, chance)
        for _ in range(3):
            bench.simulation.power.left = chance.randrange(1, 400)
            try:
                for _ in range(150):
                    try:
                        work.step()
                    except NoSpace:
                        break
            except PowerCut:
                pass
            bench.simulation.power.left = 0
            cut(bench, work, chance)
        bench.simulation.close()


def test_a_volume_grows_while_it_is_in_use(bench: Bench) -> None:
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, SIZE - 3, b"end")
    assert bench.volumes.resize("disk", 2 * SIZE).size == 2 * SIZE
    write(volume, 2 * SIZE - 5, b"later")
    volume.flush()
    volume.close()
    bench.reopen(clean=False)
    data = content(bench, "disk")
    assert (len(data), data[SIZE - 3 : SIZE], data[-5:]) == (2 * SIZE, b"end", b"later")
    bench.check()


def test_what_was_trimmed_and_not_flushed_is_given_back_with_the_volume(bench: Bench) -> None:
    before = free_count(bench.store)
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * SIZE)
    volume.flush()
    volume.trim(0, SIZE // 2)
    volume.close()
    bench.volumes.delete("disk")
    bench.check()
    assert free_count(bench.store) == before


def test_what_was_trimmed_and_cannot_be_flushed_is_erased_with_the_volume(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = free_count(bench.store)
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * 3 * CHUNK_BYTES)
    volume.flush()
    place = extent_at(volume.layer.get(1), CHUNK_BYTES // 4096)
    volume.trim(CHUNK_BYTES, 2 * CHUNK_BYTES)
    volume.close()

    def fail(*_: object) -> NoReturn:
        raise DeviceError("it was away")

    monkeypatch.setattr(volume, "_flush_devices", fail)
    bench.volumes.delete("disk")
    run(bench.store)
    assert free_count(bench.store) == before
    bench.check()
    assert not any(bench.store.blocks.read_copy((place,), 0, CHUNK_BYTES))


def test_a_rebuild_leaves_out_a_page_whose_slots_are_erased_already(disk_path: Path) -> None:
    """The power failed while a volume was erased, then the index was lost; the journal still has changes of its map."""
    simulation = Simulation(disk_path, (16 * MIB,))
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    write(volume, 0, b"x" * CHUNK_BYTES)
    volume.flush()
    volume.close()
    for number in range(700):  # until the journal does not say any more where the slots are
        store.put(b"x", name="filler", text="t" * 7500)
        if number % 50 == 0:
            store.keystore.checkpoint()
    store.put(b"y")
    simulation.cut_power(lambda offset: True)
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    volume = volumes.open("disk")
    write(volume, CHUNK_BYTES, b"z" * CHUNK_BYTES)
    volume.flush()
    volume.close()
    store.keystore.checkpoint()
    head = extent_at(store.layers.volumes["disk"].address, SLOT_COUNT)
    slots = simulation.read(0, head.block, head.count)
    volumes.delete("disk")
    simulation.cut_power(lambda offset: True)
    with simulation.paths[0].open("r+b") as image:
        image.seek(head.block * 4096)
        image.write(slots)
    rebuild_index(simulation)
    store = simulation.open()
    assert not store.read_only
    check_sound(store)
    assert not Volumes(store, Direct(store)).names()


def test_what_waits_for_a_flush_does_not_pile_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.volume._PENDING_MAX", 8)
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    for _ in range(100):
        write(volume, 0, b"x")
        left = free_count(bench.store)
        volume.trim(0, CHUNK_BYTES)
    run(bench.store)
    assert free_count(bench.store) - left < 12 * CHUNK_BYTES // 4096
    bench.simulation.devices[bench.store.layers.volumes["disk"].home].failed = "it was told to"
    before = free_count(bench.store)
    for chunk in range(40):
        with suppress(DeviceError):  # the other device takes what is written, but the map can not be flushed
            write(volume, chunk * CHUNK_BYTES, b"x")
    assert before - free_count(bench.store) < 12 * CHUNK_BYTES // 4096
    volume.close()


def test_blocks_are_announced_in_advance_for_what_a_clone_copies_and_for_nothing_else(bench: Bench) -> None:
    bench.store.put(b"base" * (200 * CHUNK_BYTES // 4), name="image")
    bench.volumes.clone("image", "clone")
    bench.volumes.create("disk", 100 * CHUNK_BYTES)
    clone, disk = bench.volumes.open("clone"), bench.volumes.open("disk")
    before = flush_count(bench)
    for chunk in range(100):
        write(disk, chunk * CHUNK_BYTES, b"x")
        write(clone, chunk * CHUNK_BYTES, b"x" * CHUNK_BYTES)
    assert flush_count(bench) == before
    for chunk in range(100, 200):
        write(clone, chunk * CHUNK_BYTES, b"x")
    assert 7 <= flush_count(bench) - before <= 9
    clone.close()
    disk.close()
    bench.check()  # what was taken in advance is given back


def flush_count(bench: Bench) -> int:
    return sum(device.flush_count for device in bench.simulation.devices)


def test_blocks_that_were_announced_in_advance_fill_no_pool(disk_path: Path) -> None:
    bench = Bench(Simulation(disk_path, (16 * MIB,)))
    bench.store.put(b"base" * (40 * CHUNK_BYTES // 4), name="image")
    bench.volumes.clone("image", "clone")
    clone = bench.volumes.open("clone")
    for chunk in range(36):  # the last of them takes 32 in advance
        write(clone, chunk * CHUNK_BYTES, b"x")
    bench.volumes.create("disk", 100 * MIB)
    disk = bench.volumes.open("disk")
    with suppress(NoSpace):
        for chunk in range(200):
            write(disk, chunk * CHUNK_BYTES, b"x")
    write(clone, 36 * CHUNK_BYTES, b"x" * CHUNK_BYTES)  # for which nothing was taken
    clone.flush()
    clone.close()
    disk.close()
    bench.check()
    bench.simulation.close()


@pytest.mark.parametrize("what", ["freeze", "snapshot"])
def test_who_makes_an_object_of_a_volume_gives_up_when_the_daemon_stops(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It reads all of the volume, which may take hours."""
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * SIZE)
    volume.close()
    read_all = bench.store.layers.fill

    def fill(*args: Any, **how: Any) -> None:
        bench.volumes.stop()
        read_all(*args, **how)

    monkeypatch.setattr(bench.store.layers, "fill", fill)
    with pytest.raises(Unavailable, match="stopping"):
        getattr(bench.volumes, what)("disk")
    bench.reopen()
    assert content(bench, "disk") == b"x" * SIZE
    assert not live(bench.store)
    bench.check()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "change", [lambda volumes: volumes.create("other", SIZE), lambda volumes: volumes.snapshot("disk")]
)
def test_nobody_else_gets_the_slots_of_a_layer_that_only_some_journals_have(
    bench: Bench, failing: int, change: Callable[[Volumes], object]
) -> None:
    """The power is cut before the index knows better."""
    make_written(bench, CHUNK_BYTES)
    bench.simulation.devices[failing].fail_flushes = 1
    with pytest.raises(DeviceError):
        change(bench.volumes)
    run(bench.store)
    stored = {bench.store.put(bytes((number,)) * 3000).uuid: bytes((number,)) * 3000 for number in range(50)}
    bench.reopen(clean=False)
    assert not bench.store.read_only
    assert {uuid: bench.store.get(uuid) for uuid in stored} == stored
    assert content(bench, "disk") == b"x" * CHUNK_BYTES + bytes(SIZE - CHUNK_BYTES)
    bench.check()


def test_nothing_is_kept_in_memory_of_what_is_deleted(bench: Bench) -> None:
    store = bench.store
    for _ in range(2):
        bench.volumes.create("disk", 10 * MIB)
        volume = bench.volumes.open("disk")
        write(volume, 0, b"data")
        volume.close()
        bench.volumes.delete("disk")
        run(store)
        store.keystore.checkpoint()
    assert not store.keystore._retired
    bench.check()


@contextmanager
def index_away(store: ObjectStore) -> Iterator[None]:
    """When the second Layer is looked for."""
    look, seen = store.keystore._page_keys, []

    def fail(layer: bytes) -> set[bytes]:
        seen.append(layer)
        if len(seen) == 2:
            raise Unavailable("the index is away", hint="wait")
        return look(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.keystore, "_page_keys", fail)
        yield


@pytest.mark.parametrize("hanging", [index_away, lambda store: store.keystore.one_commit()], ids=["index", "commit"])
@pytest.mark.parametrize("what", ["object", "volume"])
def test_what_cannot_be_erased_beside_a_commit_or_without_the_index_is_erased_later(
    simulate: Callable[..., Simulation],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    hanging: Callable[[ObjectStore], AbstractContextManager[None]],
) -> None:
    """And the pool goes on."""
    monkeypatch.setattr("rustord.keystore.store.COMMIT_S_MAX", 0.05)
    store = simulate(32 * MIB).open()
    before = free_count(store)
    writer = Writer(store)
    volumes = Volumes(store, writer)
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    write(volume, 0, b"x" * CHUNK_BYTES)
    volume.close()
    snapshot = volumes.snapshot("disk", "snapshot")
    ((_, outcome),) = writer.make([Delete(snapshot.uuid)], 60)
    assert not isinstance(outcome, Exception)
    frozen = volumes.freeze("disk") if what == "object" else None
    with hanging(store):
        if frozen:
            ((_, outcome),) = writer.make([Delete(frozen.uuid)], 60)
            assert isinstance(outcome, Unavailable)
        else:
            with pytest.raises(Unavailable):
                volumes.delete("disk")
        assert (store.objects(), volumes.names()) == ([], [])
    volumes.create("other", SIZE)
    volumes.delete("other")
    assert writer.close()
    assert not store.read_only
    run(store)
    assert free_count(store) == before
    check_sound(store)


def test_what_waits_for_the_index_is_not_lost_when_a_map_cannot_be_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")  # which many devices take to be flushed

    bench.volumes.create("disk", SIZE)
    kept = bench.store.put(b"kept")
    with monkeypatch.context() as no_threads:
        no_threads.setattr(bench.store.blocks, "flush", flush)
        with pytest.raises(RuntimeError):
            bench.store.keystore.checkpoint()
    bench.store.put(b"later")
    bench.store.keystore.checkpoint()
    assert bench.store.get(kept.uuid) == b"kept"
    bench.reopen(clean=False)
    assert bench.store.get(kept.uuid) == b"kept"
    assert bench.volumes.names() == ["disk"]


def test_a_volume_has_its_name_also_while_a_snapshot_takes_it_from_its_layer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks at that moment would have it served by another process than the others, or take it for gone."""
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    cover, names = bench.volumes._cover, []

    def look(left: Layer) -> Layer:
        top = cover(left)
        names.append(volume.key)
        return top

    monkeypatch.setattr(bench.volumes, "_cover", look)
    bench.volumes.snapshot("disk")
    assert names == ["disk"]
    volume.close()


def test_a_volume_is_opened_by_many_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client does that had several connections, when it connects again."""
    bench.volumes.create("disk", SIZE)
    check_whole, opened = bench.volumes._check_whole, []

    def open_another(layer: Layer) -> None:
        monkeypatch.setattr(bench.volumes, "_check_whole", check_whole)
        opened.append(bench.volumes.open("disk"))
        with pytest.raises(InUse):
            bench.volumes.snapshot("disk")
        with pytest.raises(InUse):
            bench.volumes.delete("disk")

    monkeypatch.setattr(bench.volumes, "_check_whole", open_another)
    opened.append(bench.volumes.open("disk"))
    assert bench.volumes.stat("disk").open_count == 2
    for volume in opened:
        volume.close()
    bench.volumes.delete("disk")


def test_to_tell_what_a_volume_has_takes_no_copy_of_its_map(bench: Bench) -> None:
    bench.volumes.create("disk", 1 << 28)
    lower = bench.store.layers.volumes["disk"]
    bench.volumes.snapshot("disk")
    upper = bench.store.layers.volumes["disk"]
    for layer in (lower, upper):
        for chunk in range(16 * PAGE_CHUNKS):
            layer.set(chunk, 1 << 48 | 10_000 + 16 * chunk)
    tracemalloc.start()
    info = bench.volumes.stat("disk")
    used = bench.store.layers.used_size([upper, lower])
    extents = lower.extents(16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (info.own_bytes, info.shared_bytes, used) == (1 << 28, 0, 1 << 28)
    assert extents[:-SLOT_COUNT] == [Extent(1, 10_000, 16 * 16 * PAGE_CHUNKS)]
    assert peak < 100_000


def test_what_is_shared_or_used_is_what_is_found(bench: Bench, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, layers = random.Random(seed), bench.store.layers
    for _ in range(40):
        base_count = chance.choice([0, 1, 3, PAGE_CHUNKS, 3 * PAGE_CHUNKS + 1])
        monkeypatch.setattr(layers, "base_size", lambda chain, count=base_count: count * CHUNK_BYTES)
        chain = [Layer(bytes(16), 0, Head(1 << 36, 0, bytes(16), 1, "")) for _ in range(chance.randrange(1, 5))]
        for layer in chain:
            for first in chance.sample(range(0, 5 * PAGE_CHUNKS, PAGE_CHUNKS), chance.randrange(4)):
                for chunk in chance.sample(range(PAGE_CHUNKS), chance.choice([3, PAGE_CHUNKS])):
                    layer.set(first + chunk, chance.choice([BASE, ZEROS, ZEROS, ZEROS, 10_000]))

        def has_data(chunk: int, chain: list[Layer] = chain, base_count: int = base_count) -> bool:
            address = layers.find(chain, chunk)
            return address > ZEROS or (address == BASE and chunk < base_count)

        chunks = range(6 * PAGE_CHUNKS)
        last = max((chunk for chunk in chunks if has_data(chunk)), default=-1)
        assert layers.used_size(chain) == (last + 1) * CHUNK_BYTES
        assert layers.shared_count(chain) == sum(has_data(c) and chain[0].get(c) == BASE for c in chunks)


@pytest.mark.parametrize("what", ["freeze", "snapshot"])
def test_a_volume_that_is_too_long_for_an_object_is_not_read_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fill(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it is read")

    bench.volumes.create("disk", 1 << 36)
    monkeypatch.setattr(bench.store.layers, "fill", fill)
    with pytest.raises(NoSpace, match="Object of 68719476736 bytes"):
        getattr(bench.volumes, what)("disk")
    assert bench.volumes.stat("disk").layer_count == 1


@pytest.mark.parametrize("how", ["missing", "leaving"])
def test_room_on_a_device_that_takes_no_new_data_is_none(bench: Bench, how: str) -> None:
    bench.volumes.create("disk", SIZE)
    taken = []
    with suppress(NoSpace):
        while True:
            taken.append(bench.store.allocator.run(SLOT_COUNT, avoid=[1]))
    assert not bench.volumes.warning()
    if how == "missing":
        detach_device(bench.store, 1)
    else:
        set_standing(bench.store, 1, Standing.LEAVING)
    assert "writes to volumes may soon fail" in bench.volumes.warning()
    bench.store.allocator.release(taken)
    assert not bench.volumes.warning()


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_room_that_was_given_back_is_there_for_what_has_to_be_said_of_zeros(bench: Bench, how: str) -> None:
    """That a chunk is zeros, and not what the base has, takes a page; what was given back is free behind a flush."""
    far = PAGE_CHUNKS * CHUNK_BYTES
    bench.store.put(b"image" * (far // 5 + 20_000), name="image")
    bench.volumes.clone("image", "disk")
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * CHUNK_BYTES)
    volume.flush()
    with suppress(NoSpace):
        while True:
            bench.store.allocator.run(1)
    volume.trim(0, CHUNK_BYTES)
    if how == "trim":
        volume.trim(far, CHUNK_BYTES)
    else:
        volume.zero(far, CHUNK_BYTES, keep=False, fast=False)
    assert read(volume, far, CHUNK_BYTES) == bytes(CHUNK_BYTES)
    volume.close()


def test_who_deletes_a_volume_is_told_what_becomes_of_it_whoever_else_erases(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = make_written(bench, CHUNK_BYTES)
    forget = bench.volumes._forget

    def forget_and_sweep(*args: Any) -> None:
        forget(*args)
        bench.store.sweep()  # as when somebody deletes a snapshot
        bench.simulation.devices[volume.layer.home].fail_writes = True

    monkeypatch.setattr(bench.volumes, "_forget", forget_and_sweep)
    with pytest.raises(DeviceError):
        bench.volumes.delete("disk")


def test_nothing_is_taken_for_a_volume_that_no_journal_takes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(*_: object) -> NoReturn:
        raise Unavailable("the journal is full")

    bench.volumes.create("disk", SIZE)
    before = free_count(bench.store)
    with monkeypatch.context() as patch:
        patch.setattr(bench.store.journals, "note", note)
        for act in (lambda: bench.volumes.create("other", SIZE), lambda: bench.volumes.snapshot("disk")):
            with pytest.raises(Unavailable):
                act()
    assert free_count(bench.store) == before
    assert bench.volumes.names() == ["disk"]
