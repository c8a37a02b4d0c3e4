"""Snapshots come and go, and leave no Layer behind; whatever happens meanwhile."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Delete
from rustord.errors import DeviceError, NoSpace, Unavailable
from rustord.export import Run, State
from rustord.extent import Extent
from rustord.layer import Layer
from rustord.layermerger import LayerMerger
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES, PAGE_CHUNKS, SLOT_COUNT, page_of
from rustord.record import Record
from rustord.volumes import LAYERS_MAX, Volumes
from rustord.writer import Writer
from tests.daemon import until
from tests.simulation import MIB, Direct, PowerCut, Simulation, check_sound, free_count, live, run
from tests.test_volumes import Bench, content, read, rebuild_index, write

SIZE = 80 * CHUNK_BYTES


@pytest.fixture
def bench(disk_path: Path) -> Iterator[Bench]:
    bench = Bench(Simulation(disk_path, (32 * MIB, 32 * MIB)))
    yield bench
    bench.simulation.close()


def contents(store: ObjectStore, volumes: Volumes) -> dict[str, bytes]:
    found = {record.name: store.get(record.uuid) for record in live(store)}
    for name in volumes.names():
        volume = volumes.open(name)
        found[f"volume {name}"] = read(volume, 0, volume.size)
        volume.close()
    return found


def change(volumes: Volumes, name: str, chance: random.Random) -> None:
    volume = volumes.open(name)
    for _ in range(3):
        write(volume, chance.randrange(volume.size - 100_000), chance.randbytes(chance.choice((10, 5000, 100_000))))
    end = volume.size // CHUNK_BYTES - 2
    volume.trim(chance.randrange(end) * CHUNK_BYTES, chance.randrange(3) * CHUNK_BYTES)
    volume.flush()
    volume.close()


def delete(store: ObjectStore, name: str) -> None:
    uuid = store.resolve(name)
    assert uuid is not None
    store.delete(uuid)


def test_a_snapshot_every_hour_and_the_oldest_goes(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    before = free_count(bench.store)
    merger = LayerMerger(bench.store, bench.volumes)
    bench.volumes.create("disk", SIZE)
    expected: dict[str, bytes] = {}
    for number in range(2 * LAYERS_MAX):
        change(bench.volumes, "disk", chance)
        expected[f"snapshot{number}"] = content(bench, "disk")
        bench.volumes.snapshot("disk", f"snapshot{number}")
        if len(expected) > 3:
            gone = chance.choice(list(expected))
            delete(bench.store, gone)
            del expected[gone]
        assert merger.run() <= 1
        assert bench.volumes.stat("disk").layer_count == len(expected) + 1
        if number % 16 == 0:
            bench.check()
            assert contents(bench.store, bench.volumes) == expected | {"volume disk": content(bench, "disk")}
        if number % 48 == 47:
            bench.reopen(clean=chance.random() < 0.5)
            merger = LayerMerger(bench.store, bench.volumes)
    for name in expected:
        delete(bench.store, name)
    merger.run()
    assert bench.volumes.stat("disk").layer_count == 1
    bench.volumes.delete("disk")
    bench.check()
    assert free_count(bench.store) == before


def test_what_a_clone_or_a_snapshot_needs_stays(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    merger = LayerMerger(bench.store, bench.volumes)
    bench.store.put(chance.randbytes(5 * CHUNK_BYTES), name="image")
    bench.volumes.clone("image", "disk")
    change(bench.volumes, "disk", chance)
    bench.volumes.snapshot("disk", "one")
    change(bench.volumes, "disk", chance)
    bench.volumes.clone("one", "other")
    expected = contents(bench.store, bench.volumes)
    assert merger.run() == 0
    delete(bench.store, "one")
    del expected["one"]
    assert merger.run() == 0  # "other" builds on its Layer
    assert contents(bench.store, bench.volumes) == expected
    bench.volumes.delete("other")
    del expected["volume other"]
    delete(bench.store, "image")
    del expected["image"]
    assert merger.run() == 1
    assert contents(bench.store, bench.volumes) == expected
    bench.check()
    assert bench.volumes.stat("disk").layer_count == 1


def test_a_volume_in_use_does_not_notice(simulate: Callable[..., Simulation], seed: int) -> None:
    simulation = simulate(64 * MIB, 64 * MIB)
    store = simulation.open()
    writer = Writer(store)
    volumes = Volumes(store, writer)
    merger = LayerMerger(store, volumes)
    merger.start()
    volumes.create("disk", SIZE)
    volume = volumes.open("disk")
    stop = threading.Event()

    def work(lane: int) -> dict[int, bytes]:
        chance, mine = random.Random(seed + lane), dict[int, bytes]()
        while not stop.is_set():
            block = chance.randrange(SIZE // 4096 // 3) * 3 + lane
            assert read(volume, block * 4096, 4096) == mine.get(block, bytes(4096))
            mine[block] = chance.randbytes(4096)
            write(volume, block * 4096, mine[block])
            if chance.random() < 0.05:
                volume.flush()
        return mine

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work, lane) for lane in range(3)]
        try:
            names: list[Record] = []
            for _ in range(25):
                names.append(volumes.snapshot("disk"))
                if len(names) > 2:
                    ((_, outcome),) = writer.make([Delete(names.pop(seed % 2).uuid)], 60)
                    assert isinstance(outcome, Record)
        finally:
            stop.set()
        for done in working:
            for block, data in done.result(60).items():
                assert read(volume, block * 4096, 4096) == data
    volume.close()
    merger.close()
    merger = LayerMerger(store, volumes)
    merger.run()
    assert volumes.stat("disk").layer_count == 3
    volumes.close()
    assert writer.close()
    run(store)
    check_sound(store)


@pytest.mark.parametrize("fate", ["index", "rebuild"])
def test_a_power_cut_at_any_step_leaves_all_of_it(
    disk_path: Path, seed: int, fate: str, pytestconfig: pytest.Config
) -> None:
    chance = random.Random(seed)
    simulation = Simulation(disk_path, (24 * MIB, 24 * MIB))
    bench = Bench(simulation)
    bench.store.put(chance.randbytes(5 * CHUNK_BYTES), name="image")
    bench.volumes.clone("image", "disk")
    for number in range(5):
        change(bench.volumes, "disk", chance)
        bench.volumes.snapshot("disk", f"snapshot{number}")
    change(bench.volumes, "disk", chance)
    for name in ("snapshot0", "snapshot2", "snapshot4"):
        delete(bench.store, name)
    expected = contents(bench.store, bench.volumes)
    bench.volumes.close()
    simulation.close()
    restore = simulation.save()
    step = 1 if pytestconfig.getoption("long") else 5
    count, done = chance.randrange(step), False
    while not done:
        restore()
        bench = Bench(simulation)
        simulation.power.left = count
        with suppress(PowerCut):
            assert LayerMerger(bench.store, bench.volumes).run() == 3
            run(bench.store)
            bench.store.keystore.checkpoint()
            done = True
        simulation.power.left = 0
        share = chance.choice((0.0, 0.5, 1.0))
        simulation.cut_power(lambda offset, share=share: chance.random() < share)  # type: ignore[misc]
        if fate == "rebuild":
            rebuild_index(simulation)
        bench.store = simulation.open()
        bench.volumes = Volumes(bench.store, Direct(bench.store))
        bench.check()
        LayerMerger(bench.store, bench.volumes).run()
        bench.check()
        assert contents(bench.store, bench.volumes) == expected
        assert len(bench.store.layers.by_uuid) == 3
        change(bench.volumes, "disk", chance)
        left = contents(bench.store, bench.volumes)
        bench.reopen(clean=False)
        assert contents(bench.store, bench.volumes) == left
        bench.check()
        simulation.close()
        count += step


@pytest.mark.parametrize("fate", ["index", "rebuild"])
@pytest.mark.parametrize("stage", ["taken over", "named"])
def test_chunks_that_two_layers_name_are_the_upper_ones(bench: Bench, seed: int, fate: str, stage: str) -> None:
    """A crash between the steps of a merge."""
    chance = random.Random(seed)
    bench.volumes.create("disk", SIZE)
    change(bench.volumes, "disk", chance)
    bench.volumes.snapshot("disk", "gone")
    change(bench.volumes, "disk", chance)
    delete(bench.store, "gone")
    expected = contents(bench.store, bench.volumes)
    merger = LayerMerger(bench.store, bench.volumes)
    ((upper, lower),) = bench.store.layers.mergeable()
    chunks = {chunk: address for chunk, address in lower.chunks() if not upper.get(chunk)}
    merger._place(upper, lower, {page_of(chunk) for chunk in chunks})
    assert merger._take_over(upper, lower, [*chunks.items()])
    if stage == "named":
        assert merger._finish(upper, lower)
    bench.simulation.cut_power()
    if fate == "rebuild":
        rebuild_index(bench.simulation)
    bench.store = bench.simulation.open()
    bench.volumes = Volumes(bench.store, Direct(bench.store))
    bench.check()
    if stage == "taken over":
        with pytest.raises(Unavailable, match="cut short"):
            bench.volumes.open("disk")
    assert LayerMerger(bench.store, bench.volumes).run() == (stage == "taken over")
    assert contents(bench.store, bench.volumes) == expected
    bench.check()
    bench.volumes.delete("disk")
    bench.check()
    for index, runs in bench.store.allocator._free.items():
        for block, count in runs:
            assert not any(bench.simulation.read(index, block, count)), "what is free was not erased"


def fill_up(store: ObjectStore, home: int) -> list[Extent]:
    """Take what is free, but for the slots of one page on a device; returns what was taken."""
    taken = []
    for count in (SLOT_COUNT, 1):
        with suppress(NoSpace):
            while True:
                taken.append(store.allocator.run(count))
    left = next(extent for extent in taken if (extent.device, extent.count) == (home, SLOT_COUNT))
    taken.remove(left)
    store.allocator.release([left])
    return taken


@pytest.mark.parametrize("batch", [1, 4096])
@pytest.mark.parametrize("writer", ["merger", "volume"])
def test_a_merge_without_room_loses_nothing_of_what_comes_later(
    bench: Bench, writer: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs slots for two pages, and finds those for one."""
    monkeypatch.setattr("rustord.layermerger._BATCH_CHUNKS", batch)
    far = PAGE_CHUNKS * CHUNK_BYTES
    bench.volumes.create("disk", far + CHUNK_BYTES)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"near")
    write(volume, far, b"far")
    bench.volumes.snapshot("disk", "gone")
    delete(bench.store, "gone")
    merger = LayerMerger(bench.store, bench.volumes)
    taken = fill_up(bench.store, bench.store.layers.volumes["disk"].home)
    with pytest.raises(NoSpace):
        merger.run()
    bench.volumes.open("disk").close()  # nothing has begun that would be half done
    bench.store.allocator.release(taken)
    if writer == "volume":
        write(volume, 4, b"er")
        write(volume, far + 3, b"ther")
        volume.flush()
    assert merger.run() == 1
    expected = [read(volume, 0, 7), read(volume, far, 7)]
    volume.close()
    bench.check()
    bench.reopen()
    volume = bench.volumes.open("disk")
    assert [read(volume, 0, 7), read(volume, far, 7)] == expected
    volume.close()
    bench.check()


