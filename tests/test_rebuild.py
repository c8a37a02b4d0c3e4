"""What a rebuild brings back, from the devices alone: all that an intact index would have, and nothing else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from rustord.blockdevice import open_device
from rustord.blockstore import ErasePolicy, read_label, write_label
from rustord.change import Change, Delete, Put
from rustord.errors import DeviceError, NoSpace, PoolError
from rustord.keygen import HashKeyGen
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.ring import Ring
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES
from rustord.placer import Contiguous, Mirrored, Placer, Striped
from rustord.pool import open_devices, open_pool
from rustord.rebuild import Report, rebuild
from rustord.record import Metadata, Record
from rustord.volumes import Volumes
from tests.simulation import MIB, Direct, PowerCut, Simulation, check_sound, free_blocks, live, run, stored, upload

POLICIES: Sequence[ErasePolicy] = ("zero", "discard", "none")


def rebuilt(pool: Simulation, **options: Any) -> Report:
    """Rebuild the index of a pool that is not open."""
    devices = open_devices(options.pop("paths", pool.paths), read_only=True)
    return rebuild(devices, backend=LmdbBackend(), directory=pool.index, **options)


def contents(store: ObjectStore) -> tuple[list[bytes], list[tuple[str, bytes]]]:
    return [record.raw for record in live(store)], store.names()


def fill_journals(store: ObjectStore, count: int = 1300) -> None:
    """Replace one Object so often that no journal has anything of what was before."""
    for number in range(count):
        store.put(b"x", name="filler", number=str(number), text="t" * 7000)


@pytest.fixture
def pool(disk_path: Path) -> Simulation:
    return Simulation(disk_path)


@pytest.fixture
def pair(disk_path: Path) -> Simulation:
    return Simulation(disk_path, (16 * MIB, 16 * MIB))


# What is brought back


@pytest.mark.parametrize("placer", [Contiguous(), Striped(1), Mirrored()], ids=lambda placer: placer.name)
def test_everything_is_as_before_when_the_journals_have_wrapped(placer: Placer, disk_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB), placer=placer)
    store = pool.open()
    for number in range(60):
        metadata = Metadata(f"name {number % 40}", "text/plain", {"long": "a" * rng.randrange(7000)})
        run(store, Put(rng.randbytes(rng.choice([0, 1, 4000, 5000, 200_000])), metadata))
    upload(store, rng.randbytes(2 * MIB), Put(b"", Metadata("n" * 1000)))
    for record in rng.sample(live(store), 10):
        store.delete(record.uuid)
    fill_journals(store)
    before = contents(store)
    pool.close()
    pool.lose_index()
    with pytest.raises(PoolError) as refused:
        pool.open()
    assert "rustorctl pool rebuild" in refused.value.hint
    report = rebuilt(pool)
    assert (report.object_count, report.name_count) == (len(before[0]), len(before[1]))
    assert (report.losses, report.doubtful) == ((), ())
    store = pool.open()
    assert contents(store) == before
    check_sound(store)
    pool.close()


def test_a_young_pool_is_rebuilt_from_journals_that_are_whole(pool: Simulation) -> None:
    store = pool.open()
    kept = store.put(b"kept", name="a")
    store.delete(store.put(b"gone", name="b").uuid)
    pool.close()
    pool.lose_index()
    assert rebuilt(pool).object_count == 1
    store = pool.open()
    assert ([record.uuid for record in live(store)], store.names()) == ([kept.uuid], [("a", kept.uuid)])
    check_sound(store)
    pool.close()


def test_a_journal_that_was_wiped_loses_nothing(pair: Simulation) -> None:
    store = pair.open()
    for number in range(50):
        store.put(bytes(5000), name=str(number))
    before = contents(store)
    pair.close()
    for path in pair.paths:
        with path.open("r+b") as file:  # as `dd if=/dev/zero` does, on the wrong device
            file.write(bytes(5 * MIB))
    pair.lose_index()
    assert rebuilt(pair).object_count == 50
    store = pair.open()
    assert contents(store) == before
    check_sound(store)
    pair.close()


def test_an_object_whose_footer_is_damaged_is_found_in_the_journal(pool: Simulation) -> None:
    store = pool.open()
    record = stored(run(store, Put(b"data"))[0])
    pool.close()
    with pool.paths[0].open("r+b") as file:
        file.seek(record.extents[-1].end * 4096 - 200)
        file.write(b"damage")
    pool.lose_index()
    report = rebuilt(pool)
    assert (report.object_count, report.losses) == (1, ())


def test_what_cannot_be_known_any_more_is_told(pool: Simulation) -> None:
    store = pool.open()
    record = stored(run(store, Put(b"data"))[0])
    fill_journals(store)
    pool.close()
    block = record.extents[-1].end - 1
    with pool.paths[0].open("r+b") as file:
        file.seek(block * 4096 + 4000)
        file.write(b"damage")
    pool.lose_index()
    report = rebuilt(pool)
    assert report.object_count == 1
    assert len(report.losses) == 1
    assert report.losses[0].startswith(f"block {block} of device 0 has half a footer")


# What damage to a journal may have lost


def damage_journal(pool: Simulation, number: int, offset: int) -> None:
    """Write over a byte of the last batch but ``number`` of the first device's journal."""
    with closing(open_device(pool.paths[0])) as device:
        label = read_label(device)
        assert label is not None
        ring = Ring(device, label.device_uuid, label.geometry, label.secret)
        (block, _) = sorted(ring.batches(), key=lambda item: item[1].number)[-1 - number]
        at = label.geometry.journal_offset + block * 4096
        data = bytearray(4096)
        device.read(at, (data,))
        data[offset] ^= 1
        device.write(at, (data,))


