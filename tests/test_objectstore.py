"""The ObjectStore on image files: what a user relies on when he stores, reads, replaces, lists and deletes Objects."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import rustord
from rustord.change import Change, Delete, Erase, Put
from rustord.errors import (
    Damaged,
    DeviceError,
    InvalidRequest,
    NoSpace,
    NotFound,
    PluginError,
    PreconditionFailed,
    ReadOnly,
    RustordError,
)
from rustord.extent import Extent, block_count
from rustord.keygen import HASHES, find_hash
from rustord.keystore.lmdb import LmdbBackend
from rustord.objectstore import ObjectStore
from rustord.placer import Contiguous, FirstFit, FreeView, Mirrored, Placer, Striped
from rustord.record import Metadata, Record
from rustord.upload import Upload
from rustord.volumes import Volumes
from tests.simulation import (
    MIB,
    Direct,
    Simulation,
    check_sound,
    free_blocks,
    free_count,
    live,
    run,
    stored,
    upload,
)

BLOCK = 4096
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 300, 65535, 65536, 65537, 131072, MIB, 3 * MIB + 12345]
DATA = random.Random(3).randbytes(6 * MIB)


@pytest.fixture
def store(simulation: Simulation) -> ObjectStore:
    return simulation.open()


def reopened(simulation: Simulation, **settings: Any) -> ObjectStore:
    simulation.close()
    return simulation.open(**settings)


class TestData:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("block_size", [BLOCK, 65536])
    def test_what_is_put_is_got(self, simulate: Callable[..., Simulation], size: int, block_size: int) -> None:
        simulation = simulate(32 * MIB, block_size=block_size)
        store = simulation.open()
        data = DATA[:size]
        uuids = [
            store.put(data).uuid,
            upload(store, data, declare=True).uuid,
            upload(store, data).uuid,
            upload(store, data, piece=max(size // 3, 1)).uuid,
        ]
        for _ in range(2):
            for uuid in uuids:
                record = store.stat(uuid)
                assert store.get(uuid) == data
                assert (record.size, record.algorithm) == (size, "xxh3-128")
                hasher = find_hash("xxh3-128")()
                hasher.update(data)
                assert record.digest == hasher.digest()
            check_sound(store)
            store = reopened(simulation)

    def test_the_five_lines_of_the_readme(self, simulation: Simulation) -> None:
        with rustord.open(simulation.paths[0], directory=simulation.index) as store:
            key = store.put(b"hello", name="greeting")
            assert store.get(key.uuid) == b"hello"
        with rustord.open([simulation.paths[0]], directory=simulation.index) as store:
            assert store.resolve("greeting") == key.uuid
            assert (key.size, str(key)) == (5, str(store.stat(key.uuid).key))

    def test_any_buffer_can_be_put(self, store: ObjectStore) -> None:
        for data in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
            assert store.get(store.put(data).uuid) == b"abc"

    @pytest.mark.parametrize("algorithm", HASHES)
    def test_the_hash_is_the_object_s_own(self, simulate: Callable[..., Simulation], algorithm: str) -> None:
        simulation = simulate(algorithm=algorithm)
        key = simulation.open().put(b"abc")
        hasher = find_hash(algorithm)()
        hasher.update(b"abc")
        assert (key.algorithm, key.digest) == (algorithm, hasher.digest())
        simulation.close()
        with rustord.open(simulation.paths[0], directory=simulation.index) as store:
            assert store.stat(key.uuid).key == key
            assert store.get(key.uuid) == b"abc"

    def test_metadata_comes_back(self, simulation: Simulation) -> None:
        store = simulation.open()
        key = store.put(b"x", name="päth/ü", content_type="text/plain; charset=utf-8", colour="blau", größe="xl")
        for _ in range(2):
            record = store.stat(key.uuid)
            attributes = {"colour": "blau", "größe": "xl"}
            assert record.metadata == Metadata("päth/ü", "text/plain; charset=utf-8", attributes)
            assert record.created_ns > 1_600_000_000_000_000_000
            store = reopened(simulation)

    def test_a_declared_size_that_is_wrong_leaves_nothing_behind(self, store: ObjectStore) -> None:
        before = free_blocks(store)
        put = Put(b"")
        intake = store.upload(put, 200_000)
        intake.write(DATA[:199_999])
        with pytest.raises(InvalidRequest, match="199999 bytes instead of the 200000"):
            stored(run(store, put)[0])
        intake = store.upload(Put(b""), 200_000)
        intake.write(DATA[:150_000])
        with pytest.raises(InvalidRequest, match="more data than the 200000 bytes"):
            intake.write(DATA[:50_001])
        intake.abort()
        run(store)
        assert free_blocks(store) == before
        check_sound(store)

    def test_aborting_an_upload_that_became_an_object_does_not_harm_it(self, store: ObjectStore) -> None:
        put = Put(b"")
        intake = store.upload(put, None)
        intake.write(DATA[:200_000])
        record = stored(run(store, put)[0])
        intake.abort()
        run(store)
        assert store.get(record.uuid) == DATA[:200_000]
        check_sound(store)

    def test_reading_at_once_and_by_range(self, store: ObjectStore) -> None:
        record = store.stat(store.put(DATA[:200_000]).uuid)
        for start, end in ((0, 200_000), (0, 0), (1, 2), (65535, 65537), (131_000, 199_999), (200_000, 200_000)):
            assert store.read(record, start, end - start) == DATA[start:end]
            now = store.read_now(record, start, end - start)
            assert now is not None
            assert now == DATA[start:end]


class TestNames:
    @pytest.mark.parametrize(
        "name", ["a", "a/b/c", "../..", "/", ".", "日本語", "🦀" * 256, "x" * 1024, "p" * 480 + "1", "p" * 480 + "2"]
    )
    def test_any_name(self, simulation: Simulation, name: str) -> None:
        store = simulation.open()
        other = store.put(b"other", name=name[:-1] + "~")
        key = store.put(b"data", name=name)
        for _ in range(2):
            assert store.resolve(name) == key.uuid
            assert store.resolve(name[:-1] + "~") == other.uuid
            assert {found for found, _ in store.names()} == {name, name[:-1] + "~"}
            store = reopened(simulation)

    @pytest.mark.parametrize("name", ["a\0", "new\nline", "x" * 1025, "\udc80"])
    def test_names_that_are_refused(self, store: ObjectStore, name: str) -> None:
        with pytest.raises(InvalidRequest):
            store.put(b"", name=name)
        assert live(store) == []

    def test_a_taken_name_is_replaced(self, simulation: Simulation) -> None:
        store = simulation.open()
        before = free_count(store)
        put = Put(DATA[:9000], Metadata("name"))
        old = stored(run(store, put)[0])
        assert not put.replaced
        again = Put(b"new", Metadata("name"))
        new = stored(run(store, again)[0])
        assert again.replaced
        for _ in range(2):
            assert store.resolve("name") == new.uuid
            assert [record.uuid for record in live(store)] == [new.uuid]
            with pytest.raises(NotFound):
                store.get(old.uuid)
            assert free_count(store) == before - 1
            check_sound(store)
            store = reopened(simulation)
        assert simulation.read(0, old.extents[0].block, 3)[BLOCK:] == bytes(2 * BLOCK)

    def test_several_of_one_name_in_one_cycle_take_turns(self, store: ObjectStore) -> None:
        puts = [Put(bytes([number]), Metadata("name")) for number in range(5)]
        records = [stored(outcome) for outcome in run(store, *puts)]
        assert [put.replaced for put in puts] == [False, True, True, True, True]
        assert [record.uuid for record in live(store)] == [records[-1].uuid]
        assert store.get(records[-1].uuid) == b"\4"
        check_sound(store)

    def test_a_name_whose_object_is_deleted_in_the_same_cycle(self, store: ObjectStore) -> None:
        old = store.put(b"old", name="name")
        put = Put(b"new", Metadata("name"))
        gone, new, again = run(store, Delete(old.uuid), put, Delete(old.uuid))
        assert stored(gone).uuid == old.uuid
        assert isinstance(again, NotFound)
        assert store.resolve("name") == stored(new).uuid
        assert not put.replaced
        check_sound(store)

    def test_a_name_that_may_not_be_replaced(self, store: ObjectStore) -> None:
        first, second = run(store, *(Put(b"x", Metadata("name"), if_none_match=True) for _ in range(2)))
        assert store.resolve("name") == stored(first).uuid
        assert isinstance(second, PreconditionFailed)
        with pytest.raises(PreconditionFailed, match="is taken by Object"):
            store.upload(Put(b"", Metadata("name"), if_none_match=True), None)
        check_sound(store)

    def test_only_what_matches_is_changed(self, store: ObjectStore) -> None:
        key = store.put(b"old", name="name")
        tag = store.stat(key.uuid).etag
        with pytest.raises(PreconditionFailed):
            stored(run(store, Put(b"new", Metadata("name"), if_match=["xxh3-128:00"]))[0])
        with pytest.raises(PreconditionFailed):
            stored(run(store, Put(b"new", Metadata("other"), if_match=["*"]))[0])
        with pytest.raises(PreconditionFailed):
            stored(run(store, Delete(key.uuid, if_match=["xxh3-128:00"]))[0])
        new = stored(run(store, Put(b"new", Metadata("name"), if_match=[tag]))[0])
        assert isinstance(run(store, Put(b"newer", Metadata("name"), if_match=[tag]))[0], PreconditionFailed)
        stored(run(store, Delete(new.uuid, if_match=["*"]))[0])
        assert live(store) == []
        check_sound(store)

    def test_an_upload_is_checked_again_when_it_is_complete(self, store: ObjectStore) -> None:
        before = free_count(store)
        put = Put(b"", Metadata("name"), if_none_match=True)
        intake = store.upload(put, None)
        intake.write(DATA[:300_000])
        store.put(b"was quicker", name="name")
        assert isinstance(run(store, put)[0], PreconditionFailed)
        assert free_count(store) == before - 1
        check_sound(store)


class TestDelete:
    def test_a_deleted_object_is_gone_and_its_blocks_are_zero(self, simulation: Simulation) -> None:
        store = simulation.open()
        before = free_blocks(store)
        records = [store.stat(store.put(DATA[:size], name=f"name{size}").uuid) for size in SIZES]
        records += [upload(store, DATA[:size], Put(b"", Metadata(f"more{size}"))) for size in SIZES]
        for record in records:
            store.delete(record.uuid)
            with pytest.raises(NotFound):
                store.get(record.uuid)
            assert store.resolve(record.name) is None
            for device, block, count in record.extents:
                assert simulation.read(device, block, count) == bytes(count * BLOCK)
        assert free_blocks(store) == before
        assert live(reopened(simulation)) == []

    def test_twice(self, store: ObjectStore) -> None:
        key = store.put(b"x")
        once, twice = run(store, Delete(key.uuid), Delete(key.uuid))
        assert stored(once).uuid == key.uuid
        assert isinstance(twice, NotFound)
        with pytest.raises(NotFound, match=str(key)):
            store.delete(key.uuid)

    def test_it_is_gone_when_its_tombstone_is_durable_and_answered_when_its_blocks_are_zero(
        self, simulation: Simulation
    ) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:BLOCK]).uuid)
        free = free_count(store)
        delete = Delete(record.uuid)
        first = store.cycle([delete])
        assert first.outcomes == []
        with pytest.raises(NotFound):
            store.stat(record.uuid)
        assert free_count(store) == free
        assert simulation.read(0, record.extents[0].block, 1) == DATA[:BLOCK]
        second = store.cycle(first.following)
        assert [(done, stored(outcome).uuid) for done, outcome in second.outcomes] == [(delete, record.uuid)]
        assert simulation.read(0, record.extents[0].block, 2) == bytes(2 * BLOCK)
        assert free_count(store) == free + 2
        assert second.following == []

    def test_a_reader_of_what_is_deleted_is_told_so(self, store: ObjectStore) -> None:
        record = store.stat(store.put(DATA[:BLOCK]).uuid)
        store.delete(record.uuid)
        with pytest.raises(NotFound):
            store.read(record, 0, record.size)
        assert store.read_now(record, 0, record.size) is None


class TestFull:
    def test_a_full_pool_refuses_and_takes_again(self, simulation: Simulation) -> None:
        store = simulation.open()
        before = free_blocks(store)
        keys = [store.put(DATA[:500_000]) for _ in range(free_count(store) // 124)]
        with pytest.raises(NoSpace, match="no room"):
            store.put(DATA[:500_000])
        small = []
        while free_count(store):
            small.append(store.put(b"x"))
        with pytest.raises(NoSpace):
            store.put(b"")
        with pytest.raises(NoSpace):
            store.upload(Put(b""), 1)
        check_sound(store)
        for key in [*keys[1:], *small]:
            store.delete(key.uuid)
        assert store.get(store.put(DATA[:500_000]).uuid) == DATA[:500_000]
        store.delete(keys[0].uuid)
        for record in live(store):
            store.delete(record.uuid)
        assert free_blocks(reopened(simulation)) == before

    @pytest.mark.parametrize("declare", [True, False], ids=["known size", "unknown size"])
    def test_an_upload_that_does_not_fit_leaves_nothing_behind(self, simulation: Simulation, declare: bool) -> None:
        store = simulation.open()
        filler = store.put(DATA[: 5 * MIB])
        before = free_blocks(store)
        with pytest.raises(NoSpace):
            upload(store, DATA, declare=declare)
        assert free_blocks(store) == before
        for block, count in before[0]:
            assert not any(simulation.read(0, block, count))
        assert store.get(filler.uuid) == DATA[: 5 * MIB]
        check_sound(store)

    def test_a_known_size_is_refused_before_any_data(self, store: ObjectStore) -> None:
        with pytest.raises(NoSpace):
            store.upload(Put(b""), 1 << 40)

    @pytest.mark.parametrize("placer", [Contiguous(), FirstFit(), Striped(4)], ids=lambda placer: placer.name)
    @pytest.mark.parametrize("how", ["at once", "known size", "unknown size"])
    def test_whatever_the_fragmentation_what_is_free_can_be_used(
        self, simulate: Callable[..., Simulation], placer: Placer, how: str
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=FirstFit())
        store = simulation.open()
        puts = [Put(b"x") for _ in range(free_count(store))]
        records = [stored(outcome) for outcome in run(store, *puts)]
        assert free_count(store) == 0
        run(store, *(Delete(record.uuid) for record in records[::2]))
        simulation.placer = placer
        store = reopened(simulation)
        free = free_count(store)
        runs = sum(map(len, free_blocks(store).values()))
        assert runs > free - 10  # single blocks, nearly all
        # The Record has 16 bytes for each extent, so its footer takes some of the blocks.
        data_blocks = next(count for count in range(free, 0, -1) if count + -(-(count * 17 + 20_000) // 3900) <= free)
        data = random.Random(1).randbytes(data_blocks * BLOCK)
        if how == "at once":
            record = store.stat(store.put(data).uuid)
        else:
            record = upload(store, data, declare=how == "known size")
        assert free_count(store) < 20
        assert store.get(record.uuid) == data
        check_sound(store)
        simulation.cut_power()
        store = simulation.open()
        assert store.get(record.uuid) == data
        store.delete(record.uuid)
        assert free_count(store) == free
        check_sound(store)

    def test_a_name_has_what_was_put_last_though_the_journal_takes_no_more_at_once(self, store: ObjectStore) -> None:
        records = [stored(outcome) for outcome in run(store, *(Put(b"x") for _ in range(free_count(store))))]
        run(store, *(Delete(record.uuid) for record in records[::2]))
        store.keystore.batch_bytes_max = 1 << 14
        scattered = [Put(DATA[: 300 * BLOCK]) for _ in range(2)]  # in 300 extents each: more than was to be expected
        outcomes = run(store, *scattered, Put(b"first", Metadata("name")), Put(b"last", Metadata("name")))
        first, last = map(stored, outcomes[2:])
        assert first.sequence < last.sequence
        assert store.resolve("name") == last.uuid
        check_sound(store)

    def test_delete_works_when_nothing_is_free(self, store: ObjectStore) -> None:
        keys = [stored(outcome).key for outcome in run(store, *(Put(b"x") for _ in range(free_count(store))))]
        assert free_count(store) == 0
        store.delete(keys[17].uuid)
        assert free_count(store) == 1
        store.put(b"y")
        check_sound(store)


class TestListing:
    def test_objects_by_uuid_and_names_by_name(self, store: ObjectStore, seed: int) -> None:
        chance = random.Random(seed)
        keys = {f"{chance.randrange(10**6)}/{number}": store.put(b"", name="") for number in range(3)}
        keys = {name: store.put(name.encode(), name=name) for name in keys}
        store.keystore.checkpoint()
        for number in range(20):
            keys[f"b/{number:02}"] = store.put(b"", name=f"b/{number:02}")
        assert [record.uuid for record in live(store)] == sorted(record.uuid for record in live(store))
        assert len(live(store)) == 26
        assert [name for name, _ in store.names("b/", "b/07", 5)] == [f"b/{number:02}" for number in range(8, 13)]
        assert dict(store.names()) == {name: key.uuid for name, key in keys.items()}
        assert store.names("c") == []


LAYOUTS = [Contiguous(), FirstFit(), Striped(1), Striped(16), Mirrored(2)]


class TestLayouts:
    @pytest.mark.parametrize("placer", LAYOUTS, ids=lambda placer: f"{placer.name}{getattr(placer, 'unit_blocks', '')}")
    @pytest.mark.parametrize("devices", [2, 4])
    def test_every_layout_over_several_devices(
        self, simulate: Callable[..., Simulation], placer: Placer, devices: int
    ) -> None:
        simulation = simulate(*(16 * MIB + number * 2 * MIB for number in range(devices)), placer=placer)
        store = simulation.open()
        before = free_blocks(store)
        objects = {}
        for size in SIZES[:-1]:
            objects[store.put(DATA[:size]).uuid] = DATA[:size]
            objects[upload(store, DATA[:size]).uuid] = DATA[:size]
        for _ in range(2):
            check_sound(store)
            for uuid, data in objects.items():
                assert store.get(uuid) == data
                assert store.stat(uuid).manifest.layout == placer.name
                assert len(store.stat(uuid).copies) == placer.copies
            simulation.cut_power()
            store = simulation.open()
        for uuid in objects:
            store.delete(uuid)
        assert free_blocks(store) == before

    def test_mirrored_copies_are_on_distinct_devices(self, simulate: Callable[..., Simulation]) -> None:
        store = simulate(16 * MIB, 16 * MIB, 16 * MIB, placer=Mirrored(3)).open()
        record = store.stat(store.put(DATA[:100_000]).uuid)
        assert sorted(extent.device for copy in record.copies for extent in copy) == [0, 1, 2]

    @pytest.mark.parametrize("devices", [2, 3])
    def test_a_mirrored_pool_with_one_device_detached_returns_everything(
        self, simulate: Callable[..., Simulation], devices: int
    ) -> None:
        simulation = simulate(*[32 * MIB] * devices, placer=Mirrored(2))
        store = simulation.open()
        objects = {store.put(DATA[:size]).uuid: DATA[:size] for size in SIZES}
        # Uploads of unknown size beside others, so that the emptiest device is now this one and now that.
        put = Put(b"")
        intake = store.upload(put, None)
        for at in range(0, len(DATA), 700_000):
            intake.write(DATA[at : at + 700_000])
            objects[store.put(DATA[at : at + 500_000]).uuid] = DATA[at : at + 500_000]
        objects[stored(run(store, put)[0]).uuid] = DATA
        simulation.close()
        for gone in range(devices):
            store = simulation.open(without=[gone])
            for uuid, data in objects.items():
                assert store.get(uuid) == data
            with pytest.raises(DeviceError, match="missing"):
                store.delete(next(uuid for uuid in objects if gone in store.stat(uuid).devices))
            simulation.close()
        check_sound(simulation.open())

    def test_without_its_device_an_object_is_an_error_and_the_others_are_not(
        self, simulate: Callable[..., Simulation]
    ) -> None:
        simulation = simulate(16 * MIB, 16 * MIB)
        store = simulation.open()
        keys = [store.put(DATA[:1_000_000]) for _ in range(4)]
        on_first = {key.uuid for key in keys if store.stat(key.uuid).devices == {0}}
        assert len(on_first) == 2
        store = reopened(simulation, without=[0])
        for key in keys:
            if key.uuid in on_first:
                with pytest.raises(DeviceError, match=r"device 0 .* is missing"):
                    store.get(key.uuid)
                assert store.read_now(store.stat(key.uuid), 0, 10) is None
            else:
                assert store.get(key.uuid) == DATA[:1_000_000]
        new = store.put(b"there is still a device")
        assert store.stat(new.uuid).devices == {1}
        store = reopened(simulation)
        assert len(live(store)) == 5
        check_sound(store)

    @pytest.mark.root
    def test_loop_devices(self, make_loop: Callable[..., Path], disk_path: Path) -> None:
        devices = [make_loop(16 * MIB), make_loop(16 * MIB, sector_size=4096)]
        simulation = Simulation(disk_path, devices, placer=Mirrored(2))
        store = simulation.open()
        keys = {size: store.put(DATA[:size], name=str(size)) for size in SIZES}
        keys[-1] = upload(store, DATA[: 2 * MIB]).key
        store.delete(keys[BLOCK].uuid)
        check_sound(store)
        simulation.cut_power()
        store = simulation.open()
        assert store.get(keys[MIB].uuid) == DATA[:MIB]
        check_sound(store)
        simulation.close()


class TestDamage:
    def test_every_flipped_byte_of_the_only_copy_is_noticed(self, simulation: Simulation, seed: int) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:70_000]).uuid)
        start = record.extents[0].block * BLOCK
        chance = random.Random(seed)
        with simulation.paths[0].open("r+b", buffering=0) as image:
            for at in [0, 65535, 65536, 69_999, *(chance.randrange(70_000) for _ in range(40))]:
                image.seek(start + at)
                image.write(bytes([DATA[at] ^ 0x20]))
                with pytest.raises(Damaged, match=str(record.key)):
                    store.get(record.uuid)
                image.seek(start + at)
                image.write(DATA[at : at + 1])
        assert store.get(record.uuid) == DATA[:70_000]

    def test_a_damaged_copy_gives_way_to_the_other(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        keys = [store.put(DATA[:100_000]) for _ in range(4)]
        for device in (0, 1):
            with simulation.paths[device].open("r+b") as image:
                for key in keys[2 * device : 2 * device + 2]:
                    extent = next(extent for extent in store.stat(key.uuid).extents if extent.device == device)
                    image.seek(extent.block * BLOCK)
                    image.write(bytes(100_000))
        for key in keys:
            assert store.get(key.uuid) == DATA[:100_000]


class Scripted:
    """A Placer that answers as it is told, and as `Contiguous` otherwise."""

    name = "scripted"
    copies = 1

    def __init__(self) -> None:
        self.answer: Callable[[int, FreeView], Any] | None = None

    def place(self, count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        placed: Sequence[Sequence[Extent]]
        placed = Contiguous().place(count, free) if self.answer is None else self.answer(count, free)
        return placed


def fail(count: int, free: FreeView) -> Any:
    raise ZeroDivisionError


HOSTILE: dict[str, Callable[[int, FreeView], Any]] = {
    "blocks of another Object": lambda count, free: [[Extent(0, 1280, count)]],
    "an overlap": lambda count, free: [[Extent(0, 1300, count), Extent(0, 1300, count)]],
    "the label": lambda count, free: [[Extent(0, 0, count)]],
    "behind the end": lambda count, free: [[Extent(0, 4096 - count + 1, count)]],
    "too few": lambda count, free: [[Extent(0, 1300, count - 1)]],
    "an error": fail,
}


class TestHostilePlacer:
    @pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
    def test_it_fails_its_own_puts_only(
        self, simulate: Callable[..., Simulation], answer: Callable[[int, FreeView], Any]
    ) -> None:
        placer = Scripted()
        store = simulate(placer=placer).open()
        key = store.put(DATA[:20_000])
        before = free_blocks(store)
        placer.answer = answer
        with pytest.raises(PluginError, match="'scripted'"):
            store.put(DATA[:20_000])
        with pytest.raises(PluginError):
            upload(store, DATA[:200_000], declare=True)
        with pytest.raises(PluginError):
            upload(store, DATA[:200_000])
        assert free_blocks(store) == before
        placer.answer = None
        store.put(DATA[:20_000])
        assert store.get(key.uuid) == DATA[:20_000]
        check_sound(store)


class TestCycles:
    def test_one_flush_for_all(self, simulation: Simulation) -> None:
        store = simulation.open()
        flushes = simulation.devices[0].flush_count
        outcomes = store.cycle([Put(bytes([number])) for number in range(200)]).outcomes
        assert len(outcomes) == 200
        assert simulation.devices[0].flush_count == flushes + 1
        check_sound(store)

    def test_more_than_the_journal_takes_follows_in_the_next_cycle(self, store: ObjectStore) -> None:
        metadata = Metadata(attributes={"key": "x" * 8000})
        puts = [Put(b"", metadata) for _ in range(300)]
        cycle = store.cycle(puts)
        assert 100 < len(cycle.outcomes) < 300
        assert len(cycle.outcomes) + len(cycle.following) == 300
        rest = run(store, *cycle.following)
        assert all(isinstance(outcome, Record) for outcome in rest)
        assert len(live(store)) == 300
        check_sound(store)

    def test_records_that_scattered_room_makes_longer_than_expected_follow_as_well(
        self, simulation: Simulation
    ) -> None:
        store = simulation.open()
        keys = [store.put(b"x") for _ in range(2000)]
        store.put(DATA[: (free_count(store) - 10) * BLOCK])
        run(store, *[Delete(key.uuid) for key in keys[::2]])
        before = free_blocks(store)
        most = store.keystore.batch_bytes_max = 8000
        puts = [Put(DATA[:290_000]) for _ in range(12)]  # of 70 extents each, which nobody knows before they are placed
        left: Sequence[Change] = puts
        objects: list[Record] = []
        while left:
            cycle = store.cycle(left)
            records = [stored(outcome) for _, outcome in cycle.outcomes]
            assert 0 < sum(len(record.raw) for record in records) < most
            objects += records
            left = cycle.following
        assert len(objects) == len(puts)
        assert len(objects[0].extents) > 60
        check_sound(store)
        simulation.cut_power()
        store = simulation.open()
        for record in objects:
            assert store.get(record.uuid) == DATA[:290_000]
            store.delete(record.uuid)
        assert free_blocks(store) == before

    def test_an_error_concerns_one_change(self, store: ObjectStore) -> None:
        kept = store.put(b"kept", name="kept")
        changes: list[Change] = [
            Put(b"a"),
            Put(b"b", Metadata("kept"), if_none_match=True),
            Delete(bytes(16)),
            Put(DATA * 10),
            Put(b"c"),
            Delete(kept.uuid, if_match=["no"]),
        ]
        outcomes = run(store, *changes)
        kinds = [Record, PreconditionFailed, NotFound, NoSpace, Record, PreconditionFailed]
        assert list(map(type, outcomes)) == kinds
        assert len(live(store)) == 3
        check_sound(store)

    def test_a_read_only_pool_says_why(self, store: ObjectStore) -> None:
        key = store.put(b"x")
        store.read_only = "it is full moon"
        for change in (Put(b""), Delete(key.uuid)):
            with pytest.raises(ReadOnly, match="full moon"):
                stored(run(store, change)[0])
        with pytest.raises(ReadOnly):
            store.upload(Put(b""), None)
        assert store.get(key.uuid) == b"x"

    def test_the_phases_are_timed(self, store: ObjectStore) -> None:
        store.put(b"x")
        assert list(store.phase_s) == ["place", "write", "journal", "flush", "settle"]
        assert {sum(times.counts) for times in store.phase_s.values()} == {1}

    def test_a_long_erasure_may_be_done_beside_the_cycles(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:BLOCK]).uuid)
        delete = Delete(record.uuid)
        (erase,) = store.cycle([delete]).following
        assert isinstance(erase, Erase)
        store.erase(erase)
        assert erase.erased
        assert store.cycle([]).outcomes == []
        ((done, outcome),) = store.cycle([erase]).outcomes
        assert done is delete
        assert isinstance(outcome, Record)
        check_sound(store)


class TestFailingDevices:
    """A device that fails takes no more writes; its unacknowledged changes fail, and everything else goes on."""

    @pytest.fixture
    def two(self, simulate: Callable[..., Simulation]) -> Simulation:
        return simulate(16 * MIB, 16 * MIB)

    @pytest.mark.parametrize("what", ["flush", "write"])
    def test_one_of_two(self, two: Simulation, what: str) -> None:
        store = two.open()
        keys = [store.put(DATA[:1_000_000]) for _ in range(4)]
        doomed = two.devices[0]
        doomed.fail_flushes, doomed.fail_writes = what == "flush", what == "write"
        doomed.strict = False
        outcomes = run(store, *(Put(DATA[:1000]) for _ in range(20)))
        failed = [outcome for outcome in outcomes if isinstance(outcome, RustordError)]
        assert failed
        assert all(isinstance(outcome, DeviceError) for outcome in failed)
        doomed.fail_writes = False
        new = [store.put(DATA[:1000]) for _ in range(20)]
        assert {device for key in new for device in store.stat(key.uuid).devices} == {1}
        assert "as it was told to" in store.blocks.slots[0].reason
        for key in keys:
            assert store.get(key.uuid) == DATA[:1_000_000]
        on_failed = next(key for key in keys if store.stat(key.uuid).devices == {0})
        with pytest.raises(DeviceError, match="takes no writes"):
            store.delete(on_failed.uuid)
        assert store.get(on_failed.uuid) == DATA[:1_000_000]
        stored_now = {record.uuid for record in live(store)}
        two.cut_power()
        store = two.open()
        assert stored_now <= {record.uuid for record in live(store)}
        check_sound(store)

    def test_a_journal_that_is_full_does_not_keep_what_is_deleted_from_being_free(
        self, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = simulation.open()
        key = store.put(DATA)
        free = free_count(store)
        delete = Delete(key.uuid)
        (erase,) = store.cycle([delete]).following
        put = Put(b"new")

        def refuse(*arguments: object) -> None:
            raise NoSpace("no space left for the index")

        with monkeypatch.context() as patch:
            patch.setattr(store.keystore, "_append", refuse)
            cycle = store.cycle([put, erase])
        outcomes = dict(cycle.outcomes)
        assert isinstance(outcomes[put], NoSpace)
        assert stored(outcomes[delete]).uuid == key.uuid
        while cycle.following:
            cycle = store.cycle(cycle.following)
        assert free_count(store) == free + block_count(stored(outcomes[delete]).extents)
        check_sound(store)

    def test_a_flush_is_never_retried_into_success(self, simulation: Simulation) -> None:
        store = simulation.open()
        simulation.devices[0].strict = False  # the second flush would succeed
        simulation.devices[0].fail_flushes = 1
        put = Put(b"x")
        assert isinstance(run(store, put)[0], DeviceError)
        for change in (Put(b"y"), Put(b"z")):
            assert isinstance(run(store, change)[0], RustordError)
        assert live(store) == []
        simulation.cut_power()
        store = simulation.open()
        assert live(store) == []
        check_sound(store)
        store.put(b"a new start")

    def test_an_upload_to_a_device_that_fails(self, simulation: Simulation) -> None:
        store = simulation.open()
        intake = store.upload(Put(b""), None)
        intake.write(DATA[:100_000])
        simulation.devices[0].fail_writes = True
        with pytest.raises(DeviceError):
            intake.write(DATA[:100_000])
        intake.abort()
        run(store)
        simulation.cut_power()
        check_sound(simulation.open())

    def test_what_is_deleted_while_its_device_fails_is_erased_at_the_next_start(self, simulation: Simulation) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:9000]).uuid)
        delete = Delete(record.uuid)
        first = store.cycle([delete])
        free = free_blocks(store)
        simulation.devices[0].fail_flushes = 1
        ((done, outcome),) = store.cycle(first.following).outcomes
        assert done is delete
        assert isinstance(outcome, DeviceError)
        assert free_blocks(store) == free
        with pytest.raises(NotFound):
            store.get(record.uuid)
        simulation.cut_power()
        store = simulation.open()
        assert live(store) == []
        assert simulation.read(0, record.extents[0].block, 3) == bytes(3 * BLOCK)
        check_sound(store)

    @pytest.mark.parametrize("reached", [False, True])
    def test_a_deletion_that_fails_counts_and_goes_on_to_count(self, simulation: Simulation, *, reached: bool) -> None:
        store = simulation.open()
        record = store.stat(store.put(DATA[:9000], name="name").uuid)
        simulation.devices[0].strict = False
        simulation.devices[0].fail_flushes = 1
        assert isinstance(run(store, Delete(record.uuid))[0], DeviceError)
        assert live(store) == []
        assert store.stock.count == 0
        store.keystore.checkpoint()
        simulation.cut_power(lambda offset: reached)
        store = simulation.open()
        assert (live(store), store.resolve("name")) == ([], None)
        assert simulation.read(0, record.extents[0].block, 3) == bytes(3 * BLOCK)
        check_sound(store)
        simulation.close()
        assert simulation.audit() == []

    def test_a_deletion_that_no_journal_has_does_not_count(
        self, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = simulation.open()
        key = store.put(DATA[:9000])

        def refuse(*arguments: object) -> None:
            raise DeviceError("the index cannot be reached")

        with monkeypatch.context() as patch:
            patch.setattr(store.keystore, "_append", refuse)
            assert isinstance(run(store, Delete(key.uuid))[0], DeviceError)
        assert store.get(key.uuid) == DATA[:9000]
        store.delete(key.uuid)
        check_sound(store)

    def test_a_failed_replacement_leaves_the_old_object_in_its_place(self, simulate: Callable[..., Simulation]) -> None:
        simulation = simulate(16 * MIB, 16 * MIB, placer=Mirrored(2))
        store = simulation.open()
        old = store.put(b"old", name="name")
        simulation.devices[1].fail_flushes = 1
        with pytest.raises(DeviceError):
            store.put(b"new", name="name")
        for lose_index in (False, False, True):
            assert store.resolve("name") == old.uuid
            assert store.get(old.uuid) == b"old"
            assert len(live(store)) == 1
            simulation.cut_power()
            if lose_index:
                simulation.lose_index()
            store = simulation.open()
        check_sound(store)

    def test_a_device_that_failed_does_not_fill_the_journals_of_the_others(self, two: Simulation) -> None:
        store = two.open()
        two.devices[0].fail_flushes = 1
        assert isinstance(run(store, *(Put(b"x") for _ in range(10)))[0], DeviceError)
        for _ in range(700):
            store.delete(store.put(b"x").uuid)
        two.cut_power()
        check_sound(two.open())


class Remote(LmdbBackend):
    """An index on a server that may be away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False

    def _check(self) -> None:
        if self.away:
            raise DeviceError("the index cannot be reached")

    def get(self, key: bytes) -> bytes | None:
        self._check()
        return super().get(key)

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._check()
        yield from super().scan(first, end)


