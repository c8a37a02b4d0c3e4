"""Objects as block devices, in the hands of the programs that people use for block devices."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import memory
from tests.daemon import Daemon, make_pool, until
from tests.frontends.nbdserved import NbdPeer
from tests.wire.peer import request

MIB = 1 << 20
PROGRAMS = {"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdfuse": "libnbd-bin", "qemu-img": "qemu-utils"}
DEBIANS_PYTHON = Path("/usr/bin/python3")


@pytest.fixture(autouse=True)
def programs() -> None:
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}; `apt-get install {package}` brings it")


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path]) -> Daemon:
    """A daemon with a pool of 400 MiB."""
    image = make_image(400 * MIB)
    make_pool(image)
    return make_daemon(image).start()


def nbd_socket(daemon: Daemon) -> Path:
    return daemon.socket.with_name("nbd.sock")


def uri(daemon: Daemon, name: str) -> str:
    return f"nbd+unix:///{name}?socket={nbd_socket(daemon)}"


def run(*command: object, **keywords: Any) -> bytes:
    """What it printed; it must have ended well."""
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=120, **keywords)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def fails(*command: object) -> str:
    """What it complained about; it must have failed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=120, text=True)
    assert done.returncode != 0, (command, done.stdout[-2000:])
    return done.stderr


def test_nbdinfo(daemon: Daemon) -> None:
    uuid = daemon.put(bytes(5000), "images/small")
    for name in ("images/small", uuid):
        told = json.loads(run("nbdinfo", "--json", uri(daemon, name)))
        (export,) = told["exports"]
        assert (told["protocol"], told["structured"]) == ("newstyle-fixed", True)
        assert (export["export-size"], export["is_read_only"], export["can_multi_conn"]) == (5120, True, True)
    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix://?socket={nbd_socket(daemon)}"))
    assert [export["export-name"] for export in listed["exports"]] == ["images/small"]
    assert b"100.0%" in run("nbdinfo", "--map", "--totals", uri(daemon, uuid))
    assert "No such file or directory for export: nothing" in fails("nbdinfo", uri(daemon, "nothing"))


@pytest.mark.parametrize("options", [("--synchronous",), ("-C", "1", "--requests=64"), ("-C", "4"), ("--no-extents",)])
def test_nbdcopy(daemon: Daemon, tmp_path: Path, options: tuple[str, ...]) -> None:
    data = random.Random(1).randbytes(20 * MIB + 1536)
    daemon.put(data, "disk")
    run("nbdcopy", *options, uri(daemon, "disk"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert run("nbdcopy", *options, uri(daemon, "disk"), "-") == data


def test_nbdcopy_cannot_write_to_an_object(daemon: Daemon, tmp_path: Path) -> None:
    daemon.put(bytes(MIB), "disk")
    (tmp_path / "source").write_bytes(b"x" * MIB)
    assert "read-only" in fails("nbdcopy", tmp_path / "source", uri(daemon, "disk"))


def test_qemu_img_and_qemu_io(daemon: Daemon, tmp_path: Path) -> None:
    data = bytes(MIB) + b"\xa5" * MIB + random.Random(2).randbytes(6 * MIB)
    daemon.put(data, "disk")
    (tmp_path / "raw").write_bytes(data)
    address = uri(daemon, "disk")
    assert json.loads(run("qemu-img", "info", "--output=json", address))["virtual-size"] == len(data)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "raw", address)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", address, tmp_path / "qcow2")
    run("qemu-img", "compare", tmp_path / "qcow2", address)
    (run_,) = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", address))
    assert (run_["start"], run_["length"], run_["data"]) == (0, len(data), True)
    run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "16", address)
    said = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0xa5 1M 1M", "-c", "read -P 0 512 1024", address)
    assert b"verification failed" not in said
    fails("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 1M 1M", address)
    assert "Permission denied" in fails("qemu-io", "-f", "raw", "-c", "write 0 512", address)


HOSTILE = """
import sys, errno, nbd
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()

def refused(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[number], (error.errno, number)
    else:
        raise SystemExit(f"{call} was not refused")
    assert h.pread(5, 0) == b"begin"

refused(errno.EPERM, h.pwrite, b"x" * 512, 0)
refused(errno.EPERM, h.pwrite, b"x" * 512, size)
refused(errno.EPERM, h.trim, 512, 0)
refused(errno.EPERM, h.zero, 512, 0)
refused(errno.EINVAL, h.pread, 512, size - 1)
refused(errno.EINVAL, h.pread, 33 << 20, 0)
refused(errno.EINVAL, h.pread, 512, 1 << 63)
refused(errno.EINVAL, h.pread, 512, 0, 1 << 9)
refused(errno.EINVAL, h.cache, 512, size)
refused(errno.EINVAL, h.block_status, 0, 0, lambda *_: 0)
refused(errno.EINVAL, h.block_status, 512, size, lambda *_: 0)
for offset in (0, 1, 511, 4095):
    assert len(h.pread(1, offset)) == 1
h.flush(); h.cache(4096, 0)
print("survived")
"""