@pytest.mark.parametrize("offset", [0, 100])  # within the head of the batch, and behind it
def test_damage_at_the_end_of_the_only_journal_is_told(pool: Simulation, offset: int) -> None:
    store = pool.open()
    store.put(b"kept", name="kept")
    lost = store.put(b"lost", name="last")
    pool.cut_power()
    pool.lose_index()
    assert rebuilt(pool, dry_run=True).doubtful == ()
    damage_journal(pool, 0, offset)
    report = rebuilt(pool)
    assert (report.object_count, report.void_count) == (1, 1)
    told = [text for text in report.doubtful if str(UUID(bytes=lost.uuid)) in text]
    assert len(told) == 1
    assert "('last') is whole, and in no journal" in told[0]
    assert len(report.doubtful) == (1 if offset == 0 else 2), "a batch that was begun is told as well"


def test_damage_in_the_midst_of_a_journal_is_told(pool: Simulation) -> None:
    store = pool.open()
    for number in range(4):
        store.put(b"kept", name=str(number))
    pool.cut_power()
    pool.lose_index()
    damage_journal(pool, 2, 100)
    report = rebuilt(pool)
    assert (report.object_count, report.doubtful) == (4, ())
    assert [text.partition(":")[0] for text in report.losses] == ["batch 2 in the journal of device 0 is damaged"]


# What never comes back


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("placer", [Contiguous(), Striped(1), Mirrored()], ids=lambda placer: placer.name)
def test_no_deleted_object_returns(policy: ErasePolicy, placer: Placer, disk_path: Path) -> None:
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB), placer=placer)
    store = open_with(pool, policy)
    small = store.put(b"small", name="small")
    long = store.put(b"long" * 5000, name="long", text="t" * 8000)
    with_footer_of_many_blocks = stored(run(store, Put(b"", Metadata("many", "", {"a": "b" * 8000})))[0])
    store.put(b"second", name="small")
    store.put(b"third", name="small")
    for uuid in (long.uuid, with_footer_of_many_blocks.uuid):
        store.delete(uuid)
    assert small.uuid not in {record.uuid for record in live(store)}
    fill_journals(store)
    before = contents(store)
    store.close()
    pool.lose_index()
    report = rebuilt(pool)
    assert (report.object_count, report.losses) == (2, ())
    store = open_with(pool, policy)
    assert contents(store) == before
    store.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_deleted_volume_returns(policy: ErasePolicy, pool: Simulation) -> None:
    store = open_with(pool, policy)
    volumes = Volumes(store, Direct(store))
    for head_count in range(1, 4):  # of which the first, or the second of two slots has the newest
        volumes.create("gone", 400 * CHUNK_BYTES)
        with closing(volumes.open("gone")) as volume:
            for chunk in (0, 1, 300):
                volume.write(chunk * CHUNK_BYTES, b"written")
                volume.flush()
                store.keystore.checkpoint()
        for number in range(1, head_count):
            volumes.resize("gone", (400 + number) * CHUNK_BYTES)
            store.keystore.checkpoint()
        volumes.delete("gone")
    run(store)
    store.allocator.placer = Behind()  # which leaves alone what the volume had
    fill_journals(store)
    store.close()
    pool.lose_index()
    assert rebuilt(pool).volume_count == 0
    store = open_with(pool, policy)
    assert not store.layers.by_uuid
    assert Volumes(store, Direct(store)).names() == []
    store.close()


