"""Moving in the background: devices are emptied, copies restored, devices filled evenly; whatever happens meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Put
from rustord.errors import DeviceError, FormatError, NoSpace, PoolError
from rustord.label import Standing
from rustord.membership import attach_device, detach_device, remove_device, set_standing
from rustord.mover import Mover
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId
from rustord.placer import Contiguous, Mirrored, Striped
from rustord.writer import Writer
from tests.simulation import MIB, PowerCut, Simulation, check_sound, live, run, stored, upload

DATA = random.Random(5).randbytes(4 * MIB)
SIZES = (0, 100, 5000, 70_000, 300_000)


class Moving:
    """A pool that is open, with a writer and a mover, as in the daemon."""

    def __init__(self, store: ObjectStore, notes: Path | None = None) -> None:
        self.store = store
        self.writer = Writer(store)
        self.mover = Mover(store, self.writer, notes=notes)

    def leave(self, index: int, standing: Standing = Standing.LEAVING) -> None:
        self.writer.call(lambda: set_standing(self.store, index, standing))
        self.run()

    def run(self, work: str = "") -> None:
        self.mover.start(work)
        assert self.mover.task.wait(60)

    def end(self) -> None:
        self.mover.pause()
        assert self.writer.close()


@pytest.fixture
def moving(simulate: Callable[..., Simulation]) -> Iterator[Callable[..., Moving]]:
    opened: list[Moving] = []

    def open_again(store: ObjectStore, **how: Any) -> Moving:
        opened.append(Moving(store, **how))
        return opened[-1]

    yield open_again
    for one in opened:
        one.end()


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def fill(store: ObjectStore, sizes: tuple[int, ...] = SIZES) -> dict[ObjectId, bytes]:
    contents = {}
    for number, size in enumerate(sizes):
        data = DATA[number : number + size]
        contents[store.put(data, name=f"name{number}").uuid] = data
    return contents


def check(store: ObjectStore, contents: dict[ObjectId, bytes]) -> None:
    store.keystore.checkpoint()
    run(store)
    assert {record.uuid for record in live(store)} == set(contents)
    for uuid, data in contents.items():
        assert store.get(uuid) == data
    check_sound(store)


def shares(store: ObjectStore, uuid: ObjectId) -> dict[int, int]:
    """How many blocks of an Object each device has."""
    share: dict[int, int] = {}
    for extent in store.stat(uuid).extents:
        share[extent.device] = share.get(extent.device, 0) + extent.count
    return share


class TestEmptying:
    @pytest.mark.parametrize("placer", [Contiguous(), Striped(4), Mirrored(2)], ids=lambda placer: placer.name)
    def test_a_device_that_leaves(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], placer: Any
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=placer)
        store = simulation.open()
        contents = fill(store)
        for index in (0, 1) if placer.copies == 1 else (1,):
            one = moving(store)
            one.leave(index)
            assert one.mover.status() | {"state": "done", "stuck": 0, "error": ""} == one.mover.status()
            one.end()
            assert index not in store.blocks.slots
            check(store, contents)
        assert not any(simulation.paths[1].read_bytes()[:MIB])
        simulation.close()
        gone = [0, 1] if placer.copies == 1 else [1]
        store = simulation.open(without=gone)
        check(store, contents)

    @pytest.mark.parametrize("placer", [Striped(4), Mirrored(3)], ids=lambda placer: placer.name)
    def test_a_new_device_stands_in_for_one_that_leaves(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], placer: Any
    ) -> None:
        """As in a replacement: what was spread over three devices is so afterwards."""
        simulation = simulate(*[16 * MIB] * 4, placer=placer)
        store = simulation.open()
        set_standing(store, 3, Standing.LEAVING)
        contents = fill(store, (300_000, 70_000, 500_000))
        before = {uuid: shares(store, uuid) for uuid in contents}
        set_standing(store, 3, Standing.IN_USE)
        one = moving(store)
        one.leave(1)
        assert one.mover.task.state == "done"
        one.end()
        check(store, contents)
        for uuid, share in before.items():
            moved = shares(store, uuid)
            assert moved.keys() == {0, 2, 3}
            assert max(moved.values()) - min(moved.values()) <= max(share.values()) - min(share.values()) + 2

    def test_what_is_striped_is_spread_over_those_that_stay(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        store = simulate(*[16 * MIB] * 3, placer=Striped(4)).open()
        (uuid,) = contents = fill(store, (2 * MIB,))
        one = moving(store)
        one.leave(1)
        one.end()
        check(store, contents)
        assert abs(shares(store, uuid)[0] - shares(store, uuid)[2]) <= 6

    def test_it_takes_no_new_data_also_after_a_restart(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        set_standing(store, 0, Standing.LEAVING)
        for how in ("cut", "close"):
            simulation.close() if how == "close" else simulation.cut_power()
            store = simulation.open()
            assert store.blocks.slots[0].standing is Standing.LEAVING
            assert [store.stat(store.put(DATA[:MIB]).uuid).devices for _ in range(3)] == [{1}] * 3

    def test_one_that_is_removed_meanwhile(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who asks for that once more, when it is empty, has it removed at once."""
        store = simulate(16 * MIB, 16 * MIB).open()
        one = moving(store)
        pass_ = Mover._pass

        def removed(mover: Mover, job: Any) -> int:
            found = pass_(mover, job)
            one.writer.call(lambda: remove_device(store, 1))
            return found

        monkeypatch.setattr(Mover, "_pass", removed)
        one.leave(1)
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        assert list(store.blocks.slots) == [0]

    def test_a_writer_that_has_no_time_to_let_go_of_it(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def late(*_: object) -> None:
            raise TimeoutError

        store = simulate(16 * MIB, 16 * MIB).open()
        one = moving(store)
        monkeypatch.setattr("rustord.mover.remove_device", late)
        one.leave(1)
        assert (one.mover.task.state, one.mover.task.error) == ("failed", "a cycle did not end in time")
        monkeypatch.undo()
        one.run()
        assert list(store.blocks.slots) == [0]

    def test_what_comes_in_meanwhile_does_not_take_its_room(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        store = simulate(16 * MIB, 16 * MIB).open()
        contents = fill(store, (300_000,) * 20)
        one = moving(store)
        one.writer.call(lambda: set_standing(store, 0, Standing.LEAVING))
        with pytest.raises(NoSpace, match="set aside for what is on device 0"):  # noqa: PT012
            while True:
                (outcome,) = [outcome for _, outcome in one.writer.make([Put(DATA[:100_000])], 30)]
                contents[stored(outcome).uuid] = DATA[:100_000]
        one.run()
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        one.end()
        check(store, contents)

    def test_what_comes_in_meanwhile_moves_too(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Striped(4))
        store = simulation.open()
        intake = store.upload(put := _put(), None)
        intake.write(DATA[:MIB])
        one = moving(store)
        one.writer.call(lambda: set_standing(store, 0, Standing.LEAVING))
        one.mover.start()
        done: list[Any] = []
        one.writer.submit([put], done.extend)
        assert one.mover.task.wait(30)
        assert one.mover.task.state == "done"
        (outcome,) = done
        one.end()
        check(store, {outcome[1].uuid: DATA[:MIB]})

    def test_what_cannot_be_read_keeps_it_unless_it_is_given_up(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        contents = fill(store)
        index = next(iter(store.stat(next(reversed(contents))).devices))
        simulation.devices[index].fail_reads = True
        one = moving(store)
        one.leave(index)
        assert one.mover.task.state == "failed"
        assert f"cannot be moved off device {index}" in one.mover.task.error
        assert one.mover.stuck == sum(store.stat(uuid).devices == {index} for uuid in contents)
        one.leave(index, Standing.GIVEN_UP)
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        assert list(store.blocks.slots) == [1 - index]
        with pytest.raises(Exception, match="checksum"):
            store.get(next(reversed(contents)))

    def test_one_that_is_given_up_while_it_is_emptied(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        record = store.stat(store.put(DATA[:100_000]).uuid)
        (index,) = record.devices
        simulation.devices[index].fail_reads = True
        one = moving(store)
        pass_ = Mover._pass

        def give_up(mover: Mover, job: Any) -> int:
            found = pass_(mover, job)
            monkeypatch.undo()
            one.writer.call(lambda: set_standing(store, index, Standing.GIVEN_UP))
            one.mover.start()
            return found

        monkeypatch.setattr(Mover, "_pass", give_up)
        one.leave(index)
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        assert list(store.blocks.slots) == [1 - index]

    @pytest.mark.parametrize("fate", ["back", "given up"])
    def test_what_was_moved_is_erased_when_a_missing_device_is(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], fate: str
    ) -> None:
        """A copy that stays on the missing device gets another footer all the same, and has to be erased with it."""
        simulation = simulate(*[16 * MIB] * 4, placer=Mirrored(2))
        store = simulation.open()
        contents = fill(store, (5000,) * 40)
        one = moving(store)
        one.writer.call(lambda: detach_device(store, 1))
        one.run("heal")
        one.writer.call(lambda: set_standing(store, 0, Standing.LEAVING))
        one.mover.start()
        until(lambda: one.mover.job == "emptying device 0, which is empty once device 1 is back or given up")
        if fate == "back":
            simulation.devices[1].close()
            one.writer.call(lambda: attach_device(store, str(simulation.paths[1])))
        else:
            one.writer.call(lambda: set_standing(store, 1, Standing.GIVEN_UP))
        assert one.mover.task.wait(60)
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        one.end()
        check(store, contents)
        assert list(store.blocks.slots) == ([1, 2, 3] if fate == "back" else [2, 3])

    def test_a_missing_device_is_given_up_when_no_object_needs_it(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        contents = fill(store)
        store.allocator.placer = Contiguous()
        alone = upload(store, DATA[:MIB], declare=True)
        (index,) = alone.devices
        one = moving(store)
        one.writer.call(lambda: detach_device(store, index))
        one.leave(index, Standing.GIVEN_UP)
        assert one.mover.task.state == "failed"
        assert "is missing" in one.mover.task.error
        assert one.mover.stuck == 1
        for uuid in contents:
            assert index not in store.stat(uuid).devices
        one.end()
        store.delete(alone.uuid)  # which is all that can be done for it
        again = moving(store)
        again.run()
        assert (again.mover.task.state, again.mover.task.error) == ("done", "")
        assert index not in store.blocks.slots
        again.end()
        check(store, contents)


def _put() -> Any:
    return Put(b"")


class TestHealing:
    def test_lost_copies_are_made_anew(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(*[16 * MIB] * 4, placer=Mirrored(2))
        store = simulation.open()
        contents = fill(store)
        one = moving(store)
        one.writer.call(lambda: detach_device(store, 0))
        one.run("heal")
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        for uuid in contents:
            copies = store.stat(uuid).copies
            devices = [{extent.device for extent in copy} for copy in copies]
            assert devices[0].isdisjoint(devices[1])
            assert 0 not in devices[0] | devices[1]
        one.end()
        simulation.cut_power()
        store = simulation.open()  # with the device that was missing: what it had is erased
        check(store, contents)

    def test_the_newest_come_first(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulation = simulate(*[16 * MIB] * 3, placer=Mirrored(2))
        store = simulation.open()
        contents = fill(store, (5000,) * 10)
        one = moving(store)
        one.writer.call(lambda: detach_device(store, 0))
        moved = []
        copy = store.relocations.copy

        def spy(relocation: Any, *how: Any) -> Any:
            moved.append(relocation.record.uuid)
            return copy(relocation, *how)

        monkeypatch.setattr(store.relocations, "copy", spy)
        hurt = [uuid for uuid in contents if 0 in store.stat(uuid).devices]
        one.run("heal")
        assert moved == hurt[::-1]

    def test_it_goes_on_after_a_restart(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving], disk_path: Path
    ) -> None:
        simulation = simulate(*[16 * MIB] * 3, placer=Mirrored(2))
        store = simulation.open()
        contents = fill(store)
        one = moving(store, notes=disk_path / "notes")
        one.writer.call(lambda: detach_device(store, 0))
        one.mover.task.bytes_s_max = 1
        one.mover.start("heal")
        one.mover.pause()
        assert one.mover.task.state == "stopped"
        again = moving(store, notes=disk_path / "notes")
        again.run()
        assert again.mover.job == "healing"
        assert all(0 not in store.stat(uuid).devices for uuid in contents)

    def test_a_note_that_cannot_be_written_ends_nothing(
        self,
        simulate: Callable[..., Simulation],
        moving: Callable[..., Moving],
        disk_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        store = simulate(*[16 * MIB] * 3, placer=Mirrored(2)).open()
        contents = fill(store)
        one = moving(store, notes=disk_path / "absent" / "notes")
        one.writer.call(lambda: detach_device(store, 0))
        one.run("heal")
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        assert all(0 not in store.stat(uuid).devices for uuid in contents)
        assert "cannot be noted in" in caplog.text


class TestRebalancing:
    def test_a_new_device_gets_its_share(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        set_standing(store, 1, Standing.LEAVING)
        contents = fill(store, (50_000,) * 100)
        set_standing(store, 1, Standing.IN_USE)
        assert store.allocator.is_empty(1)
        one = moving(store)
        one.run("rebalance")
        assert (one.mover.task.state, one.mover.task.error) == ("done", "")
        one.end()
        check(store, contents)
        used = [store.allocator.size(index) - store.allocator.free_count(index) for index in (0, 1)]
        assert abs(used[0] - used[1]) <= 0.06 * store.allocator.size(0)

    def test_what_is_even_stays_as_it_is(
        self, simulate: Callable[..., Simulation], moving: Callable[..., Moving]
    ) -> None:
        store = simulate(16 * MIB, 16 * MIB).open()
        fill(store, (50_000,) * 20)
        one = moving(store)
        one.run("rebalance")
        assert (one.mover.task.state, one.mover.moved) == ("done", 0)


@pytest.mark.parametrize("placer", [Contiguous(), Mirrored(2)], ids=lambda placer: placer.name)
def test_a_power_cut_while_a_device_leaves(
    simulate: Callable[..., Simulation],
    moving: Callable[..., Moving],
    placer: Any,
    seed: int,
    request: pytest.FixtureRequest,
) -> None:
    """The step is a matter of chance, since the index and the erasures run beside it; what holds does not."""
    chance = random.Random(seed)
    for _ in range(60 if request.config.getoption("--long") else 6):
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=placer)
        contents = fill(simulation.open())
        simulation.close()
        store = simulation.open()
        simulation.power.left = chance.randrange(60)
        one = Moving(store)
        with suppress(Exception):
            one.leave(1)
        with suppress(PowerCut, DeviceError):
            one.mover.pause()
        one.writer.close(10)
        share = chance.choice((0, 0.5, 1))
        simulation.cut_power(lambda offset, share=share: chance.random() < share)  # type: ignore[misc]
        try:
            store = simulation.open()
        except (PoolError, FormatError):  # its label is wiped last: it was removed, and may be half wiped
            store = simulation.open(without=[1])
        again = moving(store)
        again.run()  # it goes on if it had been noted
        again.end()
        check(store, contents)
        simulation.close()
