"""Repairs: what is damaged on the medium is made good from another copy, on other blocks; the rest is an error."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from rustord.blockdevice import Buffer
from rustord.errors import Damaged, DeviceError, NoSpace
from rustord.extent import Extent
from rustord.keystore.lmdb import LmdbBackend
from rustord.membership import remove_device
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.placer import Mirrored
from rustord.pool import open_devices
from rustord.rebuild import rebuild
from rustord.record import Record
from rustord.repair import Repairer, Wound
from rustord.writer import Writer
from tests.simulation import MIB, Simulation, check_sound, run

CHUNK = 65536
DATA = random.Random(7).randbytes(3 * CHUNK + 5000)


class Bench:
    """A pool that is open, with a Writer and a Repairer at work."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.store: ObjectStore = simulation.open()
        self.writer = Writer(self.store)
        self.repairer = Repairer(self.store, self.writer)

    def close(self) -> None:
        self.repairer.close()
        assert self.writer.close()
        run(self.store)

    def put(self, data: bytes = DATA) -> Record:
        return self.store.stat(self.writer.call(lambda: self.store.put(data)).uuid)

    def flip(self, record: Record, copy: int, at: int) -> Extent:
        """Flip a bit of byte ``at`` of a copy on its device; returns the block."""
        number = at // 4096
        for device, block, count in record.copies[copy]:
            if number < count:
                with self.simulation.paths[device].open("r+b") as file:
                    file.seek((block + number) * 4096 + at % 4096)
                    byte = file.read(1)[0]
                    file.seek(-1, 1)
                    file.write(bytes([byte ^ 4]))
                return Extent(device, block + number, 1)
            number -= count
        raise AssertionError("beyond the end")

    def is_bad(self, block: Extent) -> bool:
        return bool(self.store.blocks.slots[block.device].bad.within(block.block, 1))

    def until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not met():
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.005)


@contextmanager
def at_work(simulation: Simulation) -> Iterator[Bench]:
    bench = Bench(simulation)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def single(simulation: Simulation) -> Iterator[Bench]:
    with at_work(simulation) as bench:
        yield bench


@pytest.fixture
def mirrored(simulate: Callable[..., Simulation]) -> Iterator[Bench]:
    with at_work(simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))) as bench:
        yield bench


@pytest.mark.parametrize("at", [0, CHUNK + 7, 3 * CHUNK - 1, len(DATA) - 1])
def test_what_a_reader_finds_damaged_is_mended_beside_him(mirrored: Bench, at: int) -> None:
    record = mirrored.put()
    bad = mirrored.flip(record, mirrored.store.blocks.preferred(record), at)
    assert mirrored.store.get(record.uuid) == DATA
    mirrored.until(lambda: mirrored.repairer.mended == 1)
    moved = mirrored.store.stat(record.uuid)
    assert moved.sequence > record.sequence
    assert mirrored.is_bad(bad)
    assert all(e.device != bad.device or e.end <= bad.block or bad.block < e.block for e in moved.extents)
    for number in (0, 1):
        assert mirrored.store.blocks.verify(moved, number, 0, moved.size)
    mirrored.close()
    check_sound(mirrored.store)
    mirrored.simulation.cut_power()
    store = mirrored.simulation.open()
    check_sound(store)
    assert store.get(record.uuid) == DATA
    mirrored.store, mirrored.writer = store, Writer(store)


def test_only_what_is_damaged_leaves_its_blocks(mirrored: Bench) -> None:
    record = mirrored.put()
    mirrored.flip(record, 0, CHUNK + 7)
    health = mirrored.repairer.examine(record, [0, 1])
    assert (health.mended, health.lost, health.waiting) == ([Wound(0, CHUNK, 2 * CHUNK)], [], [])
    moved = mirrored.store.stat(record.uuid)
    block = record.copies[0][0].block
    assert moved.copies[0][0] == Extent(record.copies[0][0].device, block, 16)  # the first chunk stays
    assert block + 16 not in [extent.block for extent in moved.copies[0]]
    assert mirrored.repairer.examine(moved, [0, 1]).mended == []


@pytest.mark.parametrize("size", [0, 100, 4096, 4000, len(DATA)])
def test_a_footer_is_made_anew(single: Bench, size: int) -> None:
    record = single.put(DATA[:size])
    last = sum(extent.count for extent in record.copies[0]) * 4096
    for at in (last - 1, last - 80):
        bad = single.flip(record, 0, at)
        health = single.repairer.examine(record, [0])
        assert [(wound.start, wound.end) for wound in health.mended] == [(size, last)]
        assert single.is_bad(bad)
        record = single.store.stat(record.uuid)
        last = sum(extent.count for extent in record.copies[0]) * 4096
        assert single.store.get(record.uuid) == DATA[:size]


