"""Which devices a pool has: what comes back is let in if it is as the pool has left it; nothing looks at a clock."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from rustord.blockdevice import BlockDevice, ImageFile, RawDevice, open_device
from rustord.blockstore import BlockStore, Slot, read_label, write_label
from rustord.change import Change, Delete, Erase, Put
from rustord.errors import DeviceError, InvalidRequest, NoSpace, PoolError
from rustord.keystore.ring import Ring
from rustord.label import Geometry, Label, Standing
from rustord.membership import (
    add_device,
    attach_device,
    detach_device,
    prepare_device,
    remove_device,
    set_standing,
)
from rustord.mover import Mover
from rustord.objectstore import ObjectStore
from rustord.placer import Mirrored, Striped
from rustord.pool import open_devices, renew_labels
from rustord.record import Record
from rustord.repair import Repairer
from rustord.scrub import Scrub
from rustord.writer import Writer
from tests.simulation import MIB, PowerCut, Simulation, VolatileDevice, check_sound, run, stored, upload


@pytest.fixture
def pair(simulate: Callable[..., Simulation]) -> Simulation:
    return simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))


def lone(simulation: Simulation, index: Path, number: int) -> None:
    """Use one device of a pool without the others, and with an index of its own."""
    before, simulation.index = simulation.index, index
    simulation.open(without=[1 - number])
    simulation.close()
    simulation.index = before


class TestReturning:
    @pytest.mark.parametrize("how", ["close", "cut"])
    def test_a_device_that_was_missing_rejoins(self, pair: Simulation, how: str) -> None:
        store = pair.open()
        key = store.put(b"mirrored")
        pair.close() if how == "close" else pair.cut_power()
        for _ in range(3):
            store = pair.open(without=[1])
            assert store.get(key.uuid) == b"mirrored"
            assert (store.blocks.slots[1].state, store.blocks.slots[1].reason) == ("missing", "not found")
            pair.close() if how == "close" else pair.cut_power()
        store = pair.open()
        assert store.blocks.slots[1].state == "online"
        check_sound(store)

    def test_an_older_state_of_a_device_is_left_out(self, pair: Simulation, disk_path: Path) -> None:
        pair.open()
        pair.close()
        old = shutil.copy(pair.paths[1], disk_path / "old.img")
        key = pair.open().put(b"new")
        pair.close()
        shutil.copy(old, pair.paths[1])
        store = pair.open()
        assert store.get(key.uuid) == b"new"
        assert "is an older state of itself" in store.blocks.slots[1].reason
        with pytest.raises(DeviceError, match=r"needs 2 devices, and 1 can take it: .* older state"):
            store.put(b"x")
        with pytest.raises(PoolError, match="older state"):
            attach_device(store, str(pair.paths[1]))

    @pytest.mark.parametrize("which", ["an older state", "a twin"])
    def test_what_is_refused_is_not_opened_for_writing(
        self, pair: Simulation, disk_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
    ) -> None:
        """Where a udevd runs, to close it would be an event, upon which it would be tried again, without end."""
        pair.open()
        pair.close()
        copy = shutil.copy(pair.paths[1], disk_path / "copy.img")
        store = pair.open(without=[1])
        if which == "an older state":
            pair.close()
            pair.open()
            pair.close()
            store = pair.open(without=[1])
        else:
            attach_device(store, str(pair.paths[1]))
        opened: list[bool] = []

        def open_and_tell(path: str, *, read_only: bool = False, exclusive: bool = True) -> RawDevice | ImageFile:
            opened.append(read_only)
            return open_device(path, read_only=read_only, exclusive=exclusive)

        monkeypatch.setattr("rustord.membership.open_device", open_and_tell)
        with pytest.raises(PoolError, match=r"is an older state of itself|cannot stand in for device 1"):
            attach_device(store, copy)
        assert opened == [True]

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_what_could_not_be_erased_without_it_is_then(self, simulate: Callable[..., Simulation], when: str) -> None:
        """An Object was moved while it was missing: what that left is erased and free without a restart."""
        simulation = simulate(*[16 * MIB] * 3, placer=Mirrored(2))
        store = simulation.open()
        record = store.stat(store.put(bytes(100_000)).uuid)
        missing = min(record.devices)
        detach_device(store, missing)
        move = store.relocations.prepare(record, [e for e in record.extents if e.device == missing], [missing])
        stored(run(store, move)[0])
        store.keystore.checkpoint()
        run(store)
        assert store.keystore.graves()
        if when == "after":
            simulation.close()
            store = simulation.open(without=[missing])
        else:
            simulation.devices[missing].close()
        attach_device(store, str(simulation.paths[missing]))
        run(store)
        store.keystore.checkpoint()
        assert not store.keystore.graves()
        assert store.allocator.is_empty(missing)
        check_sound(store)

    @pytest.mark.parametrize("what", ["it fails", "it is away", "it is back", "it was away"])
    def test_what_a_device_has_lost_of_an_erasure_is_erased_once_more(
        self, simulate: Callable[..., Simulation], what: str
    ) -> None:
        """A long erasure is done beside the cycles, one of which flushes it: by then the device may be another one."""
        simulation = simulate(16 * MIB, 16 * MIB, placer=Striped(64))
        store = simulation.open()
        record = upload(store, b"deleted" * 500_000)
        delete = Delete(record.uuid)
        following: list[Change] = store.cycle([delete]).following
        (erase,) = following
        assert isinstance(erase, Erase)
        device = simulation.devices[0]
        if what == "it was away":
            detach_device(store, 0)
        store.erase(erase)
        if what == "it fails":
            device.fail_flushes = 1
            store.blocks.flush([0])
        else:
            detach_device(store, 0)
            device.cut_power()
        if what in ("it is back", "it was away"):
            attach_device(store, str(simulation.paths[0]))
        outcomes = {}
        while following:
            cycle = store.cycle(following)
            outcomes.update(cycle.outcomes)
            following = cycle.following
        assert isinstance(outcomes[delete], Record) is (what in ("it is back", "it was away"))
        if what == "it fails":
            simulation.cut_power()
            store = simulation.open()
        if what == "it is away":
            attach_device(store, str(simulation.paths[0]))
        run(store)
        assert not any(any(simulation.read(*extent)) for extent in record.extents)
        check_sound(store)

    def test_a_device_that_takes_no_label_again_and_again_rejoins(
        self, pair: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is as the pool has left it, however often the pool has tried to say so on it."""

        def write(device: BlockDevice, label: Label) -> None:
            if label.device_index == 1:
                device.failed = "as it was told to"
                raise DeviceError(device.failed)
            write_label(device, label)

        store = pair.open()
        key = store.put(b"mirrored")
        with monkeypatch.context() as broken:
            broken.setattr("rustord.pool.write_label", write)
            for _ in range(2):
                renew_labels(store, store.label)
                detach_device(store, 1)
                pair.devices[1].close()
                attach_device(store, str(pair.paths[1]))
        assert store.blocks.slots[1].state == "failed"
        detach_device(store, 1)
        attach_device(store, str(pair.paths[1]))
        pair.cut_power()
        store = pair.open()
        assert store.blocks.slots[1].state == "online"
        assert store.get(key.uuid) == b"mirrored"

    def test_a_device_that_was_used_alone_is_left_out(self, pair: Simulation, disk_path: Path) -> None:
        pair.open().put(b"both")
        pair.close()
        other = shutil.copytree(pair.index, disk_path / "other")
        lone(pair, other, 1)
        pair.open(without=[1])
        pair.close()
        lone(pair, pair.index, 0)  # which is newer now
        store = pair.open()
        assert "has been used without the other" in store.blocks.slots[1].reason
        assert store.blocks.slots[0].state == "online"

    def test_two_that_were_used_apart_for_the_same_time_are_refused(self, pair: Simulation, disk_path: Path) -> None:
        pair.open().put(b"both")
        pair.close()
        other = shutil.copytree(pair.index, disk_path / "other")
        lone(pair, other, 1)
        lone(pair, pair.index, 0)
        with pytest.raises(PoolError, match="have each been used without the other"):
            pair.open()
        pair.open(without=[1])

    def test_a_clock_that_is_wrong_by_ten_years_changes_nothing(
        self, pair: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [pair.open().put(b"now")]
        pair.close()
        now = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: now() - 315_360_000 * 10**9)
        store = pair.open()
        keys.append(store.put(b"then", name="name"))
        pair.cut_power()
        monkeypatch.undo()
        store = pair.open()
        keys.append(store.put(b"after", name="name"))
        assert store.resolve("name") == keys[2].uuid
        detach_device(store, 1)
        pair.devices[1].close()
        attach_device(store, str(pair.paths[1]))
        assert [slot.state for slot in store.blocks.slots.values()] == ["online", "online"]

    def test_a_crash_while_labels_are_written_leaves_no_device_behind(self, pair: Simulation) -> None:
        pair.open()
        pair.close()
        used = pair.power.used
        pair.open()
        pair.close()
        for left in range(pair.power.used - used):
            pair.power.left = left
            with pytest.raises(PowerCut):  # noqa: PT012
                pair.open()
                pair.close()
            pair.cut_power(lambda offset: offset % 1024 == 0)
            store = pair.open()
            assert [slot.state for slot in store.blocks.slots.values()] == ["online", "online"]
            pair.close()


