"""Devices that are found by rules, that are missing, come and go: with the kernel's own loop devices and events."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import signal
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import rustord
from rustord.client import Client
from rustord.config import Config, PoolTable
from rustord.discovery import DeviceRemoved, Watcher, candidates
from rustord.hotplug import Hotplug
from rustord.label import label_offsets
from rustord.placer import Mirrored
from rustord.repair import Repairer
from rustord.writer import Writer
from tests.conftest import FaultyLoop, LoopDevices
from tests.daemon import MIB, Daemon, make_pool, until

MakeDaemon = Callable[..., Daemon]
MakeImage = Callable[..., Path]

LOOP_SET_STATUS64, LOOP_GET_STATUS64 = 0x4C04, 0x4C05  # linux/loop.h
LO_OFFSET = 24
"""Where lo_offset is in struct loop_info64, which has 232 bytes."""

MIRRORED = "[placer]\npolicy = 'mirrored'\n"

pytestmark = pytest.mark.root


class Disks:
    """Loop devices of a size that nobody else's have, so that a rule can mean them and no others."""

    def __init__(self, make_loop: LoopDevices, make_image: MakeImage, directory: Path) -> None:
        self._make_loop = make_loop
        self._make_image = make_image
        self._directory = directory
        self.size = 16 * MIB + 512 * random.SystemRandom().randrange(1, 1 << 14)
        self.rule = f"[[device]]\npath = '/dev/loop*'\nsize_min = {self.size}\nsize_max = {self.size}\n"

    def image(self) -> Path:
        return self._make_image(self.size)

    def attach(self, image: Path) -> Path:
        return self._make_loop.attach(image)

    def detach(self, device: Path) -> None:
        """Detach a device that nobody uses (any more), and wait until it is gone."""
        self._make_loop.detach(device)
        until(lambda: sectors(device) == 0, f"{device} is gone")

    def link(self, device: Path, name: str) -> Path:
        """Another name for a device, like those of udev."""
        link = self._directory / name
        with suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(device)
        return link


def sectors(device: Path) -> int:
    return int(Path(f"/sys/block/{device.name}/size").read_text())


@pytest.fixture
def disks(make_loop: LoopDevices, make_image: MakeImage, tmp_path: Path) -> Disks:
    return Disks(make_loop, make_image, tmp_path)


@pytest.fixture
def pair(disks: Disks) -> list[Path]:
    """Two devices with a pool."""
    devices = [disks.attach(disks.image()) for _ in range(2)]
    make_pool(*devices)
    return devices


def states(daemon: Daemon) -> list[str]:
    return [device["state"] for device in daemon.devices()]


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def test_a_rule_finds_the_devices(make_daemon: MakeDaemon, disks: Disks, pair: list[Path]) -> None:
    daemon = make_daemon(config=disks.rule).start()
    assert states(daemon) == ["online", "online"]
    assert {device["path"] for device in daemon.devices()} == set(map(str, pair))
    uuid = daemon.put(b"data")
    assert daemon.restart().get(uuid) == b"data"


def test_a_device_that_is_named_and_meant_by_a_rule_counts_once(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path]
) -> None:
    daemon = make_daemon(disks.link(pair[0], "disk"), config=disks.rule).start()
    assert states(daemon) == ["online", "online"]


def test_a_rule_that_means_no_device_of_a_pool_says_so(make_daemon: MakeDaemon, disks: Disks) -> None:
    blank = disks.attach(disks.image())
    status, said = make_daemon(config=disks.rule).refusal()
    assert status == 11
    assert "no device that a [[device]] rule means bears a label" in said
    assert blank.read_bytes() == bytes(disks.size)


def test_a_rule_that_means_two_pools_is_refused(make_daemon: MakeDaemon, disks: Disks, pair: list[Path]) -> None:
    make_pool(other := disks.attach(disks.image()))
    before = list(map(sha256, [*pair, other]))
    daemon = make_daemon(config=disks.rule)
    status, said = daemon.refusal()
    assert status == 78
    assert "the [[device]] rules find devices of 2 pools: " in said
    assert "name one device of the pool in pool.devices" in said
    assert list(map(sha256, [*pair, other])) == before
    named = make_daemon(pair[1], config=disks.rule).start()
    assert {device["path"] for device in named.devices()} == set(map(str, pair))


