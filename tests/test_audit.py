"""What an audit finds: each kind of damage, that and nothing else; and that mending it loses nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from rustord.audit import Audit, Finding, Mend
from rustord.blockdevice import open_device
from rustord.blockstore import read_label, write_label
from rustord.change import Delete, Put
from rustord.errors import DeviceError, PoolError
from rustord.keystore.lmdb import LmdbBackend
from rustord.label import Standing
from rustord.layermerger import LayerMerger
from rustord.membership import detach_device, set_standing
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES, Page, slot_of
from rustord.placer import Mirrored
from rustord.pool import open_devices
from rustord.record import Metadata, Record, encode_record
from rustord.testing.device import VolatileDevice
from rustord.volumes import Volumes
from tests.simulation import MIB, Direct, PowerCut, Simulation, check_sound, live, run, stored

BLOCK = 4096


def audit_of(pool: Simulation, *, repair: bool = False, **options: Any) -> Audit:
    paths = options.pop("paths", pool.paths)
    return Audit(open_devices(paths, read_only=not repair), backend=LmdbBackend(), directory=pool.index, **options)


def findings(pool: Simulation, **options: Any) -> list[Finding]:
    with audit_of(pool, **options) as audit:
        return audit.findings


def mend(pool: Simulation) -> list[Mend]:
    with audit_of(pool, repair=True) as audit:
        plan = audit.plan
        audit.mend()
        return plan


def contents(store: ObjectStore) -> tuple[list[bytes], list[tuple[str, bytes]]]:
    return [record.raw for record in live(store)], store.names()


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


class Filled:
    """A pool that was closed in order, what is in it, and where."""

    def __init__(self, directory: Path) -> None:
        self.pool = Simulation(directory, (16 * MIB, 16 * MIB), placer=Mirrored())
        store = self.pool.open()
        for number in range(20):
            store.put(bytes([number]) * 3000, name=f"name {number}")
        store.put(b"\1" * 300_000)
        store.delete(store.put(b"gone").uuid)
        self.records = live(store)
        self.contents = contents(store)
        self.pool.close()

    def check_whole(self) -> None:
        """Nothing is wrong any more, and everything is there."""
        assert findings(self.pool, data=True) == []
        store = self.pool.open()
        assert contents(store) == self.contents
        check_sound(store)
        self.pool.close()


@pytest.fixture
def filled(disk_path: Path) -> Filled:
    return Filled(disk_path)


def test_a_pool_that_is_well_has_no_findings(filled: Filled) -> None:
    before = [path.read_bytes() for path in filled.pool.paths]
    with audit_of(filled.pool, data=True) as audit:
        assert (audit.findings, audit.plan, audit.object_count) == ([], [], 21)
        assert audit.data_bytes == 20 * 3000 + 300_000
    assert [path.read_bytes() for path in filled.pool.paths] == before
    filled.check_whole()


def test_a_new_pool_has_no_findings_but_that_it_has_no_index(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    assert [finding.what for finding in findings(pool)] == [f"there is no index at {pool.index}"]
    pool.open()
    pool.close()
    assert findings(pool) == []


# One kind of damage at a time


def damage_label(filled: Filled) -> None:
    write(filled.pool.paths[1], 8 * MIB + 100, b"damage")


def wipe_label(filled: Filled) -> None:
    write(filled.pool.paths[0], 0, bytes(65536))


def older_label(filled: Filled) -> None:
    path = filled.pool.paths[0]
    old = path.read_bytes()[:65536]
    filled.pool.open()
    filled.pool.close()
    write(path, 15 * MIB, old)


def damage_footer(filled: Filled) -> None:
    extent = filled.records[5].copies[1][-1]
    write(filled.pool.paths[extent.device], extent.end * BLOCK - 200, b"damage")


def wipe_both_footers(filled: Filled) -> None:
    for copy in filled.records[20].copies:
        write(filled.pool.paths[copy[-1].device], (copy[-1].end - 1) * BLOCK + 3000, bytes(BLOCK - 3000))


def forget_object(filled: Filled) -> None:
    filled.pool.change_index({}, (b"o" + filled.records[3].uuid, b"nname 3"))


def forget_name(filled: Filled) -> None:
    filled.pool.change_index({}, (b"nname 3",))


def name_of_nobody(filled: Filled) -> None:
    filled.pool.change_index({b"nnobody": bytes(16)})


def name_of_another(filled: Filled) -> None:
    filled.pool.change_index({b"nname 3": filled.records[4].uuid})


def damage_record(filled: Filled) -> None:
    record = filled.records[3]
    filled.pool.change_index({b"o" + record.uuid: record.raw[:-1] + b"?"})


def object_twice(filled: Filled) -> None:
    """Another Object in the index, with blocks that are somebody else's."""
    record = filled.records[20]
    key = record.key._replace(uuid=bytes(15) + b"\1")
    sums = record.sums(0, 5)
    raw = encode_record(key, record.sequence - 1, 0, record.copies, sums, b"mirrored", b"", b"")
    filled.pool.change_index({b"o" + key.uuid: raw})


