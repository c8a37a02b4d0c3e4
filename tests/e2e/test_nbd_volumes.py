"""Volumes in the hands of the programs that people use for block devices, and under filesystems."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import rustord
from rustord.volumes import Volumes
from rustord.writer import Writer
from tests.daemon import Daemon, make_pool
from tests.e2e.test_nbd_clients import checksums, fails, loop_over, mounted, nbd_socket, run, uri
from tests.frontends.nbdserved import NbdPeer
from tests.wire.peer import request, write

MIB = 1 << 20
SIZE = 300 * MIB
"""xfs takes no less."""


@pytest.fixture(autouse=True)
def programs() -> None:
    for program, package in (("nbdcopy", "libnbd-bin"), ("nbdfuse", "libnbd-bin"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}; `apt-get install {package}` brings it")


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path]) -> Daemon:
    """A daemon with a pool of 480 MiB, and a volume "disk" in it."""
    image = make_image(480 * MIB)
    make_pool(image)
    with rustord.open(image) as store:
        writer = Writer(store)
        Volumes(store, writer).create("disk", SIZE)
        assert writer.close()
    return make_daemon(image).start()


def test_nbdcopy_both_ways(daemon: Daemon, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(20 * MIB) + bytes(4 * MIB) + random.Random(2).randbytes(MIB)
    (tmp_path / "source").write_bytes(data)
    for options in (("--synchronous",), ("-C", "1", "--requests=64"), ("--flush", "-C", "4")):
        run("nbdcopy", *options, tmp_path / "source", uri(daemon, "disk"))
        run("nbdcopy", *options, uri(daemon, "disk"), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes()[: len(data)] == data
        assert (tmp_path / "copy").stat().st_size == SIZE
    assert b"hole,zero" in run("nbdinfo", "--map", uri(daemon, "disk"))


def test_qemu_img_and_qemu_io(daemon: Daemon, tmp_path: Path) -> None:
    address = uri(daemon, "disk")
    run("qemu-img", "create", "-f", "raw", tmp_path / "raw", SIZE)
    with (tmp_path / "raw").open("r+b") as raw:
        raw.seek(64 * MIB)
        raw.write(random.Random(3).randbytes(8 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "raw", address)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "raw", address)
    run("qemu-img", "bench", "-w", "-f", "raw", "-c", "2000", "-d", "16", "--flush-interval=100", address)
    commands = (
        "write -P 0x11 1M 1M",
        "write -f -P 0x22 1049088 512",
        "write -z 1200k 64k",
        "write -z -u 1M 4k",
        "discard 1500k 100k",
        "flush",
        "read -P 0 1M 512",
        "read -P 0 1200k 64k",
        "read -P 0x11 1053696 4k",
    )
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), address)
    fails("qemu-io", "-f", "raw", "-c", "read -P 0x33 1M 64k", address)


@pytest.mark.skipif(shutil.which("fio") is None, reason="there is no fio; `apt-get install fio` brings it")
def test_fio_verifies_what_it_wrote(daemon: Daemon) -> None:
    address = f"--uri={uri(daemon, 'disk')}"
    job = ("--name=x", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-70000", "--bs_unaligned", "--size=24M")
    check = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7", "--iodepth=16")
    run("fio", *job, address, *check, "--do_verify=1")
    run("fio", *job, address, *check, "--verify_only=1")
    with NbdPeer(nbd_socket(daemon)) as peer:  # a fio that does not notice this would notice nothing
        peer.go("disk").send(b"".join(write(at, b"\xee" * 100) for at in range(0, 24 * MIB, MIB)))
        peer.receive(16 * 24)
    fails("fio", *job, address, *check, "--verify_only=1")


def test_a_full_pool_is_told_and_heals(daemon: Daemon) -> None:
    daemon.put(bytes(120 * MIB), "filler")
    left = daemon.pool()["free_bytes"]
    for size in (64 * MIB, 16 * MIB, 4 * MIB):
        while daemon.pool()["free_bytes"] > size + 4 * MIB:
            daemon.put(bytes(size))
    assert daemon.pool()["free_bytes"] < left
    piece = b"w" * MIB
    with NbdPeer(nbd_socket(daemon)) as peer:
        peer.go("disk")
        errors = [peer.one(1, at, MIB, payload=piece).error for at in range(0, 40 * MIB, MIB)]
        assert 28 in errors  # ENOSPC
        written = errors.index(28)
        assert peer.read(0, MIB).data == (piece if written else bytes(MIB))
        daemon.request("DELETE", "/v1/names/filler")
        assert peer.one(1, 39 * MIB, MIB, payload=piece).error == 0
        assert peer.one(3).error == 0
        assert peer.read(39 * MIB, MIB).data == piece


def test_what_was_flushed_survives_the_death_of_the_daemon(daemon: Daemon) -> None:
    """A flush on one connection covers what was written on another: that is what CAN_MULTI_CONN promises."""
    with NbdPeer(nbd_socket(daemon)) as peer, NbdPeer(nbd_socket(daemon)) as other:
        peer.go("disk").send(write(5, b"flushed"))
        peer.receive(16)
        other.go("disk").send(request(3))
        other.receive(16)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
    daemon.start()
    with NbdPeer(nbd_socket(daemon)) as peer:
        assert peer.go("disk").read(0, 16).data == b"\0\0\0\0\0flushed\0\0\0\0"


def test_what_was_answered_survives_the_death_of_the_daemon(daemon: Daemon, seed: int) -> None:
    """Who connects again takes the daemon for the one before, and flushes what that has answered."""
    data = random.Random(seed).randbytes(3 * MIB)
    with NbdPeer(nbd_socket(daemon)) as peer:
        peer.go("disk")
        assert peer.one(1, 0, MIB, payload=b"x" * MIB).error == 0
        assert peer.one(3).error == 0
        assert peer.one(1, MIB // 2, 3 * MIB, payload=data).error == 0
        assert peer.one(6, MIB // 4, MIB // 8).error == 0  # zeros
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
    daemon.start()
    with NbdPeer(nbd_socket(daemon)) as peer:
        peer.go("disk")
        assert peer.one(3).error == 0
        expected = b"x" * (MIB // 4) + bytes(MIB // 8) + b"x" * (MIB // 8) + data
        assert peer.read(0, len(expected)).data == expected


# Filesystems

MKFS = {"ext4": ("mkfs.ext4", "-q"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}
FSCK = {"ext4": ("fsck.ext4", "-fn"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check")}


@pytest.fixture
def tree(tmp_path: Path, seed: int) -> Path:
    """A directory with 60 files."""
    random_ = random.Random(seed)
    (tmp_path / "tree").mkdir()
    for number in range(60):
        (tmp_path / "tree" / str(number)).write_bytes(random_.randbytes(random_.randrange(300_000)))
    return tmp_path / "tree"


@pytest.mark.root
@pytest.mark.parametrize("kind", list(MKFS))
def test_a_filesystem_lives_on_a_volume(daemon: Daemon, disk_path: Path, tree: Path, kind: str) -> None:
    target = disk_path / "target"
    target.mkdir()
    before = checksums(tree.parent)
    with loop_over(uri(daemon, "disk"), disk_path / "fuse") as device:
        run(*MKFS[kind], device)
        with mounted(device, target, "discard"):
            run("cp", "-a", tree, target)
            run("cp", "-a", tree, target / "more")
        with mounted(device, target, "discard"):
            assert checksums(target) == before
            shutil.rmtree(target / "more")
            run("fstrim", target)
    with loop_over(uri(daemon, "disk"), disk_path / "again") as device:
        run(*FSCK[kind], device)
        with mounted(device, target, "ro"):
            assert checksums(target) == before


@pytest.mark.root
@pytest.mark.parametrize("kind", list(MKFS))
def test_a_filesystem_survives_the_death_of_the_daemon(daemon: Daemon, disk_path: Path, tree: Path, kind: str) -> None:
    target = disk_path / "target"
    target.mkdir()
    before = checksums(tree.parent)
    assert daemon.process is not None
    with loop_over(uri(daemon, "disk"), disk_path / "fuse") as device:
        run(*MKFS[kind], device)
        with suppress(AssertionError), mounted(device, target, "rw"):  # unmounting fails, if it has to write
            run("cp", "-a", tree, target)
            run("sync", "--file-system", target)
            with subprocess.Popen(["cp", "-a", tree, target / "more"], stderr=subprocess.DEVNULL) as copying:
                daemon.process.send_signal(signal.SIGKILL)
                daemon.process.wait()
                copying.wait(60)
    daemon.start()
    with loop_over(uri(daemon, "disk"), disk_path / "again") as device:
        with mounted(device, target, "rw"):  # which replays the filesystem's own log
            assert checksums(target) == before
        run(*FSCK[kind], device)