@pytest.mark.parametrize("is_written", [True, False], ids=["volume", "snapshot"])
@pytest.mark.parametrize("fate", ["goes on", "cut", "rebuild"])
def test_a_full_pool_gets_back_what_only_a_snapshot_had(bench: Bench, fate: str, *, is_written: bool) -> None:
    """The merge needs slots for a page; the snapshot has more that nobody can see any more."""
    far = PAGE_CHUNKS * CHUNK_BYTES
    bench.volumes.create("disk", far + CHUNK_BYTES)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"older" * CHUNK_BYTES)
    write(volume, far, b"far")
    bench.volumes.snapshot("disk", "gone")
    write(volume, 0, b"newer" * CHUNK_BYTES)
    if not is_written:
        bench.volumes.snapshot("disk", "kept")
    volume.close()
    expected = contents(bench.store, bench.volumes)
    del expected["gone"]
    delete(bench.store, "gone")
    taken = []
    with suppress(NoSpace):
        while True:
            taken.append(bench.store.allocator.run(1))
    with pytest.raises(NoSpace):
        LayerMerger(bench.store, bench.volumes).run()
    run(bench.store)
    if fate == "goes on":
        assert free_count(bench.store) >= 5 * bench.store.layers.chunk_blocks
        assert contents(bench.store, bench.volumes) == expected
        assert LayerMerger(bench.store, bench.volumes).run() == 1
        bench.store.allocator.release(taken)
    else:
        bench.simulation.cut_power()
        if fate == "rebuild":
            rebuild_index(bench.simulation)
        bench.store = bench.simulation.open()
        bench.volumes = Volumes(bench.store, Direct(bench.store))
    assert contents(bench.store, bench.volumes) == expected
    bench.check()
    bench.reopen(clean=False)
    assert contents(bench.store, bench.volumes) == expected
    bench.check()


