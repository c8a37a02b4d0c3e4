"""What volumes have on a device moves to others, while they are in use, and over a crash at any step."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Delete, Put
from rustord.errors import DeviceError, NoSpace
from rustord.extent import Extent
from rustord.label import Standing
from rustord.layermover import LayerMover
from rustord.membership import attach_device, detach_device, set_standing
from rustord.mover import Mover
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES, PAGE_CHUNKS, ZEROS, extent_at
from rustord.record import Record
from rustord.testing.device import VolatileDevice
from rustord.volumes import Volumes
from rustord.writer import Writer
from tests.simulation import MIB, Direct, PowerCut, Simulation, check_sound, live, run
from tests.test_volumes import is_in_journal, read, rebuild_index, write


class Pool:
    """A pool with a writer, volumes and a mover, as in the daemon."""

    def __init__(self, simulation: Simulation) -> None:
        self.store = simulation.open()
        self.writer = Writer(self.store)
        self.volumes = Volumes(self.store, self.writer)
        self.mover = Mover(self.store, self.writer, volumes=self.volumes)

    def leave(self, index: int, standing: Standing = Standing.LEAVING) -> None:
        self.writer.call(lambda: set_standing(self.store, index, standing))
        self.mover.start()

    def done(self) -> None:
        assert self.mover.task.wait(60)
        assert (self.mover.task.state, self.mover.task.error) == ("done", "")

    def end(self) -> None:
        self.mover.pause()
        self.volumes.close()
        assert self.writer.close()

    def check(self) -> None:
        self.store.keystore.checkpoint()
        run(self.store)
        check_sound(self.store)


@pytest.fixture
def pool(simulate: Callable[..., Simulation]) -> Iterator[Callable[..., Pool]]:
    opened: list[Pool] = []

    def open_pool(*sizes: int) -> Pool:
        opened.append(Pool(simulate(*sizes)))
        return opened[-1]

    yield open_pool
    for one in opened:
        one.end()
        one.check()


def homes(store: ObjectStore) -> set[int]:
    layers = store.layers
    return {extent.device for layer in layers.by_uuid.values() for extent in layer.extents(layers.chunk_blocks)}


def prepare(volumes: Volumes, store: ObjectStore, chance: random.Random) -> dict[str, bytes]:
    """Volumes, one cloned from an Object and one with a snapshot, and an Object that was one; what they have."""
    store.put(chance.randbytes(5 * CHUNK_BYTES + 99), name="image")
    volumes.clone("image", "clone")
    for name in ("disk", "frozen"):
        volumes.create(name, 600 * CHUNK_BYTES)
    for name in ("clone", "disk", "frozen"):
        volume = volumes.open(name)
        for _ in range(12):
            offset = chance.randrange(volume.size - 70_000)
            write(volume, offset, chance.randbytes(70_000))
        volume.flush()
        volume.close()
    volumes.snapshot("disk", "snapshot")
    volume = volumes.open("disk")
    write(volume, 12_345, chance.randbytes(100_000))
    volume.trim(20 * CHUNK_BYTES, 10 * CHUNK_BYTES)
    volume.flush()
    volume.close()
    volumes.freeze("frozen")
    return contents(volumes, store)


def delete(one: Pool, name: str) -> None:
    uuid = one.store.resolve(name)
    assert uuid is not None
    ((_, outcome),) = one.writer.make([Delete(uuid)], 60)
    assert isinstance(outcome, Record)


def contents(volumes: Volumes, store: ObjectStore) -> dict[str, bytes]:
    found = {record.name: store.get(record.uuid) for record in live(store)}
    for name in volumes.names():
        volume = volumes.open(name)
        found[f"volume {name}"] = read(volume, 0, volume.size)
        volume.close()
    return found


def test_a_device_with_volumes_can_be_emptied(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(32 * MIB, 32 * MIB, 32 * MIB)
    expected = prepare(one.volumes, one.store, random.Random(seed))
    delete(one, "image")  # which volumes build on
    one.store.keystore.checkpoint()
    (image,) = one.store.keystore.bases()
    assert image.devices <= {0, 1}
    del expected["image"]
    clone = one.volumes.open("clone")
    for index in (0, 1):
        one.leave(index)
        one.done()
        assert index not in one.store.blocks.slots
        assert homes(one.store) <= one.store.blocks.slots.keys()
        assert contents(one.volumes, one.store) == expected
        assert read(clone, 0, clone.size) == expected["volume clone"]
    clone.close()
    one.store.keystore.checkpoint()
    assert not one.store.keystore.bases()


def test_a_clone_in_use_has_nothing_on_a_device_that_leaves(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(24 * MIB, 24 * MIB)
    data = random.Random(seed).randbytes(10 * CHUNK_BYTES)
    one.store.put(data, name="image")
    one.volumes.clone("image", "clone")
    volume = one.volumes.open("clone")
    for chunk in range(3):  # for the third one, more blocks are taken than it needs
        write(volume, chunk * CHUNK_BYTES, b"new")
    one.leave(one.store.layers.volumes["clone"].home)
    one.done()
    write(volume, 5 * CHUNK_BYTES, b"new")
    volume.flush()
    expected = b"".join(
        b"new" + data[at + 3 : at + CHUNK_BYTES] if at // CHUNK_BYTES in (0, 1, 2, 5) else data[at : at + CHUNK_BYTES]
        for at in range(0, len(data), CHUNK_BYTES)
    )
    assert read(volume, 0, len(data)) == expected
    volume.close()


def test_a_flush_needs_no_device_that_was_emptied_and_removed_meanwhile(pool: Callable[..., Pool]) -> None:
    """A chunk there was written by another process, which tells of that with the flush; and given back."""
    one = pool(24 * MIB, 24 * MIB)
    one.volumes.create("disk", 4 * CHUNK_BYTES)
    volume = one.volumes.open("disk")
    write(volume, 0, b"x" * CHUNK_BYTES)
    volume.flush()
    index = volume.layer.home
    written = one.store.blocks.device(index)
    volume.trim(0, CHUNK_BYTES)
    one.volumes.resize("disk", 8 * CHUNK_BYTES)  # which flushes what we know of
    one.leave(index)
    one.done()
    assert index not in one.store.blocks.slots
    volume.dirtied([(index, written)])
    write(volume, CHUNK_BYTES, b"y")
    volume.flush()
    assert read(volume, 0, CHUNK_BYTES + 1) == bytes(CHUNK_BYTES) + b"y"
    volume.close()


def test_a_device_is_emptied_of_what_a_client_has_given_back_and_not_flushed(pool: Callable[..., Pool]) -> None:
    """And it may never do so: it may be gone."""
    one = pool(24 * MIB, 24 * MIB)
    one.volumes.create("disk", 4 * CHUNK_BYTES)
    volume = one.volumes.open("disk")
    write(volume, 0, b"x" * 2 * CHUNK_BYTES)
    volume.flush()
    index = volume.layer.home
    volume.trim(0, CHUNK_BYTES)
    volume.trim(CHUNK_BYTES, CHUNK_BYTES)
    volume.close()
    one.leave(index)
    one.done()
    assert index not in one.store.blocks.slots


def test_what_is_written_meanwhile_does_not_take_its_room(pool: Callable[..., Pool]) -> None:
    one = pool(16 * MIB, 16 * MIB)
    one.volumes.create("disk", 256 * CHUNK_BYTES)
    volume = one.volumes.open("disk")
    write(volume, 0, b"x" * (40 * CHUNK_BYTES))
    volume.flush()
    one.writer.call(lambda: set_standing(one.store, volume.layer.home, Standing.LEAVING))
    end = 40 * CHUNK_BYTES
    with pytest.raises(NoSpace):  # noqa: PT012
        while True:
            write(volume, end, b"y" * CHUNK_BYTES)
            end += CHUNK_BYTES
    one.mover.start()
    one.done()
    assert read(volume, 0, end) == b"x" * (40 * CHUNK_BYTES) + b"y" * (end - 40 * CHUNK_BYTES)
    volume.close()


def test_a_volume_is_written_and_read_while_it_moves(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(64 * MIB, 64 * MIB)
    one.volumes.create("disk", 300 * CHUNK_BYTES)
    volume = one.volumes.open("disk")
    write(volume, 0, bytes(volume.size))
    volume.flush()
    (index,) = homes(one.store) if len(homes(one.store)) == 1 else (0,)
    stop = threading.Event()
    lanes = 3

    def work(lane: int) -> dict[int, bytes]:
        chance, mine = random.Random(seed + lane), dict[int, bytes]()
        while not stop.is_set():
            block = chance.randrange(volume.size // 4096 // lanes) * lanes + lane
            assert read(volume, block * 4096, 4096) == mine.get(block, bytes(4096))
            mine[block] = chance.randbytes(4096)
            write(volume, block * 4096, mine[block])
            if chance.random() < 0.02:
                volume.flush()
            if len(mine) == 30 and not lane and not live(one.store):
                one.volumes.snapshot("disk")
        return mine

    with ThreadPoolExecutor(lanes) as threads:
        working = [threads.submit(work, lane) for lane in range(lanes)]
        one.leave(index)
        try:
            assert one.mover.task.wait(60)
        finally:
            stop.set()
        written = {block: data for done in working for block, data in done.result(60).items()}
    one.done()
    assert index not in one.store.blocks.slots
    for block, data in written.items():
        assert read(volume, block * 4096, 4096) == data
    volume.close()


def test_who_reads_a_snapshot_meanwhile_never_gets_anything_else(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(48 * MIB, 48 * MIB)
    expected = prepare(one.volumes, one.store, random.Random(seed))
    uuid = one.store.resolve("snapshot")
    assert uuid is not None
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert one.store.get(uuid) == expected["snapshot"]

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        one.leave(0)
        try:
            assert one.mover.task.wait(60)
        finally:
            stop.set()
        looking.result(60)
    one.done()


def test_a_volume_is_deleted_or_frozen_while_it_moves(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(48 * MIB, 48 * MIB)
    chance = random.Random(seed)
    for number in range(6):
        one.volumes.create(f"disk{number}", 60 * CHUNK_BYTES)
        volume = one.volumes.open(f"disk{number}")
        write(volume, 0, chance.randbytes(40 * CHUNK_BYTES))
        volume.flush()
        volume.close()
    one.leave(0)
    for number in range(6):
        if number % 2:
            one.volumes.freeze(f"disk{number}")
        else:
            one.volumes.delete(f"disk{number}")
    one.done()


def test_what_a_volume_has_is_summed_where_it_is_though_it_moves(
    pool: Callable[..., Pool], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is frozen, and moved between the look at its map and the reading of a chunk."""
    one = pool(32 * MIB, 32 * MIB)
    data = random.Random(seed).randbytes(40 * CHUNK_BYTES)
    one.volumes.create("disk", len(data))
    volume = one.volumes.open("disk")
    write(volume, 0, data)
    volume.flush()
    volume.close()
    home = one.store.layers.volumes["disk"].home
    look = one.store.layers._runs
    moving = threading.Thread(target=lambda: LayerMover(one.store, one.volumes).run({home: 1e6}, lambda length: None))

    def look_early(*args: Any) -> list[tuple[int, int, int]]:
        monkeypatch.setattr(one.store.layers, "_runs", look)
        runs = list(look(*args))
        moving.start()
        moving.join(0.5)
        one.writer.make([Put(b"")], 60)  # what has been left is erased in the next cycle
        return runs

    monkeypatch.setattr(one.store.layers, "_runs", look_early)
    frozen = one.volumes.freeze("disk")
    moving.join()
    assert one.store.get(frozen.uuid) == data