def finish(store: ObjectStore, following: Sequence[Change]) -> None:
    while following:
        following = store.cycle(following).following
    store.keystore.checkpoint()
    run(store)


class TestIndexThatIsAway:
    """What is durable is learnt, and nothing is changed of which it cannot be told what it means."""

    @pytest.fixture
    def backend(self) -> Remote:
        return Remote()

    @pytest.fixture
    def remote(self, simulate: Callable[..., Simulation], backend: Remote) -> Simulation:
        return simulate(16 * MIB, backend=lambda: backend)

    @pytest.fixture
    def gone_when(
        self, remote: Simulation, backend: Remote, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[object, str], None]:
        """Has it go when a method is called next."""

        def gone_when(what: object, name: str) -> None:
            before = getattr(what, name)

            def call(*arguments: Any) -> Any:
                monkeypatch.setattr(what, name, before)
                backend.away = True
                return before(*arguments)

            monkeypatch.setattr(what, name, call)

        return gone_when

    def test_since_a_cycle_was_journalled(
        self, remote: Simulation, backend: Remote, gone_when: Callable[[object, str], None]
    ) -> None:
        store = remote.open()
        one, two, three = (store.put(DATA[:size], name=f"name {size}").uuid for size in (1, 2, 3))
        move = store.relocations.prepare(store.stat(three), store.stat(three).extents)
        store.keystore.checkpoint()
        gone_when(store.blocks, "flush")
        changes = (Delete(one), Put(b"new", Metadata("name 2")), move)
        cycle = store.cycle(changes)
        outcomes = dict(cycle.outcomes)
        assert {stored(outcomes[change]).name for change in changes[1:]} == {"name 2", "name 3"}
        backend.away = False
        finish(store, cycle.following)
        for _ in range(2):
            assert [name for name, _ in store.names()] == ["name 2", "name 3"]
            assert store.resolve("name 2") != two
            check_sound(store)
            store = reopened(remote)

    def test_since_a_cycle_was_begun(
        self, remote: Simulation, backend: Remote, gone_when: Callable[[object, str], None]
    ) -> None:
        store = remote.open()
        keys = [store.put(DATA[:size], name=f"name {size}").uuid for size in (1, 2)]
        store.keystore.checkpoint()
        gone_when(store.keystore, "journal")
        changes = (Delete(keys[0]), Put(b"new", Metadata("name 2")))
        cycle = store.cycle(changes)
        assert all(isinstance(outcome, DeviceError) for _, outcome in cycle.outcomes)
        backend.away = False
        finish(store, cycle.following)
        for _ in range(2):
            assert [store.resolve(f"name {size}") for size in (1, 2)] == keys
            check_sound(store)
            store = reopened(remote)

    def test_since_a_flush_of_a_volume_was_journalled(
        self, remote: Simulation, backend: Remote, gone_when: Callable[[object, str], None]
    ) -> None:
        store = remote.open()
        volumes = Volumes(store, Direct(store))
        volumes.create("disk", MIB)
        volume = volumes.open("disk")
        volume.write(0, memoryview(DATA[:65536]))
        volume.flush()
        store.keystore.checkpoint()
        volume.write(65536, memoryview(DATA[:65536]))
        gone_when(store.keystore, "_append_all")
        volume.flush()
        backend.away = False
        remote.cut_power()
        store = remote.open()
        read = memoryview(bytearray(131072))
        Volumes(store, Direct(store)).open("disk").read(0, read)
        assert read == 2 * DATA[:65536]
        check_sound(store)

    def test_when_a_deleted_object_leaves_a_layer(
        self, remote: Simulation, backend: Remote, gone_when: Callable[[object, str], None]
    ) -> None:
        store = remote.open()
        free = free_count(store)
        volumes = Volumes(store, Direct(store))
        volumes.create("disk", MIB)
        volume = volumes.open("disk")
        volume.write(0, memoryview(DATA[:65536]))
        volume.close()
        record = volumes.freeze("disk")
        store.keystore.checkpoint()
        other, put = Delete(store.put(b"other").uuid), Put(b"beside")
        delete = Delete(record.uuid)
        following = store.cycle([delete]).following
        gone_when(store.keystore, "retire")
        outcomes = dict(store.cycle([*following, put]).outcomes)
        assert isinstance(outcomes[delete], DeviceError)
        backend.away = False
        stored(outcomes[put])
        stored(run(store, other, Delete(stored(outcomes[put]).uuid))[0])
        remote.close()
        store = remote.open()
        assert (live(store), free_count(store)) == ([], free)
        check_sound(store)


