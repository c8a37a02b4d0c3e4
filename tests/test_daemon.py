"""The daemon from its start to its end: what it opens and what it refuses, signals, the socket, the log."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

import rustord
from rustord.blockdevice import open_device
from rustord.blockstore import read_label
from rustord.event import DEVICE_REMOVED
from rustord.label import State
from tests.conftest import LoopDevices, PlainUser
from tests.daemon import MIB, Daemon, Reply, make_pool, until
from tests.frontends.nbdserved import NbdPeer
from tests.wire.peer import request

MakeDaemon = Callable[..., Daemon]
MakeImage = Callable[..., Path]


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    """An image file of 16 MiB with a pool."""
    path = make_image(16 * MIB)
    make_pool(path)
    return path


@pytest.fixture
def daemon(make_daemon: MakeDaemon, image: Path) -> Daemon:
    return make_daemon(image)


def state_of(path: Path) -> State:
    with closing(open_device(path, read_only=True, exclusive=False)) as device:
        label = read_label(device)
    assert label is not None
    return label.state


# The way it goes


def test_objects_outlive_the_daemon(daemon: Daemon) -> None:
    daemon.start()
    one, two = daemon.put(b"one"), daemon.put(b"two", name="a/b")
    daemon.delete(one)
    daemon.restart()
    assert daemon.get(two) == b"two"
    assert daemon.request("GET", "/v1/names/a/b").body == b"two"
    assert daemon.request("GET", f"/v1/objects/{one}").status == 404
    assert daemon.pool()["objects"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_a_clean_pool_and_nothing_to_replay(daemon: Daemon, image: Path, number: int) -> None:
    daemon.start().put(b"data")
    assert state_of(image) is State.OPEN
    assert daemon.stop(number) == 0
    assert state_of(image) is State.CLEAN
    assert daemon.start().pool()["objects"] == 1
    assert "replayed" not in daemon.log


def test_a_killed_daemon_has_lost_nothing(daemon: Daemon, image: Path) -> None:
    daemon.start()
    uuids = {daemon.put(data): data for data in (b"", b"x", bytes(4096), os.urandom(MIB))}
    daemon.stop(signal.SIGKILL)
    assert state_of(image) is State.OPEN
    daemon.start()
    assert {uuid: daemon.get(uuid) for uuid in uuids} == uuids


def test_it_tells_at_start_what_it_opened(daemon: Daemon) -> None:
    daemon.start()
    uuid = daemon.pool()["uuid"]
    assert f"pool {uuid} is open after " in daemon.log
    assert f"serving on {daemon.socket}" in daemon.log


def test_the_socket_has_the_mode_of_the_configuration(daemon: Daemon) -> None:
    daemon.configure("[socket]\nmode = '0600'\n")
    daemon.start()
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600


# The end, while somebody is at it


class Upload:
    """An upload of 8 MiB of which the first 4 MiB have been sent."""

    def __init__(self, daemon: Daemon) -> None:
        self.data = random.Random(1).randbytes(8 * MIB)
        self.connection = daemon.connect()
        self.connection.putrequest("POST", "/v1/objects")
        self.connection.putheader("Content-Length", str(len(self.data)))
        self.connection.endheaders(self.data[: 4 * MIB])

    def finish(self) -> Reply:
        self.connection.send(self.data[4 * MIB :])
        reply = self.connection.getresponse()
        return Reply(reply.status, dict(reply.headers), reply.read())


@contextmanager
def upload_begun(daemon: Daemon) -> Iterator[Upload]:
    free = daemon.pool()["free_bytes"]
    upload = Upload(daemon)
    with closing(upload.connection):
        until(lambda: daemon.pool()["free_bytes"] < free, "the upload has begun")
        yield upload


def test_an_upload_under_way_may_end_when_the_daemon_is_told_to_stop(daemon: Daemon, image: Path) -> None:
    daemon.start()
    with upload_begun(daemon) as upload:
        assert daemon.process is not None
        daemon.process.terminate()
        daemon.wait_for_log("stopping")
        until(lambda: not daemon.answers(), "nobody is let in any more")
        assert daemon.process.poll() is None
        reply = upload.finish()
    assert reply.status == 201
    assert daemon.process.wait(60) == 0
    assert state_of(image) is State.CLEAN
    assert daemon.start().get(reply.json()["uuid"]) == upload.data


def test_a_client_that_hangs_cannot_keep_it_from_stopping(make_daemon: MakeDaemon, image: Path) -> None:
    daemon = make_daemon(image, patch="daemon.DRAIN_S = 0.2").start()
    free = daemon.pool()["free_bytes"]
    with upload_begun(daemon):
        assert daemon.stop() == 0
    assert "1 connections were still busy after 0.2 s, and are cut" in daemon.log
    assert state_of(image) is State.CLEAN
    assert daemon.start().pool()["free_bytes"] == free


def test_an_idle_client_does_not_delay_the_end(daemon: Daemon) -> None:
    daemon.start()
    with closing(daemon.connect()) as connection:
        connection.request("GET", "/v1/pool")
        connection.getresponse().read()
        assert daemon.stop() == 0
    assert "were still busy" not in daemon.log


def test_a_snapshot_under_way_does_not_keep_it_from_stopping(make_daemon: MakeDaemon, make_image: MakeImage) -> None:
    """All of the volume is read for its sum, which takes minutes."""
    make_pool(image := make_image(64 << 30))  # the longer its journal, the longer an Object may be
    daemon = make_daemon(image, patch="daemon.DRAIN_S = 0.2").start()
    size = 512 << 30
    assert daemon.request("POST", "/v1/volumes", json.dumps({"name": "disk", "size": size})).status == 201
    with closing(daemon.connect()) as connection:
        connection.request("POST", "/v1/volumes/disk/snapshot", json.dumps({}))
        until(lambda: daemon.request("GET", "/v1/volumes/disk").json()["layers"] == 2, "it is read")
        assert daemon.stop() == 0
    daemon.start()
    assert daemon.request("GET", "/v1/volumes/disk").json()["size"] == size


def test_what_is_acknowledged_while_it_stops_is_kept(daemon: Daemon, image: Path) -> None:
    daemon.start()
    acknowledged: dict[str, bytes] = {}

    def load(number: int) -> None:
        source = random.Random(number)
        with closing(daemon.connect()) as connection:
            while True:
                data = source.randbytes(source.randrange(20_000))
                try:
                    connection.request("POST", "/v1/objects", data)
                    reply = connection.getresponse()
                    body = Reply(reply.status, {}, reply.read())
                except OSError:
                    return
                if body.status == 201:
                    acknowledged[body.json()["uuid"]] = data
                elif body.status in (503, 507):
                    return

    clients = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    until(lambda: len(acknowledged) > 50, "the clients are at it")
    assert daemon.stop() == 0
    for client in clients:
        client.join(60)
    assert state_of(image) is State.CLEAN
    daemon.start()
    assert {uuid: daemon.get(uuid) for uuid in acknowledged} == acknowledged
    assert daemon.pool()["objects"] == len(acknowledged)
    assert "replayed" not in daemon.log


HANGING = """
import os, time
import rustord.blockdevice as blockdevice
flush = blockdevice.ImageFile.flush
def hanging(self):
    while os.path.exists(os.environ["HANG"]):
        time.sleep(0.01)
    flush(self)