def test_rebalancing_moves_chunks_to_the_emptier_device(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(32 * MIB, 32 * MIB)
    one = Pool(simulation)
    one.writer.call(lambda: set_standing(one.store, 1, Standing.LEAVING))
    one.volumes.create("disk", 300 * CHUNK_BYTES)
    volume = one.volumes.open("disk")
    write(volume, 0, bytes(range(256)) * 256 * 250)
    volume.flush()
    one.writer.call(lambda: set_standing(one.store, 1, Standing.IN_USE))
    one.mover.start("rebalance")
    one.done()
    assert read(volume, 0, 250 * CHUNK_BYTES) == bytes(range(256)) * 256 * 250
    volume.close()
    one.end()
    one.check()
    used = [one.store.allocator.size(index) - one.store.allocator.free_count(index) for index in (0, 1)]
    assert abs(used[0] - used[1]) < 0.1 * sum(used)


def test_what_cannot_be_read_keeps_the_device_and_is_named(pool: Callable[..., Pool], seed: int) -> None:
    one = pool(32 * MIB, 32 * MIB)
    expected = prepare(one.volumes, one.store, random.Random(seed))
    layer = one.store.layers.volumes["disk"]
    chunk, address = next((chunk, address) for chunk, address in layer.chunks() if address > ZEROS)
    device, block, _ = extent_at(address, 1)
    simulated = one.store.blocks.device(device)
    assert isinstance(simulated, VolatileDevice)
    simulated.fail_reads = range(block * 4096, block * 4096 + 512)
    one.leave(device)
    assert one.mover.task.wait(60)
    assert one.mover.task.state == "failed"
    assert f"volume disk, bytes {chunk * CHUNK_BYTES} to" in one.mover.task.error
    simulated.fail_reads = False
    one.mover.start()
    one.done()
    assert contents(one.volumes, one.store) == expected


def move_all(store: ObjectStore, index: int) -> None:
    """Everything that Layers have off a device, without any thread."""
    volumes = Volumes(store, Direct(store))
    mover = LayerMover(store, volumes)
    set_standing(store, index, Standing.LEAVING)
    mover.run({index: 1 << 60}, lambda length: None)
    assert mover.problem is None
    volumes.close()
    run(store)
    store.keystore.checkpoint()
    run(store)


def test_a_device_that_was_away_and_is_back_has_lost_what_was_copied_to_it(disk_path: Path) -> None:
    simulation = Simulation(disk_path, (32 * MIB, 32 * MIB))
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 8 * CHUNK_BYTES)
    volume = volumes.open("disk")
    write(volume, 0, b"x" * volume.size)
    volume.close()
    home = volume.layer.home
    frozen = volumes.freeze("disk")
    mover = LayerMover(store, volumes)
    copy = mover._copy

    def copy_after_it_was_away(address: int, extent: Extent) -> None:
        mover._copy = copy  # type: ignore[method-assign]
        copy(address, extent)
        detach_device(store, extent.device)
        simulation.devices[extent.device].cut_power()
        attach_device(store, str(simulation.paths[extent.device]))

    mover._copy = copy_after_it_was_away  # type: ignore[method-assign]
    mover.run({home: 1e6}, lambda length: None)
    run(store)
    assert store.get(frozen.uuid) == b"x" * frozen.size
    assert homes(store) == {1 - home}, "each for itself could be moved"
    check_sound(store)
    simulation.close()