def test_what_is_not_ours_is_never_touched(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices
) -> None:
    foreign, other_pool, _ = theirs = [disks.attach(disks.image()) for _ in range(3)]
    subprocess.run(["mkfs.ext4", "-q", foreign], check=True)
    make_pool(other_pool)
    before = list(map(sha256, theirs))
    missing = make_loop.image(pair[1])
    disks.detach(pair[1])
    daemon = make_daemon(pair[0], config=disks.rule).start()
    daemon.put(bytes(MIB))
    for number, device in enumerate(theirs):  # once more, now that it serves
        image = make_loop.image(device)
        disks.detach(device)
        theirs[number] = disks.attach(image)
    disks.attach(missing)
    until(lambda: states(daemon) == ["online", "online"], "our own device is taken in")
    assert daemon.stop() == 0
    assert list(map(sha256, theirs)) == before
    assert " ERROR " not in daemon.log


# Missing at the start


def test_a_mirrored_pool_serves_without_one_device_and_takes_it_back(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices
) -> None:
    daemon = make_daemon(disks.link(pair[0], "a"), disks.link(pair[1], "b"), config=MIRRORED).start()
    objects = {daemon.put(data): data for data in (b"", b"x", os.urandom(100_000), os.urandom(2 * MIB))}
    free = daemon.pool()["free_bytes"]
    daemon.stop()
    image = make_loop.image(pair[1])
    disks.detach(pair[1])
    disks.link(Path("/dev/nothing"), "b")

    daemon.start()
    assert f"{daemon.directory.parent / 'b'} is not there" in daemon.log
    assert "device 1 is missing: not found" in daemon.log
    assert states(daemon) == ["online", "missing"]
    pool = daemon.pool()
    assert pool["state"] == "degraded"
    assert pool["problems"] == ["device 1 is missing: not found"]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects

    refused = daemon.request("POST", "/v1/objects", b"data")
    assert refused.status == 503
    assert "new data needs 2 devices, and 1 can take it: device 1 is missing" in refused.problem
    uuid = next(iter(objects))
    refused = daemon.request("DELETE", f"/v1/objects/{uuid}")
    assert refused.status == 503
    assert "device 1 " in refused.problem
    assert "missing" in refused.problem
    assert daemon.get(uuid) == objects[uuid]

    back = disks.attach(image)
    disks.link(back, "b")
    Path(f"/sys/block/{back.name}/uevent").write_text("change")  # the link came later than the device
    until(lambda: states(daemon) == ["online", "online"], "the device is taken in")
    until(lambda: f"device 1 is back: {back}" in daemon.log, "that is told")
    assert daemon.pool()["state"] == "ok"
    assert daemon.pool()["free_bytes"] == free
    objects[daemon.put(b"new")] = b"new"
    daemon.delete(uuid)
    del objects[uuid]
    disks.link(Path("/dev/nothing"), "a")
    daemon.restart()  # the device that was away knows it all
    assert states(daemon) == ["missing", "online"]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects


def test_only_the_objects_on_a_missing_device_are_missing(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices
) -> None:
    daemon = make_daemon(config=f"{disks.rule}[placer]\npolicy = 'striped'\n").start()
    objects: list[dict[str, bytes]] = [{}, {}]
    while not all(len(there) > 1 for there in objects):
        data = os.urandom(5000)
        uuid = daemon.put(data)
        objects[device_of(daemon, uuid)][uuid] = data
    daemon.stop()
    image = make_loop.image(pair[1])
    disks.detach(pair[1])

    daemon.start()
    assert {uuid: daemon.get(uuid) for uuid in objects[0]} == objects[0]
    for method in ("GET", "DELETE"):
        reply = daemon.request(method, f"/v1/objects/{next(iter(objects[1]))}")
        assert reply.status == 503
        assert "of the pool is missing: not found" in reply.problem
        assert "attach it again" in reply.problem
    daemon.delete(uuid := next(iter(objects[0])))
    del objects[0][uuid]
    objects[0][uuid] = daemon.get(uuid := daemon.put(b"new"))
    assert device_of(daemon, uuid) == 0

    disks.attach(image)
    until(lambda: states(daemon) == ["online", "online"], "the device is taken in")
    assert {uuid: daemon.get(uuid) for uuid in objects[1]} == objects[1]
    assert {uuid: daemon.get(uuid) for uuid in objects[0]} == objects[0]