blockdevice.ImageFile.flush = hanging
daemon.DRAIN_S = daemon.CUT_S = daemon.FINISH_S = 0.2
"""


@pytest.mark.parametrize("device_count", [1, 2])
def test_a_device_that_hangs_cannot_keep_it_from_stopping(
    make_daemon: MakeDaemon, make_image: MakeImage, tmp_path: Path, device_count: int
) -> None:
    images = [make_image(16 * MIB) for _ in range(device_count)]
    make_pool(*images)
    daemon = make_daemon(*images, patch=HANGING, config="[placer]\npolicy = 'striped'\noptions = {unit_blocks = 1}\n")
    hang = tmp_path / "hang"
    daemon.environment["HANG"] = str(hang)
    before = daemon.start().put(bytes(20_000))
    hang.touch()
    with closing(daemon.connect()) as connection:
        connection.request("POST", "/v1/objects", bytes(20_000))
        until(lambda: daemon.pool()["free_bytes"] < 16 * MIB * device_count, "it is placed")
        assert daemon.stop() == 11
    assert "a device does not answer" in daemon.log
    hang.unlink()
    assert daemon.start().get(before) == bytes(20_000)


# Signals that come early

SIGNALLED = """
import signal
before = daemon.{function}
def signalled(*arguments):
    signal.raise_signal(signal.{signal})
    return before(*arguments)
