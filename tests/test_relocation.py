"""Moving Objects to other blocks: nothing changes for who reads them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from rustord.errors import Damaged, DeviceError, NoSpace
from rustord.extent import Extent, block_count
from rustord.membership import remove_device
from rustord.objectstore import ObjectStore
from rustord.placer import Mirrored, Striped
from rustord.record import Record
from tests.simulation import (
    MIB,
    Simulation,
    check_sound,
    free_count,
    run,
    stored,
    upload,
)

BLOCK = 4096
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 65536, 3 * 65536 + 5, 2 * MIB + 77]
DATA = random.Random(4).randbytes(4 * MIB)


def on(record: Record, device: int) -> list[Extent]:
    return [extent for extent in record.extents if extent.device == device]


def move(store: ObjectStore, record: Record, leave: list[Extent], **how: Any) -> Record:
    """Move an Object, and erase its old blocks."""
    moved = stored(run(store, store.relocations.prepare(record, leave, **how))[0])
    settle(store)
    return moved


def settle(store: ObjectStore) -> None:
    """Let the index know everything, and erase what waits for that."""
    store.keystore.checkpoint()
    run(store)


class TestMoving:
    @pytest.mark.parametrize("size", SIZES)
    def test_the_object_is_the_same_elsewhere(self, simulate: Callable[..., Simulation], size: int) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        free = free_count(store)
        old = store.stat(store.put(DATA[:size], name="name", content_type="text/plain", colour="blue").uuid)
        (device,) = old.devices
        new = move(store, old, old.extents, avoid={device})
        for _ in range(2):
            assert new.devices == {1 - device}
            assert store.stat(old.uuid).raw == new.raw
            assert store.get(old.uuid) == DATA[:size]
            assert store.resolve("name") == old.uuid
            assert (new.key, new.metadata, new.created_ns) == (old.key, old.metadata, old.created_ns)
            assert free_count(store) == free - block_count(new.extents)
            check_sound(store)
            simulation.close()
            store = simulation.open()
        for _, block, count in old.extents:
            assert not any(simulation.read(device, block, count))
        store.delete(old.uuid)
        assert free_count(store) == free

    def test_only_what_has_to_leave_does(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Striped(16))
        store = simulation.open()
        old = upload(store, DATA[: 2 * MIB + 77])
        assert old.devices == {0, 1, 2}
        new = move(store, old, on(old, 1), avoid={1})
        assert new.devices == {0, 2}
        body = block_count(old.extents) - 1
        kept = {(e.device, block) for e in old.extents for block in range(e.block, e.end) if e.device != 1}
        now = {(e.device, block) for e in new.extents for block in range(e.block, e.end)}
        assert len(kept & now) in (len(kept), len(kept) - 1)  # all but, perhaps, the last block
        assert body <= block_count(new.extents)
        assert store.get(old.uuid) == DATA[: 2 * MIB + 77]
        check_sound(store)

    def test_some_blocks_in_the_middle_of_an_extent(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        (extent,) = old.extents
        bad = [Extent(0, extent.block + 20, 3), Extent(0, extent.block + 100, 1)]
        new = move(store, old, bad)
        assert len(new.extents) > 4
        assert not any(a.block < b.end and b.block < a.end for a in new.extents for b in bad)
        assert store.get(old.uuid) == DATA[:MIB]
        check_sound(store)
        simulation.cut_power()
        store = simulation.open()
        assert store.get(old.uuid) == DATA[:MIB]
        check_sound(store)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("leaves", [0, 1])
    @pytest.mark.parametrize("is_full", [False, True], ids=["more room", "less room"])
    def test_copies_stay_on_devices_of_their_own(
        self, simulate: Callable[..., Simulation], size: int, leaves: int, is_full: bool
    ) -> None:
        """Whether there is more room on the one that is new, or on the one where a copy stays."""
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        old = upload(store, DATA[:size], declare=True)
        leaving, staying = (copy[0].device for copy in (old.copies if not leaves else old.copies[::-1]))
        (new_one,) = {0, 1, 2} - {leaving, staying}
        taken = store.allocator.place_on(1500, lambda device: device == new_one) if is_full else []
        new = move(store, old, on(old, leaving), avoid={leaving} if is_full else ())
        devices = [{extent.device for extent in copy} for copy in new.copies]
        assert devices[1 - leaves] == {staying}
        assert devices[leaves] == {new_one}
        assert store.get(old.uuid) == DATA[:size]
        store.allocator.release(taken)
        check_sound(store)
        simulation.cut_power()
        check_sound(simulation.open())

    def test_each_byte_stays_on_two_devices(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        old = upload(store, DATA[: 3 * MIB])  # of unknown size: the copies change their devices on the way
        assert all(len({extent.device for extent in copy}) > 1 for copy in old.copies)
        new = move(store, old, on(old, 0), avoid={0})
        assert 0 not in new.devices
        first, second = ([e.device for e in copy for _ in range(e.count)] for copy in new.copies)
        assert all(one != other for one, other in zip(first, second, strict=True))
        check_sound(store)

    def test_there_may_be_no_device_for_it(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        with pytest.raises(NoSpace, match="no device may take"):
            store.relocations.prepare(old, on(old, 0), avoid={0})
        run(store)
        check_sound(store)

    def test_metadata_of_any_length_moves_along(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = store.stat(store.put(DATA[:100], name="n" * 1000, **{"k" * 100: "v" * 7000}).uuid)
        new = move(store, old, old.extents)
        assert store.get(old.uuid) == DATA[:100]
        assert new.metadata == old.metadata
        check_sound(store)

    def test_again_and_again(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = upload(store, DATA[:MIB])
        for _ in range(30):
            record = move(store, record, record.extents)
        assert store.get(record.uuid) == DATA[:MIB]
        check_sound(store)


class TestDamage:
    def damaged(self, simulation: Simulation, record: Record, copy: int, block: int) -> None:
        device, first, _ = record.copies[copy][0]
        simulation.devices[device].write((first + block) * BLOCK + 7, [b"?"])

    def test_a_chunk_that_is_right_nowhere_stays_an_error(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        self.damaged(simulation, old, 0, 20)
        change = store.relocations.prepare(old, old.extents)
        assert change.source.damaged == [(65536, 131072)]
        new = stored(run(store, change)[0])
        settle(store)
        for _ in range(2):
            with pytest.raises(Damaged):
                store.read(new, 65536, 1)
            assert store.read(new, 0, 65536) == DATA[:65536]
            assert store.read(new, 131072, MIB - 131072) == DATA[131072:MIB]
            simulation.close()
            store = simulation.open()

    def test_copies_are_mended_from_one_another(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        self.damaged(simulation, old, 0, 20)
        self.damaged(simulation, old, 1, 100)
        change = store.relocations.prepare(old, old.extents)
        assert change.source.damaged == []
        stored(run(store, change)[0])
        settle(store)
        check_sound(store)

    def test_what_cannot_be_read_is_not_given_up_unasked(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        old = upload(store, DATA[: MIB + 5], declare=True)
        (device,) = old.devices
        simulation.devices[device].fail_reads = True
        with pytest.raises(DeviceError, match="fails"):
            store.relocations.prepare(old, old.extents, avoid={device})
        new = move(store, old, old.extents, avoid={device}, salvage=True)
        assert new.devices == {1 - device}
        with pytest.raises(Damaged):
            store.read(new, 0, 10)

    def test_a_device_that_is_removed_meanwhile(self, simulate: Callable[..., Simulation]) -> None:
        """Somebody else has moved the Object; who still copies what it had is told so, and nothing else breaks."""
        store = simulate(16 * MIB, 16 * MIB).open()
        old = upload(store, DATA, declare=True)
        (device,) = old.devices

        def remove(length: int) -> None:
            if device in store.blocks.slots:
                move(store, old, old.extents, avoid={device})
                remove_device(store, device)

        with pytest.raises(DeviceError, match="of the pool is missing"):
            store.relocations.prepare(old, old.extents, avoid={device}, pace=remove)
        settle(store)
        assert store.get(old.uuid) == DATA
        check_sound(store)

    def test_a_damaged_object_survives_a_crash_right_after_its_move(self, simulation: Simulation) -> None:
        store = simulation.open()
        old = upload(store, DATA[:MIB])
        self.damaged(simulation, old, 0, 20)
        simulation.devices[0].flush()
        stored(run(store, store.relocations.prepare(old, old.extents))[0])
        simulation.cut_power()
        store = simulation.open()
        assert store.read(store.stat(old.uuid), 0, 65536) == DATA[:65536]
        with pytest.raises(Damaged):
            store.read(store.stat(old.uuid), 65536, 1)