def open_with(pool: Simulation, policy: ErasePolicy) -> ObjectStore:
    return open_pool(
        open_devices(pool.paths),
        keygen=HashKeyGen("xxh3-128"),
        placer=pool.placer,
        backend=LmdbBackend(),
        directory=pool.index,
        erase_policy=policy,
    )


def test_an_erasure_that_was_cut_short_is_finished(pool: Simulation) -> None:
    store = pool.open()
    record = stored(run(store, Put(b"\xaa" * 20_000, Metadata("n")))[0])
    fill_journals(store)
    assert store.cycle([Delete(record.uuid)]).following  # the tombstone is durable, the blocks are not erased
    pool.cut_power()
    pool.lose_index()
    report = rebuilt(pool)
    assert (report.object_count, report.grave_count) == (1, 1)
    store = pool.open()
    assert store.resolve("n") is None
    assert pool.read(0, record.extents[0].block, record.extents[0].count) == bytes(record.extents[0].count * 4096)
    check_sound(store)
    pool.close()


def test_what_waits_for_a_reader_to_be_erased_does_not_return(pool: Simulation) -> None:
    """Its tombstone is long overwritten in the journal, which says once more what has not been erased."""
    store = pool.open()
    old = store.stat(store.put(b"old" * 3000, name="n").uuid)
    store.pins.add(old)
    store.put(b"new", name="n")
    store.keystore.checkpoint()
    fill_journals(store)
    pool.cut_power()
    pool.lose_index()
    assert rebuilt(pool).object_count == 2
    store = pool.open()
    assert [name for name, _ in store.names()] == ["filler", "n"]
    assert pool.read(0, old.extents[0].block, old.extents[0].count) == bytes(old.extents[0].count * 4096)
    pool.close()


@pytest.mark.parametrize("starts", [1, 2])
def test_what_could_not_be_erased_before_a_start_does_not_return(pair: Simulation, starts: int) -> None:
    """Its device is away, and the journals of the others are written around and around meanwhile."""
    store = pair.open()
    store.put(bytes(40_000))
    gone = store.stat(store.put(bytes(100_000), name="a").uuid)
    (device,) = gone.devices
    put = Put(b"newer", Metadata("a"))
    newer = stored(next(outcome for change, outcome in store.cycle([put]).outcomes if change is put))
    assert newer.devices.isdisjoint(gone.devices)
    store.keystore.checkpoint()
    pair.cut_power()
    store = pair.open(without=[device])
    for _ in range(1, starts):
        pair.close()
        store = pair.open(without=[device])
    fill_journals(store)
    store.delete(newer.uuid)
    fill_journals(store)
    pair.close()
    pair.lose_index()
    rebuilt(pair)
    store = pair.open()
    assert [record.name for record in live(store)] == ["", "filler"]
    check_sound(store)
    pair.close()


def test_a_put_whose_flush_never_finished_is_not_believed(pool: Simulation) -> None:
    store = pool.open()
    kept = store.put(b"kept", name="n")
    pool.power.left = 1  # the data and the footer, but nothing of the journal
    with pytest.raises(PowerCut):
        store.put(b"never acknowledged", name="n")
    pool.cut_power(lambda offset: True)
    pool.lose_index()
    report = rebuilt(pool)
    assert (report.object_count, report.void_count) == (1, 1)
    store = pool.open()
    assert store.resolve("n") == kept.uuid
    check_sound(store)
    pool.close()