daemon.{function} = signalled
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_stop_just_before_it_serves_is_not_forgotten(make_daemon: MakeDaemon, image: Path, number: str) -> None:
    daemon = make_daemon(image, patch=SIGNALLED.format(function="Metrics", signal=number))
    assert daemon.begin().wait(60) == 0
    assert state_of(image) is State.CLEAN


def test_a_stop_while_it_opens_the_pool_is_followed_at_once(make_daemon: MakeDaemon, image: Path) -> None:
    daemon = make_daemon(image, patch=SIGNALLED.format(function="Supervisor.progress", signal="SIGTERM"))
    assert daemon.begin().wait(60) == 143
    assert "serving on" not in daemon.log
    assert make_daemon(image).start().put(b"data")


def test_sighup_while_it_opens_the_pool_waits_until_it_serves(make_daemon: MakeDaemon, image: Path) -> None:
    daemon = make_daemon(image, patch=SIGNALLED.format(function="open_devices", signal="SIGHUP")).start()
    daemon.wait_for_log("the configuration was read again")
    assert daemon.put(b"data")


# SIGHUP


def test_sighup_reads_the_level_of_the_log_again(daemon: Daemon) -> None:
    daemon.configure("[log]\nlevel = 'error'\n")
    daemon.start()
    assert daemon.log == ""
    assert "log.level has changed" not in daemon.reload("[log]\nlevel = 'info'\n")  # the level was error then
    assert "the configuration was read again" in daemon.log


def test_sighup_reads_what_a_slow_request_is_again(daemon: Daemon) -> None:
    daemon.configure("[log]\nslow_request = '1 h'\n")
    daemon.start().put(bytes(4 * MIB))
    assert "slow request" not in daemon.log
    assert "log.slow_request has changed" in daemon.reload("[log]\nslow_request = '1 ms'\n")
    daemon.put(bytes(4 * MIB))
    daemon.wait_for_log("slow request: POST /v1/objects took ")


@pytest.mark.root
def test_sighup_reads_roles_again(daemon: Daemon, plain_user: PlainUser) -> None:
    daemon.socket = plain_user.directory / "rustord.sock"
    here = f"[socket]\npath = '{daemon.socket}'\nmode = '0666'\n"
    daemon.configure(here)
    daemon.start()

    def statuses() -> list[str]:
        curl = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--unix-socket"]
        asked: list[list[str]] = [[], ["--data", "x"], ["--request", "DELETE"]]
        paths = ["objects", "objects", "devices/0"]
        return [
            plain_user.run(*curl, daemon.socket, *options, f"http://rustord/v1/{path}").stdout
            for options, path in zip(asked, paths, strict=True)
        ]

    assert statuses() == ["403", "403", "403"]
    assert "roles.readers has changed" in daemon.reload(f"{here}[roles]\nreaders = ['{plain_user.uid}']\n")
    assert statuses() == ["200", "403", "403"]
    daemon.reload(f"{here}[roles]\nwriters = ['@{plain_user.gid}']\n")
    assert statuses() == ["200", "201", "403"]
    daemon.reload(f"{here}[roles]\nadmins = ['{plain_user.uid}']\n")
    assert statuses() == ["200", "201", "507"]  # what is on the pool's only device has nowhere to go
    daemon.reload(here)
    assert statuses() == ["403", "403", "403"]