def test_what_no_copy_has_right_is_an_error_that_names_object_and_range(single: Bench) -> None:
    record = single.put()
    bad = single.flip(record, 0, CHUNK + 1)
    health = single.repairer.examine(record, [0])
    assert (health.mended, health.lost) == ([], [Wound(0, CHUNK, 2 * CHUNK)])
    assert single.is_bad(bad)
    for _ in range(2):
        with pytest.raises(Damaged, match=f"{uuid_text(record.uuid)}, bytes {CHUNK} to {2 * CHUNK - 1}, "):
            single.store.get(record.uuid)
        assert single.store.read(record, 0, CHUNK) == DATA[:CHUNK]
        assert single.store.read(record, 2 * CHUNK, CHUNK) == DATA[2 * CHUNK : 3 * CHUNK]
        last = sum(extent.count for extent in record.copies[0]) * 4096
        single.flip(record, 0, last - 1)
        health = single.repairer.examine(record, [0])  # mending the footer does not make the data seem right
        assert (len(health.mended), len(health.lost)) == (1, 1)
        record = single.store.stat(record.uuid)
    single.writer.call(lambda: single.store.delete(record.uuid))
    assert not single.store.allocator._free[0].contains(bad.block, 1)


def test_what_a_reader_finds_lost_is_noted_as_bad(single: Bench) -> None:
    record = single.put()
    bad = single.flip(record, 0, CHUNK + 1)
    with pytest.raises(Damaged):
        single.store.get(record.uuid)
    single.until(lambda: single.is_bad(bad))


def test_poison_in_the_last_block_moves_with_it(single: Bench) -> None:
    record = single.put()
    single.flip(record, 0, len(DATA) - 1)
    single.flip(record, 0, sum(extent.count for extent in record.copies[0]) * 4096 - 1)
    health = single.repairer.examine(record, [0])
    assert (len(health.mended), len(health.lost)) == (1, 1)
    with pytest.raises(Damaged, match=f"bytes {3 * CHUNK} to {len(DATA) - 1}, "):
        single.store.get(record.uuid)


def test_two_copies_that_are_damaged_in_different_places_heal_each_other(mirrored: Bench) -> None:
    record = mirrored.put()
    mirrored.flip(record, 0, 5)
    mirrored.flip(record, 1, 2 * CHUNK)
    mirrored.flip(record, 0, 3 * CHUNK)
    mirrored.flip(record, 1, 3 * CHUNK + 1)  # this chunk is wrong on both
    health = mirrored.repairer.examine(record, [0, 1])
    assert sorted(health.mended) == [Wound(0, 0, CHUNK), Wound(1, 2 * CHUNK, 3 * CHUNK)]
    assert [wound.start for wound in health.lost] == [3 * CHUNK, 3 * CHUNK]
    assert mirrored.store.read(mirrored.store.stat(record.uuid), 0, 3 * CHUNK) == DATA[: 3 * CHUNK]


class Failing:
    """In place of a method of a device that reads: fails, for a while or for good, where it touches a range."""

    def __init__(self, device: Any, times: int, where: range) -> None:
        self.left, self._where = times, where
        for name in ("read", "reread"):
            setattr(device, name, self._failing(getattr(device, name)))
        device.read_now = lambda offset, buffers: False

    def _failing(self, call: Callable[..., None]) -> Callable[..., None]:
        def read(offset: int, buffers: Sequence[Buffer]) -> None:
            end = offset + sum(map(len, buffers))
            if self.left and offset < self._where.stop and end > self._where.start:
                self.left -= 1
                raise DeviceError("reading failed: Input/output error")
            call(offset, buffers)

        return read


def test_a_transient_error_moves_nothing_however_often(single: Bench) -> None:
    record = single.put()
    block = record.copies[0][0].block
    for turn in range(1, 6):
        Failing(single.simulation.devices[0], 1, range(block * 4096, block * 4096 + 1))
        assert single.store.read(record, 0, 10) == DATA[:10]
        single.until(lambda turn=turn: single.repairer.transient == turn)  # type: ignore[misc]
    assert single.store.stat(record.uuid).id == record.id
    assert (single.repairer.damaged, single.store.blocks.slots[0].bad.runs) == (0, ())


def test_blocks_that_cannot_be_read_are_replaced(mirrored: Bench) -> None:
    record = mirrored.put()
    device, block, _ = record.copies[0][0]
    Failing(mirrored.simulation.devices[device], 1 << 30, range((block + 17) * 4096, (block + 18) * 4096))
    health = mirrored.repairer.examine(record, [0])
    assert health.mended == [Wound(0, CHUNK, 2 * CHUNK)]
    moved = mirrored.store.stat(record.uuid)
    assert mirrored.repairer.examine(moved, [0, 1]).mended == []
    mirrored.writer.call(lambda: mirrored.store.delete(record.uuid))


def test_a_block_of_a_single_copy_that_cannot_be_read_is_an_error_that_names_it(single: Bench) -> None:
    record = single.put()
    block = record.copies[0][0].block
    Failing(single.simulation.devices[0], 1 << 30, range((block + 17) * 4096, (block + 18) * 4096))
    assert single.repairer.examine(record, [0]).lost == [Wound(0, CHUNK, 2 * CHUNK)]
    with pytest.raises(
        DeviceError, match=f"{uuid_text(record.uuid)}, bytes {CHUNK} to {2 * CHUNK - 1}, cannot be read"
    ):
        single.store.get(record.uuid)
    assert single.store.read(record, 0, CHUNK) == DATA[:CHUNK]