def test_what_was_absent_after_a_crash_stays_absent(pool: Simulation) -> None:
    """Its footer is still there, in a free block, and the journal has forgotten when it was written."""
    store = pool.open()
    store.put(b"kept", name="kept")
    pool.power.left = 1
    with pytest.raises(PowerCut):
        store.put(b"never acknowledged" * 1000, name="never")
    pool.cut_power(lambda offset: True)
    pool.placer = Behind()
    fill_journals(pool.open())
    pool.close()
    pool.lose_index()
    report = rebuilt(pool)
    assert (report.object_count, report.void_count) == (2, 1)
    store = pool.open()
    assert [name for name, _ in store.names()] == ["filler", "kept"]
    pool.close()


@pytest.mark.parametrize("closed", [False, True])
def test_an_object_that_a_crash_came_behind_is_not_lost_for_a_chunk_that_decays(pool: Simulation, closed: bool) -> None:
    store = pool.open()
    old = store.put(b"old", name="name")
    record = store.stat(store.put(b"x" * 200_000, name="name").uuid)
    pool.cut_power()
    store = pool.open()
    if closed:
        pool.close()
    else:
        store.put(b"later")
        pool.cut_power()
    with pool.paths[0].open("r+b") as file:
        file.seek(record.extents[0].block * 4096)
        file.write(b"damage")
    for _ in range(2):
        pool.lose_index()
        rebuilt(pool)
        store = pool.open()
        assert store.stat(record.uuid).raw == record.raw
        assert store.read(record, 65536, 65536) == b"x" * 65536
        assert store.keystore.get(old.uuid) is None
        fill_journals(store)
        pool.close()


def test_a_put_that_failed_with_its_only_device_does_not_return(pair: Simulation) -> None:
    store = pair.open()
    pair.devices[0].fail_flushes = 1
    with pytest.raises(DeviceError):
        store.put(b"failed", name="failed")
    store.put(b"kept", name="kept")  # on the other device
    pair.cut_power(lambda offset: True)  # the failed flush has written everything all the same
    pair.lose_index()
    assert rebuilt(pair).object_count == 1
    assert [name for name, _ in pair.open().names()] == ["kept"]
    pair.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_what_one_device_lost_of_a_cycle_stays_absent(pair: Simulation, *, at_once: bool) -> None:
    """The other one has a later change of that cycle, which counts: so the lost one is behind no void's beginning."""
    store = pair.open()
    run(store, Put(b"first"), Put(b"second"))
    pair.power.left = 4  # data and journal of both, but no flush
    with pytest.raises(PowerCut):
        run(store, Put(b"lost", Metadata("lost")), Put(b"kept", Metadata("kept")))
    lost, kept = pair.devices
    lose, keep = lost.cut_power, kept.cut_power
    lost.cut_power = lambda _: lose(lambda offset: offset >= 5 * MIB)  # type: ignore[method-assign]
    kept.cut_power = lambda _: keep(lambda offset: True)  # type: ignore[method-assign]
    pair.cut_power()
    if at_once:
        pair.lose_index()
        rebuilt(pair)
    pair.placer = Behind()
    store = pair.open()
    assert [name for name, _ in store.names()] == ["kept"]
    fill_journals(store, 2500)
    pair.close()
    pair.lose_index()
    report = rebuilt(pair)
    assert (report.object_count, report.void_count) == (4, 1)
    assert [name for name, _ in pair.open().names()] == ["filler", "kept"]
    pair.close()


class Behind(Contiguous):
    """Leaves the first blocks alone."""

    def place(self, count: int, free: Any) -> Any:
        block = free.best_fit(0, 1000)
        return [[(super().place(count, free)[0][0])._replace(block=block + 500)]]


def test_an_image_of_the_pool_in_the_pool_is_nothing_but_data(pool: Simulation) -> None:
    store = pool.open()
    for number in range(10):
        store.put(bytes(3000), name=str(number))
    pool.close()
    image = pool.paths[0].read_bytes()[: 7 * MIB]
    store = pool.open()
    for record in live(store):
        store.delete(record.uuid)
    upload(store, image)
    before = contents(store)
    pool.close()
    pool.lose_index()
    assert rebuilt(pool).object_count == 1
    store = pool.open()
    assert contents(store) == before
    check_sound(store)
    pool.close()