def leave_something_free(filled: Filled) -> None:
    write(filled.pool.paths[0], 3000 * BLOCK + 17, b"left")


@pytest.mark.parametrize(
    ("damage", "kind", "said", "plan"),
    [
        (damage_label, "label", "byte 8388608 of device 1 is damaged", Mend.LABEL),
        (wipe_label, "label", "byte 0 of device 0 is absent", Mend.LABEL),
        (older_label, "label", "byte 15728640 of device 0 is older than the others", Mend.LABEL),
        (damage_footer, "footer", "the footer of copy 1 of Object", Mend.FOOTER),
        (wipe_both_footers, "footer", "the footer of copy", Mend.FOOTER),
        (forget_object, "index", "is on the devices, and not in the index", Mend.INDEX),
        (forget_name, "name", "the name 'name 3' is that of Object", Mend.INDEX),
        (name_of_nobody, "name", "the name 'nobody' leads to Object 00000000", Mend.INDEX),
        (name_of_another, "name", "the name 'name 3' leads to Object", Mend.INDEX),
        (damage_record, "index", "cannot be decoded", Mend.INDEX),
        (leave_something_free, "free", "block 3000 of device 0: is free, and is not zero", Mend.ERASE),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_found_and_mended(
    damage: Callable[[Filled], None], kind: str, said: str, plan: Mend, filled: Filled
) -> None:
    damage(filled)
    found = findings(filled.pool)
    assert any(said in finding.what for finding in found), found
    assert {finding.mend for finding in found} == {plan}
    assert kind in {finding.kind for finding in found}
    assert all(finding.what and finding.remedy for finding in found)
    assert mend(filled.pool) == [plan]
    filled.check_whole()


def test_two_objects_with_one_block(filled: Filled) -> None:
    object_twice(filled)
    found = findings(filled.pool)
    assert "blocks" in {finding.kind for finding in found}
    store = filled.pool.open()
    assert "two Objects claim block" in store.read_only
    filled.pool.close()


def test_everything_at_once(filled: Filled) -> None:
    for damage in (damage_label, damage_footer, forget_object, name_of_another, leave_something_free):
        damage(filled)
    assert mend(filled.pool) == [Mend.LABEL, Mend.FOOTER, Mend.INDEX, Mend.ERASE]
    filled.check_whole()


def test_a_lost_index_is_a_finding(filled: Filled) -> None:
    filled.pool.lose_index()
    assert [(finding.kind, finding.mend) for finding in findings(filled.pool)] == [("index", Mend.INDEX)]
    assert not filled.pool.index.exists()
    assert mend(filled.pool) == [Mend.INDEX]
    filled.check_whole()


def test_damaged_data_is_found_by_its_checksum_alone(filled: Filled) -> None:
    extent = filled.records[20].copies[0][0]
    write(filled.pool.paths[extent.device], (extent.block + 9) * BLOCK, b"flip")
    assert findings(filled.pool) == []
    (finding,) = findings(filled.pool, data=True)
    assert finding.kind == "data"
    assert finding.what.startswith("copy 0 of Object")
    assert "scrub" in finding.remedy


def test_a_footer_in_a_free_block_is_told_apart(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    store.put(b"kept")
    pool.power.left = 1
    with pytest.raises(PowerCut):
        store.put(b"never")
    pool.cut_power(lambda offset: True)
    pool.open()
    pool.close()
    (finding,) = findings(pool)
    assert "ends with the footer of an Object that is deleted or was never committed" in finding.what
    assert finding.harmless
    assert mend(pool) == [Mend.ERASE]
    assert findings(pool) == []


@pytest.mark.parametrize("indexed", [False, True])
def test_what_a_move_that_was_cut_short_has_copied_is_to_be_erased_anyway(disk_path: Path, indexed: bool) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    record = store.stat(store.put(random.Random(1).randbytes(20_000)).uuid)
    store.keystore.checkpoint()
    store.relocations.prepare(record, record.extents)
    if indexed:
        store.keystore.checkpoint()
    pool.cut_power(lambda offset: True)
    assert {finding.kind for finding in findings(pool)} == {"journal"}  # it was not closed in order
    pool.open()
    pool.close()
    assert findings(pool) == []


def test_a_journal_with_a_gap_behind_the_index(disk_path: Path) -> None:
    """What the journal has behind the gap was acknowledged: without a repair the next start would not know."""
    pool = Simulation(disk_path)
    pool.open().close()
    store = pool.open()
    for number in range(5):
        store.put(b"data", name=str(number))
    before = contents(store)
    pool.cut_power()
    write(pool.paths[0], MIB + BLOCK, bytes(BLOCK))
    found = findings(pool)
    assert [(finding.kind, finding.harmless) for finding in found if finding.kind == "journal"] == [
        ("journal", False),
        ("journal", True),
    ]
    assert Mend.INDEX in mend(pool)
    assert contents(pool.open()) == before
    pool.close()


def test_missing_devices_and_old_copies_are_told(filled: Filled, disk_path: Path) -> None:
    old = disk_path / "old.img"
    old.write_bytes(filled.pool.paths[1].read_bytes())
    filled.pool.open()
    filled.pool.close()
    (missing,) = findings(filled.pool, paths=filled.pool.paths[:1])
    assert missing.what.startswith("device 1 (")
    assert missing.what.endswith("is missing: not found")
    (stale,) = findings(filled.pool, paths=[filled.pool.paths[0], old])
    assert "is an older state of itself" in stale.what


def test_the_index_is_not_made_anew_without_a_device(filled: Filled) -> None:
    forget_name(filled)
    with (
        audit_of(filled.pool, repair=True, paths=filled.pool.paths[:1]) as audit,
        pytest.raises(PoolError, match="device 1 is missing"),
    ):
        audit.mend()


def test_a_footer_is_mended_while_the_device_of_another_copy_is_missing(filled: Filled) -> None:
    extent = filled.records[5].copies[0][-1]
    path = filled.pool.paths[extent.device]
    write(path, extent.end * BLOCK - 200, b"damage")
    with audit_of(filled.pool, repair=True, paths=[path]) as audit:
        assert Mend.FOOTER in audit.plan
        audit.mend()
    filled.check_whole()


def test_a_free_block_that_cannot_be_read_ends_no_audit(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    store.put(b"kept")
    block = store.stat(store.put(bytes(5 * BLOCK)).uuid).extents[0].end + 10
    pool.close()
    device = VolatileDevice(open_device(pool.paths[0], read_only=True))
    device.fail_reads = range(block * BLOCK, (block + 1) * BLOCK)
    with Audit([device], backend=LmdbBackend(), directory=pool.index, data=True) as audit:
        (finding,) = audit.findings
        assert f"block {block} of device 0: is free, and cannot be read" in finding.what
        assert finding.harmless


def test_a_pool_in_use_is_refused(filled: Filled) -> None:
    filled.pool.open()
    with pytest.raises(DeviceError, match="in use"):
        findings(filled.pool)
    filled.pool.close()


@pytest.mark.parametrize("turn", range(6))
def test_what_a_crash_leaves_is_harmless(turn: int, disk_path: Path, seed: int) -> None:
    rng = random.Random(f"{seed} {turn}")
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB), placer=Mirrored())
    store = pool.open()
    run(store, *(Put(bytes(4000), Metadata(str(number))) for number in range(9)))
    pool.power.left = rng.randrange(1, 60)
    with pytest.raises(PowerCut):
        _work_for_ever(store, rng)
    pool.cut_power(lambda offset: rng.random() < 0.5)
    assert [finding for finding in findings(pool, data=True) if not finding.harmless] == []
    store = pool.open()
    before = contents(store)
    pool.close()
    assert [finding for finding in findings(pool) if not finding.harmless] == []
    mend(pool)
    assert findings(pool) == []
    assert contents(pool.open()) == before
    pool.close()


def _work_for_ever(store: ObjectStore, rng: random.Random) -> None:
    while True:
        uuids = [record.uuid for record in live(store)]
        run(store, Put(rng.randbytes(9000), Metadata(str(rng.randrange(9)))), Delete(rng.choice(uuids)))


def test_an_object_that_only_the_index_knows_is_kept(filled: Filled) -> None:
    """Its footers are gone, and its PUT is long out of the journal: a rebuild alone would lose it."""
    store = filled.pool.open()
    for number in range(1300):
        store.put(b"x", name="filler", number=str(number), text="t" * 7000)
    filled.contents = contents(store)
    filled.pool.close()
    wipe_both_footers(filled)
    forget_name(filled)
    assert mend(filled.pool) == [Mend.FOOTER, Mend.INDEX]
    filled.check_whole()


def test_labels_that_say_the_same_are_left_alone(filled: Filled) -> None:
    with closing(open_device(filled.pool.paths[0])) as device:
        label = read_label(device)
        assert label is not None
        write_label(device, label)
    assert findings(filled.pool) == []


def test_records_are_compared_byte_by_byte(filled: Filled) -> None:
    record = filled.records[2]
    other = Record(
        encode_record(record.key, record.sequence, 1, record.copies, record.sums(0, 1), b"mirrored", b"name 2", b"")
    )
    assert other.raw != record.raw
    filled.pool.change_index({b"o" + record.uuid: other.raw})
    (finding,) = findings(filled.pool)
    assert "is not in the index as on the devices" in finding.what
    assert mend(filled.pool) == [Mend.INDEX]
    filled.check_whole()


class WithVolumes:
    """A pool with a volume, its clone, a snapshot, and a deleted Object below one of them."""

    def __init__(self, directory: Path) -> None:
        self.pool = Simulation(directory, (32 * MIB,))
        store = self.pool.open()
        volumes = Volumes(store, Direct(store))
        image = store.put(b"image" * 50_000, name="image")
        volumes.create("disk", 40 * CHUNK_BYTES)
        volumes.clone("image", "clone")
        for name in ("disk", "clone"):
            with closing(volumes.open(name)) as volume:
                volume.write(70_000, b"written")
                volume.flush()
        volumes.snapshot("disk", "snapshot")
        store.delete(image.uuid)
        volumes.create("gone", 40 * CHUNK_BYTES)
        volumes.delete("gone")
        run(store)
        self.pool.close()

    def head(self) -> Page:
        with audit_of(self.pool) as audit:
            return next(page for page in audit._pages.values() if page.number == 0)


@pytest.fixture
def with_volumes(disk_path: Path) -> WithVolumes:
    return WithVolumes(disk_path)


def test_a_pool_with_volumes_that_is_well(with_volumes: WithVolumes) -> None:
    assert findings(with_volumes.pool, data=True) == []


def test_a_page_that_the_index_has_lost(with_volumes: WithVolumes) -> None:
    page = with_volumes.head()
    with_volumes.pool.change_index({}, (b"l" + page.layer + bytes(4),))
    (finding,) = findings(with_volumes.pool)
    assert "page 0 of the map of layer" in finding.what
    assert mend(with_volumes.pool) == [Mend.INDEX]
    assert findings(with_volumes.pool, data=True) == []
    store = with_volumes.pool.open()
    assert Volumes(store, Direct(store)).names() == ["clone", "disk"]
    with_volumes.pool.close()


def test_a_page_that_the_devices_have_lost(with_volumes: WithVolumes) -> None:
    slot = slot_of(with_volumes.head())
    write(with_volumes.pool.paths[0], slot.block * BLOCK, bytes(BLOCK))
    found = findings(with_volumes.pool)
    assert [(finding.kind, finding.mend) for finding in found] == [("footer", Mend.FOOTER)]
    assert mend(with_volumes.pool) == [Mend.FOOTER]
    assert findings(with_volumes.pool) == []


def test_what_volumes_have_on_a_device_that_is_missing_is_not_wrong(disk_path: Path) -> None:
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB))
    store = pool.open()
    volumes = Volumes(store, Direct(store))
    for number in range(4):
        volumes.create(f"disk-{number}", 40 * CHUNK_BYTES)
        with closing(volumes.open(f"disk-{number}")) as volume:
            volume.write(CHUNK_BYTES, b"written")
            volume.flush()
        volumes.snapshot(f"disk-{number}", f"snapshot-{number}")
    pool.close()
    for number in (0, 1):
        found = findings(pool, paths=[pool.paths[1 - number]], data=True)
        assert [finding.kind for finding in found] == ["device"]