def test_a_volume_may_get_pages_while_its_pages_move(disk_path: Path) -> None:
    simulation = Simulation(disk_path, (32 * MIB, 32 * MIB))
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    page_bytes = PAGE_CHUNKS * CHUNK_BYTES
    volumes.create("disk", 8 * page_bytes)
    volume = volumes.open("disk")
    for number in range(3):
        write(volume, number * page_bytes, b"x")
    volume.flush()

    class Written(dict[int, float]):
        """Is asked for each page whether it leaves."""

        def get(self, *args: Any) -> Any:
            if len(volume.layer.places) < 8:
                write(volume, len(volume.layer.places) * page_bytes, b"x")
            return super().get(*args)

    LayerMover(store, volumes).run(Written({volume.layer.home: 1e6}), lambda length: None)
    for number in range(8):
        assert read(volume, number * page_bytes, 1) == b"x"
    volume.close()
    volumes.close()
    store.keystore.checkpoint()
    run(store)
    check_sound(store)
    simulation.close()


@pytest.mark.parametrize("kind", ["volume", "snapshot"])
def test_what_has_its_home_on_a_device_that_is_missing_takes_no_room(disk_path: Path, kind: str) -> None:
    """Nothing of it can be moved: no journal could say so."""
    simulation = Simulation(disk_path, (32 * MIB, 32 * MIB, 32 * MIB))
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 40 * CHUNK_BYTES)
    home = store.layers.volumes["disk"].home
    leaving = 1 - min(home, 1)
    rest = {*store.blocks.slots} - {leaving}
    with suppress(NoSpace):  # so that the chunks go to the device that leaves
        while True:
            store.allocator.run(CHUNK_BYTES // 4096, avoid={leaving})
    volume = volumes.open("disk")
    write(volume, 0, b"x" * volume.size)
    volume.flush()
    volume.close()
    if kind == "snapshot":
        volumes.snapshot("disk")
    volumes.close()
    simulation.close()
    store = simulation.open(without={home})
    free = {index: store.allocator.free_count(index) for index in rest}
    mover = LayerMover(store, Volumes(store, Direct(store)))
    assert mover.count({leaving}) >= 40 * CHUNK_BYTES // 4096
    assert mover.run({leaving: 1e6}, lambda length: None) == 0
    assert isinstance(mover.problem, DeviceError)
    run(store)
    assert {index: store.allocator.free_count(index) for index in rest} == free
    simulation.close()


@pytest.mark.parametrize("fate", ["index", "rebuild"])
def test_a_power_cut_at_any_step_leaves_all_of_it(
    disk_path: Path, seed: int, fate: str, pytestconfig: pytest.Config
) -> None:
    chance = random.Random(seed)
    template = Simulation(disk_path, (24 * MIB, 24 * MIB))
    store = template.open()
    volumes = Volumes(store, Direct(store))
    expected = prepare(volumes, store, chance)
    uuid = store.resolve("image")
    assert uuid is not None
    assert store.stat(uuid).devices == {0}
    store.delete(uuid)
    del expected["image"]
    volumes.close()
    for _ in range(700):  # until no journal has anything of what was before
        store.put(b"x", name="filler", text="t" * 7500)
    template.close()
    restore = template.save()
    step = 1 if pytestconfig.getoption("long") else 61
    count, done = chance.randrange(step), False
    while not done:
        restore()
        store = template.open()
        template.power.left = count
        with suppress(PowerCut):
            move_all(store, 0)
            done = True
        template.power.left = 0
        share = chance.choice((0.0, 0.5, 1.0))
        template.cut_power(lambda offset, share=share: chance.random() < share)  # type: ignore[misc]
        if fate == "rebuild":
            rebuild_index(template)
        store = template.open()
        volumes = Volumes(store, Direct(store))
        assert contents(volumes, store) | {"filler": b"x"} == expected | {"filler": b"x"}
        check_sound(store)
        move_all(store, 0)  # it goes on
        assert 0 not in homes(store).union(*(record.devices for record in store.keystore.bases()))
        volumes = Volumes(store, Direct(store))
        assert contents(volumes, store) | {"filler": b"x"} == expected | {"filler": b"x"}
        check_sound(store)
        template.close()
        count += step


def create_disk(store: ObjectStore, data: bytes) -> Volumes:
    """The volumes of ``store``, of which "disk" is a new one that begins with ``data``, durably."""
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 4 * CHUNK_BYTES)
    volume = volumes.open("disk")
    write(volume, 0, data)
    volume.flush()
    return volumes


