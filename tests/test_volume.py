"""A volume that many threads use at once, and what a write or a flush that fails leaves; see also test_volumes.py."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from unittest.mock import ANY

import pytest

from rustord.change import Put
from rustord.errors import DeviceError, Unsupported
from rustord.export import Run, State
from rustord.layer import Layer
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import CHUNK_BYTES
from rustord.record import Record
from rustord.testing.device import VolatileDevice
from rustord.volume import Volume
from rustord.volumes import Volumes
from rustord.writer import Writer
from tests.simulation import MIB, Simulation, check_sound

SIZE = 32 * CHUNK_BYTES


@pytest.fixture
def simulation(disk_path: Path) -> Simulation:
    return Simulation(disk_path, (64 * MIB,))


@pytest.fixture
def store(simulation: Simulation) -> Iterator[ObjectStore]:
    store = simulation.open()
    yield store
    simulation.close()


@pytest.fixture
def volumes(store: ObjectStore) -> Iterator[Volumes]:
    writer = Writer(store)
    volumes = Volumes(store, writer)
    yield volumes
    volumes.close()
    assert writer.close()
    check_sound(store)


def read(volume: Volume, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    volume.read(offset, memoryview(buffer))
    return bytes(buffer)


def together(*work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result(60)


def test_threads_do_not_lose_one_anothers_writes(volumes: Volumes, seed: int) -> None:
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    lanes, rounds = 8, 60

    def work(lane: int) -> Callable[[], None]:
        chance = random.Random(seed + lane)

        def run() -> None:
            mine = bytearray(SIZE // 4096)  # of each chunk, every eighth block is this thread's
            for number in range(rounds):
                block = chance.randrange(SIZE // 4096 // lanes) * lanes + lane
                value = number % 255 + 1
                volume.write(block * 4096, memoryview(bytes([value]) * 4096))
                mine[block] = value
                if chance.random() < 0.2:
                    volume.flush()
                if chance.random() < 0.05 and lane == 0:
                    volumes.snapshot("disk")
            for block, value in enumerate(mine):
                if block % lanes == lane:
                    assert read(volume, block * 4096, 4096) == bytes([value]) * 4096

        return run

    together(*(work(lane) for lane in range(lanes)))
    volume.close()
    volumes.delete("disk")


def test_blocks_that_are_given_back_are_never_written_by_who_still_has_them(
    store: ObjectStore, volumes: Volumes, seed: int
) -> None:
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    chance = random.Random(seed)
    stop = threading.Event()

    def overwrite() -> None:
        while not stop.is_set():
            volume.write(0, memoryview(b"\xff" * 2 * CHUNK_BYTES))

    def give_back() -> None:
        try:
            for _ in range(100):
                volume.trim(0, 2 * CHUNK_BYTES)
                volume.flush()
        finally:
            stop.set()

    together(overwrite, overwrite, give_back)
    volume.close()
    volumes.delete("disk")
    for block, count in store.allocator._free[0]:
        data = bytearray(min(count, 64) * 4096)
        store.blocks.device(0).read(block * 4096, (data,))
        assert not any(data), "a free block was written"
    del chance


def test_nobody_looks_at_each_chunk_of_a_large_hole(volumes: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may ask for the runs of all of a volume at once, or trim all of it: 8 TiB have 134 million chunks."""
    ((_, image),) = volumes._writer.make([Put(b"x" * 70_000)], 60)
    assert isinstance(image, Record)
    volumes.clone(uuid_text(image.uuid), "disk")
    volumes.resize("disk", 1 << 40)
    volume = volumes.open("disk")
    volume.write(1 << 39, memoryview(b"x"))
    looked, get = [], Layer.get

    def look(layer: Layer, chunk: int) -> int:
        looked.append(chunk)
        return get(layer, chunk)

    monkeypatch.setattr(Layer, "get", look)
    data, hole = State.DATA, State.HOLE | State.ZERO
    left = (1 << 39) - 2 * CHUNK_BYTES
    assert list(volume.runs(0, volume.size)) == [
        Run(2 * CHUNK_BYTES, data),
        Run(left, hole),
        Run(CHUNK_BYTES, data),
        Run((1 << 39) - CHUNK_BYTES, hole),
    ]
    assert list(volume.runs((1 << 38) + 1, left)) == [Run((1 << 38) - 1, hole), Run(CHUNK_BYTES, data), Run(ANY, hole)]
    volume.trim(0, volume.size)
    assert list(volume.runs(0, volume.size)) == [Run(volume.size, hole)]
    assert len(looked) < 10_000
    volume.close()


def test_a_flush_that_fails_says_so_and_goes_on_saying_so(simulation: Simulation, volumes: Volumes) -> None:
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    volume.write(0, memoryview(b"x" * 4096))
    simulation.devices[0].fail_flushes = 1
    for _ in range(2):
        with pytest.raises(DeviceError):
            volume.flush()
    assert read(volume, 0, 4096) == b"x" * 4096
    volume.close()


@pytest.mark.parametrize("tried", [False, True], ids=["", "after a flush that failed"])
def test_what_a_device_has_lost_while_it_was_away_is_not_forgotten_when_it_is_written_again(
    simulation: Simulation, store: ObjectStore, volumes: Volumes, *, tried: bool
) -> None:
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    volume.write(0, memoryview(b"x" * 4096))
    slot, before = store.blocks.slots[0], simulation.devices[0]
    if tried:
        before.fail_flushes = 1
        with pytest.raises(DeviceError):
            volume.flush()
    slot.device = VolatileDevice(before._below)  # it was pulled out, and is back
    volume.write(8192, memoryview(b"y" * 4096))
    for _ in range(2):
        with pytest.raises(DeviceError, match="was away"):
            volume.flush()
    slot.device, before.failed = before, ""


def test_zeros_that_stay_allocated_are_not_fast(simulation: Simulation, volumes: Volumes) -> None:
    volumes.create("disk", SIZE)
    with closing(volumes.open("disk")) as volume:
        volume.write(0, memoryview(b"x" * CHUNK_BYTES))
        with pytest.raises(Unsupported):
            volume.zero(0, CHUNK_BYTES, keep=True, fast=True)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        volume.read(0, buffer)
        assert buffer == b"x" * CHUNK_BYTES
        for keep, fast in ((True, False), (False, True)):
            volume.write(0, memoryview(b"x" * CHUNK_BYTES))
            volume.zero(0, CHUNK_BYTES, keep=keep, fast=fast)
            volume.read(0, buffer)
            assert not any(buffer)


def test_a_change_that_no_journal_takes_is_an_error(simulation: Simulation, volumes: Volumes) -> None:
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    volume.write(0, memoryview(b"x" * CHUNK_BYTES))
    volume.flush()
    simulation.devices[0].failed = "it was told to"
    volume.zero(0, CHUNK_BYTES, keep=False, fast=False)
    for _ in range(2):
        with pytest.raises(DeviceError):
            volume.flush()
    volume.close()
    with pytest.raises(DeviceError):
        volumes.delete("disk")
    assert volumes.names() == ["disk"]
    simulation.devices[0].failed = ""