def test_damage_below_a_snapshot_is_told_of_both(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    image = store.stat(store.put(b"image" * 50_000, name="image").uuid)
    volumes = Volumes(store, Direct(store))
    volumes.clone("image", "disk")
    volumes.snapshot("disk", "snapshot")
    pool.close()
    write(pool.paths[0], image.extents[0].block * BLOCK, b"flip")
    found = findings(pool, data=True)
    assert [finding.kind for finding in found] == ["data", "data"]


def test_an_object_that_was_below_a_volume_is_not_one_any_more(disk_path: Path) -> None:
    """Its blocks were erased last before the pool was closed, so that no journal says so, and are another's now."""
    pool = Simulation(disk_path)
    store = pool.open()
    image = store.put(b"image", name="image")
    volumes = Volumes(store, Direct(store))
    volumes.clone("image", "disk")
    store.delete(image.uuid)
    volumes.delete("disk")
    pool.close()
    pool.open().put(bytes(1000))
    pool.close()
    assert findings(pool) == []


def volume_at_home(store: ObjectStore) -> tuple[Volumes, int]:
    """A volume with something in it, and the device of its map."""
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 40 * CHUNK_BYTES)
    with closing(volumes.open("disk")) as volume:
        volume.write(0, b"written")
        volume.flush()
    return volumes, store.layers.volumes["disk"].home