def test_without_room_it_stays_as_it_is_and_is_mended_later(mirrored: Bench) -> None:
    record = mirrored.put()
    mirrored.flip(record, 0, 5)
    fill = []
    while True:
        try:
            room = max(map(mirrored.store.allocator.largest, (0, 1))) * 4096
            fill.append(mirrored.put(bytes(max(room - 8192, 0))))
        except NoSpace:
            break
    health = mirrored.repairer.examine(record, [0])
    assert health.waiting == [Wound(0, 0, CHUNK)]
    assert health.why
    assert mirrored.store.get(record.uuid) == DATA
    for filler in fill:
        mirrored.writer.call(lambda filler=filler: mirrored.store.delete(filler.uuid))  # type: ignore[misc]
    mirrored.repairer.examine(mirrored.store.stat(record.uuid), [0])
    assert mirrored.repairer.mended == 1


def test_an_object_that_is_deleted_meanwhile_is_not_damaged(single: Bench) -> None:
    record = single.put()
    single.writer.call(lambda: single.store.delete(record.uuid))  # its blocks are zero now
    health = single.repairer.examine(record, [0])
    assert health.is_gone
    assert (single.repairer.damaged, single.store.blocks.slots[0].bad.runs) == (0, ())


def test_a_missing_device_is_no_damage(mirrored: Bench) -> None:
    record = mirrored.put()
    mirrored.store.blocks.retire(mirrored.store.blocks.slots[1], "it was taken out")
    health = mirrored.repairer.examine(record, [0, 1])
    assert (health.unread, health.mended, health.lost, health.waiting) == (1, [], [], [])


def test_a_device_that_is_emptied_and_removed_meanwhile(simulate: Callable[..., Simulation]) -> None:
    with at_work(simulate(16 * MIB, 16 * MIB)) as bench:
        record = bench.put(DATA * 3)
        (device,) = record.devices

        def remove() -> None:
            if device in bench.store.blocks.slots:
                run(bench.store, bench.store.relocations.prepare(record, record.extents, [device]))
                bench.store.keystore.checkpoint()
                run(bench.store)
                remove_device(bench.store, device)

        health = bench.repairer.examine(record, [0], pace=lambda length: bench.writer.call(remove))
        assert (health.lost, health.waiting, health.bad) == ([], [], [])
        assert bench.store.get(record.uuid) == DATA * 3


def test_a_pool_that_takes_no_changes_is_left_alone(mirrored: Bench) -> None:
    record = mirrored.put()
    mirrored.flip(record, 0, 5)
    mirrored.store.read_only = "a test says so"
    health = mirrored.repairer.examine(record, [0])
    assert (len(health.waiting), health.mended) == (1, [])
    assert "read-only" in health.why
    assert mirrored.store.blocks.slots[0].bad.runs == ()


def test_what_the_first_look_saw_and_the_second_did_not_is_transient(single: Bench) -> None:
    record = single.put()
    block = record.copies[0][0].block
    Failing(single.simulation.devices[0], 1, range(block * 4096, block * 4096 + 1))
    health = single.repairer.examine(record, [0])
    assert (health.transient, health.lost, single.store.blocks.slots[0].bad.runs) == (1, [], ())


class TestPoison:
    """What is right nowhere stays an error, whatever becomes of the Object."""

    @pytest.fixture
    def poisoned(self, single: Bench) -> Record:
        record = single.put()
        single.flip(record, 0, CHUNK + 1)
        assert single.repairer.examine(record, [0]).lost
        return record

    def is_error_and_only_there(self, store: ObjectStore, record: Record) -> None:
        record = store.stat(record.uuid)
        with pytest.raises(Damaged, match=f"{uuid_text(record.uuid)}, bytes {CHUNK} to {2 * CHUNK - 1}, "):
            store.get(record.uuid)
        assert store.read(record, 0, CHUNK) == DATA[:CHUNK]
        assert store.read(record, 2 * CHUNK, len(DATA) - 2 * CHUNK) == DATA[2 * CHUNK :]

    def test_a_move(self, single: Bench, poisoned: Record) -> None:
        move = single.store.relocations.prepare(poisoned, poisoned.extents)
        single.writer.call(lambda: run(single.store, move))
        assert not {e.block for e in single.store.stat(poisoned.uuid).extents} & {e.block for e in poisoned.extents}
        self.is_error_and_only_there(single.store, poisoned)

    def test_a_rebuild(self, single: Bench, poisoned: Record) -> None:
        bad = single.store.blocks.slots[0].bad.runs
        single.close()
        single.simulation.close()
        single.simulation.lose_index()
        devices = open_devices(single.simulation.paths, read_only=True)
        rebuild(devices, backend=LmdbBackend(), directory=single.simulation.index)
        single.store = single.simulation.open()
        single.writer = Writer(single.store)
        assert single.store.blocks.slots[0].bad.runs == bad != ()
        self.is_error_and_only_there(single.store, poisoned)
        single.writer.call(lambda: single.store.delete(poisoned.uuid))
        assert not single.store.allocator._free[0].contains(bad[0].block, 1)