def device_of(daemon: Daemon, uuid: str) -> int:
    """The index of the one device that an Object is on."""
    (copy,) = daemon.request("GET", f"/v1/objects/{uuid}/manifest").json()["copies"]
    (index,) = {extent["index"] for extent in copy}
    return int(index)


def test_a_disk_that_has_died_is_done_without(
    make_loop: LoopDevices, faulty_loop: FaultyLoop, make_daemon: MakeDaemon
) -> None:
    devices = [faulty_loop.path, make_loop(16 * MIB)]
    make_pool(*devices)
    daemon = make_daemon(*devices, config=MIRRORED).start()
    objects = {daemon.put(data): data for data in (b"x", os.urandom(100_000))}
    daemon.stop()
    with faulty_loop.failing():
        daemon.start()
        assert states(daemon) == ["missing", "online"]
        assert f"{devices[0]} is left out: " in daemon.log
        assert {uuid: daemon.get(uuid) for uuid in objects} == objects
        daemon.stop()
    daemon.start()
    assert states(daemon) == ["online", "online"]
    assert daemon.pool()["state"] == "ok"
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects


def test_a_device_with_changes_that_nobody_knows_says_what_to_do(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices
) -> None:
    """After a crash its journal is replayed, and only an opening does that."""
    patch = "import rustord.writer\nrustord.writer.CHECKPOINT_S = 3600"
    daemon = make_daemon(config=f"{disks.rule}[placer]\npolicy = 'striped'\n", patch=patch).start()
    objects: dict[str, bytes] = {}
    while {device_of(daemon, uuid) for uuid in objects} != {0, 1}:
        data = os.urandom(5000)
        objects[daemon.put(data)] = data
    daemon.stop(signal.SIGKILL)
    image = make_loop.image(pair[1])
    disks.detach(pair[1])
    daemon.start()
    back = disks.attach(image)
    until(lambda: daemon.pool()["problems"] != ["device 1 is missing: not found"], "the device is looked at")
    assert daemon.pool()["problems"] == [
        f"device 1 is missing: {back} holds changes that the index does not know (restart rustord, which replays them)"
    ]
    daemon.restart()
    assert states(daemon) == ["online", "online"]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects


@pytest.mark.parametrize("how", ["detached", "blank"])
def test_a_node_without_its_disk_is_done_without(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices, how: str
) -> None:
    daemon = make_daemon(*pair, config=MIRRORED).start()
    uuid = daemon.put(b"data")
    daemon.stop()
    if how == "detached":
        disks.detach(pair[0])  # but the node stays, and can be opened
    else:
        make_loop.image(pair[0]).write_bytes(bytes(disks.size))
    daemon.start()
    assert states(daemon) == ["missing", "online"]
    assert f"{pair[0]} is left out: it bears no rustord label" in daemon.log
    assert daemon.get(uuid) == b"data"


def test_a_disk_that_was_given_up_and_stays_plugged_in_is_done_without(
    make_loop: LoopDevices, faulty_loop: FaultyLoop, make_daemon: MakeDaemon
) -> None:
    devices = [faulty_loop.path, make_loop(16 * MIB)]
    make_pool(*devices)
    daemon = make_daemon(*devices).start()
    with faulty_loop.failing():
        until(lambda: daemon.request("POST", "/v1/objects", bytes(5000)).status == 503, "it fails")
    with Client(daemon.socket) as client:
        client.remove_device("0", give_up=True)
    until(lambda: len(daemon.devices()) == 1, "it is given up")
    daemon.restart()
    assert [device["state"] for device in daemon.devices()] == ["online"]
    assert f"{devices[0]} is left out: it was removed from the pool" in daemon.log


def test_a_disk_that_somebody_else_took_meanwhile_is_left_to_him(
    make_image: MakeImage, make_daemon: MakeDaemon
) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    daemon = make_daemon(*images, config=MIRRORED).start()
    uuid = daemon.put(b"data")
    daemon.stop()
    subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", images[0]], check=True)
    before = sha256(images[0])
    daemon.start()
    assert states(daemon) == ["missing", "online"]
    assert "bears the label of a rustord pool, and not it alone" in daemon.log
    assert daemon.get(uuid) == b"data"
    daemon.stop()
    assert sha256(images[0]) == before
    daemon.configure("")
    subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", images[1]], check=True)
    status, said = daemon.refusal()
    assert status == 12
    assert f"{images[0]} carries ext4" in said