def test_a_merge_without_room_is_made_when_there_is_some(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rustord.layermerger._AGAIN_S", 0.1)
    store = simulate(32 * MIB).open()
    writer = Writer(store)
    volumes = Volumes(store, writer)
    merger = LayerMerger(store, volumes)
    merger.start()
    far = PAGE_CHUNKS * CHUNK_BYTES
    volumes.create("disk", far + CHUNK_BYTES)
    volume = volumes.open("disk")
    write(volume, 0, b"near")
    write(volume, far, b"far")
    volume.close()
    snapshot = volumes.snapshot("disk")
    taken = fill_up(store, volume.layer.home)
    writer.make([Delete(snapshot.uuid)], 60)
    until(lambda: merger._has_failed, "there was no room")
    store.allocator.release(taken)
    until(lambda: volumes.stat("disk").layer_count == 1, "it is merged")
    merger.close()
    volumes.close()
    assert writer.close()


def test_a_merge_that_the_journal_did_not_take_loses_nothing_of_what_comes_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(*_: object) -> None:
        raise Unavailable("the journal is full")

    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"old")
    bench.volumes.snapshot("disk", "gone")
    delete(bench.store, "gone")
    before = free_count(bench.store)
    with monkeypatch.context() as patch:
        patch.setattr(bench.store.journals, "note", note)
        for _ in range(2):
            with pytest.raises(Unavailable):
                LayerMerger(bench.store, bench.volumes).run()
    bench.volumes.open("disk").close()  # nothing has begun that would be half done
    assert free_count(bench.store) == before
    write(volume, 3, b"er")
    volume.flush()
    volume.close()
    bench.reopen(clean=False)
    assert content(bench, "disk")[:5] == b"older"
    bench.check()