def test_a_page_that_a_device_did_not_take_is_written_by_the_next_start(disk_path: Path) -> None:
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB))
    store = pool.open()
    _, home = volume_at_home(store)
    pool.devices[home].fail_writes = True
    store.keystore.checkpoint()
    pool.cut_power()
    found = [finding for finding in findings(pool) if finding.kind != "journal"]
    assert {(finding.kind, finding.harmless) for finding in found} == {("footer", True)}
    pool.open()
    pool.close()
    assert findings(pool) == []


def test_what_a_merge_has_erased_is_not_lost_if_the_index_does_not_know_yet(disk_path: Path) -> None:
    pool = Simulation(disk_path, (32 * MIB,))
    store = pool.open()
    volumes = Volumes(store, Direct(store))
    volumes.create("disk", 40 * CHUNK_BYTES)
    with closing(volumes.open("disk")) as volume:
        volume.write(70_000, b"written")
    store.delete(volumes.snapshot("disk").uuid)
    store.keystore.checkpoint()
    assert LayerMerger(store, volumes).run() == 1
    run(store)
    pool.cut_power()
    with audit_of(pool, repair=True, data=True) as audit:
        assert all(finding.harmless for finding in audit.findings)
        assert audit.plan == []


def test_a_volume_that_is_deleted_while_its_home_is_away(disk_path: Path) -> None:
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB))
    store = pool.open()
    volumes, home = volume_at_home(store)
    store.keystore.checkpoint()
    detach_device(store, home)
    pool.devices[home].close()
    with suppress(DeviceError):
        volumes.delete("disk")
    pool.close()
    assert [finding for finding in findings(pool) if not finding.harmless] == []


