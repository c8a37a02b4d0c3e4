"""What the daemon answers about its pool, devices and plugins, and how it changes its devices; on image files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

import rustord
from rustord.admin import Admin
from rustord.blockdevice import open_device
from rustord.blockstore import read_label
from rustord.errors import (
    ClaimRefused,
    DeviceBusy,
    DeviceError,
    InvalidRequest,
    NoSpace,
    NotFound,
    ReadOnly,
    RustordError,
    Unavailable,
)
from rustord.label import Standing
from rustord.membership import set_standing
from rustord.objectstore import ObjectStore
from rustord.objkey import parse_uuid, uuid_text
from rustord.placer import Contiguous, Mirrored, Placer
from rustord.plugins import PluginManager
from rustord.repair import Repairer
from rustord.scrub import Scrub
from rustord.volumes import Volumes
from rustord.wire.api import NewDevice
from rustord.writer import Writer
from tests.daemon import MIB, make_pool

MakeImage = Callable[..., Path]
UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    path = make_image(16 * MIB)
    make_pool(path, name="test")
    return path


class Opened(NamedTuple):
    """A pool that is open, as in the daemon."""

    store: ObjectStore
    admin: Admin


@contextmanager
def opened(directory: Path, *images: Path, placer: Placer | None = None) -> Iterator[Opened]:
    with rustord.open(images, directory=directory / "index", placer=placer) as store:
        writer = Writer(store)
        scrub = Scrub(store, Repairer(store, writer), directory / "scrub.json")
        yield Opened(store, Admin(store, writer, PluginManager(), scrub, Volumes(store, writer)))
        scrub.close()
        assert writer.close()


@pytest.fixture
def pool(image: Path, tmp_path: Path) -> Iterator[Opened]:
    with opened(tmp_path, image) as pool:
        yield pool


@pytest.fixture
def store(pool: Opened) -> ObjectStore:
    return pool.store


@pytest.fixture
def admin(pool: Opened) -> Admin:
    return pool.admin


def is_locked(path: Path) -> bool:
    try:
        open_device(path).close()
    except DeviceBusy:
        return True
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The pool


def test_a_pool_that_is_well(admin: Admin, store: ObjectStore) -> None:
    pool = admin.pool()
    assert (pool["name"], pool["state"], pool["problems"]) == ("test", "ok", [])
    assert pool["uuid"] == uuid_text(store.label.pool_uuid)
    assert (pool["objects"], pool["data_bytes"], pool["block_size"]) == (0, 0, 4096)
    assert 8 * MIB < pool["free_bytes"] == pool["size_bytes"] < 16 * MIB
    assert (pool["devices"], pool["devices_online"]) == (1, 1)
    assert (pool["algorithm"], pool["placer"], pool["erase"]) == ("xxh3-128", "contiguous", "zero")


def test_sizes_follow_the_objects(admin: Admin, store: ObjectStore) -> None:
    free = admin.pool()["free_bytes"]
    uuid = store.put(bytes(10_000)).uuid
    pool = admin.pool()
    assert (pool["objects"], pool["data_bytes"], free - pool["free_bytes"]) == (1, 10_000, 12_288)
    assert admin.devices()[0]["free_bytes"] == pool["free_bytes"]
    store.delete(uuid)
    assert admin.pool()["free_bytes"] == free


def test_a_pool_that_takes_no_changes_says_why(admin: Admin, store: ObjectStore, make_image: MakeImage) -> None:
    store.read_only = "the moon is full"
    pool = admin.pool()
    assert pool["state"] == "read-only"
    assert pool["problems"] == ["the pool takes no changes: the moon is full"]
    with pytest.raises(ReadOnly, match="the moon is full"):
        admin.add_device(NewDevice(str(make_image(16 * MIB)), force=False, dry_run=False))


def test_an_index_that_cannot_be_written_makes_the_pool_degraded(
    admin: Admin, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise NoSpace("the disk is full")

    monkeypatch.setattr(store.keystore, "checkpoint", full)
    deadline = time.monotonic() + 30
    while admin.pool()["state"] != "degraded":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "the index cannot be written: the disk is full" in admin.pool()["problems"][0]


def test_a_device_that_failed_makes_the_pool_degraded(admin: Admin, store: ObjectStore) -> None:
    device = store.blocks.slots[0].device
    assert device is not None
    device.failed = "it smokes"
    assert admin.pool()["state"] == "degraded"
    assert admin.pool()["problems"] == ["device 0 is failed: it smokes"]
    entry = admin.devices()[0]
    assert (entry["state"], entry["reason"]) == ("failed", "it smokes")
    device.failed = ""


# Devices


def test_devices_are_listed_by_index_missing_ones_too(make_image: MakeImage, tmp_path: Path) -> None:
    images = [make_image(size * MIB) for size in (16, 17, 18)]
    make_pool(*images)
    with opened(tmp_path, images[2], images[0]) as pool:
        devices = pool.admin.devices()
    assert [entry["index"] for entry in devices] == [0, 1, 2]
    assert [entry["state"] for entry in devices] == ["online", "missing", "online"]
    assert [entry["path"] for entry in devices] == [str(images[0]), None, str(images[2])]
    assert [entry["device_bytes"] for entry in devices] == [16 * MIB, 17 * MIB, 18 * MIB]
    assert devices[1]["reason"] == "not found"
    assert devices[1]["rotational"] is None


def test_an_added_device_belongs_to_the_pool_at_once_and_for_good(
    make_image: MakeImage, image: Path, tmp_path: Path
) -> None:
    new = make_image(32 * MIB)
    data = os.urandom(16 * MIB)  # more than the first device has
    with opened(tmp_path, image) as (store, admin):
        free = admin.pool()["free_bytes"]
        added = admin.add_device(NewDevice(str(new), force=False, dry_run=False))
        assert (added["index"], added["path"], added["state"]) == (1, str(new), "online")
        assert added["free_bytes"] == added["size_bytes"] > 16 * MIB
        assert admin.devices()[1] == added
        assert admin.pool()["devices"] == 2
        assert admin.pool()["free_bytes"] == free + added["free_bytes"]
        assert is_locked(new)
        key = store.put(data)
    with opened(tmp_path, image, new) as (store, admin):
        assert store.get(key.uuid) == data
        assert admin.pool()["state"] == "ok"


def test_a_dry_run_changes_nothing(admin: Admin, make_image: MakeImage) -> None:
    new = make_image(32 * MIB)
    told = admin.add_device(NewDevice(str(new), force=False, dry_run=True))
    assert told == {"path": str(new), "size_bytes": 32 * MIB, "would_erase": []}
    assert new.read_bytes() == bytes(32 * MIB)
    assert admin.pool()["devices"] == 1
    assert not is_locked(new)


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_somebody_elses_is_refused_and_not_changed(admin: Admin, make_image: MakeImage, dry_run: bool) -> None:
    theirs = make_image(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", theirs], check=True)
    before = sha256(theirs)
    with pytest.raises(ClaimRefused) as refused:
        admin.add_device(NewDevice(str(theirs), force=False, dry_run=dry_run))
    assert any("ext4" in reason for reason in refused.value.reasons)
    assert sha256(theirs) == before
    assert admin.pool()["devices"] == 1
    assert not is_locked(theirs)
    told = admin.add_device(NewDevice(str(theirs), force=True, dry_run=True))
    assert any("ext4" in erasure for erasure in told["would_erase"])
    assert sha256(theirs) == before


def test_force_erases_what_is_there_and_logs_it(
    admin: Admin, make_image: MakeImage, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = make_image(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", theirs], check=True)
    added = admin.add_device(NewDevice(str(theirs), force=True, dry_run=False))
    assert added["state"] == "online"
    assert any(f"{theirs}: erasing " in message and "ext4" in message for message in caplog.messages)
    probe = subprocess.run(["blkid", "-p", theirs], capture_output=True, text=True)
    assert "ext4" not in probe.stdout


def test_a_device_in_use_by_a_pool_is_refused_even_with_force(
    admin: Admin, make_image: MakeImage, image: Path, tmp_path: Path
) -> None:
    make_pool(other := make_image(16 * MIB))
    with rustord.open(other, directory=tmp_path / "other"):
        for path in (image, other):
            before = sha256(path)
            with pytest.raises(ClaimRefused) as refused:
                admin.add_device(NewDevice(str(path), force=True, dry_run=False))
            assert any("in use" in reason for reason in refused.value.reasons)
            assert sha256(path) == before
    assert admin.pool()["devices"] == 1


def test_a_device_of_another_pool_is_refused_without_force(admin: Admin, make_image: MakeImage) -> None:
    make_pool(other := make_image(16 * MIB))
    before = sha256(other)
    with pytest.raises(ClaimRefused) as refused:
        admin.add_device(NewDevice(str(other), force=False, dry_run=False))
    assert any("pool" in reason for reason in refused.value.reasons)
    assert sha256(other) == before
    assert admin.add_device(NewDevice(str(other), force=True, dry_run=False))["index"] == 1


@pytest.mark.parametrize("path", ["/dev/null", "/nowhere", "/"])
def test_what_is_no_device_is_refused(admin: Admin, path: str) -> None:
    with pytest.raises(RustordError, match=path) as refused:
        admin.add_device(NewDevice(path, force=True, dry_run=False))
    assert refused.value.http_status < 500 or isinstance(refused.value, DeviceError)
    assert refused.value.hint


def test_a_device_that_is_too_small_is_refused_and_let_go(admin: Admin, make_image: MakeImage) -> None:
    small = make_image(MIB)
    with pytest.raises(RustordError) as refused:
        admin.add_device(NewDevice(str(small), force=True, dry_run=False))
    assert str(small) in " ".join([str(refused.value), *getattr(refused.value, "reasons", ())])
    assert not is_locked(small)
    assert small.read_bytes() == bytes(MIB)


def test_a_pool_that_is_full_of_devices_erases_nothing(
    admin: Admin, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_image(16 * MIB)
    theirs.write_bytes(b"theirs" * 1000 + bytes(16 * MIB - 6000))
    before = theirs.read_bytes()
    monkeypatch.setattr("rustord.membership.MEMBER_COUNT_MAX", 1)
    for dry_run in (True, False):
        with pytest.raises(InvalidRequest, match="has 1 devices already"):
            admin.add_device(NewDevice(str(theirs), force=True, dry_run=dry_run))
    assert theirs.read_bytes() == before


def test_an_error_while_adding_lets_go_of_the_device(
    admin: Admin, make_image: MakeImage, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(generation: int) -> None:
        raise DeviceError("the index fails")

    new = make_image(16 * MIB)
    monkeypatch.setattr(store.keystore, "note_generation", fail)
    with pytest.raises(DeviceError, match="the index fails"):
        admin.add_device(NewDevice(str(new), force=False, dry_run=False))
    monkeypatch.undo()
    assert not is_locked(new)
    assert admin.pool()["devices"] == 1
    assert admin.add_device(NewDevice(str(new), force=False, dry_run=False))["index"] == 1


# Removing


@pytest.fixture
def added(admin: Admin, make_image: MakeImage) -> Path:
    """A second device, which is empty."""
    path = make_image(32 * MIB)
    admin.add_device(NewDevice(str(path), force=False, dry_run=False))
    return path


@pytest.mark.parametrize("by", ["index", "uuid", "path"])
def test_an_empty_device_can_be_removed(make_image: MakeImage, image: Path, tmp_path: Path, by: str) -> None:
    with opened(tmp_path, image) as (store, admin):
        key = store.put(b"data")
        free = admin.pool()["free_bytes"]
        admin.add_device(NewDevice(str(added := make_image(32 * MIB)), force=False, dry_run=False))
        entry = admin.devices()[1]
        assert admin.remove_device(str(entry[by])) == {**entry, "standing": "removed"}
        assert [entry["path"] for entry in admin.devices()] == [str(image)]
        assert admin.pool()["free_bytes"] == free
        assert not is_locked(added)
        with closing(open_device(added, read_only=True)) as device:
            assert read_label(device) is None
    with opened(tmp_path, image) as (store, admin):
        assert admin.pool()["devices"] == 1
        assert store.get(key.uuid) == b"data"


def test_a_device_that_was_removed_can_be_added_again(admin: Admin, added: Path) -> None:
    first = admin.remove_device("1")
    again = admin.add_device(NewDevice(str(added), force=False, dry_run=False))
    assert again["uuid"] != first["uuid"]
    assert again["free_bytes"] == first["free_bytes"]


def test_a_device_that_holds_objects_is_not_removed(admin: Admin, store: ObjectStore, added: Path) -> None:
    key = store.put(bytes(16 * MIB))  # for which only the new one has room
    with pytest.raises(NoSpace, match=r"device 1 holds 16.0 MiB, and the 1 others that take data have 9.9 MiB"):
        admin.remove_device("1")
    assert admin.devices()[1]["standing"] == "in use"
    assert store.get(key.uuid) == bytes(16 * MIB)
    store.delete(key.uuid)
    admin.remove_device("1")


def test_a_device_is_emptied_and_then_removed(admin: Admin, store: ObjectStore, added: Path) -> None:
    keys = [store.put(bytes([number]) * 100_000, name=f"name{number}") for number in range(50)]
    assert any(1 in store.stat(key.uuid).devices for key in keys)
    assert admin.remove_device(str(added))["standing"] == "leaving"
    assert ended(admin)["state"] == "done"
    assert len(admin.devices()) == 1
    assert [store.get(key.uuid)[:1] for key in keys] == [bytes([number]) for number in range(50)]
    assert not is_locked(added)
    with closing(open_device(added, read_only=True)) as device:
        assert read_label(device) is None


def test_a_device_that_leaves_is_left_to_the_mover(admin: Admin, store: ObjectStore, added: Path) -> None:
    """Which may be at work on it: it would stumble if somebody else let go of the device."""
    set_standing(store, 1, Standing.LEAVING)
    assert store.allocator.is_empty(1)
    assert admin.remove_device("1")["standing"] == "leaving"
    assert ended(admin)["state"] == "done"
    assert len(admin.devices()) == 1


def test_a_device_is_replaced(admin: Admin, store: ObjectStore, make_image: MakeImage) -> None:
    keys = [store.put(bytes([number]) * 100_000) for number in range(50)]
    new = admin.add_device(NewDevice(str(make_image(32 * MIB)), replaces="0"))
    assert ended(admin)["state"] == "done"
    assert [device["index"] for device in admin.devices()] == [new["index"]] == [1]
    assert [store.get(key.uuid)[:1] for key in keys] == [bytes([number]) for number in range(50)]


def test_a_device_that_was_to_leave_is_kept(admin: Admin, store: ObjectStore, added: Path) -> None:
    key = store.put(bytes(100_000))
    admin._mover.task.bytes_s_max = 1000
    admin.remove_device("1" if 1 in store.stat(key.uuid).devices else "0")
    (leaving,) = [device for device in admin.devices() if device["standing"] == "leaving"]
    assert admin.keep_device(str(leaving["index"]))["standing"] == "in use"
    assert ended(admin)["state"] == "stopped"
    assert store.get(key.uuid) == bytes(100_000)


def test_a_pool_that_is_busy_says_so_and_goes_on(
    admin: Admin, added: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> NoReturn:
        raise TimeoutError

    for change in ("add_device", "set_standing"):
        monkeypatch.setattr(f"rustord.admin.{change}", late)
    started: list[bool] = []
    monkeypatch.setattr(admin._mover, "start", lambda: started.append(True))
    with pytest.raises(Unavailable, match="the pool is busy"):
        admin.add_device(NewDevice(str(new := make_image(16 * MIB))))
    assert not is_locked(new)
    with pytest.raises(Unavailable, match="the pool is busy"):
        admin.keep_device("1")
    assert started


def test_a_mover_is_told_what_to_do(admin: Admin) -> None:
    with pytest.raises(InvalidRequest, match="knows no work 'dance'"):
        admin.start_mover("dance")
    admin.start_mover("rebalance")
    assert ended(admin) | {"moved": 0, "job": "rebalancing", "error": ""} == ended(admin)
    assert admin.stop_mover()["state"] == "done"


def ended(admin: Admin) -> dict[str, Any]:
    """What became of what is moved, once it has ended."""
    assert admin._mover.task.wait(30)
    return admin.mover()


def test_the_last_device_is_not_removed(admin: Admin) -> None:
    with pytest.raises(InvalidRequest, match="is the pool's only one"):
        admin.remove_device("0")


@pytest.mark.parametrize("which", ["1", "-1", "00", "", UNKNOWN, "/dev/sda", "x" * 5000])
def test_a_device_that_the_pool_has_not_is_not_found(admin: Admin, which: str) -> None:
    with pytest.raises(NotFound, match="the pool has no device") as missed:
        admin.remove_device(which)
    assert len(missed.value.message) < 200


def test_a_missing_device_is_not_removed(make_image: MakeImage, tmp_path: Path) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    with opened(tmp_path, images[0]) as (_, admin):
        missing = admin.devices()[1]["uuid"]
        with pytest.raises(DeviceError, match="is missing"):
            admin.remove_device(missing)


def test_a_mirrored_pool_that_lost_a_device_can_be_given_another(make_image: MakeImage, tmp_path: Path) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    with opened(tmp_path, images[0], placer=Mirrored()) as (store, admin):
        with pytest.raises(RustordError, match="needs 2 devices, and 1 can take it: device 1 is missing"):
            store.put(b"data")
        admin.add_device(NewDevice(str(make_image(16 * MIB)), force=False, dry_run=False))
        key = store.put(b"data")
        assert store.get(key.uuid) == b"data"
        assert store.stat(key.uuid).devices == {0, 2}


# Plugins


def test_plugins_are_listed_with_what_they_offer(admin: Admin) -> None:
    own, *others = admin.plugins()
    assert (own["name"], own["distribution"], own["loaded"]) == ("rustord", "rustord", True)
    assert Contiguous().name in own["offers"]["placer"]
    assert set(own["offers"]) == {"keygen", "placer", "keystore"}
    assert all(not plugin["loaded"] and plugin["offers"] == {} for plugin in others)


def test_uuids_are_text_that_can_be_read_back(admin: Admin, store: ObjectStore) -> None:
    assert parse_uuid(admin.devices()[0]["uuid"]) == store.blocks.slots[0].uuid


def test_what_a_scrub_found_lost_is_a_problem(pool: Opened) -> None:
    key = pool.store.put(b"precious", name="precious")
    (extent,) = pool.store.stat(key.uuid).extents
    device = pool.store.blocks.device(0)
    device.write(extent.block * 4096, [b"damaged"])
    pool.admin.start_scrub(False)
    deadline = time.monotonic() + 20
    while pool.admin.scrub()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool.admin.pool()["state"] == "degraded"
    assert "1 chunks lost" in pool.admin.pool()["problems"][0]
    (listed,) = pool.admin.scrub()["damaged_objects"]
    assert (listed["name"], listed["state"]) == ("precious", "lost")
    assert pool.admin.devices()[0]["bad_bytes"] == 4096
    pool.store.delete(key.uuid)
    pool.admin.start_scrub(True)
    while pool.admin.scrub()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool.admin.pool()["state"] == "ok"
