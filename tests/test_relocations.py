"""Objects on the way to other blocks: no race and no crash loses or doubles anything, nor leaves a copy behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from rustord.change import Delete, Put
from rustord.errors import DeviceError, NoSpace, NotFound, PreconditionFailed
from rustord.extent import Extent, block_count
from rustord.keystore.lmdb import LmdbBackend
from rustord.label import Standing
from rustord.membership import attach_device, detach_device, remove_device, set_standing
from rustord.objectstore import ObjectStore
from rustord.placer import Contiguous, Mirrored, Striped
from rustord.pool import open_devices
from rustord.rebuild import rebuild
from rustord.record import Metadata
from rustord.relocation import Relocation
from tests.simulation import (
    MIB,
    PowerCut,
    Simulation,
    check_sound,
    free_count,
    live,
    run,
    stored,
    upload,
)
from tests.test_relocation import BLOCK, DATA, move, on, settle

PIECES = {DATA[at : at + BLOCK] for at in range(0, len(DATA), BLOCK)}


class TestRaces:
    def test_an_object_that_is_deleted_meanwhile(self, simulation: Simulation) -> None:
        store = simulation.open()
        free = free_count(store)
        record = upload(store, DATA[:MIB])
        change = store.relocations.prepare(record, record.extents)
        store.delete(record.uuid)
        with pytest.raises(NotFound):
            stored(run(store, change)[0])
        run(store)
        assert free_count(store) == free
        check_sound(store)

    def test_an_object_that_is_deleted_while_it_is_given_its_place(
        self, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block that the place turns out not to need must not be given back by both."""
        store = simulation.open()
        free = free_count(store)
        give_back, taken_back = Relocation._give_back, []

        def while_deleted(relocation: Relocation, unused: list[Extent]) -> None:
            thread = threading.Thread(target=lambda: taken_back.extend(store.relocations.take_back(record.uuid)))
            thread.start()
            if not relocation._copying.locked():
                thread.join()
            give_back(relocation, unused)
            threads.append(thread)

        monkeypatch.setattr(Relocation, "_give_back", while_deleted)
        threads: list[threading.Thread] = []
        length = 3800
        while not threads:  # until the footer is as long as a block, so that one extent more makes it two
            record = store.stat(store.put(DATA[: 2 * BLOCK], long="a" * length).uuid)
            store.relocations.place(record, record.extents[:1]).abort()
            store.delete(record.uuid)
            length += 8
        threads[0].join()
        for erase in taken_back:
            store.erasures.add(erase)
        run(store)
        assert free_count(store) == free
        check_sound(store)

    def test_who_finds_no_room_leaves_nothing_behind(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        for block, count in [*store.allocator.free_runs(0)]:
            store.allocator.condemn([Extent(0, block, count)])
        with pytest.raises(NoSpace):
            store.relocations.place(record, record.extents)
        assert store.relocations.take_back(record.uuid) == []

    def test_an_object_that_is_moved_meanwhile(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        first, second = (store.relocations.prepare(record, record.extents) for _ in range(2))
        outcomes = run(store, first, second)
        settle(store)
        assert isinstance(outcomes[1], PreconditionFailed)
        assert store.stat(record.uuid).raw == stored(outcomes[0]).raw
        assert store.get(record.uuid) == DATA[:MIB]
        check_sound(store)

    @pytest.mark.parametrize("first", ["move", "other"])
    def test_one_that_is_deleted_or_replaced_in_the_same_cycle(self, simulation: Simulation, first: str) -> None:
        store = simulation.open()
        free = free_count(store)
        records = [store.stat(store.put(DATA[:9000], name=name).uuid) for name in ("a", "b")]
        moves = [store.relocations.prepare(record, record.extents) for record in records]
        others = [Delete(records[0].uuid), Put(b"new", Metadata("b"))]
        outcomes = run(store, *(moves + others if first == "move" else others + moves))
        settle(store)
        new = stored(outcomes[3] if first == "move" else outcomes[1])
        assert [record.uuid for record in live(store)] == [new.uuid]
        assert free_count(store) == free - 1
        check_sound(store)

    def test_a_reader_who_knows_the_old_place_is_not_cut_off(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        store.pins.add(old)
        stored(run(store, store.relocations.prepare(old, old.extents))[0])
        settle(store)
        assert store.read_now(old, 0, MIB) == DATA[:MIB]  # from where it was
        store.pins.remove(old)
        settle(store)
        assert store.read_now(old, 0, MIB) is None
        assert store.read(old, 5, 100) == DATA[5:105]
        assert store.read(old, 0, MIB) == DATA[:MIB]
        check_sound(store)

    def test_nothing_is_erased_before_the_index_knows_where_the_object_is(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        stored(run(store, store.relocations.prepare(old, old.extents))[0])
        assert simulation.read(0, old.extents[0].block, 16) == DATA[:65536]
        settle(store)
        assert not any(simulation.read(0, old.extents[0].block, 16))

    def test_a_device_that_was_away_while_it_was_copied_to(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        change = store.relocations.prepare(record, record.extents)
        simulation.devices[change.source.copies[0][0].device].failed = "it says so"
        with pytest.raises(DeviceError, match="it says so"):
            stored(run(store, change)[0])
        assert store.get(record.uuid) == DATA[:MIB]

    def test_a_device_that_was_away_and_is_back_has_lost_what_was_not_flushed(
        self, simulate: Callable[..., Simulation]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB], declare=True)
        (source,) = record.devices
        change = store.relocations.prepare(record, record.extents, avoid={source})
        detach_device(store, 1 - source)
        simulation.devices[1 - source].close()
        attach_device(store, str(simulation.paths[1 - source]))
        with pytest.raises(DeviceError, match="was away"):
            stored(run(store, change)[0])
        assert store.stat(record.uuid).raw == record.raw
        check_sound(store)

    def test_a_move_that_fails_in_the_flush_is_taken_back(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        record = upload(store, DATA[:MIB], declare=True)
        leaving = record.copies[0][0].device
        change = store.relocations.prepare(record, on(record, leaving))
        (target,) = {0, 1, 2} - record.devices
        simulation.devices[target].fail_flushes = 1
        with pytest.raises(DeviceError):
            stored(run(store, change)[0])
        assert store.stat(record.uuid).raw == record.raw
        settle(store)
        for _ in range(2):
            assert store.get(record.uuid) == DATA[:MIB]
            simulation.cut_power()
            store = simulation.open()
            check_sound(store)
        store.delete(record.uuid)
        check_sound(store)


class TestInterrupted:
    """What a copy leaves that is not the Object's own in the end."""

    def remains(self, simulation: Simulation) -> list[int]:
        """In which blocks of a device, whatever they are, there is anything of `DATA` durably."""
        found = []
        for path in simulation.paths:
            image = path.read_bytes()
            found += [at // BLOCK for at in range(MIB, len(image), BLOCK) if image[at : at + BLOCK] in PIECES]
        return found

    @pytest.mark.parametrize("lose", ["nothing", "index"])
    @pytest.mark.parametrize("placer", [Contiguous(), Striped(4), Mirrored(2)], ids=lambda placer: placer.name)
    def test_is_not_found_when_the_object_has_been_deleted(
        self, simulate: Callable[..., Simulation], placer: Any, lose: str, seed: int
    ) -> None:
        chance = random.Random(seed)
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=placer)
        found = 0
        for turn in range(60):
            if turn >= 12 and found:
                break
            store = simulation.open()
            record = upload(store, DATA[:MIB])
            store.keystore.checkpoint()  # which a move would do first
            used = len(self.remains(simulation))
            simulation.power.left = chance.randrange(16)
            with suppress(PowerCut):
                run(store, store.relocations.prepare(record, record.extents))
                store.keystore.checkpoint()
            simulation.cut_power(survival(chance))
            found += len(self.remains(simulation)) > used
            if lose == "index":
                simulation.lose_index()
            store = simulation.open()
            assert store.get(record.uuid) == DATA[:MIB]
            check_sound(store)
            store.delete(record.uuid)
            assert not self.remains(simulation)
            simulation.close()
        assert found, "no crash has left a copy"

    def test_is_not_found_after_a_rebuild_from_the_devices_alone(
        self, simulate: Callable[..., Simulation], seed: int
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        store.relocations.prepare(record, record.extents)
        for number in range(1300):  # the journals have nothing any more of what was before
            store.put(b"x", name="filler", number=str(number), text="t" * 7000)
            if number % 50 == 0:
                store.keystore.checkpoint()
        simulation.cut_power(lambda offset: True)
        assert len(self.remains(simulation)) > block_count(record.extents)
        simulation.lose_index()
        devices = open_devices(simulation.paths, read_only=True)
        assert not rebuild(devices, backend=LmdbBackend(), directory=simulation.index).losses
        store = simulation.open()
        assert store.get(record.uuid) == DATA[:MIB]
        check_sound(store)
        store.delete(record.uuid)
        assert not self.remains(simulation)

    def test_is_not_found_when_it_was_given_up(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        free = free_count(store)

        def stop(length: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            store.relocations.prepare(record, record.extents, pace=stop)
        store.keystore.checkpoint()
        assert [grave.id.uuid for grave in store.keystore.graves()] == [record.uuid]
        run(store)
        store.keystore.checkpoint()
        assert not store.keystore.graves()
        assert free_count(store) == free
        simulation.cut_power()
        store = simulation.open()
        store.delete(record.uuid)
        assert not self.remains(simulation)

    @pytest.mark.parametrize("pieces", [0, 1, 4])
    def test_is_not_found_when_the_object_is_deleted_meanwhile(self, simulation: Simulation, pieces: int) -> None:
        store = simulation.open()
        free = free_count(store)
        record = upload(store, DATA[: 3 * MIB])
        waiting = threading.Event()
        deleted = threading.Event()
        copied = []

        def pace(length: int) -> None:
            copied.append(length)
            if len(copied) == pieces:
                waiting.set()
                deleted.wait(60)

        with ThreadPoolExecutor(1) as pool:
            relocation = store.relocations.place(record, record.extents)
            if pieces:
                store.relocations.announce([relocation])
                copying = pool.submit(store.relocations.copy, relocation, pace if pieces < 4 else lambda length: None)
                assert pieces == 4 or waiting.wait(60)
                if pieces == 4:
                    copying.result(60)
            store.delete(record.uuid)
            assert not self.remains(simulation)
            deleted.set()
            if pieces == 1:
                with pytest.raises(NotFound):
                    copying.result(60)
            if not pieces:
                store.relocations.announce([relocation])
                with pytest.raises(NotFound):
                    store.relocations.copy(relocation)
        relocation.abort()
        run(store)
        assert not self.remains(simulation)
        assert free_count(store) == free
        check_sound(store)
        store.keystore.checkpoint()
        assert not store.keystore.graves()

    def test_is_no_grave_any_more_when_it_is_the_objects_own(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        move(store, record, record.extents)
        store.keystore.checkpoint()
        assert not store.keystore.graves()
        simulation.cut_power()
        store = simulation.open()
        assert store.get(record.uuid) == DATA[:MIB]
        check_sound(store)

    def test_nothing_is_copied_if_the_journal_cannot_say_so(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB], declare=True)
        (source,) = record.devices
        free = free_count(store)
        simulation.devices[1 - source].fail_flushes = 1
        with pytest.raises(DeviceError):
            store.relocations.prepare(record, record.extents, avoid={source})
        assert free_count(store) == free
        simulation.cut_power(lambda offset: True)
        assert len(self.remains(simulation)) == MIB // BLOCK
        store = simulation.open()
        assert store.get(record.uuid) == DATA[:MIB]
        check_sound(store)


class Crashes:
    """Moves Objects of all sorts between three devices, and cuts the power after so many operations."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        store = simulation.open()
        self.data = {}
        for number, size in enumerate((0, 100, 5000, 70_000, 300_000)):
            data = DATA[number : number + size]
            self.data[store.put(data, name=f"name{number}").uuid] = data
        simulation.close()

    def work(self, store: ObjectStore) -> None:
        for device in (0, 1, 2):
            for record in live(store):
                if leave := on(record, device):
                    stored(run(store, store.relocations.prepare(record, leave))[0])
            settle(store)

    def check(self, store: ObjectStore) -> None:
        assert {record.uuid for record in live(store)} == set(self.data)
        for number, (uuid, data) in enumerate(self.data.items()):
            assert store.get(uuid) == data
            assert store.resolve(f"name{number}") == uuid
        check_sound(store)


def survival(chance: random.Random) -> Callable[[int], bool]:
    """Lets none, some or all of the sectors survive that were not flushed."""
    share = chance.choice((0, 0.3, 1))
    return lambda offset: chance.random() < share


@pytest.mark.parametrize("placer", [Contiguous(), Striped(4), Mirrored(2)], ids=lambda placer: placer.name)
@pytest.mark.parametrize("lose", ["nothing", "index"])
def test_a_power_cut_at_any_step(
    simulate: Callable[..., Simulation], placer: Any, lose: str, seed: int, request: pytest.FixtureRequest
) -> None:
    chance = random.Random(seed)
    crashes = Crashes(simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=placer))
    simulation = crashes.simulation
    used = simulation.power.used
    store = simulation.open()
    begun = simulation.power.used - used
    crashes.work(store)
    steps = simulation.power.used - used
    simulation.close()
    count = steps if request.config.getoption("--long") else 25
    for step in sorted(chance.sample(range(begun, steps + 20), min(count, steps - begun))):
        simulation.power.left = step
        with suppress(PowerCut):
            crashes.work(simulation.open())
        simulation.cut_power(survival(chance))
        if lose == "index":
            simulation.lose_index()
        crashes.check(simulation.open())
        simulation.close()


class TestDeviceThatIsAway:
    """The Object has been moved to it, which the index does not know yet."""

    @pytest.mark.parametrize("fate", ["deleted", "replaced", "kept"])
    def test_does_not_bring_back_what_was_deleted_meanwhile(
        self, simulate: Callable[..., Simulation], fate: str
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB], Put(b"", Metadata("a")), declare=True)
        (old,) = record.devices
        new = 1 - old
        store.keystore.checkpoint()
        assert stored(run(store, store.relocations.prepare(record, record.extents, {old}))[0]).devices == {new}
        simulation.cut_power()
        store = simulation.open(without={new})
        assert store.get(record.uuid) == DATA[:MIB]
        if fate == "deleted":
            store.delete(record.uuid)
        elif fate == "replaced":
            store.put(b"x", name="a")
        simulation.close()
        store = simulation.open()
        expected = {"deleted": [], "replaced": [False], "kept": [True]}
        assert [one.uuid == record.uuid for one in live(store)] == expected[fate]
        check_sound(store)
        run(store)
        store.keystore.checkpoint()
        run(store)
        simulation.close()
        images = [path.read_bytes() for path in simulation.paths]
        found = sum(image[at : at + BLOCK] in PIECES for image in images for at in range(MIB, len(image), BLOCK))
        assert found == (MIB // BLOCK if fate == "kept" else 0)


class TestDeviceThatWasLeft:
    """The Object had been stored on it, which the index does not know yet, and was moved to another one."""

    @pytest.mark.parametrize("fate", ["deleted", "deleted meanwhile", "kept"])
    def test_does_not_bring_back_what_was_there(self, simulate: Callable[..., Simulation], fate: str) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = upload(store, DATA[:MIB], Put(b"", Metadata("a")), declare=True)
        (old,) = record.devices
        moved = stored(run(store, store.relocations.prepare(record, record.extents, {old}))[0])
        assert moved.devices == {1 - old}
        other = store.put(DATA[: 2 * MIB])  # its journal shows that the Object had been durable
        assert store.stat(other.uuid).devices == {old}
        if fate == "deleted":
            store.delete(record.uuid)
        simulation.cut_power()
        store = simulation.open(without={old})
        if fate == "deleted meanwhile":
            store.delete(record.uuid)
        simulation.close()
        store = simulation.open()
        found = [one.raw for one in live(store) if one.uuid != other.uuid]
        assert found == ([moved.raw] if fate == "kept" else [])
        check_sound(store)


class TestDeviceThatIsLost:
    """What a copy that was cut short has left on other devices is erased all the same."""

    @pytest.mark.parametrize("lose", ["nothing", "index"])
    def test_and_removed_holds_nothing_back(self, simulate: Callable[..., Simulation], lose: str) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        record = upload(store, DATA[:MIB], declare=True)
        (lost, other) = sorted({0, 1, 2, 3} - record.devices)
        relocation = store.relocations.place(record, record.extents)
        store.relocations.announce([relocation])
        store.relocations.copy(relocation)
        assert {extent.device for extent in relocation.new} == {lost, other}
        detach_device(store, lost)
        relocation.abort()
        run(store)
        store.keystore.checkpoint()
        assert store.keystore.graves(), "it cannot be erased yet"
        set_standing(store, lost, Standing.GIVEN_UP)
        remove_device(store, lost)
        for number in range(1300):  # the journals have gone around, and say once more what is not erased
            store.put(b"x", name="filler", number=str(number), text="t" * 7000)
            if number % 50 == 0:
                store.keystore.checkpoint()
        simulation.cut_power(lambda offset: True)
        if lose == "index":
            simulation.lose_index()
            left = [path for number, path in enumerate(simulation.paths) if number != lost]
            rebuild(open_devices(left, read_only=True), backend=LmdbBackend(), directory=simulation.index)
        store = simulation.open(without={lost})
        check_sound(store)
        store.delete(record.uuid)
        images = [path.read_bytes() for number, path in enumerate(simulation.paths) if number != lost]
        assert not any(image[at : at + BLOCK] in PIECES for image in images for at in range(MIB, len(image), BLOCK))
        store.keystore.checkpoint()
        assert not store.keystore.graves()
        check_sound(store)