def test_sighup_says_what_needs_a_restart(daemon: Daemon) -> None:
    said = daemon.start().reload("[placer]\npolicy = 'first-fit'\n[log]\nslow_request = '7 s'\n")
    assert "placer.policy has changed, and takes effect when rustord is started again" in said
    assert "log.slow_request has changed\n" in said
    assert daemon.pool()["placer"] == "contiguous"
    assert daemon.restart().pool()["placer"] == "first-fit"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("[log]\nlevle = 'info'\n", "levle"),
        ("[log]\nlevel = 'loud'\n", "loud"),
        ("[log\n", "line 1"),
    ],
)
def test_a_broken_configuration_changes_nothing(daemon: Daemon, config: str, why: str) -> None:
    said = daemon.start().reload(config)
    assert "the configuration stays as it was" in said
    assert why in said or "test.toml" in said
    assert daemon.put(b"data")
    assert "the configuration was read again" in daemon.reload("")
    daemon.reload(config)
    assert daemon.stop() == 0
    status, text = daemon.refusal()
    assert status == 78
    assert "test.toml" in text


# The socket


def test_a_stale_socket_is_replaced(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(daemon.socket))
    assert daemon.start().put(b"data")


def test_a_socket_on_which_somebody_listens_is_left_alone(
    daemon: Daemon, make_daemon: MakeDaemon, make_image: MakeImage
) -> None:
    daemon.start()
    make_pool(other_image := make_image(16 * MIB))
    other = make_daemon(other_image, config=f"[socket]\npath = '{daemon.socket}'\n")
    other.begin()
    assert other.process is not None
    assert other.process.wait(60) == 11
    assert f"another daemon listens on {daemon.socket}" in other.log
    assert state_of(other_image) is State.CLEAN
    assert daemon.put(b"data")


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(daemon: Daemon, kind: str, tmp_path: Path) -> None:
    if kind == "file":
        daemon.socket.write_text("precious")
    elif kind == "directory":
        daemon.socket.mkdir()
    else:
        (tmp_path / "target").write_text("precious")
        daemon.socket.symlink_to(tmp_path / "target")
    status, said = daemon.refusal()
    assert status == 78
    assert f"{daemon.socket} is not a socket" in said
    assert "hint: " in said
    assert kind == "directory" or daemon.socket.read_text() == "precious"


def test_a_path_that_is_too_long_for_a_socket_is_refused(daemon: Daemon) -> None:
    daemon.configure(f"[socket]\npath = '{daemon.directory / ('x' * 120)}'\n")
    status, said = daemon.refusal()
    assert status == 78
    assert "AF_UNIX path too long" in said


# What it does not open


def test_without_a_device_it_says_how_to_name_one(make_daemon: MakeDaemon) -> None:
    status, said = make_daemon().refusal()
    assert status == 78
    assert "no device is named" in said
    assert "pool.devices" in said


