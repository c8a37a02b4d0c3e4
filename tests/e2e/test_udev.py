"""Whoever asks udev is told that a device is ours: the rule and rustord-probe, alone and under a real udevd."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rustord.blockdevice import open_device
from rustord.blockstore import read_label
from rustord.label import HEAD, MAGIC, Label, label_offsets
from rustord.objkey import uuid_text
from tests.container import Container
from tests.daemon import make_pool
from tests.zoo import BEASTS, NEED_LOOP, Zoo, write

UDEV = Path(__file__).parents[2] / "packaging" / "udev"
PROBE = UDEV / "rustord-probe"
MIB = 1 << 20


def probe(path: Path) -> dict[str, str]:
    """What rustord-probe says of a device or image."""
    done = subprocess.run([PROBE, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def label_of(path: Path) -> Label:
    device = open_device(path)
    try:
        label = read_label(device)
    finally:
        device.close()
    assert label is not None
    return label


def expected(label: Label) -> dict[str, str]:
    return {
        "ID_FS_TYPE": "rustor_member",
        "ID_FS_USAGE": "raid",
        "ID_FS_UUID": uuid_text(label.pool_uuid),
        "ID_FS_UUID_SUB": uuid_text(label.device_uuid),
        "ID_FS_LABEL": "holiday_2026",
    }


@pytest.fixture
def member(image: Path) -> Path:
    make_pool(image, name="holiday 2026")
    return image


def test_probe_reads_what_the_label_says(member: Path) -> None:
    said = probe(member)
    assert expected(label_of(member)).items() <= said.items()
    assert said["ID_FS_LABEL_ENC"] == "holiday\\x202026"
    assert f"HEAD_BYTES = {HEAD.size}\n" in PROBE.read_text()


@pytest.mark.parametrize("spared", [0, 1, 2])
def test_any_copy_of_the_label_will_do(member: Path, spared: int) -> None:
    said = probe(member)
    for number, offset in enumerate(label_offsets(64 * MIB)):
        if number != spared:
            write(member, offset, bytes(4096))
    assert probe(member) == said


@pytest.mark.parametrize("size", [0, 1, 511, MIB - 1, 16 * MIB + 512])
def test_what_is_not_ours_is_passed_over(make_image: Callable[[int], Path], size: int) -> None:
    assert probe(make_image(size)) == {}


def test_what_is_somebody_elses_is_passed_over(zoo: Zoo) -> None:
    for name, path in zoo.images.items():
        assert (probe(path) != {}) == (name == "rustord")
    assert BEASTS.keys() - zoo.images.keys() <= NEED_LOOP


def test_probe_does_not_fall_for_a_name_that_says_more(member: Path) -> None:
    """udev takes each line for a property."""
    write(member, HEAD.size - 64, b"x\nID_FS_TYPE=ext4".ljust(64, b"\0"))
    assert probe(member)["ID_FS_LABEL"] == "x_ID_FS_TYPE=ext4"
    assert probe(member)["ID_FS_TYPE"] == "rustor_member"


def test_a_device_that_cannot_be_read_is_a_line_not_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([PROBE, tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("rustord-probe: [Errno 2]")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def machine(container: Container) -> Container:
    """A machine on which the rule is installed."""
    shutil.copy(PROBE, container.files / "usr/lib/udev")
    shutil.copy(UDEV / "61-rustord.rules", container.files / "usr/lib/udev/rules.d")
    container.ok("udevadm", "control", "--reload")
    return container


def properties(machine: Container, path: Path) -> dict[str, str]:
    listing = machine.ok("udevadm", "info", "--query=property", path)
    return dict(line.split("=", 1) for line in listing.splitlines())


def test_everybody_is_told_by_udev(machine: Container, member: Path) -> None:
    label = label_of(member)
    loop = machine.new_loop(member).path
    machine.until(lambda: "ID_FS_TYPE" in properties(machine, loop), "udevd has probed the device")
    said = properties(machine, loop)
    assert expected(label).items() <= said.items()
    by_id = f"/dev/disk/by-id/rustord-{uuid_text(label.device_uuid)}"
    assert by_id in said["DEVLINKS"].split()
    assert machine.ok("readlink", "--canonicalize", by_id).strip() == str(loop)
    (listed,) = json.loads(machine.ok("lsblk", "--fs", "--json", loop))["blockdevices"]
    assert (listed["fstype"], listed["label"]) == ("rustor_member", "holiday 2026")
    assert listed["uuid"] == uuid_text(label.pool_uuid)

    # Who writes and closes a device has udev look again: it is let go, taken, and taken by somebody else.
    for offset in label_offsets(64 * MIB):
        machine.sh(f"dd if=/dev/zero of={loop} bs=4096 seek={offset // 4096} count=1 conv=notrunc")
    machine.until(lambda: "ID_FS_TYPE" not in properties(machine, loop), "udevd sees that it was let go")
    machine.ok("dd", f"of={loop}", "conv=notrunc", input=MAGIC.decode("latin-1"))
    machine.until(lambda: properties(machine, loop).get("ID_FS_TYPE") == "rustor_member", "udevd sees it is ours")
    machine.ok("mkfs.ext4", "-q", "-F", loop)
    machine.until(lambda: properties(machine, loop).get("ID_FS_TYPE") == "ext4", "udevd sees that it is not")