def test_what_only_a_missing_device_says_was_deleted_is_not_wrong(disk_path: Path) -> None:
    """An Object was replaced by one on the other device, whose journal alone tells; the index knows."""
    pool = Simulation(disk_path, (16 * MIB, 16 * MIB))
    store = pool.open()
    for leaving in (0, 1):
        set_standing(store, leaving, Standing.LEAVING)
        store.put(b"data", name="name")
        store.put(b"more")  # which says that the one before was durable
        set_standing(store, leaving, Standing.IN_USE)
    pool.close()
    assert [finding.kind for finding in findings(pool, paths=pool.paths[1:])] == ["device"]


def test_what_is_stored_is_not_changed_by_an_audit(filled: Filled) -> None:
    assert stored(run(filled.pool.open(), Put(b"more"))[0]).size == 4
    filled.pool.close()
    assert findings(filled.pool) == []


# Damage to what no later batch of the journal shows to have been flushed


def damage_data(pool: Simulation, record: Record) -> None:
    write(pool.paths[0], record.extents[0].block * BLOCK, b"damage")


@pytest.mark.parametrize("started_since", [False, True])
def test_an_object_that_a_crash_came_behind_is_damaged_and_not_deleted(disk_path: Path, *, started_since: bool) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    record = store.stat(store.put(b"x" * 200_000, name="name").uuid)
    store.keystore.checkpoint()
    pool.cut_power()
    if started_since:
        pool.open()
        pool.close()
    damage_data(pool, record)
    found = [finding for finding in findings(pool, data=True) if not finding.harmless]
    assert [finding.kind for finding in found] == ["data"]
    pool.change_index({b"nnobody": bytes(16)})
    assert Mend.INDEX in mend(pool)
    store = pool.open()
    assert live(store)[0].raw == record.raw
    assert store.read(record, 65536, 65536) == b"x" * 65536
    pool.close()


def test_a_damaged_object_that_was_moved_before_a_crash_is_where_it_is_now(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    record = store.stat(store.put(b"x" * 200_000, name="name").uuid)
    damage_data(pool, record)
    moved = stored(run(store, store.relocations.prepare(record, record.extents, salvage=True))[0])
    store.keystore.checkpoint()
    pool.cut_power()
    found = [finding for finding in findings(pool, data=True) if not finding.harmless]
    assert [finding.kind for finding in found] == ["data"]
    assert live(pool.open())[0].raw == moved.raw
    pool.close()
