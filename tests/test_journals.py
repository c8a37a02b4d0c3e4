"""What the journals say between cycles: it is durable, and said no more often than it has to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Delete
from rustord.errors import DeviceError, RustordError, Unavailable
from rustord.extent import Extent
from rustord.journal import Entry, Kind
from rustord.layermerger import LayerMerger
from rustord.layermover import LayerMover
from rustord.membership import attach_device, detach_device
from rustord.page import CHUNK_BYTES
from rustord.testing.device import SECTOR_BYTES
from rustord.volumes import Volumes
from tests.simulation import MIB, Direct, Simulation, check_sound, run
from tests.test_layermover import remains
from tests.test_volumes import Bench, content, rebuild_index, write

SIZE = 6 * CHUNK_BYTES


def test_a_grave_of_blocks_that_were_given_back_is_nobodys(disk_path: Path, seed: int) -> None:
    """Who announced them may have waited no longer while the writer was at it: others may have them by then."""
    data = random.Random(seed).randbytes(3 * CHUNK_BYTES)
    simulation = Simulation(disk_path, (16 * MIB,))
    store = simulation.open()
    uuid = store.put(data).uuid
    part = store.stat(uuid).extents[0]._replace(count=3)
    store.journals.announce([(b"somebody's uuid.", [part])])
    simulation.cut_power()
    store = simulation.open()
    assert store.get(uuid) == data
    store.journals.announce([(b"somebody's uuid.", [part])])
    store.cycle([Delete(uuid)])
    simulation.cut_power()
    store = simulation.open()
    assert not remains(simulation, data)
    check_sound(store)
    simulation.close()


def test_what_waits_to_be_erased_is_not_said_again_with_each_change(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate(16 * MIB, 1024 * MIB)
    store = simulation.open()
    for first in range(100_000, 260_000, 40_000):
        store.journals.announce([(bytes(16), [Extent(1, block, 1) for block in range(first, first + 40_000, 2)])])
    lengths = []
    append = store.keystore._append

    def spy(ring: Any, entries: Sequence[bytes], *rest: int) -> None:
        lengths.append(sum(map(len, entries)))
        append(ring, entries, *rest)

    monkeypatch.setattr(store.keystore, "_append", spy)
    for _ in range(60):
        store.put(b"x")
        store.keystore.checkpoint()
    assert sum(length > MIB for length in lengths) <= 4


class Doubt(Bench):
    """A pool, and what its volumes and Objects have to have. What failed may have happened, until that is settled."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        super().__init__(Simulation(directory, (32 * MIB, 32 * MIB)))
        self.chance = chance
        self.disks: dict[str, bytearray] = {}
        self.objects: dict[str, bytes] = {}
        self.unsure: set[str] = set()
        """Volumes that may be gone, or not be there yet, or longer."""
        self.unsure_writes: list[tuple[str, int, bytes]] = []
        self.put("image", chance.randbytes(3 * CHUNK_BYTES))
        self.volumes.clone("image", "clone")
        self.disks["clone"] = bytearray(self.objects["image"])
        self.delete("image")
        self.volumes.create("disk", SIZE)
        self.disks["disk"] = bytearray(SIZE)
        for offset in (0, 100_000, 3 * CHUNK_BYTES):
            self.write("disk", offset, chance.randbytes(70_000))
        self.volumes.snapshot("disk", "snapshot")
        self.objects["snapshot"] = bytes(self.disks["disk"])
        self.write("disk", 0, chance.randbytes(70_000))
        self.write("clone", 0, chance.randbytes(5000))
        self.store.keystore.checkpoint()
        top, below = self.store.layers.chain(self.store.layers.volumes["disk"])
        self.move(top.home, 2 * CHUNK_BYTES // 4096, slots=False)
        assert LayerMover(self.store, self.volumes)._move_slots(below, {top.home: 1})
        self.store.keystore.checkpoint()
        run(self.store)

    def put(self, name: str, data: bytes) -> None:
        self.store.put(data, name=name)
        self.objects[name] = data

    def delete(self, name: str) -> None:
        uuid = self.store.resolve(name)
        assert uuid is not None
        self.store.delete(uuid)
        del self.objects[name]

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.unsure_writes.append((name, offset, data))
        volume = self.volumes.open(name)
        try:
            write(volume, offset, data)
            volume.flush()
        finally:
            volume.close()
        self.unsure_writes.pop()
        self.disks[name][offset : offset + len(data)] = data

    def move(self, device: int, block_count: int = 1 << 60, *, slots: bool = True) -> None:
        mover = LayerMover(self.store, self.volumes)
        mover.run({device: block_count}, lambda length: None, slots=slots)
        if mover.problem:
            raise mover.problem

    def fail_at(self, number: int, failing: Collection[int]) -> Callable[[], bool]:
        """Have devices fail when the change of Layers with this number is flushed; tells whether they have."""
        journal_notes, numbers = self.store.keystore.journal_notes, count()
        failed = []

        def fail(entries: Sequence[Entry], *rest: Any) -> Any:
            is_change = any(entry.kind in (Kind.LAYER, Kind.MAP) for entry in entries)
            if is_change and next(numbers) == number:
                for device in failing:
                    self.simulation.devices[device].fail_flushes = 1
                failed.append(True)
            return journal_notes(entries, *rest)

        self.store.keystore.journal_notes = fail  # type: ignore[method-assign]
        return lambda: bool(failed)

    def work(self) -> None:
        """What users go on with, as far as devices take it: on blocks, too, that seem to be free."""
        for name in self.volumes.names() * 3:
            at = self.chance.randrange(len(self.disks[name]) // SECTOR_BYTES) * SECTOR_BYTES
            with suppress(RustordError):
                self.write(name, at, self.chance.randbytes(SECTOR_BYTES))
        for number in range(30):
            with suppress(RustordError):
                self.put(f"{self.chance.random()}", bytes((number,)) * self.chance.choice((3000, 70_000)))
        run(self.store)

    def go_around(self) -> None:
        """Until no journal has anything of what was before."""
        self.volumes.create("filler", SIZE)
        for _ in range(1100):
            self.volumes._set_head(self.store.layers.volumes["filler"], lambda head: head)
        self.volumes.delete("filler")

    def stop(self, *, clean: bool = True, lost: float = 0.0, rebuild: bool = False) -> None:
        """Stop, and start again. So much is ``lost`` of what a device did not flush."""
        if clean:
            self.volumes.close()
            self.simulation.close()
            for device in range(2):
                self.lose(device, lost)
        else:
            self.simulation.cut_power(lambda offset: self.chance.random() >= lost)
        if rebuild:
            rebuild_index(self.simulation)
        self.store = self.simulation.open()
        assert not self.store.read_only
        self.volumes = Volumes(self.store, Direct(self.store))
        LayerMerger(self.store, self.volumes).run()
        self.look()
        self.check()

    def lose(self, device: int, lost: float) -> None:
        """What a device failed to flush is gone, once the page cache is."""
        with self.simulation.paths[device].open("r+b") as image:
            for offset, old, _ in reversed(self.simulation.devices[device]._lost):
                if self.chance.random() < lost:
                    image.seek(offset)
                    image.write(old)

    def look(self, *, settle: bool = True) -> None:
        there = set(self.volumes.names())
        assert self.disks.keys() - self.unsure <= there <= self.disks.keys()
        seen: dict[str, bytearray] = {}
        for name in there:
            try:
                found = content(self, name)
            except Unavailable:  # as long as a merge is not finished
                assert not settle
                continue
            known = bytearray(self.disks[name])
            if name in self.unsure:
                known = known[: len(found)].ljust(len(found), b"\0")
            for where, at, data in self.unsure_writes:
                if where == name and found[at : at + len(data)] == data:
                    known[at : at + len(data)] = data
            assert found == known, f"volume {name} has changed"
            seen[name] = known
        if settle:
            self.disks, self.unsure, self.unsure_writes = seen, set(), []
        for name, data in self.objects.items():
            uuid = self.store.resolve(name)
            assert uuid is not None, f"Object {name} is gone"
            assert self.store.get(uuid) == data


def create(doubt: Doubt) -> None:
    doubt.disks["other"] = bytearray(SIZE)
    doubt.unsure.add("other")
    doubt.volumes.create("other", SIZE)


def clone(doubt: Doubt) -> None:
    doubt.disks["other"] = bytearray(doubt.objects["snapshot"])
    doubt.unsure.add("other")
    doubt.volumes.clone("snapshot", "other")


def snapshot(doubt: Doubt) -> None:
    doubt.volumes.snapshot("disk")


def resize(doubt: Doubt) -> None:
    doubt.unsure.add("disk")
    doubt.volumes.resize("disk", SIZE + CHUNK_BYTES)


def drop(doubt: Doubt) -> None:
    doubt.unsure.add("disk")
    doubt.volumes.delete("disk")


def freeze(doubt: Doubt) -> None:
    doubt.unsure.add("clone")
    doubt.volumes.freeze("clone")


def flush(doubt: Doubt) -> None:
    doubt.write("disk", 5 * CHUNK_BYTES, b"x" * SECTOR_BYTES)


def empty_first(doubt: Doubt) -> None:
    doubt.move(0)


def empty_second(doubt: Doubt) -> None:
    doubt.move(1)


def merge(doubt: Doubt) -> None:
    doubt.delete("snapshot")
    LayerMerger(doubt.store, doubt.volumes).run()


CHANGES = (create, clone, snapshot, resize, drop, freeze, flush, empty_first, empty_second, merge)


@pytest.mark.parametrize("fate", ["kept", "lost", "cut"])
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_layers_that_fails_in_the_flush_is_one_that_happened(
    disk_path: Path, seed: int, change: Callable[[Doubt], None], failing: Collection[int], fate: str
) -> None:
    """The journal of the device that fails has it or not; index and devices agree on it, whatever comes."""
    for number in count():
        directory = disk_path / str(number)
        directory.mkdir()
        doubt = Doubt(directory, random.Random(seed))
        opened = [] if change in (drop, freeze) else [*map(doubt.volumes.open, doubt.volumes.names())]
        has_failed = doubt.fail_at(number, failing)
        with suppress(RustordError):
            change(doubt)
        if has_failed():
            run(doubt.store)
            doubt.look(settle=False)
            doubt.work()
            doubt.look(settle=False)
            for volume in opened:
                volume.close()
            if fate == "cut":
                doubt.stop(clean=False, lost=0.5, rebuild=doubt.chance.random() < 0.5)
            else:
                doubt.stop(lost=float(fate == "lost"))
            doubt.work()
            if fate == "lost":
                doubt.go_around()
            doubt.stop(rebuild=True)
            doubt.work()
            doubt.stop(clean=False, lost=1.0)
        doubt.simulation.close()
        if not has_failed():
            assert number, "nothing was changed"
            break


def test_a_device_that_failed_and_is_back_takes_what_it_has_missed(disk_path: Path, seed: int) -> None:
    doubt = Doubt(disk_path, random.Random(seed))
    home = doubt.store.layers.volumes["disk"].home
    doubt.fail_at(0, (home,))
    with pytest.raises(DeviceError):
        snapshot(doubt)
    detach_device(doubt.store, home)
    doubt.simulation.devices[home].cut_power()
    attach_device(doubt.store, str(doubt.simulation.paths[home]))
    doubt.work()
    doubt.go_around()
    doubt.volumes.close()
    doubt.simulation.close()
    rebuild_index(doubt.simulation)
    doubt.store = doubt.simulation.open()
    doubt.volumes = Volumes(doubt.store, Direct(doubt.store))
    doubt.look()
    doubt.check()
    doubt.simulation.close()


def test_the_layer_that_a_merge_which_failed_would_leave_stays_until_the_next_start(disk_path: Path) -> None:
    doubt = Doubt(disk_path, random.Random(0))
    top, below = doubt.store.layers.chain(doubt.store.layers.volumes["disk"])
    doubt.fail_at(1, (top.home,))
    with pytest.raises(DeviceError):
        merge(doubt)
    assert doubt.store.layers.chain(top) == [top]
    doubt.store.sweep()
    run(doubt.store)
    assert below.uuid in doubt.store.layers.by_uuid
    doubt.stop()
    assert below.uuid not in doubt.store.layers.by_uuid
    doubt.simulation.close()


def test_what_the_others_have_of_a_change_that_failed_counts_also_when_they_are_away(disk_path: Path) -> None:
    doubt = Doubt(disk_path, random.Random(0))
    home = doubt.store.layers.volumes["disk"].home
    doubt.fail_at(0, (home,))
    with pytest.raises(DeviceError):
        doubt.volumes.delete("disk")
    assert doubt.volumes.names() == ["clone"]
    doubt.volumes.create("disk", SIZE)
    assert content(doubt, "disk") == bytes(SIZE)
    doubt.simulation.cut_power()
    store = doubt.simulation.open(without=[1 - home])
    assert "disk" not in Volumes(store, Direct(store)).names()
    doubt.simulation.cut_power()
    doubt.store = doubt.simulation.open()
    doubt.volumes = Volumes(doubt.store, Direct(doubt.store))
    assert content(doubt, "disk") == bytes(SIZE)
    doubt.check()
    doubt.simulation.close()