# Devices that are not there


def test_a_missing_device_is_refused_unless_it_is_named(disk_path: Path) -> None:
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB), placer=Mirrored())
    store = pool.open()
    for number in range(20):
        store.put(bytes(3000), name=str(number))
    before = contents(store)
    pool.close()
    pool.lose_index()
    with pytest.raises(PoolError, match=r"device 1 \(.*\) is missing"):
        rebuilt(pool, paths=pool.paths[:1])
    assert not pool.index.exists()
    report = rebuilt(pool, paths=pool.paths[:1], without=[1])
    assert len(report.losses) == 1
    assert report.losses[0].startswith("device 1 is missing")
    store = pool.open(without=[1])
    assert contents(store) == before
    for record in live(store):
        store.read(record, 0, record.size)
    pool.close()


def test_objects_of_the_missing_device_are_lost_and_the_others_are_not(pair: Simulation) -> None:
    store = pair.open()
    records = [stored(run(store, Put(bytes(3000), Metadata(str(number))))[0]) for number in range(20)]
    fill_journals(store, 2000)
    pair.close()
    pair.lose_index()
    rebuilt(pair, paths=pair.paths[1:], without=[0])
    store = pair.open(without=[0])
    expected = {record.uuid for record in records if record.devices == {1}}
    assert expected
    assert {record.uuid for record in live(store) if record.name != "filler"} == expected
    pair.close()


def test_an_old_copy_of_a_device_is_refused(pair: Simulation, disk_path: Path) -> None:
    pair.open().put(b"a")
    pair.close()
    old = Path(shutil.copy(pair.paths[1], disk_path / "old.img"))
    pair.open().put(b"b")
    pair.close()
    pair.lose_index()
    with pytest.raises(PoolError, match="an older state of itself"):
        rebuilt(pair, paths=[pair.paths[0], old])
    assert rebuilt(pair).object_count == 2


# The index


def test_a_dry_run_changes_nothing(pair: Simulation) -> None:
    pair.open().put(b"a", name="a")
    pair.cut_power()
    pair.lose_index()
    before = [path.read_bytes() for path in pair.paths]
    assert rebuilt(pair, dry_run=True).object_count == 1
    assert [path.read_bytes() for path in pair.paths] == before
    assert not pair.index.exists()


def test_the_devices_are_not_written_to(pair: Simulation) -> None:
    pair.open().put(b"a", name="a")
    pair.cut_power()
    pair.lose_index()
    before = [path.read_bytes() for path in pair.paths]
    rebuilt(pair)
    assert [path.read_bytes() for path in pair.paths] == before


def test_an_index_that_is_there_is_kept_unless_it_shall_be_replaced(pool: Simulation) -> None:
    store = pool.open()
    store.put(b"a", name="a")
    before = contents(store)
    pool.close()
    with pytest.raises(PoolError, match="there is an index"):
        rebuilt(pool)
    assert contents(pool.open()) == before
    pool.close()
    assert rebuilt(pool, replace=True).object_count == 1
    assert contents(pool.open()) == before
    pool.close()