def test_a_merge_that_needs_a_missing_device_holds_up_no_other_one(bench: Bench) -> None:
    """Least of all one that was cut short, without which nobody can open the volume."""
    volumes = bench.volumes
    homes: dict[str, int] = {}
    while len({*homes.values()}) < 2:
        name = f"disk{len(homes)}"
        volumes.create(name, SIZE)
        homes[name] = bench.store.layers.volumes[name].home
        bench.store.put(bytes(5 * MIB))
    first, last = "disk0", f"disk{len(homes) - 1}"
    for name in (first, last):
        volume = volumes.open(name)
        write(volume, 0, name.encode())
        volume.flush()
        volume.close()
        volumes.snapshot(name, "gone")
        delete(bench.store, "gone")
    (_, (upper, lower)) = bench.store.layers.mergeable()
    assert upper.head.name == last
    merger = LayerMerger(bench.store, volumes)
    merger._place(upper, lower, {page_of(chunk) for chunk, _ in lower.chunks()})
    assert merger._take_over(upper, lower, [*lower.chunks()])
    bench.simulation.cut_power()
    bench.store = bench.simulation.open(without={homes[first]})
    bench.volumes = Volumes(bench.store, Direct(bench.store))
    with pytest.raises(DeviceError):
        LayerMerger(bench.store, bench.volumes).run()
    assert content(bench, last).rstrip(b"\0") == last.encode()


