"""A zoo: what a device may hold that is somebody else's, made by the tools that make it in earnest.

`BEASTS` has a maker for each kind, which fills a blank image file; `Zoo` keeps one image of each for all tests. Where a
kernel or a running service would be needed (RAID, ZFS, BlueStore), the superblock is put together here, byte by byte.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from rustord.label import MAGIC, label_offsets
from tests.daemon import make_pool

MIB = 1 << 20
SIZE = 64 * MIB  # libblkid takes no smaller one for ZFS
KIB = 1024


def run(*command: str | os.PathLike[str], stdin: bytes | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, input=stdin)
    return done.stdout.decode().strip()


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


class Beast(NamedTuple):
    """``type`` is what libblkid calls it, ``make`` fills an image file, with ``tool`` if that is not empty."""

    type: str
    tool: str
    make: Callable[[Path], object]


def _tool(type_: str, *command: str, stdin: bytes | None = None) -> Beast:
    """What a command makes of the path that is put behind its arguments."""
    return Beast(type_, command[0], lambda path: run(*command, path, stdin=stdin))


def _luks(version: str) -> Beast:
    cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode", "--key-file", "-"]
    return _tool("crypto_LUKS", "cryptsetup", "luksFormat", "--type", version, *cheap, stdin=b"secret")


@contextmanager
def loop(path: Path) -> Iterator[Path]:
    """A loop device over an image, for tools that take nothing else."""
    device = Path(run("losetup", "--find", "--show", path))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def _lvm(path: Path) -> None:
    with loop(path) as device:
        run("pvcreate", "--devices", device, "--quiet", device)


def _squashfs(path: Path) -> None:
    run("mksquashfs", __file__, path, "-quiet", "-no-progress", "-noappend")
    os.truncate(path, SIZE)


def _iso9660(path: Path) -> None:
    run("genisoimage", "-quiet", "-o", path, __file__)
    os.truncate(path, SIZE)


def _partitioned(kind: str) -> Callable[[Path], None]:
    return lambda path: run("sfdisk", "--quiet", path, stdin=f"label: {kind}\nsize=8M\nsize=8M\n".encode()) and None


def gpt_backup_alone(path: Path) -> None:
    """The first MiB was zeroed, as is often done to free a disk."""
    _partitioned("gpt")(path)
    write(path, 0, bytes(MIB))


def _raid_090(path: Path) -> None:
    """struct mdp_superblock_s of linux/raid/md_p.h, in the last whole 64 KiB."""
    words = [0] * 1024
    words[:14] = [0xA92B4EFC, 0, 90, 0, 0, 0x1234, 1, 1, SIZE // KIB - 64, 2, 2, 0, 0, 0x5678]
    words[32:38] = [1, 1, 2, 2, 0, 0]
    total = sum(words)
    words[38] = ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF
    write(path, (SIZE & -(64 * KIB)) - 64 * KIB, struct.pack("<1024I", *words))


def _raid_1(minor: int) -> Callable[[Path], None]:
    """struct mdp_superblock_1: 1.0 stands 8 KiB before the end, 1.1 at the start, 1.2 at 4 KiB."""

    def make(path: Path) -> None:
        at = (SIZE // 512 - 16 & -8, 0, 8)[minor]
        ids = struct.pack("<IIII16s32s", 0xA92B4EFC, 1, 0, 0, uuid.uuid4().bytes, b"machine:array")
        array = struct.pack("<QIIQII", 1, 1, 0, SIZE // 512 - 2048, 0, 2).ljust(128 - len(ids), b"\0")
        device = struct.pack("<QQQQII16sQ", 2048, SIZE // 512 - 2048, at, 0, 0, 0, uuid.uuid4().bytes, 0)
        state = struct.pack("<QQQII32xHH", 1, 1, 0, 0, 2, 0, 1)
        block = bytearray((ids + array + device + state).ljust(512, b"\0"))
        total = sum(struct.unpack("<65I", block[:260]))
        struct.pack_into("<I", block, 216, ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF)
        write(path, at * 512, bytes(block))

    return make


def _zfs(path: Path) -> None:
    """Four labels of 256 KiB, two at either end, each with uberblocks in its upper half."""
    for label in (0, 256 * KIB, SIZE - 512 * KIB, SIZE - 256 * KIB):
        for slot in range(8):
            uberblock = struct.pack("<QQQQQ", 0x00BAB10C, 5000, 4 + slot, 0x1234, 1)
            write(path, label + 128 * KIB + slot * KIB, uberblock)


def _bluestore(path: Path) -> None:
    """What `ceph-bluestore-tool mkfs` writes first, and reads as the label."""
    write(path, 0, b"bluestore block device\n" + str(uuid.uuid4()).encode() + b"\n")


BEASTS = {
    "ext2": _tool("ext2", "mkfs.ext2", "-q", "-L", "holiday"),
    "ext3": _tool("ext3", "mkfs.ext3", "-q"),
    "ext4": _tool("ext4", "mkfs.ext4", "-q", "-L", "holiday"),
    "xfs": _tool("xfs", "mkfs.xfs", "-q", "--unsupported"),
    "btrfs": _tool("btrfs", "mkfs.btrfs", "-q", "--mixed"),
    "vfat": _tool("vfat", "mkfs.vfat"),
    "swap": _tool("swap", "mkswap"),
    "luks1": _luks("luks1"),
    "luks2": _luks("luks2"),
    "lvm": Beast("LVM2_member", "pvcreate", _lvm),
    "md-0.90": Beast("linux_raid_member", "", _raid_090),
    "md-1.0": Beast("linux_raid_member", "", _raid_1(0)),
    "md-1.1": Beast("linux_raid_member", "", _raid_1(1)),
    "md-1.2": Beast("linux_raid_member", "", _raid_1(2)),
    "zfs": Beast("zfs_member", "", _zfs),
    "bcache": _tool("bcache", "make-bcache", "--cset-uuid", str(uuid.UUID(int=7)), "-B"),
    "squashfs": Beast("squashfs", "mksquashfs", _squashfs),
    "iso9660": Beast("iso9660", "genisoimage", _iso9660),
    "gpt": Beast("gpt", "sfdisk", _partitioned("gpt")),
    "gpt-backup-alone": Beast("gpt", "sfdisk", gpt_backup_alone),
    "mbr": Beast("dos", "sfdisk", _partitioned("dos")),
    "bluestore": Beast("ceph_bluestore", "", _bluestore),
    "rustord": Beast("", "", lambda path: make_pool(path, name="theirs")),
}
NEED_LOOP = {"lvm"}


class Zoo:
    """One image of each beast, made when the first is asked for, all at once. Nobody may change them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __getitem__(self, name: str) -> Path:
        return self.images[name]

    def ask_for(self, name: str) -> Path:
        """The image of a beast; skips the test if it cannot be had."""
        if name not in self.images:
            pytest.skip(f"this image needs root, or {BEASTS[name].tool}, which is not there")
        return self[name]

    @functools.cached_property
    def images(self) -> dict[str, Path]:
        names = [
            name
            for name, beast in BEASTS.items()
            if (not beast.tool or shutil.which(beast.tool)) and (name not in NEED_LOOP or os.geteuid() == 0)
        ]
        with ThreadPoolExecutor(4) as threads:
            return dict(zip(names, threads.map(self._make, names), strict=True))

    def _make(self, name: str) -> Path:
        path = self.directory / f"{name}.img"
        with path.open("xb") as file:
            file.truncate(SIZE)
        BEASTS[name].make(path)
        return path

    def copy(self, name: str, path: Path) -> Path:
        """One of its own, to be changed."""
        run("cp", "--sparse=always", self.ask_for(name), path)
        return path


def signatures(path: Path) -> list[tuple[int, str]]:
    """(offset, type) of all that wipefs knows on a device or image, and of the labels of rustord pools."""
    listing = run("wipefs", "--json", path)
    found = [
        (int(entry["offset"], 0), entry["type"]) for entry in json.loads(listing or '{"signatures": []}')["signatures"]
    ]
    with path.open("rb") as file:
        for offset in label_offsets(file.seek(0, os.SEEK_END)):
            file.seek(offset)
            if file.read(len(MAGIC)) == MAGIC:
                found.append((offset, "rustord"))
    return found


def damage(path: Path) -> None:
    """Spoils one byte of each signature until nobody knows any more what it was."""
    while found := signatures(path):
        for offset, _ in found:
            with path.open("r+b") as file:
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 0x5A]))