@pytest.mark.parametrize("kept", [0, 1, None], ids=["old place's", "new place's", "none"])
def test_a_power_cut_before_a_device_is_away_for_a_while_leaves_all_of_it(
    disk_path: Path, seed: int, kept: int | None
) -> None:
    """Of what was not flushed, the device ``kept`` has everything, the other nothing; then the old place is away."""
    data = random.Random(seed).randbytes(2 * CHUNK_BYTES)
    template = Simulation(disk_path, (16 * MIB, 16 * MIB))
    store = template.open()
    create_disk(store, data).close()
    assert homes(store) == {0}
    template.close()
    restore = template.save()
    count, done = 0, False
    while not done:
        restore()
        store = template.open()
        volumes = Volumes(store, Direct(store))
        template.power.left = count
        with suppress(PowerCut):
            LayerMover(store, volumes).run({0: 1 << 60}, lambda length: None, slots=False)
            done = True
        template.power.left = 0
        for number, device in enumerate(template.devices):
            device.cut_power(lambda offset, number=number: number == kept)  # type: ignore[misc]
        template.devices = []
        template.cut_power()
        store = template.open(without={0})
        store.put(random.Random(seed).randbytes(MIB))
        template.close()
        store = template.open()
        assert not store.read_only
        volumes = Volumes(store, Direct(store))
        assert contents(volumes, store)["volume disk"][: len(data)] == data, f"after {count} writes and flushes"
        run(store)
        check_sound(store)
        assert not store.keystore.graves()
        template.close()
        count += 1