class Life(RuleBasedStateMachine):
    """Whatever is done in whatever order, with crashes in between: the store holds what a dictionary would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-")
        self.objects: dict[bytes, tuple[bytes, str]] = {}
        self.intakes: list[tuple[Upload, Put, bytearray]] = []

    @initialize(placer=st.sampled_from([Contiguous(), Striped(8), Mirrored(2), FirstFit()]))
    def begin(self, placer: Placer) -> None:
        self.simulation = Simulation(Path(self.directory.name), (16 * MIB, 18 * MIB), placer=placer)
        self.store = self.simulation.open()
        self.free = free_blocks(self.store)

    def learn(self, outcome: Record | RustordError, data: bytes, name: str) -> None:
        if isinstance(outcome, NoSpace):
            return
        record = stored(outcome)
        for uuid, (_, taken) in list(self.objects.items()):
            if name and taken == name:
                del self.objects[uuid]
        self.objects[record.uuid] = (data, name)

    @rule(puts=st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from(["", "", "a", "b", "c"])), max_size=6))
    def put(self, puts: list[tuple[int, str]]) -> None:
        changes = [Put(DATA[size : 2 * size], Metadata(name)) for size, name in puts]
        for change, outcome, (size, name) in zip(changes, run(self.store, *changes), puts, strict=True):
            assert change.source == DATA[size : 2 * size]
            self.learn(outcome, DATA[size : 2 * size], name)

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        uuids = data.draw(st.lists(st.sampled_from(sorted(self.objects)), min_size=1, max_size=4, unique=True))
        for outcome in run(self.store, *map(Delete, uuids)):
            del self.objects[stored(outcome).uuid]

    @rule(name=st.sampled_from(["", "a", "d"]), size=st.none() | st.integers(0, 2_000_000))
    def begin_upload(self, name: str, size: int | None) -> None:
        put = Put(b"", Metadata(name))
        with suppress(NoSpace):
            self.intakes.append((self.store.upload(put, size), put, bytearray()))

    @precondition(lambda self: self.intakes)
    @rule(data=st.data(), length=st.integers(0, 700_000))
    def upload_more(self, data: st.DataObject, length: int) -> None:
        intake, _, taken = number = data.draw(st.sampled_from(self.intakes))
        more = DATA[len(taken) : len(taken) + length]
        try:
            intake.write(more)
            taken += more
        except (NoSpace, InvalidRequest):
            intake.abort()
            self.intakes.remove(number)

    @precondition(lambda self: self.intakes)
    @rule(data=st.data(), abort=st.booleans())
    def end_upload(self, data: st.DataObject, abort: bool) -> None:
        intake, put, taken = self.intakes.pop(data.draw(st.integers(0, len(self.intakes) - 1)))
        if abort:
            intake.abort()
        else:
            outcome = run(self.store, put)[0]
            if isinstance(outcome, InvalidRequest):
                assert intake.declared_size != len(taken)
            else:
                self.learn(outcome, bytes(taken), put.name)

    @rule()
    def checkpoint(self) -> None:
        self.store.keystore.checkpoint()

    @rule(how=st.sampled_from(["close", "cut power", "cut power, half is kept", "lose the index"]))
    def open_again(self, how: str) -> None:
        self.intakes.clear()
        if how == "close":
            self.simulation.close()
        else:
            self.simulation.cut_power(lambda offset: "kept" in how and offset // 512 % 2 == 0)
        if how == "lose the index" and self.journal_is_whole():
            self.simulation.lose_index()
        self.store = self.simulation.open()
        self.settled()

    def journal_is_whole(self) -> bool:
        return all(ring.number < 1000 for ring in self.store.keystore._rings.values())

    def settled(self) -> None:
        run(self.store)
        check_sound(self.store)
        assert {record.uuid: record.name for record in live(self.store)} == {
            uuid: name for uuid, (_, name) in self.objects.items()
        }
        for uuid, (data, _) in self.objects.items():
            assert self.store.get(uuid) == data
        assert dict(self.store.names()) == {name: uuid for uuid, (_, name) in self.objects.items() if name}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for intake, _, _ in self.intakes:
                intake.abort()
            self.settled()
            run(self.store, *map(Delete, self.objects))
            assert free_blocks(self.store) == self.free
            self.simulation.close()
        self.directory.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=30)
