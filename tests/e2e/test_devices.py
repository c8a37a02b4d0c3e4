"""The store on real block devices, through its own command: from a blank disk to Objects that outlive accidents."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rustord.client import Client
from rustord.errors import (
    ClaimRefused,
    DeviceError,
    InUse,
    InvalidRequest,
    NoSpace,
    NotFound,
    RustordError,
    Unavailable,
)
from tests.conftest import FaultyLoop, LoopDevices
from tests.daemon import MIB, Daemon, until
from tests.frontends.nbdserved import NbdPeer

pytestmark = pytest.mark.root

MakeDaemon = Callable[..., Daemon]
BLOCK = 4096
MARK = b"\xa5rustord-test\xa5"
"""Begins what is stored, so that it can be looked for on a device; a number follows."""
MARKED_BYTES = len(MARK) + 8


class Layout(NamedTuple):
    devices: int
    policy: str
    options: str = "{}"
    copies: int = 1


LAYOUTS = [
    Layout(1, "contiguous"),
    Layout(2, "striped", "{unit_blocks = 16}"),
    Layout(2, "mirrored", copies=2),
    Layout(4, "striped", "{unit_blocks = 1}"),
    Layout(4, "first-fit"),
]


class Machine:
    """Loop devices, the daemon that serves the pool on them, and `rustorctl`."""

    def __init__(self, make_daemon: MakeDaemon, devices: list[Path], layout: Layout) -> None:
        self.devices = devices
        config = f"[placer]\npolicy = '{layout.policy}'\noptions = {layout.options}\n"
        self.daemon = make_daemon(*devices, config=config)

    def run(self, *arguments: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("rustorctl")), *map(str, arguments)]
        environment = {**os.environ, "RUSTORD_SOCKET": str(self.daemon.socket)}
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "env": environment}
        if "input" not in keywords:
            settings["stdin"] = subprocess.DEVNULL
        return subprocess.run(command, **(settings | keywords))

    def ok(self, *arguments: str | Path, **keywords: Any) -> Any:
        """What it printed; it must have ended well, without a word on standard error."""
        done = self.run(*arguments, **keywords)
        assert (done.returncode, done.stderr or "") == (0, ""), done
        return done.stdout

    def refused(self, *arguments: str | Path, **keywords: Any) -> tuple[int, str]:
        """Its exit status, and what it said; it must have said what to do, and shown no traceback."""
        done = self.run(*arguments, **keywords)
        assert done.returncode not in (0, 1), done
        assert done.stdout == ""
        assert "\nhint: " in done.stderr
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    def create(self) -> Machine:
        self.ok("pool", "create", "--pool-name", "e2e", *self.devices)
        self.daemon.start()
        return self

    def client(self) -> Client:
        return Client(self.daemon.socket)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.ok("status", "--json"))
        return status

    def free(self) -> int:
        return int(self.daemon.pool()["free_bytes"])


@pytest.fixture
def machine(make_loop: LoopDevices, make_daemon: MakeDaemon, request: pytest.FixtureRequest) -> Machine:
    """A pool on devices of 32 MiB, which is served; a parameter says how it is laid out."""
    layout = getattr(request, "param", LAYOUTS[0])
    return Machine(make_daemon, [make_loop(32 * MIB) for _ in range(layout.devices)], layout).create()


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def marked(source: random.Random, size: int) -> bytes:
    """Data that `traces` finds."""
    return (MARK + source.randbytes(size))[:size]


def traces(devices: list[Path]) -> set[bytes]:
    """The beginnings of all data that is on the devices, stored or not."""
    found: set[bytes] = set()
    for device in devices:
        found.update(re.findall(re.escape(MARK) + b".{8}", device.read_bytes(), re.DOTALL))
    return found


# Files, from the first device to the last


def make_tree(directory: Path, seed: int) -> dict[str, bytes]:
    """200 files of 0 bytes to 5 MiB in directories; their data by their names in the store."""
    source = random.Random(seed)
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 65535, 65536, 65537, 5 * MIB]
    sizes += [source.randrange(20_000) for _ in range(200 - len(sizes))]
    files = {}
    for number, size in enumerate(sizes):
        name = f"tree/{source.choice(('a', 'b', 'b/c', 'ä ö'))}/{number}.bin"
        files[name] = marked(source, size)
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    return files


@pytest.mark.parametrize("machine", LAYOUTS, indirect=True, ids=lambda layout: f"{layout.devices}-{layout.policy}")
def test_a_tree_of_files_comes_and_goes(
    machine: Machine, make_loop: LoopDevices, tmp_path: Path, seed: int, request: pytest.FixtureRequest
) -> None:
    layout: Layout = request.node.callspec.params["machine"]
    files = make_tree(tmp_path, seed)
    free = machine.free()

    printed = machine.ok("put", "--recursive", "tree", "--prefix", "tree/", cwd=tmp_path)
    assert len(printed.splitlines()) == 200
    check_all(machine, files)
    check_through_the_command(machine, files, tmp_path)
    check_layout(machine, layout, printed)

    machine.daemon.restart()
    check_all(machine, files)
    if layout.copies > 1:
        check_without_one_device(machine, files)

    machine.ok("delete", *files)
    assert machine.ok("ls", "--all") == ""
    assert machine.free() == free
    assert machine.daemon.stop() == 0
    assert not traces(machine.devices)


def check_all(machine: Machine, files: dict[str, bytes]) -> None:
    with machine.client() as client:
        assert {stored.name: stored.size for stored in client.names()} == {name: len(files[name]) for name in files}
        for name, data in files.items():
            assert client.get(name) == data
            for start, end in ((0, 1), (4095, 4097), (65535, 65537), (len(data) // 2, len(data) // 2 + 100_000)):
                if end <= len(data):
                    assert client.get(name, start=start, end=end) == data[start:end]


def check_through_the_command(machine: Machine, files: dict[str, bytes], directory: Path) -> None:
    listed = machine.ok("ls", "tree/").splitlines()
    assert sorted(listed) == sorted(files)
    by_size = sorted(files, key=lambda name: len(files[name]))
    for name in (by_size[0], by_size[100], by_size[-1]):
        machine.ok("get", name, "--output", directory / "got")
        assert (directory / "got").read_bytes() == files[name]
    largest = by_size[-1]
    part = machine.ok("get", largest, "--range", "1000000-2999999", text=False)
    assert part == files[largest][1_000_000:3_000_000]
    assert machine.ok("get", largest, "--range", "-10", text=False) == files[largest][-10:]


def check_layout(machine: Machine, layout: Layout, printed: str) -> None:
    used = set()
    for uuid in (line.split()[0] for line in printed.splitlines()):
        copies = machine.daemon.request("GET", f"/v1/objects/{uuid}/manifest").json()["copies"]
        assert len(copies) == layout.copies
        on = [{extent["index"] for extent in copy} for copy in copies]
        assert len(set().union(*on)) == sum(map(len, on)), "two copies share a device"
        used |= set().union(*on)
    assert layout.policy == "first-fit" or used == set(range(layout.devices))


def check_without_one_device(machine: Machine, files: dict[str, bytes]) -> None:
    """A pool without one of its devices still returns every Object."""
    for missing in range(len(machine.devices)):
        assert machine.daemon.stop() == 0
        there = [str(device) for index, device in enumerate(machine.devices) if index != missing]
        whole = machine.daemon.config.read_text()
        machine.daemon.config.write_text(whole.replace(str(machine.devices[missing]), "/dev/absent"))
        machine.daemon.start()
        status = machine.status()
        assert status["state"] == "degraded"
        assert [device["path"] for device in status["devices"] if device["path"]] == there
        check_all(machine, files)
        machine.daemon.config.write_text(whole)
        machine.daemon.restart()  # it rejoins: two that are used without each other, one after the other, would not
        assert machine.status()["state"] == "ok"


# Devices that join and leave


def test_a_device_joins_the_pool_that_is_served(machine: Machine, make_loop: LoopDevices) -> None:
    stop = threading.Event()
    acknowledged: dict[str, bytes] = {}

    def load() -> None:
        with machine.client() as client:
            while not stop.is_set():
                data = os.urandom(3000)
                acknowledged[client.put(data).uuid] = data
                client.delete(client.put(data).uuid)

    theirs = make_loop(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", theirs], check=True)
    blank = make_loop(16 * MIB)
    client = threading.Thread(target=load)
    client.start()
    try:
        before = sha256(theirs)
        status, said = machine.refused("device", "add", theirs)
        assert status == 12
        assert "ext4" in said
        assert machine.refused("device", "add", "--dry-run", theirs)[0] == 12
        assert "would erase" in machine.ok("device", "add", "--dry-run", "--force", theirs)
        assert sha256(theirs) == before
        assert "would be taken" in machine.ok("device", "add", "--dry-run", blank)
        assert blank.read_bytes() == bytes(16 * MIB)
        assert len(machine.status()["devices"]) == 1

        assert f"{blank} is device 1" in machine.ok("device", "add", blank)
        assert f"{theirs} is device 2" in machine.ok("device", "add", "--force", theirs)
        assert machine.status()["state"] == "ok"
        assert machine.refused("device", "add", "--force", theirs)[0] == 12
    finally:
        stop.set()
        client.join(60)
    assert len(acknowledged) > 0
    data = os.urandom(40 * MIB)  # more than any one of them holds
    uuid = machine.ok("put", "-", input=data, text=False).decode().strip()
    machine.daemon.stop()
    everything = [str(device) for device in (*machine.devices, blank, theirs)]
    config = machine.daemon.config.read_text()
    machine.daemon.config.write_text(config.replace(f'["{machine.devices[0]}"]', json.dumps(everything)))
    machine.daemon.start()
    assert [device["state"] for device in machine.status()["devices"]] == ["online"] * 3
    assert machine.ok("get", uuid, text=False) == data
    with machine.client() as again:
        assert {uuid: again.get(uuid) for uuid in acknowledged} == acknowledged


def test_a_device_leaves_when_it_is_empty(machine: Machine, make_loop: LoopDevices, tmp_path: Path) -> None:
    added = make_loop(64 * MIB)
    free = machine.free()
    machine.ok("device", "add", added)
    uuid = machine.ok("put", "-", input=os.urandom(40 * MIB), text=False).decode().strip()  # has room there alone
    status, said = machine.refused("device", "remove", added)
    assert status == 6
    assert "device 1 holds 32.0 MiB, and the 1 others that take data have 17.9 MiB free" in said
    machine.ok("delete", uuid)
    machine.ok("device", "remove", "1", "--wait")
    assert machine.free() == free
    assert machine.refused("device", "remove", "0")[0] == 2
    assert machine.refused("device", "remove", "1")[0] == 3
    machine.daemon.restart()
    assert machine.status()["state"] == "ok"
    other = tmp_path / "other"
    other.mkdir()
    assert "of 1 devices" in machine.ok("pool", "create", "--pool-name", "other", added)  # it is free again


def test_a_device_leaves_under_a_volume_that_is_in_use(
    machine: Machine, make_loop: LoopDevices, tmp_path: Path
) -> None:
    first, second = machine.devices[0], make_loop(64 * MIB)
    machine.ok("volume", "create", "disk", "--size", "8M")
    with NbdPeer(machine.daemon.socket.with_name("nbd.sock")) as peer:
        peer.go("disk")
        for number in range(8):
            assert peer.one(1, number * MIB, MIB, payload=bytes((number + 1,)) * MIB).error == 0
        machine.ok("device", "add", second)
        machine.ok("device", "remove", first, "--wait")
        other = tmp_path / "other"
        other.mkdir()
        machine.ok("pool", "create", "--pool-name", "other", first)  # nobody has it any more
        assert peer.one(1, 0, 4, payload=b"more").error == 0
        assert peer.one(3).error == 0
        for number in range(8):
            assert peer.read(number * MIB + 4, MIB - 4).data == bytes((number + 1,)) * (MIB - 4)
        assert peer.read(0, 4).data == b"more"


# Killed under load


class Attempt(NamedTuple):
    """What a client wanted of a name when the daemon was killed: this data, or that there is none."""

    name: str
    data: bytes | None


class Load:
    """A client that stores, replaces and deletes under names of its own, and knows what it was promised."""

    def __init__(self, number: int, seed: int) -> None:
        self.stored: dict[str, bytes] = {}
        self.attempt: Attempt | None = None
        self.acknowledged: set[bytes] = set()
        """The beginnings of all data that ever was."""
        self.count = 0
        self._number = number
        self._source = random.Random(f"{seed} {number}")

    def run(self, path: Path) -> None:
        """Until the daemon is gone."""
        with suppress(RustordError), Client(path) as client:
            while True:
                self._change(client)

    def _change(self, client: Client) -> None:
        source = self._source
        name = f"{self._number}/{source.randrange(30)}"
        if name in self.stored and source.random() < 0.3:
            self.attempt = Attempt(name, None)
            client.delete(name)
            del self.stored[name]
        else:
            sizes = (0, 100, BLOCK, source.randrange(20_000), source.randrange(300_000), source.randrange(3 * MIB))
            (size,) = source.choices(sizes, (4, 4, 4, 8, 4, 1))
            data = marked(source, size)
            self.attempt = Attempt(name, data)
            client.put(data, name=name)
            self._store(name, data)
        self.attempt = None
        self.count += 1

    def check(self, client: Client, there: set[str]) -> None:
        """All that was acknowledged is there, and what was under way is whole or absent."""
        for name, data in self.stored.items():
            if self.attempt is None or self.attempt.name != name:
                assert client.get(name) == data
        mine = {name for name in there if name.startswith(f"{self._number}/")}
        unsure, self.attempt = self.attempt, None
        if unsure is None:
            assert mine == set(self.stored)
            return
        before = self.stored.pop(unsure.name, None)
        assert mine - {unsure.name} == set(self.stored)
        now = client.get(unsure.name) if unsure.name in mine else None
        assert now in (before, unsure.data)
        if now is not None:
            self._store(unsure.name, now)

    def _store(self, name: str, data: bytes) -> None:
        self.stored[name] = data
        if len(data) >= MARKED_BYTES:
            self.acknowledged.add(data[:MARKED_BYTES])


def have_done(clients: list[Load], count: int) -> bool:
    return sum(client.count for client in clients) >= count


@pytest.mark.parametrize("machine", [LAYOUTS[0], LAYOUTS[2]], indirect=True, ids=["1-contiguous", "2-mirrored"])
def test_a_daemon_that_is_killed_under_load_keeps_its_promises(machine: Machine, seed: int) -> None:
    source = random.Random(seed)
    free = machine.free()
    clients = [Load(number, seed) for number in range(4)]
    for _ in range(3):
        threads = [threading.Thread(target=client.run, args=(machine.daemon.socket,)) for client in clients]
        done = sum(client.count for client in clients)
        enough = done + source.randrange(100, 300)
        for thread in threads:
            thread.start()
        until(partial(have_done, clients, enough), "the clients have worked")
        machine.daemon.stop(signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        machine.daemon.start()
        with machine.client() as client:
            listed = {stored.uuid: stored.name for stored in client.objects()}
            assert sorted(listed.values()) == sorted(stored.name for stored in client.names())
            for load in clients:
                load.check(client, set(listed.values()))
    with machine.client() as client:
        for stored in list(client.objects()):
            client.delete(stored.uuid)
    assert machine.free() == free, "blocks were lost"
    assert machine.daemon.stop() == 0
    acknowledged = set().union(*(client.acknowledged for client in clients))
    assert not traces(machine.devices) & acknowledged, "deleted data is still there"


class Disk:
    """A client that writes to a volume and flushes, and knows what each block may hold."""

    BLOCKS = 64
    BLOCK = 32 << 10

    def __init__(self, seed: int) -> None:
        self.count = 0
        self._source = random.Random(f"{seed} disk")
        self._held: list[set[bytes]] = [{bytes(self.BLOCK)} for _ in range(self.BLOCKS)]
        """What was there at the last flush, and what was written since."""

    def run(self, path: Path) -> None:
        """Until the daemon is gone."""
        with suppress(OSError, AssertionError, struct.error), NbdPeer(path) as peer:
            peer.go("disk")
            while True:
                written = {}
                for _ in range(8):
                    number, data = self._source.randrange(self.BLOCKS), self._source.randbytes(self.BLOCK)
                    self._held[number].add(data)
                    written[number] = data
                    assert peer.one(1, number * self.BLOCK, self.BLOCK, payload=data).error == 0
                assert peer.one(3).error == 0
                for number, data in written.items():
                    self._held[number] = {data}
                self.count += 1

    def check(self, path: Path) -> None:
        with NbdPeer(path) as peer:
            peer.go("disk")
            for number, held in enumerate(self._held):
                now = bytes(peer.read(number * self.BLOCK, self.BLOCK).data)
                if len(held) == 1:
                    assert now in held, f"block {number} has lost what was flushed"
                assert all(  # each page of it is one of those that it may be
                    any(now[at : at + BLOCK] == data[at : at + BLOCK] for data in held)
                    for at in range(0, self.BLOCK, BLOCK)
                ), f"block {number} holds what nobody wrote"
                self._held[number] = {now}


def stir(machine: Machine, seed: str) -> None:
    """Scrub, rebalance, empty a device and keep it, or add it again, until the daemon is gone."""
    source = random.Random(seed)
    last = machine.devices[-1]
    with suppress(Unavailable, DeviceError, ConnectionError), machine.client() as client:
        while True:
            with suppress(NotFound, InvalidRequest, NoSpace, ClaimRefused, InUse):
                source.choice(
                    (
                        lambda: client.start_scrub(again=True),
                        lambda: client.start_mover("rebalance"),
                        lambda: client.remove_device(str(last)),
                        lambda: client.keep_device(str(last)),
                        lambda: client.add_device(str(last)),
                        lambda: machine.daemon.pool(),
                    )
                )()


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("policy", ["contiguous", "striped", "mirrored"])
def test_a_daemon_that_is_killed_while_everything_is_under_way(
    make_daemon: MakeDaemon, make_loop: LoopDevices, policy: str, rounds: int, seed: int
) -> None:
    machine = Machine(make_daemon, [make_loop(48 * MIB) for _ in range(3)], Layout(3, policy)).create()
    socket, nbd = machine.daemon.socket, machine.daemon.socket.with_name("nbd.sock")
    with machine.client() as client:
        client.create_volume("disk", Disk.BLOCKS * Disk.BLOCK)
    source = random.Random(seed)
    clients, disk = [Load(number, seed) for number in range(3)], Disk(seed)
    for number in range(rounds):
        threads = [threading.Thread(target=client.run, args=(socket,)) for client in clients]
        threads.append(threading.Thread(target=disk.run, args=(nbd,)))
        threads.append(threading.Thread(target=stir, args=(machine, f"{seed} {number}")))
        enough = sum(client.count for client in clients) + source.randrange(50, 200)
        flushed = disk.count + 1
        for thread in threads:
            thread.start()
        until(lambda: have_done(clients, enough) and disk.count >= flushed, "the clients have worked")  # noqa: B023
        machine.daemon.stop(signal.SIGKILL)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        machine.daemon.start()
        with machine.client() as client:
            listed = {stored.uuid: stored.name for stored in client.objects()}
            for load in clients:
                load.check(client, set(listed.values()))
        disk.check(nbd)
    with machine.client() as client, suppress(NotFound):
        client.keep_device(str(machine.devices[-1]))
    with machine.client() as client:
        for stored in list(client.objects()):
            client.delete(stored.uuid)
        until(lambda: client.mover()["state"] != "running", "nothing is moved any more")
        client.delete_volume("disk")
        until(lambda: all(one["free_bytes"] == one["size_bytes"] for one in client.devices()), "all blocks are back")
    assert machine.daemon.stop() == 0
    acknowledged = set().union(*(client.acknowledged for client in clients))
    assert not traces(machine.devices) & acknowledged, "deleted data is still there"


# Full


@pytest.fixture
def small(make_loop: LoopDevices, make_daemon: MakeDaemon) -> Machine:
    """A pool on one device of 16 MiB."""
    return Machine(make_daemon, [make_loop(16 * MIB)], LAYOUTS[0]).create()


def fill(machine: Machine, size: int) -> list[str]:
    """Store Objects of that size until no more fit; their uuids."""
    uuids: list[str] = []
    with machine.client() as client, suppress(NoSpace):
        while True:
            uuids.append(client.put(bytes([len(uuids) % 256]) * size).uuid)
    return uuids


def test_a_pool_that_is_full_is_no_trap(small: Machine, tmp_path: Path) -> None:
    free = small.free()
    uuids = fill(small, BLOCK)
    assert small.free() < 2 * BLOCK
    uuids += fill(small, 100)
    assert small.free() == 0
    status, said = small.refused("put", "-", input="x")
    assert status == 6
    assert "no room" in said
    assert small.status()["state"] == "ok"

    small.ok("delete", uuids[7])
    assert small.free() == 2 * BLOCK
    small.ok("put", "-", input="x" * BLOCK)
    assert small.free() == 0
    small.daemon.restart()
    assert small.free() == 0
    with small.client() as client:
        for number, uuid in enumerate(uuids[:300]):
            if number != 7:
                assert client.get(uuid) == bytes([number % 256]) * BLOCK
        for stored in list(client.objects()):
            client.delete(stored.uuid)
    assert small.free() == free


def test_an_upload_of_unknown_size_that_does_not_fit_leaves_nothing(small: Machine) -> None:
    kept = small.ok("put", "-", input="kept").strip()
    free = small.free()
    status, said = small.refused("put", "-", input=(MARK + os.urandom(1000)).hex() * 20_000)
    assert status == 6
    assert "no room" in said
    until(lambda: small.free() == free, "its blocks are free again")
    data = os.urandom(free - BLOCK * 4)
    uuid = small.ok("put", "-", input=data, text=False).decode().strip()
    assert small.ok("get", uuid, text=False) == data
    small.ok("delete", uuid)
    assert small.free() == free
    assert small.ok("get", kept) == "kept"


@pytest.mark.parametrize("known", [True, False])
def test_a_put_succeeds_however_fragmented_the_room_is(small: Machine, tmp_path: Path, known: bool) -> None:
    uuids = fill(small, BLOCK)
    with small.client() as client:
        for uuid in uuids[::2]:
            client.delete(uuid)
    free = small.free()
    runs = small.status()["free_runs"]
    assert runs > 500
    data = os.urandom(free - 16 * BLOCK)  # the footer names every run
    path = tmp_path / "data"
    path.write_bytes(data)
    with path.open("rb") as opened:
        put = ("put", path) if known else ("put", "-")
        uuid = small.ok(*put, stdin=opened).split()[0]
    assert small.ok("get", uuid, text=False) == data
    assert small.free() < 16 * BLOCK
    small.daemon.restart()
    assert small.ok("get", uuid, text=False) == data
    small.ok("delete", uuid)
    assert small.free() == free


# Devices that fail


@pytest.fixture
def faulty(faulty_loop: FaultyLoop, make_daemon: MakeDaemon) -> Machine:
    """A pool on a device that can be made to fail."""
    return Machine(make_daemon, [faulty_loop.path], LAYOUTS[0]).create()


def test_a_device_that_fails_takes_no_writes_and_loses_nothing(faulty: Machine, faulty_loop: FaultyLoop) -> None:
    stored = {faulty.daemon.put(data): data for data in (b"one", os.urandom(100_000), os.urandom(MIB))}
    with faulty_loop.failing():
        status, said = faulty.refused("put", "-", input="lost")
        assert status == 11
        assert f"{faulty.devices[0]}: " in said
        assert "Input/output error" in said
        for uuid, data in stored.items():
            assert faulty.daemon.get(uuid) == data  # from the page cache
    # The fault is over, but what the kernel has lost it will not say twice.
    status, said = faulty.refused("put", "-", input="more")
    assert status in (6, 11)
    uuid = next(iter(stored))
    status, said = faulty.refused("delete", uuid)
    assert status == 11
    assert "takes no writes" in said
    assert faulty.daemon.get(uuid) == stored[uuid]
    shown = faulty.ok("status")
    assert "degraded" in shown
    assert "device 0 is failed: " in shown
    assert "Input/output error" in shown
    assert f"device 0 takes no writes any more: {faulty.devices[0]}: " in faulty.daemon.log

    ended = faulty.daemon.stop()
    assert ended in (0, 11)
    faulty.daemon.start()
    assert faulty.status()["state"] == "ok"
    with faulty.client() as client:
        there = {found.uuid: client.get(found.uuid) for found in client.objects()}
    assert {uuid: there.pop(uuid) for uuid in stored} == stored
    assert all(data == b"lost" for data in there.values())  # never acknowledged: whole or absent
    assert faulty.daemon.put(b"works again")


def test_a_device_that_fails_while_the_daemon_ends_is_put_in_order_at_the_next_start(
    faulty: Machine, faulty_loop: FaultyLoop
) -> None:
    stored = {faulty.daemon.put(data): data for data in (b"one", os.urandom(100_000))}
    with faulty_loop.failing():
        assert faulty.daemon.stop() == 11
    assert "Input/output error" in faulty.daemon.log
    faulty.daemon.start()
    assert {uuid: faulty.daemon.get(uuid) for uuid in stored} == stored
    assert faulty.status()["state"] == "ok"