def test_a_disk_whose_labels_are_all_damaged_is_done_without(make_image: MakeImage, make_daemon: MakeDaemon) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    daemon = make_daemon(*images, config=MIRRORED).start()
    uuid = daemon.put(b"data")
    daemon.stop()
    with images[0].open("r+b") as opened:
        for offset in label_offsets(16 * MIB):
            opened.seek(offset + 100)
            opened.write(b"\xff" * 8)
    before = sha256(images[0])
    daemon.start()
    assert states(daemon) == ["missing", "online"]
    assert daemon.get(uuid) == b"data"
    daemon.stop()
    assert sha256(images[0]) == before


def test_a_device_that_came_while_the_pool_was_opened_is_taken_in(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path]
) -> None:
    patch = "find = daemon.find_devices\ndaemon.find_devices = lambda config: find(config)[:1]"
    daemon = make_daemon(config=disks.rule + MIRRORED, patch=patch).start()
    until(lambda: states(daemon) == ["online", "online"], "the device is taken in")


def test_a_rule_that_is_new_counts_for_devices_that_are_there(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path]
) -> None:
    debug = "[log]\nlevel = 'debug'\n"
    daemon = make_daemon(pair[0], config=debug).start()
    daemon.wait_for_log("devices have come, gone or changed")
    assert states(daemon) == ["online", "missing"]
    assert "device has changed" in daemon.reload(disks.rule + debug)
    until(lambda: states(daemon) == ["online", "online"], "the device is taken in")


# Gone while it is in use


class Plug:
    """Takes a loop device's medium away while it is in use, as an unplugged disk loses it; and puts it back."""

    def __init__(self, device: Path) -> None:
        self._device = device

    def pull(self) -> None:
        self._set_offset(1 << 40)

    def push(self) -> None:
        self._set_offset(0)

    def _set_offset(self, offset: int) -> None:
        with self._device.open("rb") as opened:
            info = bytearray(232)
            fcntl.ioctl(opened, LOOP_GET_STATUS64, info)
            struct.pack_into("<Q", info, LO_OFFSET, offset)
            fcntl.ioctl(opened, LOOP_SET_STATUS64, bytes(info))
        until(lambda: (sectors(self._device) == 0) == bool(offset), "the size has changed")
        Path(f"/sys/block/{self._device.name}/uevent").write_text("change")


@pytest.mark.parametrize("linked", [False, True])
def test_a_mirrored_pool_goes_on_without_a_device_that_is_pulled(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], linked: bool
) -> None:
    named = [disks.link(pair[0], "a"), disks.link(pair[1], "b")] if linked else pair
    daemon = make_daemon(*named, config=MIRRORED).start()
    objects = {daemon.put(data): data for data in (b"", b"x", os.urandom(100_000), os.urandom(2 * MIB))}
    if linked:
        disks.link(Path("/dev/nothing"), "b")  # udev removes a disk's links before anybody hears that it has gone
    Plug(pair[1]).pull()
    until(lambda: states(daemon) == ["online", "missing"], "the device is let go")
    assert f"device 1 has gone: {pair[1]}" in daemon.log
    assert daemon.pool()["problems"] == ["device 1 is missing: it was removed from the machine"]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects
    refused = daemon.request("POST", "/v1/objects", b"data")
    assert refused.status == 503
    assert "new data needs 2 devices, and 1 can take it: device 1 is missing" in refused.problem
    Plug(pair[1]).push()
    disks.link(pair[1], "b")
    daemon.restart()
    assert states(daemon) == ["online", "online"]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects
    daemon.delete(next(iter(objects)))


def test_a_storm_of_events_ends_with_what_is_there(make_daemon: MakeDaemon, pair: list[Path], tmp_path: Path) -> None:
    """Of 10,000 events many are lost; and what they say is the smaller part of what they are about."""
    daemon = make_daemon(*pair, config=MIRRORED).start()
    uuid = daemon.put(b"data")
    plug = Plug(pair[1])
    for change, expected in ((plug.pull, "missing"), (plug.push, "online"), (plug.pull, "missing")):
        with Path(f"/sys/block/{pair[0].name}/uevent").open("w") as uevent:
            for number in range(10_000):
                uevent.write("change")
                uevent.flush()
                if number == 5_000:
                    change()
        until(lambda: states(daemon) == ["online", expected], "it knows what is there")  # noqa: B023
        assert daemon.get(uuid) == b"data"
    assert "following the devices failed" not in daemon.log