def fail_to_note(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, turn: int = 1) -> None:
    """Have the index refuse a new generation once, the time ``turn``, as when its filesystem is full."""
    note, turns = store.keystore.note_generation, iter(range(1, 100))

    def fail_once(generation: int) -> None:
        if next(turns) == turn:
            raise NoSpace("the index has no room")
        note(generation)

    monkeypatch.setattr(store.keystore, "note_generation", fail_once)


class TestLeaving:
    def test_the_last_that_takes_data_stays(self, pair: Simulation) -> None:
        store = pair.open()
        set_standing(store, 0, Standing.LEAVING)
        with pytest.raises(InvalidRequest, match="no device but device 1"):
            set_standing(store, 1, Standing.LEAVING)
        with pytest.raises(InvalidRequest, match="no device but device 1"):
            remove_device(store, 1)
        set_standing(store, 0, Standing.IN_USE)
        store.put(b"x")

    def test_that_it_leaves_is_said_again_if_it_could_not_be_noted(
        self, pair: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = pair.open()
        fail_to_note(store, monkeypatch)
        with pytest.raises(NoSpace):
            set_standing(store, 1, Standing.LEAVING)
        assert store.blocks.slots[1].standing is Standing.IN_USE
        set_standing(store, 1, Standing.LEAVING)
        pair.close()
        assert pair.open().blocks.slots[1].standing is Standing.LEAVING

    def test_no_index_of_a_device_is_used_twice(self, simulate: Callable[..., Simulation]) -> None:
        simulation, other = simulate(), simulate()
        store = simulation.open()
        for expected in (1, 2, 3):
            device = VolatileDevice(open_device(other.paths[0]))
            prepare_device(store, device)
            assert add_device(store, device).device_index == expected
            remove_device(store, expected)
        simulation.close()
        assert simulation.open().label.next_index == 4

    def test_one_whose_removal_could_not_be_noted_is_removed_the_next_time(
        self, simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        fail_to_note(store, monkeypatch)
        with pytest.raises(NoSpace):
            remove_device(store, 1)
        assert [slot.state for slot in store.blocks.slots.values()] == ["online", "online"]
        run(store, Put(b"x"))
        remove_device(store, 1)
        check_sound(store)
        simulation.close()
        assert list(simulation.open(without=[1]).blocks.slots) == [0]

    def test_one_may_go_while_somebody_looks_at_the_journals(
        self, pair: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = pair.open()

        def used(ring: Ring) -> float:
            detach_device(store, 1)
            return 0.5

        monkeypatch.setattr(Ring, "used", property(used))
        assert store.keystore.journal_used() == 0.5

    @pytest.mark.parametrize("starts", [0, 1])
    def test_one_that_was_given_up_is_not_kept_with_what_was_deleted_meanwhile(
        self, simulate: Callable[..., Simulation], starts: int
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        key = store.put(b"deleted")
        (index,) = store.stat(key.uuid).devices
        set_standing(store, index, Standing.GIVEN_UP)
        set_standing(store, index, Standing.IN_USE)  # by mistake, then: nothing has happened
        set_standing(store, index, Standing.GIVEN_UP)
        detach_device(store, index)
        simulation.devices[index].close()
        store.delete(key.uuid)
        attach_device(store, str(simulation.paths[index]))
        for _ in range(starts):
            simulation.close()
            store = simulation.open()
        for standing in (Standing.IN_USE, Standing.LEAVING):
            with pytest.raises(InvalidRequest, match="what was deleted since may still be on it"):
                set_standing(store, index, standing)
        remove_device(store, index)
        assert list(store.blocks.slots) == [1 - index]

    def test_one_that_is_given_up_is_let_go_as_it_is(self, pair: Simulation) -> None:
        store = pair.open()
        pair.devices[1].fail_flushes = 1
        run(store, Put(b"x"))
        assert store.blocks.slots[1].state == "failed"
        with pytest.raises(DeviceError, match="takes no writes"):
            remove_device(store, 1)
        set_standing(store, 1, Standing.GIVEN_UP)
        remove_device(store, 1)
        assert list(store.blocks.slots) == [0]
        pair.close()
        with pytest.raises(PoolError, match="was removed from pool"):
            pair.open()
        assert list(pair.open(without=[1]).blocks.slots) == [0]


class TestJoining:
    def test_a_crash_never_leaves_a_new_device_that_is_refused(
        self, simulate: Callable[..., Simulation], make_image: Callable[[int], Path]
    ) -> None:
        for left in range(40):
            simulation, new = simulate(), make_image(16 * MIB)
            store = simulation.open()
            device = VolatileDevice(open_device(new), simulation.power)
            prepare_device(store, device)
            simulation.devices.append(device)
            simulation.power.left = left
            try:
                add_device(store, device)
            except PowerCut:
                simulation.cut_power()
            else:
                simulation.power.left = None
                return
            with closing(open_device(new)) as after:
                if read_label(after):
                    simulation.paths.append(new)
            store = simulation.open()
            assert [slot.state for slot in store.blocks.slots.values()] == ["online"] * len(simulation.paths)
            simulation.close()
        pytest.fail("the power never went off")

    def test_one_that_does_not_take_its_label_keeps_nobody_from_the_pool(
        self, simulate: Callable[..., Simulation], make_image: Callable[[int], Path]
    ) -> None:
        simulation, new = simulate(), make_image(16 * MIB)
        store = simulation.open()
        key = store.put(b"x")
        device = VolatileDevice(open_device(new))
        prepare_device(store, device)
        device.fail_writes = range(8 * MIB, 9 * MIB)  # the second copy
        with pytest.raises(DeviceError):
            add_device(store, device)
        device.close()
        simulation.close()
        simulation.paths.append(new)
        with pytest.raises(PoolError, match="was removed from pool"):
            simulation.open()
        store = simulation.open(without=[1])
        assert (list(store.blocks.slots), store.get(key.uuid)) == ([0], b"x")

    def test_who_counts_blocks_meanwhile_sees_none_of_it(
        self, simulate: Callable[..., Simulation], make_image: Callable[[int], Path], tmp_path: Path
    ) -> None:
        simulation = simulate()
        store = simulation.open()
        writer = Writer(store)
        scrub, mover = Scrub(store, Repairer(store, writer), tmp_path / "notes"), Mover(store, writer)
        device = VolatileDevice(open_device(make_image(16 * MIB)))
        prepare_device(store, device)
        seen = []

        def count(operation: str) -> None:
            if operation == "write":
                seen.append((len(store.blocks.slots), scrub.status()["total_bytes"], max(mover._excess().values())))

        simulation.devices[0].stall = count
        writer.call(lambda: add_device(store, device))
        assert (2, 0, 0.0) in seen
        writer.call(lambda: remove_device(store, 1))
        scrub.close()
        writer.close()

    @pytest.mark.parametrize("turn", [1, 2])
    def test_an_index_without_room_leaves_it_in_or_out(
        self,
        simulate: Callable[..., Simulation],
        make_image: Callable[[int], Path],
        monkeypatch: pytest.MonkeyPatch,
        turn: int,
    ) -> None:
        simulation = simulate()
        store = simulation.open()
        device = VolatileDevice(open_device(make_image(16 * MIB)))
        prepare_device(store, device)
        fail_to_note(store, monkeypatch, turn)
        with suppress(NoSpace):
            add_device(store, device)
        monkeypatch.undo()
        is_in = len(store.blocks.slots) == 2
        assert store.allocator.is_empty(1)
        assert bool(store.allocator.free_count(1)) is is_in
        check_sound(store)
        if not is_in:
            add_device(store, device)
        simulation.close()


class TestFaults:
    """One device that is not as it should be keeps nobody from the others."""

    def test_a_journal_that_cannot_be_read(self, pair: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        store = pair.open()
        key = store.put(b"mirrored")
        pair.close()
        read = VolatileDevice.read

        def fail(device: VolatileDevice, offset: int, buffers: object) -> None:
            if device.path == str(pair.paths[1]) and MIB <= offset < 5 * MIB:
                raise DeviceError("the medium is bad")
            read(device, offset, buffers)  # type: ignore[arg-type]

        monkeypatch.setattr(VolatileDevice, "read", fail)
        store = pair.open()
        assert "its journal cannot be read: the medium is bad" in store.blocks.slots[1].reason
        assert store.get(key.uuid) == b"mirrored"

    def test_a_label_that_cannot_be_written(self, pair: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        key = pair.open().put(b"mirrored")
        pair.close()
        write = VolatileDevice.write

        def fail(device: VolatileDevice, offset: int, buffers: object) -> None:
            device.fail_writes = device.path == str(pair.paths[1])
            write(device, offset, buffers)  # type: ignore[arg-type]

        monkeypatch.setattr(VolatileDevice, "write", fail)
        store = pair.open()
        assert [slot.state for slot in store.blocks.slots.values()] == ["online", "failed"]
        assert store.get(key.uuid) == b"mirrored"
        monkeypatch.undo()
        pair.cut_power()
        check_sound(pair.open())

    def test_what_is_said_when_no_device_takes_data(self, pair: Simulation) -> None:
        store: ObjectStore = pair.open()
        for device in pair.devices:
            device.failed = "broken"
        with pytest.raises(DeviceError, match="needs 2 devices, and none can take it: device 0 is failed: broken; dev"):
            stored(run(store, Put(b"x"))[0])

    @pytest.mark.root
    def test_a_disk_that_comes_back_can_be_opened_again_at_once(self, make_loop: Callable[..., Path]) -> None:
        path = make_loop(16 * MIB)
        geometry = Geometry.of_device(16 * MIB, 4096)
        first = open_device(path)
        blocks = BlockStore(4096, [slot := Slot(0, bytes(16), geometry, first)])
        blocks.retire(slot, "it was taken out")
        with closing(open_device(path)) as again:
            again.write(0, [b"x" * 4096])
            for use in (
                lambda: first.read(0, [bytearray(4096)]),
                lambda: first.write(0, [bytes(4096)]),
                first.flush,
            ):
                with pytest.raises(DeviceError):
                    use()
            assert not first.read_now(0, [bytearray(4096)])
        blocks.close()

    @pytest.mark.root
    def test_a_device_that_is_write_protected_is_read(self, make_loop: Callable[..., Path]) -> None:
        path = make_loop(16 * MIB)
        subprocess.run(["blockdev", "--setro", path], check=True)
        (device,) = open_devices([path])
        with closing(device):
            assert device.read_only
            assert read_label(device) is None