@pytest.mark.parametrize("what", ["resize", "delete"])
def test_a_merge_just_before_a_volume_gets_another_head_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    volumes = bench.volumes
    before = free_count(bench.store)
    bench.store.put(b"i" * (4 * CHUNK_BYTES), name="image")
    volumes.clone("image", "disk")
    volume = volumes.open("disk")
    write(volume, 0, b"older")
    volumes.snapshot("disk", "gone")
    write(volume, CHUNK_BYTES, b"newer")
    expected = read(volume, 0, volume.size)
    volume.close()
    delete(bench.store, "gone")
    call, set_head = volumes.call, volumes._set_head

    def merge_first(function: Callable[[], object]) -> object:
        monkeypatch.setattr(volumes, "call", call)
        assert LayerMerger(bench.store, volumes).run() == 1
        return call(function)

    def set_head_late(*args: Any) -> None:
        monkeypatch.setattr(volumes, "call", merge_first)
        set_head(*args)

    monkeypatch.setattr(volumes, "_set_head", set_head_late)
    if what == "resize":
        volumes.resize("disk", volume.size + CHUNK_BYTES)
        assert content(bench, "disk") == expected + bytes(CHUNK_BYTES)
    else:
        volumes.delete("disk")
        delete(bench.store, "image")
        run(bench.store)
        assert free_count(bench.store) == before
    bench.check()


@pytest.mark.parametrize("what", ["runs", "zero"])
def test_a_chunk_has_data_while_it_goes_from_one_layer_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who asks has looked into the upper Layer already, and not into the lower one yet."""
    bench.volumes.create("disk", SIZE)
    volume = bench.volumes.open("disk")
    write(volume, 0, b"x" * CHUNK_BYTES)
    bench.volumes.snapshot("disk", "gone")
    delete(bench.store, "gone")
    get, upper, asking = Layer.get, volume.layer, threading.get_ident()
    merging = threading.Thread(target=LayerMerger(bench.store, bench.volumes).run)

    def get_late(layer: Layer, chunk: int) -> int:
        address = get(layer, chunk)
        if layer is upper and threading.get_ident() == asking:
            monkeypatch.setattr(Layer, "get", get)
            merging.start()
            merging.join(0.5)
        return address

    monkeypatch.setattr(Layer, "get", get_late)
    if what == "runs":
        assert list(volume.runs(0, 2 * CHUNK_BYTES)) == [
            Run(CHUNK_BYTES, State.DATA),
            Run(CHUNK_BYTES, State.HOLE | State.ZERO),
        ]
    else:
        volume.zero(0, 100, keep=False, fast=False)
        assert read(volume, 0, 101) == bytes(100) + b"x"
    merging.join()
    assert bench.volumes.stat("disk").layer_count == 1
    volume.close()
    bench.check()


def test_a_merge_takes_no_copy_of_the_map(bench: Bench) -> None:
    """That of 100 GiB would be 200 MiB, and a long time for all who wait for the pool."""
    bench.volumes.create("disk", 256 * PAGE_CHUNKS * CHUNK_BYTES)
    lower = bench.store.layers.volumes["disk"]
    bench.volumes._volume("disk").split(bench.volumes._cover)
    bench.volumes._let_go(lower)
    for chunk in range(256 * PAGE_CHUNKS):
        lower.set(chunk, 1 << 48 | 10_000 + chunk)
    tracemalloc.start()
    assert LayerMerger(bench.store, bench.volumes).run() == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bench.volumes.stat("disk").own_bytes == 1 << 32
    assert peak < 4 << 20
