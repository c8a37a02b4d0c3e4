"""Pools: making, opening and closing one, changing its devices, and what every kind of crash leaves of it."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rustord
from rustord.badblocks import RUN_COUNT_MAX, BadBlocks, BadRun
from rustord.blockdevice import Buffer, open_device
from rustord.blockstore import read_label, write_label
from rustord.change import Change, Delete, Put
from rustord.claim import check
from rustord.errors import (
    Damaged,
    DeviceBusy,
    DeviceError,
    FormatError,
    InvalidRequest,
    NoSpace,
    NotFound,
    PoolError,
    RustordError,
)
from rustord.extent import Extent
from rustord.keygen import HashKeyGen
from rustord.label import DEVICE_BYTES_MIN, LABEL_BYTES, Geometry, Label, State
from rustord.membership import add_device, attach_device, detach_device, prepare_device, remove_device
from rustord.objectstore import ObjectStore
from rustord.placer import Contiguous, FreeView, Mirrored, Placer, Striped
from rustord.pool import create_pool, open_devices, renew_labels
from rustord.record import RECORD_ID, Metadata, Record, encode_extents
from rustord.replay import VOID_LENGTH
from tests.simulation import (
    MIB,
    PowerCut,
    Simulation,
    VolatileDevice,
    check_sound,
    free_blocks,
    free_count,
    live,
    run,
    stored,
    upload,
)

BLOCK = 4096
KEYGEN = HashKeyGen("xxh3-128")
DATA = random.Random(3).randbytes(4 * MIB)
GEOMETRY = Geometry(16 * MIB // BLOCK, BLOCK)


class On:
    """A Placer that puts everything on the device of which it is told."""

    name = "on"
    copies = 1

    def __init__(self, device: int = 0) -> None:
        self.device = device

    def place(self, count: int, free: FreeView) -> list[list[Any]]:
        return Contiguous().place(count, _Only(self.device, free))


class _Only:
    def __init__(self, device: int, free: FreeView) -> None:
        self._device = device
        self._free = free

    def devices(self) -> list[int]:
        return [self._device]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._free, name)


def label_of(path: Path) -> Label:
    with closing(open_device(path)) as device:
        label = read_label(device)
    assert label is not None
    return label


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x08]))


class TestCreating:
    def test_labels_name_all_members(self, make_image: Callable[[int], Path]) -> None:
        paths = [make_image(16 * MIB), make_image(20 * MIB + 512)]
        devices = [open_device(path) for path in paths]
        labels = create_pool(devices, KEYGEN, name="photos", block_size=8192)
        for device in devices:
            device.close()
        assert [label_of(path) for path in paths] == labels
        first, second = labels
        assert first.members == second.members
        assert first.pool_uuid == second.pool_uuid
        assert first.secret == second.secret != bytes(32)
        assert (first.pool_name, first.block_size, first.state) == ("photos", 8192, State.CLEAN)
        assert [member.block_count for member in first.members] == [2048, 2560]
        assert (second.device_index, second.device_uuid) == (1, first.members[1].device_uuid)

    def test_what_is_reserved_is_cleared(self, make_image: Callable[[int], Path]) -> None:
        path = make_image(16 * MIB)
        path.write_bytes(b"\xaa" * (16 * MIB))
        with closing(open_device(path)) as device:
            (label,) = create_pool([device], KEYGEN)
        content = path.read_bytes()
        length = len(label.encode())
        for offset in label.geometry.label_offsets:
            assert content[offset : offset + length] == label.encode()
        assert not any(content[length : 5 * MIB])
        assert not any(content[15 * MIB + length :])
        assert content[5 * MIB : 8 * MIB] == b"\xaa" * (3 * MIB)

    @pytest.mark.parametrize("block_size", [0, 512, 2048, 4097, 131072])
    def test_block_sizes_that_are_refused(self, make_image: Callable[[int], Path], block_size: int) -> None:
        refused = pytest.raises(InvalidRequest, match="a block cannot have")
        with closing(open_device(make_image(16 * MIB))) as device, refused:
            create_pool([device], KEYGEN, block_size=block_size)

    @pytest.mark.parametrize("name", ["x" * 65, "ü" * 33, "a\nb", "\udc80"])
    def test_names_that_are_refused(self, make_image: Callable[[int], Path], name: str) -> None:
        refused = pytest.raises(InvalidRequest, match="cannot be a pool's name")
        with closing(open_device(make_image(16 * MIB))) as device, refused:
            create_pool([device], KEYGEN, name=name)

    def test_a_small_device_is_refused_untouched(self, make_image: Callable[[int], Path]) -> None:
        paths = [make_image(16 * MIB), make_image(DEVICE_BYTES_MIN - 512)]
        devices = [open_device(path) for path in paths]
        with pytest.raises(DeviceError, match="too small"):
            create_pool(devices, KEYGEN)
        for device in devices:
            device.close()
        assert not any(paths[0].read_bytes())

    def test_a_device_that_fails_leaves_no_label_on_the_others(self, make_image: Callable[[int], Path]) -> None:
        paths = [make_image(16 * MIB) for _ in range(3)]
        with ExitStack() as opened:
            devices = [opened.enter_context(closing(open_device(path))) for path in paths]
            write = devices[1].write
            count = 0

            def fail(offset: int, buffers: Sequence[Buffer]) -> None:
                nonlocal count
                count += 1
                if count == 2:
                    raise DeviceError("it is told to fail")
                write(offset, buffers)

            devices[1].write = fail  # type: ignore[method-assign]
            with pytest.raises(DeviceError, match="told to"):
                create_pool(devices, KEYGEN)
        assert count > 1
        for path in paths:
            assert not any(path.read_bytes())
            assert not check(path).reasons

    def test_how_many_devices_there_may_be(self) -> None:
        for count in (0, 97):
            with pytest.raises(InvalidRequest, match=f"a pool cannot have {count} devices"):
                create_pool([None] * count, KEYGEN)  # type: ignore[list-item]

    @pytest.mark.root
    def test_a_block_is_no_smaller_than_the_device_s(self, make_loop: Callable[..., Path]) -> None:
        with closing(open_device(make_loop(16 * MIB, sector_size=4096))) as device:
            create_pool([device], KEYGEN, block_size=4096)
        # No loop device has larger blocks; one that says so is refused.
        with closing(open_device(make_loop(16 * MIB))) as device:
            device.block_size = 8192
            with pytest.raises(DeviceError, match="logical blocks"):
                create_pool([device], KEYGEN, block_size=4096)


class TestOpening:
    def test_what_bears_no_label(self, make_image: Callable[[int], Path], disk_path: Path) -> None:
        path = make_image(16 * MIB)
        with pytest.raises(PoolError, match="bears no rustord label"):
            rustord.open(path, directory=disk_path / "index")
        open_device(path).close()  # nothing holds it

    def test_nothing_at_all(self, disk_path: Path) -> None:
        with pytest.raises(DeviceError):
            rustord.open(disk_path / "absent.img")

    def test_devices_of_two_pools(self, simulate: Callable[..., Simulation]) -> None:
        one, two = simulate(), simulate()
        with pytest.raises(PoolError, match="different pools"):
            rustord.open([*one.paths, *two.paths], directory=one.index)

    def test_the_index_of_another_pool(self, simulate: Callable[..., Simulation]) -> None:
        one, two = simulate(), simulate()
        one.open().put(b"x")
        one.close()
        with pytest.raises(PoolError, match="the index belongs to pool"):
            rustord.open(two.paths, directory=one.index)

    def test_a_copy_of_a_device_beside_it(self, simulation: Simulation) -> None:
        copy = simulation.paths[0].with_name("copy.img")
        shutil.copy(simulation.paths[0], copy)
        with pytest.raises(PoolError, match="one is a copy"):
            rustord.open([*simulation.paths, copy], directory=simulation.index)

    @pytest.mark.parametrize("kind", ["image", pytest.param("loop", marks=pytest.mark.root)])
    def test_one_that_is_named_twice(self, disk_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
        path = Simulation(disk_path, [request.getfixturevalue("make_loop")() if kind == "loop" else 16 * MIB]).paths[0]
        other = disk_path / "other name"
        other.symlink_to(path)
        with pytest.raises(PoolError, match=f"{path} and {other} are the same device"):
            open_devices([path, other])
        open_device(path).close()

    def test_two_at_a_time(self, simulation: Simulation) -> None:
        simulation.open()
        with pytest.raises(DeviceBusy):
            rustord.open(simulation.paths, directory=simulation.index)

    def test_an_image_that_was_cut_short(self, simulation: Simulation) -> None:
        key = simulation.open().put(DATA[:5000])
        simulation.close()
        with simulation.paths[0].open("r+b") as file:
            file.truncate(12 * MIB)
        with pytest.raises(PoolError, match="cut short"):
            simulation.open()
        with simulation.paths[0].open("r+b") as file:
            file.truncate(16 * MIB)
        assert simulation.open().get(key.uuid) == DATA[:5000]

    @pytest.mark.parametrize("bad", [[0], [1], [2], [0, 1], [0, 2], [1, 2]], ids=str)
    def test_one_good_copy_of_the_label_is_enough_and_heals_the_others(
        self, simulation: Simulation, bad: list[int]
    ) -> None:
        key = simulation.open().put(DATA[:5000])
        simulation.close()
        offsets = GEOMETRY.label_offsets
        for number in bad:
            flip(simulation.paths[0], offsets[number] + 100)
        assert simulation.open().get(key.uuid) == DATA[:5000]
        simulation.close()
        content = simulation.paths[0].read_bytes()
        head = content[:LABEL_BYTES]
        assert all(content[offset : offset + LABEL_BYTES] == head for offset in offsets)

    def test_no_good_copy_of_the_label(self, simulation: Simulation) -> None:
        for offset in GEOMETRY.label_offsets:
            flip(simulation.paths[0], offset + 100)
        with pytest.raises(FormatError, match="checksum"):
            simulation.open()

    def test_firmware_that_zeroes_the_first_blocks(self, simulation: Simulation) -> None:
        key = simulation.open().put(DATA[:5000])
        simulation.close()
        with simulation.paths[0].open("r+b") as file:
            file.seek(0x1000)
            file.write(bytes(0x3000))
        assert simulation.open().get(key.uuid) == DATA[:5000]

    def test_a_foreign_copy_of_the_label(self, simulate: Callable[..., Simulation]) -> None:
        one, two = simulate(), simulate()
        head = two.paths[0].read_bytes()[:MIB]
        with one.paths[0].open("r+b") as file:
            file.write(head)
        with pytest.raises(FormatError, match="different devices or pools"):
            one.open()

    def test_an_older_copy_of_the_index(self, simulation: Simulation) -> None:
        simulation.open().put(b"x")
        simulation.close()
        old = simulation.index.with_name("old")
        shutil.copytree(simulation.index, old)
        simulation.open().put(b"y")
        simulation.close()
        shutil.rmtree(simulation.index)
        old.rename(simulation.index)
        with pytest.raises(PoolError, match="the index is older"):
            simulation.open()

    def test_generations_only_go_up(self, simulation: Simulation) -> None:
        seen = [label_of(simulation.paths[0]).generation]
        for how in ("close", "cut", "cut", "close"):
            store = simulation.open()
            seen.append(store.label.generation)
            simulation.close() if how == "close" else simulation.cut_power()
            seen.append(label_of(simulation.paths[0]).generation)
        assert seen == sorted(seen)
        assert len(set(seen)) == 7  # one more for each opening and for each closing

    def test_the_state_says_whether_it_was_closed(self, simulation: Simulation) -> None:
        simulation.open()
        simulation.cut_power()
        assert label_of(simulation.paths[0]).state is State.OPEN
        simulation.open()
        simulation.close()
        assert label_of(simulation.paths[0]).state is State.CLEAN

    def test_a_pool_with_a_failed_device_is_not_clean(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        simulation.devices[0].fail_flushes = 1
        run(store, Put(b"x"), Put(b"y"))
        simulation.close()
        assert label_of(simulation.paths[1]).state is State.OPEN

    def test_after_a_crash_a_void_covers_whatever_was_not_committed(self, simulation: Simulation) -> None:
        store = simulation.open()
        records = [store.stat(store.put(b"x").uuid) for _ in range(3)]
        assert [record.sequence for record in records] == [1, 2, 3]
        simulation.cut_power()
        store = simulation.open()
        assert store.label.voids == ((4, 4 + VOID_LENGTH),)
        assert store.stat(store.put(b"y").uuid).sequence == 4 + VOID_LENGTH
        simulation.close()
        store = simulation.open()
        assert store.label.voids == ((4, 4 + VOID_LENGTH),)
        assert store.stat(store.put(b"z").uuid).sequence == 5 + VOID_LENGTH

    def test_nothing_is_ever_stored_within_a_void(self, simulation: Simulation) -> None:
        simulation.open()
        simulation.cut_power()
        simulation.open()  # which notes the void
        simulation.close()
        simulation.lose_index()  # which knew how far the sequences had got
        store = simulation.open()
        record = store.stat(store.put(b"y").uuid)
        assert store.label.voids == ((1, 1 + VOID_LENGTH),)
        assert record.sequence == 1 + VOID_LENGTH

    def test_what_a_missing_device_committed_leaves_the_void(self, simulate: Callable[..., Simulation]) -> None:
        placer = On(1)
        simulation = simulate(16 * MIB, 16 * MIB, placer=placer)
        store = simulation.open()
        key = store.put(b"on the second device")
        simulation.cut_power()
        placer.device = 0
        store = simulation.open(without=[1])
        assert live(store) == []
        assert store.label.voids == ((1, 1 + VOID_LENGTH),)
        store.put(b"on the first device")
        simulation.close()
        store = simulation.open()
        assert store.get(key.uuid) == b"on the second device"
        assert store.label.voids == ((2, 1 + VOID_LENGTH),)
        check_sound(store)

    def test_two_objects_that_claim_a_block_make_it_read_only(self, simulation: Simulation) -> None:
        store = simulation.open()
        records = [store.stat(store.put(DATA[:5000]).uuid) for _ in range(2)]
        deleted = store.stat(store.put(DATA[:9000]).uuid)
        simulation.close()
        # An index that names the blocks of one Object twice, and has a grave of the blocks of a live one.
        forged = bytearray(records[1].raw)
        at = bytes(forged).index(records[1].extents[0].block.to_bytes(8, "little"))
        forged[at : at + 8] = records[0].extents[0].block.to_bytes(8, "little")
        grave = {b"g" + RECORD_ID.pack(*deleted.id): encode_extents(deleted.extents)}
        simulation.change_index({b"o" + records[1].uuid: _summed(forged)} | grave)
        store = simulation.open()
        assert "two Objects claim block 1280 of device 0" in store.read_only
        with pytest.raises(RustordError, match="read-only"):
            store.put(b"x")
        assert store.get(records[0].uuid) == DATA[:5000]
        assert store.get(deleted.uuid) == DATA[:9000]


def _summed(raw: bytearray) -> bytes:
    from xxhash import xxh3_64_digest

    return xxh3_64_digest(memoryview(raw)[8:]) + bytes(raw[8:])


class TestDevices:
    def test_adding_one(self, simulate: Callable[..., Simulation]) -> None:
        simulation, other = simulate(), simulate(20 * MIB)
        store = simulation.open()
        keys = [store.put(DATA[:5000])]
        member = add_device(store, device := VolatileDevice(open_device(other.paths[0])))
        simulation.paths.append(other.paths[0])
        simulation.devices.append(device)
        assert (member.device_index, member.block_count) == (1, 5120)
        keys += [store.put(DATA[:1_000_000]) for _ in range(3)]
        assert {device for key in keys for device in store.stat(key.uuid).devices} == {0, 1}
        for how in ("cut", "close"):
            simulation.close() if how == "close" else simulation.cut_power()
            assert {member.device_index for member in label_of(other.paths[0]).members} == {0, 1}
            store = simulation.open()
            assert [store.get(key.uuid) for key in keys] == [DATA[:5000]] + [DATA[:1_000_000]] * 3
            check_sound(store)

    def test_the_pool_opens_without_a_device_that_was_being_added(self, simulate: Callable[..., Simulation]) -> None:
        simulation, other = simulate(), simulate()
        for left in range(40):
            store = simulation.open()
            key = store.put(b"x")
            member_count = len(store.label.members)
            device = VolatileDevice(open_device(other.paths[0]), simulation.power)
            simulation.devices.append(device)
            simulation.power.left = left
            try:
                add_device(store, device)
            except PowerCut:
                simulation.cut_power(lambda offset: offset % 1024 == 0)
                store = simulation.open()
                assert store.get(key.uuid) == b"x"
                assert len(store.label.members) in (member_count, member_count + 1)
                check_sound(store)
                simulation.close()
                if len(store.label.members) > member_count:
                    return
            else:
                pytest.fail("the power never went off")

    def test_a_device_whose_blocks_are_larger_is_refused(self, simulate: Callable[..., Simulation]) -> None:
        store = simulate().open()
        with closing(open_device(simulate().paths[0])) as device:
            device.block_size = 8192
            with pytest.raises(DeviceError, match="logical blocks"):
                prepare_device(store, device)
        assert len(store.label.members) == 1

    def test_removing_an_empty_one(self, simulate: Callable[..., Simulation]) -> None:
        placer = On(1)
        simulation = simulate(16 * MIB, 16 * MIB, placer=placer)
        store = simulation.open()
        key = store.put(b"x")
        with pytest.raises(DeviceError, match="holds Objects"):
            remove_device(store, 1)
        placer.device = 0
        kept = store.put(b"y")
        store.delete(key.uuid)
        remove_device(store, 1)
        assert list(store.blocks.slots) == [0]
        simulation.close()
        with closing(open_device(simulation.paths[1])) as device:
            assert read_label(device) is None
        store = simulation.open(without=[1])
        assert store.get(kept.uuid) == b"y"
        with pytest.raises(InvalidRequest, match="only one"):
            remove_device(store, 0)
        with pytest.raises(InvalidRequest, match="no device 7"):
            remove_device(store, 7)
        check_sound(store)

    def test_one_that_was_removed_does_not_come_back(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        copy = simulation.paths[1].read_bytes()
        store = simulation.open()
        remove_device(store, 1)
        simulation.close()
        simulation.paths[1].write_bytes(copy)
        with pytest.raises(PoolError, match="was removed from pool"):
            simulation.open()

    def test_an_index_that_is_lost_after_a_removal(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Striped(1))
        store = simulation.open()
        striped = store.put(DATA[:20_000])
        store.delete(striped.uuid)
        simulation.placer = store.allocator.placer = On(0)
        kept = store.put(DATA[:20_000])
        remove_device(store, 1)
        simulation.cut_power()
        simulation.lose_index()
        store = simulation.open(without=[1])
        assert store.get(kept.uuid) == DATA[:20_000]
        assert len(live(store)) == 1
        check_sound(store)

    def test_detaching_and_attaching(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        mirrored = store.put(DATA[:100_000])
        store.allocator.placer = On(0)
        alone = store.put(b"alone")
        detach_device(store, 0)
        assert store.blocks.slots[0].state == "missing"
        assert store.get(mirrored.uuid) == DATA[:100_000]
        with pytest.raises(DeviceError, match="removed from the machine"):
            store.get(alone.uuid)
        with pytest.raises(RustordError):
            store.put(b"x")
        store.allocator.placer = On(1)
        new = store.put(b"new")
        store.keystore.checkpoint()
        simulation.devices[0].close()
        assert attach_device(store, str(simulation.paths[0])) == 0
        store.allocator.placer = Mirrored(2)
        keys = [mirrored, alone, new, store.put(b"again")]
        assert [store.get(key.uuid) for key in keys] == [DATA[:100_000], b"alone", b"new", b"again"]
        check_sound(store)
        simulation.close()
        check_sound(simulation.open())

    def test_an_upload_ends_with_the_device_that_it_began_on(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate()
        store = simulation.open()
        kept = store.put(b"kept")
        store.keystore.checkpoint()
        free = free_blocks(store)
        put = Put(b"")
        store.upload(put, None).write(DATA[:MIB])
        detach_device(store, 0)
        simulation.devices[0].close()  # what was not flushed is lost
        attach_device(store, str(simulation.paths[0]))
        with pytest.raises(DeviceError, match="was away while the data came in"):
            stored(run(store, put)[0])
        assert [record.uuid for record in store.objects()] == [kept.uuid]
        assert free_blocks(store) == free
        check_sound(store)
        assert upload(store, DATA[:MIB]).size == MIB

    def test_what_cannot_be_attached(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        with pytest.raises(PoolError, match="no device of this pool"):
            attach_device(store, str(simulate().paths[0]))
        with pytest.raises(DeviceError):
            attach_device(store, str(simulation.paths[0].with_name("absent")))


# Crashes


class Story:
    """Changes of a store, and what is known of their outcome: acknowledged, or under way when the power went off."""

    def __init__(self, store: ObjectStore, seed: int) -> None:
        self.objects: dict[bytes, tuple[bytes, str]] = {}
        self.putting: list[tuple[bytes, str]] = []
        self.deleting: set[bytes] = set()
        self.deleted: set[bytes] = set()
        self._store = store
        self._chance = random.Random(seed)

    def tell(self, turns: int = 7) -> None:
        """Make changes of every kind; raises PowerCut when the power goes off."""
        for turn in range(turns):
            changes: list[Change] = [self._put() for _ in range(self._chance.randrange(1, 4))]
            if turn % 2 and self.objects:
                uuids = self._chance.sample(sorted(self.objects), min(2, len(self.objects)))
                self.deleting |= set(uuids)
                changes += map(Delete, uuids)
            if turn == 3:
                changes.append(self._upload())
            self._cycles(changes)
            if turn in (2, 4):
                self._store.keystore.checkpoint()

    def _put(self) -> Put:
        size = self._chance.choice([0, 100, 4096, 5000, 70_000, 200_000])
        at = self._chance.randrange(MIB)
        name = self._chance.choice(["", "a", "b"])
        self.putting.append((DATA[at : at + size], name))
        return Put(DATA[at : at + size], Metadata(name))

    def _upload(self) -> Put:
        put = Put(b"", Metadata("b"))
        intake = self._store.upload(put, None)
        for at in range(0, 300_000, 100_000):
            intake.write(DATA[at : at + 100_000])
        abandoned = self._store.upload(Put(b""), None)
        abandoned.write(DATA[:150_000])
        abandoned.abort()
        self.putting.append((DATA[:300_000], "b"))
        return put

    def _cycles(self, changes: list[Change]) -> None:
        while changes:
            cycle = self._store.cycle(changes)
            for change, outcome in cycle.outcomes:
                if isinstance(outcome, NotFound) and isinstance(change, Delete):
                    assert change.uuid in self.deleted  # somebody else replaced it
                else:
                    self._learn(change, stored(outcome))
            changes = cycle.following

    def _learn(self, change: Change, record: Record) -> None:
        if isinstance(change, Delete):
            self.objects.pop(record.uuid, None)
            self.deleting.discard(record.uuid)
            self.deleted.add(record.uuid)
        elif isinstance(change, Put):
            data = bytes(self._store.read(record, 0, record.size))
            self.putting.remove((data, record.name))
            for uuid, (_, name) in list(self.objects.items()):
                if name and name == record.name:
                    del self.objects[uuid]
                    self.deleting.discard(uuid)
                    self.deleted.add(uuid)
            self.objects[record.uuid] = data, record.name

    def check(self, store: ObjectStore) -> dict[bytes, tuple[bytes, str]]:
        """Assert that a store which was opened after the crash is what P1 promises; returns what it holds."""
        check_sound(store)
        found = {record.uuid: (store.get(record.uuid), record.name) for record in live(store)}
        extra = {uuid: what for uuid, what in found.items() if uuid not in self.objects}
        unacknowledged = list(self.putting)
        for uuid, what in extra.items():
            assert uuid not in self.deleted, "a deleted Object came back"
            assert what in unacknowledged, "nobody stored this"
            unacknowledged.remove(what)
        replaced = {name for _, name in extra.values() if name}
        for uuid, what in self.objects.items():
            if uuid in found:
                assert found[uuid] == what
            else:
                assert uuid in self.deleting or what[1] in replaced, "an acknowledged Object is lost"
        assert {name: uuid for uuid, (_, name) in found.items() if name} == dict(store.names())
        return found


def keeping(seed: int) -> Callable[[int], bool]:
    """A `keep` for a power cut: all, nothing, or a part of what was not flushed."""
    chance = random.Random(seed)
    share = chance.choice([0.0, 0.3, 0.7, 1.0, 1.0])
    return lambda offset: chance.random() < share


PLACERS: list[Placer] = [Contiguous(), Striped(2), Mirrored(2)]


class TestPowerCuts:
    """The power goes off at each write and each flush of a story in turn."""

    @pytest.mark.parametrize("placer", PLACERS, ids=lambda placer: placer.name)
    def test_within_a_cycle(self, simulate: Callable[..., Simulation], placer: Placer, seed: int) -> None:
        sizes = [16 * MIB] * (1 if placer.name == "contiguous" else 2)
        template = simulate(*sizes, placer=placer)
        template.open()
        template.close()
        step = 2 if placer.name == "contiguous" else 5  # the seed decides which ones are left out
        left = seed % step
        while True:
            simulation = copied(template)
            story = Story(simulation.open(), seed)
            simulation.power.left = left
            try:
                story.tell()
            except PowerCut:
                over = False
            else:
                over = True
            simulation.cut_power(keeping(seed + left))
            found = story.check(simulation.open())
            simulation.cut_power()
            assert story.check(simulation.open()) == found
            simulation.close()
            simulation.lose_index()
            assert story.check(simulation.open()) == found
            simulation.close()
            if over:
                return
            left += step

    def test_within_an_opening(self, simulate: Callable[..., Simulation], seed: int) -> None:
        template = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
        story = Story(template.open(), seed)
        story.tell()
        template.power.left = 6  # in the middle of the next cycle
        with pytest.raises(PowerCut):
            story.tell(turns=2)
        template.cut_power(keeping(seed))
        for left in range(1000):
            simulation = copied(template)
            simulation.power.left = left
            try:
                simulation.open()
            except PowerCut:
                over = False
            else:
                over = True
            simulation.cut_power(keeping(seed + left))
            found = story.check(simulation.open())
            simulation.close()
            simulation.lose_index()
            assert story.check(simulation.open()) == found
            simulation.close()
            if over:
                return

    def test_within_a_closing(self, simulate: Callable[..., Simulation], seed: int) -> None:
        template = simulate()
        story = Story(template.open(), seed)
        story.tell()
        template.close()
        for left in range(1000):
            simulation = copied(template)
            store = simulation.open()
            key = store.put(b"the last one")
            simulation.power.left = left
            try:
                simulation.close()
            except PowerCut:
                simulation.cut_power(keeping(seed + left))
            else:
                assert left > 4
                return
            store = simulation.open()
            assert store.get(key.uuid) == b"the last one"
            check_sound(store)
            simulation.close()


def copied(template: Simulation) -> Simulation:
    """A copy of a simulation that is not open, in place of the copy before."""
    directory = template.index.with_name("copy")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    copy = Simulation.__new__(Simulation)
    copy.__dict__.update(template.__dict__)
    copy.power = type(template.power)()
    copy.devices = []
    copy.index = directory / "index"
    if template.index.exists():
        shutil.copytree(template.index, copy.index)
    copy.paths = [Path(shutil.copy(path, directory)) for path in template.paths]
    return copy


@pytest.fixture
def last_batch(simulation: Simulation) -> tuple[Simulation, bytes, list[Record]]:
    """A pool after a crash: what the uuid was of "name" before the last batch, and the Records of that batch.

    The second Object of the batch had replaced it. The erasure that follows from that had not begun.
    """
    store = simulation.open()
    old = store.put(DATA[:70_000], name="name")
    store.delete(store.put(b"deleted").uuid)
    cycle = store.cycle([Put(b"first"), Put(DATA[:80_000], Metadata("name")), Put(b"third")])
    batch = [stored(outcome) for _, outcome in cycle.outcomes]
    simulation.cut_power()
    return simulation, old.uuid, batch


@pytest.mark.parametrize(
    ("number", "offset"),
    [(1, 0), (1, 65_536), (1, 79_999), (1, 20 * BLOCK - 1), (1, 20 * BLOCK - 300), (0, 0), (0, BLOCK - 1), (2, 2)],
    ids=["data", "second chunk", "last byte", "trailer", "footer", "small data", "small trailer", "third"],
)
def test_a_torn_object_of_the_last_batch_is_absent(
    last_batch: tuple[Simulation, bytes, list[Record]], number: int, offset: int
) -> None:
    simulation, old, batch = last_batch
    (extent,) = batch[number].extents
    flip(simulation.paths[0], extent.block * BLOCK + offset)
    for _ in range(2):
        store = simulation.open()
        expected = {record.uuid for record in batch} - {batch[number].uuid} | ({old} if number == 1 else set())
        assert {record.uuid for record in live(store)} == expected
        assert store.resolve("name") == (old if number == 1 else batch[1].uuid)
        check_sound(store)
        assert simulation.read(0, extent.block, extent.count) == bytes(extent.count * BLOCK)
        simulation.close()
        simulation.lose_index()


def test_a_batch_whose_journal_is_torn_is_absent(last_batch: tuple[Simulation, bytes, list[Record]]) -> None:
    simulation, old, _ = last_batch
    number = 3  # put; put; delete; the batch
    flip(simulation.paths[0], MIB + number * BLOCK + 100)
    store = simulation.open()
    assert [record.uuid for record in live(store)] == [old]
    assert store.resolve("name") == old
    check_sound(store)
    assert free_count(store) == GEOMETRY.data_block_count - 18


def test_damage_to_what_was_flushed_is_damage_and_never_absence(
    last_batch: tuple[Simulation, bytes, list[Record]],
) -> None:
    simulation, _, batch = last_batch
    store = simulation.open()
    store.put(b"so that the last batch was flushed")
    store.put(b"and this one says so")
    simulation.cut_power()
    (extent,) = batch[1].extents
    flip(simulation.paths[0], extent.block * BLOCK)
    store = simulation.open()
    with pytest.raises(Damaged):
        store.get(batch[1].uuid)
    simulation.close()


def test_what_is_deleted_does_not_come_back_with_the_index_lost(simulation: Simulation) -> None:
    store = simulation.open()
    keys = [store.put(DATA[:9000], name=f"name{number}") for number in range(5)]
    store.delete(keys[0].uuid)
    first = store.cycle([Delete(keys[1].uuid)])
    assert first.outcomes == []
    store.put(b"new", name="name2")
    for _ in range(3):
        simulation.cut_power()
        simulation.lose_index()
        store = simulation.open()
        assert {name for name, _ in store.names()} == {"name2", "name3", "name4"}
        assert store.get(store.resolve("name2") or b"") == b"new"
        check_sound(store)


def test_blocks_that_were_given_to_others_are_not_erased_for_a_grave_that_came_back(simulation: Simulation) -> None:
    store = simulation.open()
    gone = store.stat(store.put(DATA[:9000]).uuid)
    store.delete(gone.uuid)
    simulation.close()
    store = simulation.open()
    heir = store.stat(store.put(DATA[:5000]).uuid)
    assert heir.extents[0].block == gone.extents[0].block
    simulation.close()
    simulation.lose_index()
    store = simulation.open()
    assert store.get(heir.uuid) == DATA[:5000]
    check_sound(store)


def test_an_index_cannot_be_made_anew_from_a_journal_that_went_around(simulation: Simulation) -> None:
    store = simulation.open()
    for _ in range(1100):
        store.put(b"")
    simulation.close()
    simulation.lose_index()
    with pytest.raises(PoolError, match="does not reach back to the beginning"):
        simulation.open()


def test_an_unacknowledged_object_of_a_failed_device_is_verified_though_others_went_on(
    simulate: Callable[..., Simulation],
) -> None:
    placer = On(0)
    simulation = simulate(16 * MIB, 16 * MIB, placer=placer)
    store = simulation.open()
    simulation.devices[0].fail_flushes = 1
    with pytest.raises(DeviceError):
        store.put(DATA[:5000])
    placer.device = 1
    key = store.put(b"on the other")
    store.put(b"and one more")
    # The journal of the failed device had reached the medium after all, the data had not.
    simulation.cut_power(lambda offset: MIB <= offset < 5 * MIB)
    store = simulation.open()
    assert store.get(key.uuid) == b"on the other"
    assert len(live(store)) == 2
    check_sound(store)


def test_the_last_batch_of_a_device_is_verified_when_it_comes_back(simulate: Callable[..., Simulation]) -> None:
    placer = On(1)
    simulation = simulate(16 * MIB, 16 * MIB, placer=placer)
    store = simulation.open()
    whole = store.put(b"whole")
    simulation.power.left = 2  # data, journal, and no flush
    with pytest.raises(PowerCut):
        store.put(DATA[:5000])
    simulation.cut_power(lambda offset: MIB <= offset < 5 * MIB)
    placer.device = 0
    store = simulation.open(without=[1])
    for _ in range(3):
        store.put(b"on the first")
    simulation.close()
    store = simulation.open()
    assert store.get(whole.uuid) == b"whole"
    assert len(live(store)) == 4
    check_sound(store)


@pytest.mark.parametrize("torn", [0, 1])
@pytest.mark.parametrize("size", [5000, 2_500_000])
def test_a_copy_that_a_crash_tore_is_made_anew_from_the_other(
    simulate: Callable[..., Simulation], torn: int, size: int
) -> None:
    simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
    store = simulation.open()
    record = store.stat(store.put(DATA[:size]).uuid)
    simulation.cut_power()
    (extent,) = record.copies[torn]
    flip(simulation.paths[extent.device], extent.block * BLOCK + size - 1)
    flip(simulation.paths[extent.device], extent.end * BLOCK - 1)
    store = simulation.open()
    check_sound(store)
    simulation.close()
    simulation.lose_index()  # so that data and footers are verified once more
    for gone in (0, 1):
        store = simulation.open(without=[gone])
        assert store.get(record.uuid) == DATA[:size]
        simulation.close()
        simulation.lose_index()


@pytest.mark.parametrize("gone", [0, 1])
def test_what_was_deleted_on_several_devices_is_deleted_on_each(simulate: Callable[..., Simulation], gone: int) -> None:
    simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
    store = simulation.open()
    key = store.put(DATA[:5000])
    assert store.cycle([Delete(key.uuid)]).outcomes == []
    simulation.cut_power()
    store = simulation.open(without=[gone])
    assert live(store) == []
    simulation.close()
    store = simulation.open()
    assert live(store) == []
    check_sound(store)


def test_what_a_crash_leaves_of_an_upload_is_free(simulation: Simulation) -> None:
    store = simulation.open()
    before = free_blocks(store)
    intake = store.upload(Put(b""), None)
    intake.write(DATA[:2_000_000])
    simulation.cut_power(lambda offset: True)
    store = simulation.open()
    assert free_blocks(store) == before
    assert upload(store, DATA).size == len(DATA)
    check_sound(store)


def test_labels_that_a_crash_left_different(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(16 * MIB, 16 * MIB)
    key = simulation.open().put(b"x")
    simulation.close()
    with closing(open_device(simulation.paths[1])) as device:
        label = label_of(simulation.paths[0])
        older = replace(label.for_member(label.members[1]), generation=label.generation - 1, state=State.OPEN)
        write_label(device, older)
    store = simulation.open()
    assert store.get(key.uuid) == b"x"
    check_sound(store)


class TestBadBlocks:
    def test_they_are_never_used_again(self, simulation: Simulation) -> None:
        store = simulation.open()
        free, (record,) = free_count(store), [store.stat(store.put(DATA[:200_000]).uuid)]
        used, spare = Extent(0, record.extents[0].block + 3, 5), Extent(0, 3000, 10)
        store.condemn([used, spare])
        assert store.get(record.uuid) == DATA[:200_000]  # it is not moved
        for end in (simulation.cut_power, simulation.close, simulation.cut_power):
            end()
            store = simulation.open()
            check_sound(store)
            if store.keystore.get(record.uuid):
                store.delete(record.uuid)
            assert free_count(store) == free - 15
            fill = store.put(bytes(store.allocator.largest(0) * BLOCK - BLOCK))
            taken = [extent for entry in live(store) for extent in entry.extents]
            taken += [Extent(0, block, count) for block, count in free_blocks(store)[0]]
            assert all(extent.end <= bad.block or bad.end <= extent.block for extent in taken for bad in (used, spare))
            store.delete(fill.uuid)
        check_sound(store)

    def test_they_are_zeroed_with_their_object(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:50_000]).uuid)
        ((_, block, count),) = record.extents
        store.condemn([Extent(0, block, 2), Extent(0, block + count - 1, 1)])
        store.delete(record.uuid)
        assert simulation.read(0, block, count) == bytes(count * BLOCK)

    def test_one_that_cannot_be_zeroed_is_dead_and_delays_no_delete(
        self, simulation: Simulation, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:50_000]).uuid)
        ((_, block, count),) = record.extents
        store.condemn([Extent(0, block + 1, 2)])
        simulation.devices[0].fail_scratches = True
        store.delete(record.uuid)
        assert f"bad blocks {block + 1} to {block + 2} of device 0 keep what was deleted there" in caplog.text
        assert simulation.read(0, block, count).strip(b"\0") == DATA[BLOCK : 3 * BLOCK]
        store.put(b"the device takes writes")
        simulation.cut_power()
        store = simulation.open()
        assert store.blocks.slots[0].bad.runs == ((block + 1, 2, True),)
        check_sound(store)

    @pytest.mark.parametrize("damaged", [0, 1])
    def test_a_damaged_copy_of_the_table_loses_nothing_and_is_healed(
        self, simulation: Simulation, damaged: int
    ) -> None:
        simulation.open().condemn([Extent(0, 3000, 10)])
        simulation.cut_power()
        places = GEOMETRY.bad_table_offsets
        with simulation.paths[0].open("r+b") as file:
            file.seek(places[damaged])
            file.write(b"?" * 100)
        assert simulation.open().blocks.slots[0].bad.runs == ((3000, 10, False),)
        simulation.cut_power()
        copies = [simulation.read(0, place // BLOCK, 1) for place in places]
        assert copies[0] == copies[1] != bytes(BLOCK)

    def test_a_table_that_is_lost_is_logged_and_opens(
        self, simulation: Simulation, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = simulation.open()
        key = store.put(DATA)
        store.condemn([Extent(0, 3000, 10)])
        simulation.close()
        with simulation.paths[0].open("r+b") as file:
            for place in GEOMETRY.bad_table_offsets:
                file.seek(place)
                file.write(b"?" * 100)
        assert simulation.open().get(key.uuid) == DATA
        assert "lost its table of bad blocks" in caplog.text

    def test_a_power_cut_leaves_the_table_before_or_after(self, simulation: Simulation, seed: int) -> None:
        chance = random.Random(seed)
        store = simulation.open()
        store.condemn([Extent(0, block, 1) for block in range(2200, 2400, 2)])  # more than a sector of them
        before = store.blocks.slots[0].bad.runs
        simulation.close()
        for block in range(3000, 3100, 2):
            store = simulation.open()
            simulation.power.left = chance.randrange(5)
            try:
                store.condemn([Extent(0, block, 1)])
            except PowerCut:
                done = False
            else:
                done = True
            simulation.cut_power(lambda offset: chance.random() < 0.5)
            runs = simulation.open().blocks.slots[0].bad.runs
            after = BadBlocks(before).adding(block, 1).runs
            assert runs == after or (runs == before and not done)
            before = runs
            simulation.close()

    def test_what_one_device_cannot_note_another_does(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        simulation.devices[0].fail_writes = True
        with pytest.raises(DeviceError):
            store.condemn([Extent(0, 3000, 10), Extent(1, 3000, 10), Extent(7, 3000, 10)])
        simulation.cut_power()
        store = simulation.open()
        assert [slot.bad.block_count for slot in store.blocks.slots.values()] == [0, 10]

    def test_what_is_noted_while_the_labels_are_renewed_stays(self, simulation: Simulation) -> None:
        """What a thread that erases finds that it cannot."""
        store = simulation.open()
        store.condemn([Extent(0, 3000, 10)])
        erasing = threading.Thread(target=store.blocks.condemn, args=([Extent(0, 3500, 1)],), kwargs={"dead": True})

        def condemn(operation: str) -> None:
            if operation == "write" and erasing.ident is None:
                has_to_wait = store.blocks._condemning.locked()
                erasing.start()
                if not has_to_wait:
                    erasing.join()

        simulation.devices[0].stall = condemn
        renew_labels(store, store.label)
        erasing.join()
        simulation.close()
        assert simulation.open().blocks.slots[0].bad.runs == (BadRun(3000, 10), BadRun(3500, 1, True))

    def test_a_full_table_is_a_clear_error(self, simulation: Simulation) -> None:
        store = simulation.open()
        full = BadBlocks(tuple(BadRun(5000 + 2 * number, 1) for number in range(RUN_COUNT_MAX)), 1)
        store.blocks.slots[0].bad = full
        with pytest.raises(DeviceError, match="more bad extents than its table holds") as caught:
            store.condemn([Extent(0, 3901, 1)])
        assert "replace the device" in caught.value.hint
        assert store.blocks.slots[0].bad == full
        assert not store.allocator._free[0].contains(3901, 1)

    def test_a_device_that_was_missing_brings_its_own(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        simulation.open().condemn([Extent(1, 3000, 10)])
        simulation.close()
        store = simulation.open(without={1})
        attach_device(store, str(simulation.paths[1]))
        assert not store.allocator._free[1].contains(3005, 1)
        check_sound(store)

    def test_a_device_with_bad_blocks_is_empty_when_it_holds_no_object(
        self, simulate: Callable[..., Simulation]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=On(1))
        store = simulation.open()
        record = store.stat(store.put(b"x").uuid)
        store.condemn(record.extents)
        with pytest.raises(DeviceError, match="holds Objects"):
            remove_device(store, 1)
        store.delete(record.uuid)
        remove_device(store, 1)


def test_a_pool_that_is_filled_crashes_and_is_emptied_again_and_again_leaks_nothing(
    simulate: Callable[..., Simulation], seed: int, request: pytest.FixtureRequest
) -> None:
    """No block is lost over all of this, and nobody is refused for whom there is room."""
    chance = random.Random(seed)
    simulation = simulate(16 * MIB, 16 * MIB, placer=chance.choice([Contiguous(), Striped(8)]))
    store = simulation.open()
    empty = free_count(store)
    known: dict[bytes, bytes] = {}
    for _ in range(2000 if request.config.getoption("--long") else 12):
        simulation.power.left = chance.choice((None, chance.randrange(400)))
        try:
            _fill_up(store, known, chance)
            for uuid in chance.sample(sorted(known), len(known) * chance.choice((1, 2, 3)) // 3):
                del known[uuid]  # once it has begun, nobody knows what a crash leaves
                store.delete(uuid)
        except PowerCut:
            simulation.cut_power(lambda offset: offset % 1536 == 0)
            store = simulation.open()
            found = {record.uuid for record in live(store)}
            assert found >= known.keys()
            for uuid in found - known.keys():  # under way: whole, or absent
                known[uuid] = store.get(uuid)
        check_sound(store)
        assert all(store.get(uuid) == data for uuid, data in known.items())
    simulation.power.left = None
    for uuid in known:
        store.delete(uuid)
    assert free_count(store) == empty


def _fill_up(store: ObjectStore, known: dict[bytes, bytes], chance: random.Random) -> None:
    while True:
        size = chance.choice((0, 100, 5000, 70_000, 400_000, 3_000_000))
        start = chance.randrange(1000)
        data = DATA[start : start + size]
        try:
            known[store.put(data).uuid] = data
        except NoSpace:
            assert free_count(store) < size // BLOCK + 4, "there was room for it"
            return