def test_libnbd_without_its_good_manners(daemon: Daemon) -> None:
    if subprocess.run([DEBIANS_PYTHON, "-c", "import nbd"], capture_output=True).returncode:
        pytest.skip("there is no libnbd for Python; `apt-get install python3-libnbd` brings it")
    daemon.put(b"begin" + bytes(MIB), "disk")
    assert run(DEBIANS_PYTHON, "-c", HOSTILE, uri(daemon, "disk")) == b"survived\n"


def test_an_object_that_is_open_is_not_deleted(daemon: Daemon) -> None:
    uuid = daemon.put(bytes(MIB), "disk")
    with NbdPeer(nbd_socket(daemon)) as peer:
        peer.go("disk")
        for path in (f"/v1/objects/{uuid}", "/v1/names/disk"):
            reply = daemon.request("DELETE", path)
            assert (reply.status, reply.json()["code"]) == (409, "in-use")
            assert "is open as a block device, by 1 connections" in reply.problem
        assert daemon.request("PUT", "/v1/names/disk", b"another").status == 200
        assert peer.read(0, MIB).data == bytes(MIB)
    until(lambda: daemon.request("GET", "/v1/exports").json() == [], "it is closed")
    assert daemon.request("DELETE", "/v1/names/disk").status == 204


# Memory


def test_a_client_that_never_reads_costs_little(daemon: Daemon) -> None:
    assert daemon.process is not None
    daemon.put(bytes(32 * MIB), "disk")
    with NbdPeer(nbd_socket(daemon)) as first:
        first.go("disk").read(0, MIB)
    before = memory(daemon.process.pid)["VmRSS"]
    with NbdPeer(nbd_socket(daemon)) as peer:
        peer.go("disk")
        peer.sock.settimeout(1.0)
        with suppress(TimeoutError):
            while True:
                peer.send(request(0, 0, 32 * MIB) * 100)
        assert memory(daemon.process.pid)["VmRSS"] - before < 32


def test_sixteen_busy_connections_cost_little(daemon: Daemon) -> None:
    assert daemon.process is not None
    daemon.put(random.Random(1).randbytes(32 * MIB), "disk")
    before = memory(daemon.process.pid)["VmRSS"]
    with ExitStack() as opened:
        peers = [opened.enter_context(NbdPeer(nbd_socket(daemon))) for _ in range(16)]
        for peer in peers:
            peer.go("disk")
        for turn in range(8):
            for peer in peers:
                peer.send(request(0, turn * 4 * MIB, 4 * MIB, cookie=turn))
            for peer in peers:
                assert len(peer.receive(16 + 4 * MIB)) == 16 + 4 * MIB
        assert memory(daemon.process.pid)["VmRSS"] - before < 64


# A filesystem on it


@contextmanager
def loop_over(address: str, directory: Path) -> Iterator[Path]:
    """A loop device over what nbdfuse shows of an export."""
    directory.mkdir()
    file = directory / "disk"
    file.touch()
    with subprocess.Popen(["nbdfuse", file, address], stderr=subprocess.DEVNULL) as fuse:
        try:
            until(lambda: file.stat().st_size > 0, "nbdfuse shows it")
            device = run("losetup", "--find", "--show", file).decode().strip()
            try:
                yield Path(device)
            finally:
                run("losetup", "--detach", device)
        finally:
            subprocess.run(["umount", "--lazy", file], check=False)
            with suppress(subprocess.TimeoutExpired):
                fuse.wait(10)
            fuse.kill()


@pytest.mark.root
@pytest.mark.parametrize("mkfs", [("mkfs.ext4", "-q"), ("mkfs.xfs", "-q"), ("mkfs.btrfs", "-q")])
def test_a_disk_image_is_mounted(daemon: Daemon, disk_path: Path, mkfs: tuple[str, ...], seed: int) -> None:
    tree, image, target = disk_path / "tree", disk_path / "fs.img", disk_path / "target"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(300 * MIB if "xfs" in mkfs[0] else 128 * MIB)  # xfs takes no less
    run(*mkfs, image)
    with mounted(image, target, "loop"):
        tree = target / "tree"
        tree.mkdir()
        random_ = random.Random(seed)
        for number in range(40):
            (tree / str(number)).write_bytes(random_.randbytes(random_.randrange(200_000)))
        before = checksums(target)
    with image.open("rb") as data:
        daemon.put(data, "fs")
    with loop_over(uri(daemon, "fs"), disk_path / "fuse") as device, mounted(device, target, "ro"):
        assert checksums(target) == before


def checksums(directory: Path) -> bytes:
    return run("sh", "-c", "find tree -type f | sort | xargs sha256sum", cwd=directory)


@contextmanager
def mounted(device: Path, target: Path, options: str) -> Iterator[None]:
    run("mount", "-o", options, device, target)
    try:
        yield
    finally:
        run("umount", target)