@pytest.mark.parametrize(
    ("function", "error", "again", "said"),
    [
        # A writer that waits for the very disk that was pulled has no time for that until the kernel gives up on it.
        ("detach_device", "TimeoutError()", "LOOK_AGAIN_S", "following the devices failed"),
        # What has to be in the index before may find no room there.
        ("attach_device", "errors.NoSpace('the index is full')", "REFUSED_S", "is not taken in: the index is full"),
    ],
)
def test_a_device_that_cannot_be_let_go_or_taken_back_at_once_is_so_later(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], function: str, error: str, again: str, said: str
) -> None:
    patch = f"""
from rustord import errors, hotplug
function, fails = hotplug.{function}, [True]
def late(*arguments):
    if fails:
        fails.clear()
        raise {error}
    return function(*arguments)
hotplug.{function} = late
daemon.{again} = 0.01
"""
    running = make_daemon(*pair, config=MIRRORED, patch=patch).start()
    uuid = running.put(b"data")
    plug = Plug(pair[1])
    plug.pull()
    until(lambda: states(running) == ["online", "missing"], "the device is let go")
    plug.push()
    until(lambda: states(running) == ["online", "online"], "the device is taken back")
    assert said in running.log
    assert running.get(uuid) == b"data"


def test_a_device_that_is_pulled_while_the_pool_is_opened_is_let_go(pair: list[Path], tmp_path: Path) -> None:
    """It is open by then, and not among those that are there when they are listed for the first time."""
    with rustord.open(pair, directory=tmp_path / "index") as store:
        writer = Writer(store)
        plug = Plug(pair[1])
        plug.pull()
        hotplug = Hotplug(store, writer, Config(pool=PoolTable(devices=tuple(pair))))
        hotplug.follow()
        assert store.blocks.writable_indices() == [0]
        plug.push()
        hotplug.follow()
        assert store.blocks.writable_indices() == [0, 1]
        hotplug.close()
        assert writer.close()


def test_a_device_that_was_pulled_a_moment_ago_is_not_damaged(pair: list[Path], tmp_path: Path) -> None:
    with rustord.open(pair, directory=tmp_path / "index", placer=Mirrored(2)) as store:
        writer = Writer(store)
        repairer = Repairer(store, writer)
        record = store.stat(store.put(os.urandom(300_000)).uuid)
        Plug(pair[1]).pull()  # and nobody has let go of it yet
        health = repairer.examine(record, [0, 1])
        assert (health.lost, health.waiting, health.mended, health.bad) == ([], [], [], [])
        repairer.close()
        assert writer.close()


def test_names_that_move_do_not_matter(
    make_daemon: MakeDaemon, disks: Disks, pair: list[Path], make_loop: LoopDevices
) -> None:
    named = [disks.link(pair[0], "a"), disks.link(pair[1], "b")]
    daemon = make_daemon(*named, config=MIRRORED).start()
    objects = {daemon.put(data): data for data in (b"x", os.urandom(100_000))}
    daemon.stop()
    disks.link(pair[1], "a")
    disks.link(pair[0], "b")
    daemon.start()
    assert states(daemon) == ["online", "online"]
    assert [device["path"] for device in daemon.devices()] == [str(path) for path in reversed(named)]
    assert {uuid: daemon.get(uuid) for uuid in objects} == objects
    assert daemon.pool()["state"] == "ok"


def test_another_disk_of_the_same_number_that_has_gone_is_not_ours(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel hands out the number of a disk that went at once; the news of it may come later than the next disk."""
    config = Config(pool=PoolTable(devices=tuple(pair)))
    with rustord.open(pair, directory=tmp_path / "index") as store:
        writer = Writer(store)
        hotplug = Hotplug(store, writer, config)
        ours = next(candidate for candidate in candidates() if candidate.path == str(pair[1]))
        news = [[DeviceRemoved(replace(ours, diskseq=ours.diskseq - 1))], [DeviceRemoved(ours)]]
        monkeypatch.setattr(Watcher, "wait", lambda self, timeout: news.pop(0))
        monkeypatch.setattr("rustord.hotplug.candidates", list)  # as for the kernel, it has gone
        hotplug.follow()
        assert store.blocks.writable_indices() == [0, 1]
        hotplug.follow()
        assert store.blocks.writable_indices() == [0]
        hotplug.close()
        assert writer.close()