def test_half_a_rebuild_is_not_taken_for_an_index(pool: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.keystore.contents._BATCH", 4)
    store = pool.open()
    for number in range(30):
        store.put(b"data", name=str(number))
    before = contents(store)
    pool.close()
    commits = 1
    while not _cut_short(pool, commits):
        with pytest.raises(PoolError, match="cut short") as refused:
            pool.open()
        assert "pool rebuild" in refused.value.hint
        commits += 1
    assert commits > 10
    assert contents(pool.open()) == before
    pool.close()


def _cut_short(pool: Simulation, commits: int) -> bool:
    """Rebuild, and crash after so many commits; whether it came to its end before."""

    class Crashing(LmdbBackend):
        left = commits

        def commit(self, puts: Any, deletes: Any) -> None:
            if not self.left:
                raise PowerCut
            self.left -= 1
            super().commit(puts, deletes)

    try:
        rebuild(open_devices(pool.paths), backend=Crashing(), directory=pool.index, replace=True)
    except PowerCut:
        return False
    return True


def test_a_device_that_is_in_use_is_refused(pool: Simulation) -> None:
    pool.open()
    with pytest.raises(DeviceError, match="in use"):
        rebuilt(pool)
    pool.close()


def test_the_labels_of_a_removed_device_are_refused(pair: Simulation) -> None:
    pair.open()
    pair.close()
    with closing(open_device(pair.paths[0])) as device:
        label = read_label(device)
        assert label is not None
        write_label(device, replace(label, generation=label.generation + 1, members=label.members[:1]))
    with pytest.raises(PoolError, match="was removed"):
        rebuilt(pair, replace=True)


# Crashes


@pytest.mark.parametrize("turn", range(12))
def test_after_a_crash_it_is_as_if_the_index_had_not_been_lost(turn: int, disk_path: Path, seed: int) -> None:
    rng = random.Random(f"{seed} {turn}")
    placer, count = rng.choice(
        [(Contiguous(), 1), (Contiguous(), 2), (Striped(1), 2), (Mirrored(), 2), (Mirrored(), 3)]
    )
    pool = Simulation(disk_path, (16 * MIB,) * count, placer=placer)
    store = pool.open()
    for _ in range(3):  # each journal has a first batch: without, an Object that is whole is believed
        run(store, *(Put(bytes(4000)) for _ in range(3)))
    for number in range(4):
        if not pool.is_open:
            pool.open()
        _work_until_crash(pool, rng)
        twin = _copy(pool, disk_path / f"copy{number}")
        twin.lose_index()
        report = rebuilt(twin)
        store, other = pool.open(), twin.open()
        assert contents(other) == contents(store)
        assert free_blocks(other) == free_blocks(store)
        assert report.object_count == len(live(store))
        check_sound(other)
        twin.close()
        pool.close()


def _work_until_crash(pool: Simulation, rng: random.Random) -> None:
    pool.power.left = rng.randrange(1, 200)
    share = rng.choice([0, 0.5, 0.9, 1])
    store = pool._store
    assert store is not None
    try:
        while True:
            run(store, *_changes(store, rng))
    except PowerCut:
        pool.cut_power(lambda offset: rng.random() < share)


def _changes(store: ObjectStore, rng: random.Random) -> list[Change]:
    changes: list[Change] = []
    records = live(store)
    for _ in range(rng.randrange(1, 5)):
        chance = rng.random()
        if records and chance < 0.3:
            changes.append(Delete(records.pop(rng.randrange(len(records))).uuid))
        elif records and chance < 0.5:
            record = records.pop(rng.randrange(len(records)))
            with suppress(NoSpace):
                leave = rng.sample(record.extents, rng.randint(1, len(record.extents)))
                changes.append(store.relocations.prepare(record, leave))
        else:
            name = f"name {rng.randrange(12)}" if rng.random() < 0.7 else ""
            attributes = {"a": "x" * rng.randrange(6000)} if rng.random() < 0.3 else {}
            data = rng.randbytes(rng.choice([0, 10, 4000, 9000, 70_000]))
            changes.append(Put(data, Metadata(name, "", attributes)))
    return changes


def _copy(pool: Simulation, directory: Path) -> Simulation:
    """The same pool once more, on copies of its image files and its index."""
    directory.mkdir()
    twin = Simulation(directory, [path.stat().st_size for path in pool.paths], placer=pool.placer)
    for path, copy in zip(pool.paths, twin.paths, strict=True):
        shutil.copy(path, copy)
    shutil.copytree(pool.index, twin.index)
    return twin


def test_a_record_is_what_an_object_is_known_by(pool: Simulation) -> None:
    store = pool.open()
    key = store.put(b"data", name="n", content_type="text/plain", colour="blue")
    pool.close()
    pool.lose_index()
    rebuilt(pool)
    record: Record = pool.open().stat(key.uuid)
    assert (record.key, record.name, record.content_type) == (key, "n", "text/plain")
    assert record.attributes == {"colour": "blue"}
    pool.close()
