"""Whose disk it looks like: nobody else's, whatever Objects hold; and who keeps his hands off it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rustord.blockstore import read_label
from rustord.claim import check
from rustord.errors import ClaimRefused
from rustord.extent import Extent
from rustord.label import label_offsets
from rustord.placer import FreeView
from rustord.pool import open_devices
from tests.conftest import LoopDevices
from tests.daemon import Daemon, make_pool
from tests.simulation import Simulation
from tests.zoo import SIZE, Zoo

MIB = 1 << 20
BLOCK = 4096
DOCUMENT = Path(__file__).parents[2] / "packaging" / "udev" / "README.md"


class At:
    """A Placer that puts everything where it is told: from block ``at`` on, or up to it."""

    name = "at"
    copies = 1
    at = 0
    upwards = True

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        return [[Extent(0, self.at if self.upwards else self.at - count, count)]]


def looks_like(path: Path) -> str:
    """What libblkid, and whoever reads partition tables, takes a device for."""
    said = [
        subprocess.run([*command, path], capture_output=True, text=True).stdout
        for command in (["blkid", "--probe"], ["wipefs", "--noheadings"], ["sfdisk", "--dump"], ["partx", "--show"])
    ]
    return "".join(said)


def test_nothing_that_objects_hold_makes_it_look_like_somebody_elses(
    simulate: Callable[..., Simulation], zoo: Zoo
) -> None:
    placer = At()
    simulation = simulate(SIZE, placer=placer)
    path = simulation.paths[0]
    store = simulation.open()
    (begin, count), (resume, rest) = store.blocks.slots[0].geometry.data_runs
    assert (resume + rest) * BLOCK == label_offsets(SIZE)[2]
    upwards = [(begin, True), (begin + count // 2, True), (resume, True)]
    downwards = [(begin + count, False), (resume + rest // 2, False), (resume + rest, False)]
    for name, image in zoo.images.items():
        assert looks_like(image) or name == "rustord"
        stored = []
        for placer.at, placer.upwards in upwards + downwards:
            with image.open("rb") as file:
                stored.append(store.put(os.pread(file.fileno(), MIB, 0 if placer.upwards else SIZE - MIB)))
        assert looks_like(path) == "", name
        reasons = [reason.what for reason in check(path).reasons]
        assert not [what for what in reasons if "carries" in what or "partition" in what], name
        for key in stored:
            store.delete(key.uuid)
    simulation.close()
    for device in open_devices([path]):  # nobody else has taken it, it is sure of that
        device.close()


TOOLS: dict[str, tuple[str, ...]] = {
    "wipefs --all": (),
    "sfdisk": (),
    "mkfs.ext4": ("-q",),
    "mkfs.xfs": ("-q", "--unsupported"),
    "mkfs.btrfs": ("-q", "--mixed"),
    "mkfs.vfat": (),
    "mkswap": (),
    "pvcreate": ("--yes", "--quiet", "--devices", "{}"),
    "cryptsetup luksFormat": ("--batch-mode", "--key-file", "-", "--pbkdf", "pbkdf2"),
    "mdadm --create": ("/dev/md/rustord-test", "--run", "--level=1", "--raid-devices=2", "missing"),
    "make-bcache -B": (),
    "dd": (),
}
"""What may take a disk, and what else it is told. The device comes last."""


def take(tool: str, device: Path) -> str:
    """Let a tool loose on the device: whether it refused, or has taken it."""
    command = [*tool.split(), *(argument.format(device) for argument in TOOLS[tool]), str(device)]
    if tool == "dd":
        command = ["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=1", "oflag=sync"]
    before = ends(device)
    done = subprocess.run(command, capture_output=True, input=b"label: gpt\nsize=8M\n")
    if ends(device) != before:
        return "takes it"
    return "refuses" if done.returncode else "finds nothing"


def ends(device: Path) -> bytes:
    with device.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), 4 * MIB, 0) + os.pread(file.fileno(), MIB, SIZE - MIB)


def next_start(device: Path) -> str:
    """What rustord makes of a device that may have been taken."""
    try:
        (opened,) = open_devices([device])
    except ClaimRefused:
        return "leaves it alone"
    with closing(opened):
        if read_label(opened) is None:
            return "finds no label"
    return "serves it"


@pytest.mark.root
def test_table_of_who_keeps_his_hands_off(make_loop: LoopDevices, make_daemon: Callable[..., Daemon]) -> None:
    """The table in the document is what this finds; `make_loop` devices are erased each time."""
    if missing := [tool for tool in TOOLS if shutil.which(tool.split()[0]) is None]:
        pytest.skip(f"these are not there: {', '.join(missing)}")
    rows = []
    served = make_loop(SIZE)
    make_pool(served)
    daemon = make_daemon(served).start()
    uuid = daemon.put(os.urandom(MIB))
    data = daemon.get(uuid)
    for tool in TOOLS:
        running = take(tool, served)
        assert daemon.get(uuid) == data
        device = make_loop(SIZE)
        make_pool(device)
        stopped = take(tool, device)
        if tool == "mdadm --create" and not Path("/proc/mdstat").exists():  # it needs a driver: as we know it to be
            stopped, then = "takes it", "leaves it alone"
        else:
            then = next_start(device)
        rows.append(f"| `{tool}` | {running} | {stopped} | {then} |")
        make_loop.detach(device)
    found = re.findall(r"^\| `.*\|$", DOCUMENT.read_text(), re.MULTILINE)
    assert found == rows, "\n".join(rows)