def test_a_device_that_is_not_there_is_named(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    status, said = make_daemon(tmp_path / "gone").refusal()
    assert status == 11  # so that systemd tries again: it may come late
    assert f"none of {tmp_path / 'gone'} is there" in said


def test_a_late_device_is_missed_also_beside_one_without_a_label(
    make_daemon: MakeDaemon, make_image: MakeImage, tmp_path: Path
) -> None:
    status, said = make_daemon(tmp_path / "late", blank := make_image(16 * MIB)).refusal()
    assert status == 11
    assert f"{tmp_path / 'late'} is not there, and {blank} is no help: it bears no rustord label" in said


def test_a_device_without_a_label_is_not_touched(make_daemon: MakeDaemon, make_image: MakeImage) -> None:
    image = make_image(16 * MIB)
    status, said = make_daemon(image).refusal()
    assert status == 13
    assert f"{image} bears no rustord label" in said
    assert "rustorctl pool create" in said
    assert image.read_bytes() == bytes(16 * MIB)


def test_two_daemons_cannot_have_one_pool(daemon: Daemon, make_daemon: MakeDaemon, image: Path) -> None:
    uuid = daemon.start().put(b"data")
    assert daemon.process is not None
    other = make_daemon(image)
    status, said = other.refusal()
    assert status == 11
    assert f"{image} is in use by " in said
    assert f"({daemon.process.pid})" in said
    other.configure(f"[pool]\ndirectory = '{daemon.index}'\n")
    assert other.refusal() == (status, said)
    assert daemon.get(uuid) == b"data"


def test_two_pools_cannot_share_an_index(daemon: Daemon, make_daemon: MakeDaemon, make_image: MakeImage) -> None:
    make_pool(other_image := make_image(16 * MIB))
    other = make_daemon(other_image, config=f"[pool]\ndirectory = '{daemon.index}'\n")
    pool = daemon.start().pool()["uuid"]
    status, said = other.refusal()
    assert status == 11
    assert f"the index at {daemon.index} is in use" in said
    daemon.stop()
    status, said = other.refusal()
    assert status == 13
    assert f"the index belongs to pool {pool}" in said
    assert "hint: give each pool a directory of its own" in said
    assert daemon.start().put(b"data")


def test_devices_of_two_pools_are_refused(make_daemon: MakeDaemon, make_image: MakeImage) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    for image in images:
        make_pool(image)
    before = [image.read_bytes() for image in images]
    status, said = make_daemon(*images).refusal()
    assert status == 13
    assert "belong to different pools" in said
    assert [image.read_bytes() for image in images] == before


def test_a_copy_of_a_device_is_refused(make_daemon: MakeDaemon, image: Path, tmp_path: Path) -> None:
    copy = shutil.copy(image, tmp_path / "copy.img")
    status, said = make_daemon(image, copy).refusal()
    assert status == 13
    assert "is a copy of another" in said


@pytest.mark.parametrize(
    ("config", "status", "what"),
    [
        ("[placer]\npolicy = 'lucky'\n", 14, "there is no placer 'lucky': those to choose from are contiguous"),
        ("[keygen]\nalgorithm = 'crc'\n", 14, "there is no keygen 'crc': those to choose from are xxh3-128"),
        ("[keystore]\nbackend = 'abacus'\n", 14, "there is no keystore 'abacus': those to choose from are lmdb"),
        ("[placer]\npolicy = 'mirrored'\noptions = {copies = 0}\n", 78, "[placer.options]"),
        ("[placer]\noptions = {copy = 2}\n", 78, "[placer.options]"),
        ("[pool]\ndevice = []\n", 78, "devices"),
    ],
)
def test_a_configuration_that_cannot_be_met_is_refused(daemon: Daemon, config: str, status: int, what: str) -> None:
    daemon.configure(config)
    ended, said = daemon.refusal()
    assert ended == status
    assert what in said
    assert "hint: " in said


def test_an_index_whose_record_is_damaged_is_refused_and_made_anew(daemon: Daemon) -> None:
    daemon.start()
    uuids = {daemon.put(data): data for data in (b"one", b"two", b"three")}
    assert daemon.stop() == 0
    (file,) = daemon.index.rglob("data.mdb")
    data = bytearray(file.read_bytes())
    at = -1
    while (at := data.find(b"o" + bytes.fromhex(next(iter(uuids)).replace("-", "")), at + 1)) >= 0:
        data[at + 60] ^= 4
    file.write_bytes(data)
    status, said = daemon.refusal()
    assert status == 10
    assert f"the index at {daemon.index} is damaged: of its 4 entries, some are not as they were written" in said
    assert f"move {daemon.index} away, then 'rustorctl pool rebuild'" in said
    daemon.index.rename(daemon.index.with_name("damaged"))
    rebuild = [Path(sys.executable).parent / "rustorctl", "pool", "rebuild", "--config", daemon.config]
    subprocess.run(rebuild, check=True, capture_output=True)
    daemon.start()
    assert {uuid: daemon.get(uuid) for uuid in uuids} == uuids


def test_a_plugin_that_is_missing_and_that_nothing_needs_is_told_of(daemon: Daemon) -> None:
    daemon.configure("plugins = ['nowhere']\n")
    daemon.start()
    assert "ERROR plugin 'nowhere' is not installed (install the distribution that brings it" in daemon.log
    assert daemon.pool()["state"] == "ok"


def test_a_configuration_that_is_not_there_is_refused(daemon: Daemon) -> None:
    daemon.config.unlink()
    status, said = daemon.refusal()
    assert status == 78
    assert f"{daemon.config}: it cannot be read" in said


def test_an_image_that_was_cut_short_is_refused(daemon: Daemon, image: Path) -> None:
    daemon.start().put(b"data")
    daemon.stop()
    os.truncate(image, 12 * MIB)
    status, said = daemon.refusal()
    assert status == 13
    assert f"{image} has {12 * MIB} bytes, but its label speaks of {16 * MIB}: it was cut short" in said
    assert image.stat().st_size == 12 * MIB


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_next_to_nothing_of_an_image_is_refused(daemon: Daemon, image: Path, size: int) -> None:
    os.truncate(image, size)
    status, said = daemon.refusal()
    assert status == (11 if size < 512 else 13)  # what has no size may get one later
    assert str(image) in said
    assert image.stat().st_size == size


@pytest.mark.root
def test_a_device_that_is_read_only_is_only_read(make_daemon: MakeDaemon, make_loop: LoopDevices) -> None:
    device = make_loop(16 * MIB)
    make_pool(device)
    daemon = make_daemon(device)
    subprocess.run(["blockdev", "--setro", device], check=True)
    daemon.start()
    assert f"{device} is read-only; it is only read" in daemon.log
    assert daemon.request("POST", "/v1/objects", b"data").status >= 500
    assert daemon.stop() == 0
    subprocess.run(["blockdev", "--setrw", device], check=True)
    assert daemon.start().put(b"data")


# The index


def test_a_lost_index_is_made_anew_from_a_complete_journal(daemon: Daemon) -> None:
    daemon.start()
    kept = {daemon.put(data): data for data in (b"", b"one", os.urandom(100_000))}
    daemon.put(b"old", name="name")
    kept[daemon.put(b"new", name="name")] = b"new"
    daemon.delete(gone := daemon.put(b"gone"))
    free = daemon.pool()["free_bytes"]
    daemon.stop()
    shutil.rmtree(daemon.index)
    daemon.start()
    assert {uuid: daemon.get(uuid) for uuid in kept} == kept
    assert daemon.request("GET", "/v1/names/name").body == b"new"
    assert daemon.request("GET", f"/v1/objects/{gone}").status == 404
    pool = daemon.pool()
    assert (pool["objects"], pool["free_bytes"], pool["state"]) == (len(kept), free, "ok")


def test_a_lost_index_is_missed_when_the_journal_has_wrapped(daemon: Daemon, image: Path) -> None:
    with rustord.open(image, directory=daemon.index) as store:
        for _ in range(1100):  # a batch each, and the journal has 1,024 blocks
            store.put(b"data", name="name")
    index = daemon.index.rename(daemon.directory / "saved")
    before = image.read_bytes()
    status, said = daemon.refusal()
    assert status == 13
    assert "the index has no knowledge of device" in said
    assert "hint: put back the index directory that belongs to this pool" in said
    assert image.read_bytes() == before
    shutil.rmtree(daemon.index, ignore_errors=True)
    index.rename(daemon.index)
    assert daemon.start().request("GET", "/v1/names/name").body == b"data"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_old_copy_of_the_index_is_refused(daemon: Daemon, end: int) -> None:
    daemon.start().put(b"one")
    daemon.stop()
    shutil.copytree(daemon.index, daemon.directory / "old")
    uuid = daemon.start().put(b"two")
    daemon.stop(end)
    daemon.index.rename(daemon.directory / "new")
    (daemon.directory / "old").rename(daemon.index)
    status, said = daemon.refusal()
    assert status == 13
    assert "the index is older (generation " in said
    shutil.rmtree(daemon.index)
    (daemon.directory / "new").rename(daemon.index)
    assert daemon.start().get(uuid) == b"two"


def test_an_index_that_is_damaged_is_refused(daemon: Daemon) -> None:
    daemon.start().put(b"one")
    daemon.stop()
    for path in daemon.index.iterdir():
        if path.is_file() and path.stat().st_size:
            path.write_bytes(b"\xff" * path.stat().st_size)
    status, said = daemon.refusal()
    assert status != 1
    assert str(daemon.index) in said


# The log


def test_the_log_is_plain_text_on_standard_error(daemon: Daemon) -> None:
    daemon.environment["JOURNAL_STREAM"] = "1:2"  # some other stream than standard error: a child of a unit
    daemon.start()
    assert " INFO pool " in daemon.log


@pytest.mark.root
def test_the_journal_gets_fields_when_standard_error_leads_to_it(
    make_daemon: MakeDaemon, make_image: MakeImage, tmp_path: Path
) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    daemon = make_daemon(*images)
    (tmp_path / "journal").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal" / "socket"))
        journal.settimeout(60)
        let_see(daemon, tmp_path / "journal")
        daemon.start()
        daemon.request("DELETE", "/v1/devices/1")
        assert daemon.stop() == 0
        entries = list(received(journal))
    assert daemon.log == ""
    (opened,) = (entry for entry in entries if " is open after " in entry["MESSAGE"])
    assert opened["SYSLOG_IDENTIFIER"] == "rustord"
    assert opened["MESSAGE"].startswith("pool ")
    assert opened["PRIORITY"] == "6"
    (removed,) = (entry for entry in entries if "was removed" in entry["MESSAGE"])
    assert (removed["RUSTORD_DEVICE"], removed["MESSAGE_ID"]) == (str(images[1]), DEVICE_REMOVED.message_id)


def let_see(daemon: Daemon, journal: Path) -> None:
    """Has the daemon see ``journal`` where systemd's journal listens, and its standard error lead there."""
    daemon.log_file.touch()
    status = daemon.log_file.stat()
    daemon.environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    journald = "/run/systemd/journal"
    mount = f'mount -t tmpfs none /run && mkdir -p {journald} && mount --bind $0 {journald} && exec "$@"'
    daemon.prefix = ["unshare", "--mount", "sh", "-c", mount, str(journal)]


def received(journal: socket.socket) -> Iterator[dict[str, str]]:
    """The entries that have arrived, in the order and the format of the journal's native protocol."""
    journal.setblocking(False)
    while True:
        try:
            lines = journal.recv(1 << 16).decode().splitlines()
        except BlockingIOError:
            return
        yield dict(line.split("=", 1) for line in lines if "=" in line)


def test_no_disk_takes_the_place_of_an_output_that_is_closed(daemon: Daemon) -> None:
    daemon.prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    daemon.start()
    assert daemon.process is not None
    assert {os.readlink(f"/proc/{daemon.process.pid}/fd/{number}") for number in range(3)} == {os.devnull}
    assert daemon.get(daemon.put(b"data")) == b"data"


# NBD


def workers_of(pid: int) -> set[int]:
    """The processes that serve NBD for a daemon, which has others as well for a moment."""
    found = set()
    for told in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            parent = (told.parent / "stat").read_text().rpartition(") ")[2].split()[1]
            if int(parent) == pid and b"rustord.frontends.worker" in told.read_bytes():
                found.add(int(told.parent.name))
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody who asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_what_serves_nbd_ends_with_the_daemon_and_the_next_one_has_the_disks(daemon: Daemon) -> None:
    """However it ends, and in the middle of a client's writes."""
    daemon.start().request("POST", "/v1/volumes", json.dumps({"name": "volume", "size": MIB}))
    for turn in range(5):
        assert daemon.process is not None
        pid = daemon.process.pid
        with NbdPeer(daemon.socket.with_name("nbd.sock")) as peer:
            peer.go("volume")
            assert peer.one(1, turn, 1, payload=bytes((turn + 1,))).error == 0
            (worker,) = workers_of(pid)
            peer.send(request(1, MIB // 2, MIB // 2) + bytes(MIB // 2))
            daemon.process.kill()
            daemon.process.wait()
            daemon.start()
            assert has_ended(worker)
            assert peer.is_ended()
    with NbdPeer(daemon.socket.with_name("nbd.sock")) as peer:
        assert peer.go("volume").read(0, 5).data == bytes((1, 2, 3, 4, 5))
        (worker,) = workers_of(daemon.process.pid)
        assert daemon.stop() == 0
        assert has_ended(worker)


def test_it_takes_as_many_connections_as_it_may(daemon: Daemon) -> None:
    daemon.prefix = ["prlimit", "--nofile=64:4096"]
    daemon.start().request("POST", "/v1/volumes", json.dumps({"name": "volume", "size": MIB}))
    with ExitStack() as opened:
        for _ in range(60):
            peer = opened.enter_context(NbdPeer(daemon.socket.with_name("nbd.sock"))).go("volume")
        assert peer.read(0, 512).data == bytes(512)