def remains(simulation: Simulation, data: bytes) -> list[int]:
    """The blocks of the devices, whatever they are, that have any of ``data``."""
    pieces = {data[at : at + 4096] for at in range(0, len(data), 4096)}
    images = [path.read_bytes() for path in simulation.paths]
    return [at // 4096 for image in images for at in range(MIB, len(image), 4096) if image[at : at + 4096] in pieces]


def cut_everywhere(
    template: Simulation,
    data: bytes,
    chance: random.Random,
    act: Callable[[ObjectStore], None],
    name: str,
    *,
    rebuilding: bool,
) -> list[int]:
    """Cut the power at each moment of ``act``; then delete the volume "disk" and, if there is one, the Object ``name``.

    Nothing of ``data`` may be left anywhere. Returns in how many blocks it was after each cut.
    """
    restore = template.save()
    done, found = False, list[int]()
    while not done:
        restore()
        store = template.open()
        template.power.left = len(found)
        with suppress(PowerCut):
            act(store)
            done = True
        template.power.left = 0
        template.cut_power(survival(chance))
        found.append(len(remains(template, data)))
        if rebuilding:
            rebuild_index(template)
        store = template.open()
        volumes = Volumes(store, Direct(store))
        check_sound(store)
        volumes.delete("disk")
        if uuid := store.resolve(name):
            store.delete(uuid)
        assert not remains(template, data), f"after {len(found) - 1} writes and flushes"
        check_sound(store)
        template.close()
    return found


@pytest.mark.parametrize("fate", ["", "rebuild"])
@pytest.mark.parametrize("work", ["move", "move what a snapshot has", "trim", "trim much"])
def test_nothing_is_left_of_a_volume_that_is_deleted_after_a_power_cut(
    disk_path: Path, seed: int, work: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "much" in work:  # more than one entry of the journal takes
        monkeypatch.setattr("rustord.volume._ENTRY_CHUNKS", 1)
    chance = random.Random(seed)
    data = chance.randbytes(3 * CHUNK_BYTES)
    template = Simulation(disk_path, (16 * MIB,))
    volumes = create_disk(template.open(), data)
    if "snapshot" in work:
        volumes.snapshot("disk", "snapshot")
    template.close()

    def act(store: ObjectStore) -> None:
        if "trim" in work:
            volume = Volumes(store, Direct(store)).open("disk")
            volume.trim(0, 2 * CHUNK_BYTES)
            volume.flush()
        else:
            move_within(store)

    found = cut_everywhere(template, data, chance, act, "snapshot", rebuilding=fate == "rebuild")
    assert any(count != len(data) // 4096 for count in found), "no power cut has left anything in two places"


@pytest.mark.parametrize("fate", ["", "rebuild"])
@pytest.mark.parametrize("work", ["write", "write to a clone of a snapshot", "adopt"])
def test_nothing_is_left_of_what_a_clone_was_made_of_when_both_are_deleted_after_a_power_cut(
    disk_path: Path, seed: int, work: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "snapshot" in work:  # more than one entry of the journal takes
        monkeypatch.setattr("rustord.volume._ENTRY_CHUNKS", 1)
    chance = random.Random(seed)
    data = chance.randbytes(5 * CHUNK_BYTES)
    template = Simulation(disk_path, (16 * MIB,))
    store = template.open()
    volumes = Volumes(store, Direct(store))
    if "snapshot" in work:
        volumes.create("image", len(data))
        volume = volumes.open("image")
        write(volume, 0, data)
        volume.close()
        volumes.freeze("image", "image")
    else:
        store.put(data, name="image")
    volumes.clone("image", "disk")
    if work == "adopt" and (uuid := store.resolve("image")):
        store.delete(uuid)
    template.close()

    def act(store: ObjectStore) -> None:
        volumes = Volumes(store, Direct(store))
        if work == "adopt":
            volumes.adopt(store.keystore.bases()[0], lambda length: None)
        else:
            volume = volumes.open("disk")
            for chunk in (3, 1, 4):
                write(volume, chunk * CHUNK_BYTES + 512, b"new")
            volume.trim(CHUNK_BYTES, CHUNK_BYTES)
            volume.flush()

    found = cut_everywhere(template, data, chance, act, "image", rebuilding=fate == "rebuild")
    assert any(count > len(data) // 4096 for count in found), "no power cut has left anything in two places"


def survival(chance: random.Random) -> Callable[[int], bool]:
    """Lets none, some or all of the sectors survive that were not flushed."""
    share = chance.choice((0.0, 0.5, 1.0))
    return lambda offset: chance.random() < share


def small(directory: Path) -> tuple[Simulation, dict[str, bytes], list[Extent]]:
    """A pool with a volume, a snapshot of it and nothing of them in the journals; what is in there, and their slots."""
    directory.mkdir()
    simulation = Simulation(directory)
    store = simulation.open()
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 4 * CHUNK_BYTES)
    for data in (b"old" * CHUNK_BYTES, b"new" * 1000):
        volume = volumes.open("disk")
        write(volume, 0, data)
        volume.flush()
        volume.close()
        if not live(store):
            volumes.snapshot("disk", "snapshot")
    expected = contents(volumes, store)
    volumes.close()
    for _ in range(700):
        store.put(b"x", name="filler", text="t" * 7500)
    expected["filler"] = b"x"
    simulation.close()
    extents = [extent for layer in store.layers.by_uuid.values() for extent in layer.extents(store.layers.chunk_blocks)]
    return simulation, expected, [extent for extent in extents if extent.count == 1]


def move_within(store: ObjectStore, *, chunks: bool = True) -> None:
    """Everything that Layers have, or their pages alone, to other blocks of the same device."""
    volumes = Volumes(store, Direct(store))
    mover = LayerMover(store, volumes)
    take = store.allocator.run
    store.allocator.run = lambda count, device=-1, avoid=(): take(count, device)  # type: ignore[method-assign]
    for layer in list(store.layers.by_uuid.values()):
        assert mover._move_slots(layer, {0: 1 << 60})
    if chunks:
        mover.run({0: 1 << 60}, lambda length: None, slots=False)
    assert mover.problem is None


def test_a_page_stays_in_its_old_slots_until_it_is_in_the_new_ones(disk_path: Path) -> None:
    simulation, expected, _ = small(disk_path / "pool")
    store = simulation.open()
    move_within(store, chunks=False)  # or else the journal would have the whole map
    run(store)
    simulation.cut_power()
    restore = simulation.save()
    count, done = 0, False
    while not done:
        restore()
        simulation.power.left = count
        with suppress(PowerCut):
            simulation.open()  # which erases the old slots
            done = True
        simulation.power.left = 0
        simulation.cut_power()
        rebuild_index(simulation)
        store = simulation.open()
        assert contents(Volumes(store, Direct(store)), store) == expected
        check_sound(store)
        simulation.close()
        count += 1


@pytest.mark.parametrize("fate", ["index", "rebuild"])
def test_no_page_is_left_behind_in_old_slots(disk_path: Path, fate: str) -> None:
    """One that was, and was found by a rebuild in years, might bring back a volume that is deleted by then."""
    simulation, expected, slots = small(disk_path / "pool")
    store = simulation.open()
    move_within(store)
    store.keystore.checkpoint()
    simulation.cut_power()
    if fate == "rebuild":
        rebuild_index(simulation)
    store = simulation.open()
    assert contents(Volumes(store, Direct(store)), store) == expected
    layers = store.layers
    now = [extent for layer in layers.by_uuid.values() for extent in layer.extents(layers.chunk_blocks)]
    slots = [slot for slot in slots if not any(extent.block <= slot.block < extent.end for extent in now)]
    assert slots, "all of them are somebody's by now"
    for slot in slots:
        assert not any(simulation.read(0, slot.block, 1))
    check_sound(store)
    simulation.close()


def test_a_chunk_is_durable_in_its_new_place_before_the_journal_says_so(disk_path: Path) -> None:
    template, expected, _ = small(disk_path / "pool")
    restore = template.save()
    count, done = 0, False
    while not done:
        restore()
        store = template.open()
        template.power.left = count
        with suppress(PowerCut):
            move_within(store)
            done = True
        template.power.left = 0
        template.cut_power(is_in_journal)
        store = template.open()
        assert contents(Volumes(store, Direct(store)), store) == expected
        check_sound(store)
        template.close()
        count += 1
