"""The Debian package on a machine with a kernel and disks of its own, that loses disks, or its power, under load.

On two cores that are busy with other things, too, each takes two to four minutes.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import guest as guests
from tests.e2e import load
from tests.faultydisk import FaultyDisk
from tests.guest import Guest

ROOT = Path(__file__).parents[2]
BY_ID = "/dev/disk/by-id/virtio-"
MIB = 1 << 20

Boot = Callable[..., Guest]
MakeImage = Callable[[int], Path]

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def installed(debian: Path) -> Iterator[Path]:
    """The root filesystem of a machine on which the packages are installed, and the load is in /root."""
    if lacking := guests.lacking():
        pytest.skip(f"this test starts a guest: {lacking}")
    if shutil.which("pybuild") is None:
        pytest.skip("there is no debhelper; `./dev package` brings it")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-") as directory:
        subprocess.run([sys.executable, ROOT / "packaging" / "build.py", directory, "deb"], check=True)
        (work := Path(directory, "work")).mkdir()
        packages = list(Path(directory).glob("*.deb"))
        guests.make_image(image := Path(directory, "root.img"), work, packages, [Path(load.__file__)])
        yield image


@pytest.fixture
def root(installed: Path, disk_path: Path) -> Path:
    """Its disk, for one test to change."""
    image = disk_path / "root.img"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", installed, image], check=True)
    return image


@pytest.fixture
def boot(disk_path: Path) -> Iterator[Boot]:
    """`boot(root, ONE=path)` starts a machine with these disks; the last one does not outlive the test."""
    running: list[Guest] = []

    def start(root: Path | str, **disks: Path | str) -> Guest:
        running.append(Guest(disk_path / f"guest{len(running)}", root, disks))
        return running[-1]

    yield start
    if running:
        running[-1].power_cut()


def create_pool(guest: Guest, *serials: str, known: Sequence[str] = ()) -> None:
    """Make a pool of disks, and serve it; ``known`` are those that the configuration names besides."""
    paths = " ".join(BY_ID + serial for serial in serials)
    guest.ok(f"udevadm wait {paths}; rustorctl pool create --pool-name main {paths}")
    devices = ", ".join(f'"{BY_ID}{serial}"' for serial in (*serials, *known))
    guest.ok(f"echo '[pool]\ndevices = [{devices}]' > /etc/rustord/rustord.toml; systemctl start rustord; sync")


def is_serving(guest: Guest) -> bool:
    return guest.run("systemctl is-active rustord")[0] == 0


class Acknowledged:
    """What the names may be, by what the machine has told of its load: the step of each, or None if it is deleted."""

    def __init__(self) -> None:
        self._first = 0
        self._noted = 0
        self._may_be: dict[str, set[int | None]] = {name: {None} for name in load.NAMES}

    def start_load(self, guest: Guest) -> None:
        self._noted = len(guest.told)
        guest.ok(f"systemd-run --unit=load /usr/bin/python3 /root/load.py work {self._first}")

    def wait(self, guest: Guest, count: int) -> None:
        """Until the load has got on by so many steps."""
        target = len(guest.told) + count
        guest.until(lambda: len(guest.told) >= target, f"the load gets on by {count} steps")

    def note(self, guest: Guest) -> list[str]:
        """Take note of what the load told before it came to its end; the lines that do not say that a step was done."""
        following = dict.fromkeys(load.NAMES, self._first)
        others: list[str] = []
        for line in guest.told[self._noted :]:
            kind, name, step, *why = line.split(maxsplit=3)
            state = _state(name, int(step))
            if kind == "done":
                self._may_be[name] = {state}
            else:
                others.append(line)
                if kind == "refused" and "is missing" not in why[0]:
                    self._may_be[name].add(state)  # it failed half-way
            if kind in ("done", "refused"):
                following[name] = int(step) + 1
        for name, following_step in following.items():
            self._may_be[name].add(_state(name, following_step))  # it may have been under way
        self._first = max(following.values()) + 1
        return others

    def wrong(self, guest: Guest) -> dict[str, str]:
        """The names that are not what they may be, and how that is. What is there must be whole."""
        wrong: dict[str, str] = {}
        absent = set(load.NAMES)
        for line in guest.ok("python3 /root/load.py check").splitlines():
            name, devices, step, *why = line.split(maxsplit=3)
            absent.remove(name)
            if step == "-":
                wrong[name] = f"on device {devices}: {why[0]}"
            else:
                self._see(name, int(step), wrong)
        for name in absent:
            self._see(name, None, wrong)
        return wrong

    def _see(self, name: str, state: int | None, wrong: dict[str, str]) -> None:
        if state not in self._may_be[name]:
            wrong[name] = f"is {state}, and may be {self._may_be[name]}"
        self._may_be[name] = {state}


def _state(name: str, step: int) -> int | None:
    return None if load.content(name, step) is None else step


# Disks that come and go


def test_disks_come_and_go_under_load(boot: Boot, root: Path, make_image: MakeImage) -> None:
    one, two = make_image(256 * MIB), make_image(256 * MIB)
    guest = boot(root, ONE=one)
    create_pool(guest, "ONE", known=["TWO"])
    acknowledged = Acknowledged()
    acknowledged.start_load(guest)
    guest.plug("TWO", two, port=1)
    guest.ok(f"udevadm wait {BY_ID}TWO; rustorctl device add {BY_ID}TWO")
    assert "ID_FS_TYPE=rustor_member" in guest.ok(f"udevadm settle; udevadm info {BY_ID}TWO")
    acknowledged.wait(guest, 100)
    assert [line for line in guest.told if not line.startswith("done ")] == []

    guest.unplug("TWO")
    guest.until(lambda: "device 1 is missing" in guest.run("rustorctl status")[1], "the disk is missed")
    acknowledged.wait(guest, 40)
    guest.ok("systemctl stop load")
    failures = acknowledged.note(guest)
    assert failures
    assert [line for line in failures if not re.search(r"\b(device 1 \(|virtio-TWO\b)", line)] == []
    unreadable = acknowledged.wrong(guest)
    assert unreadable
    assert [why for why in unreadable.values() if not re.match("on device 1: .*device 1 .* is missing", why)] == []

    acknowledged.start_load(guest)
    acknowledged.wait(guest, 40)
    guest.plug("TWO", two, port=1)
    guest.until(lambda: "State    ok" in guest.run("rustorctl status")[1], "the disk is taken in again")
    back = len(guest.told)
    acknowledged.wait(guest, 100)
    guest.ok("systemctl stop load")
    acknowledged.note(guest)
    assert [line for line in guest.told[back + len(load.CLIENTS) :] if not line.startswith("done ")] == []
    assert acknowledged.wrong(guest) == {}


# Power cuts


@pytest.fixture
def volatile(disk_path: Path) -> Callable[[Path], FaultyDisk]:
    """`volatile(image)` is a disk whose cache loses what was not flushed when its power is cut."""

    def serve(image: Path) -> FaultyDisk:
        (directory := disk_path / f"{image.stem}-disk").mkdir()
        disk = FaultyDisk(directory, image)
        threading.Thread(target=disk.serve, daemon=True).start()
        return disk

    return serve


class Machine:
    """A guest all of whose disks have a volatile cache."""

    def __init__(self, boot: Boot, root: FaultyDisk, **disks: FaultyDisk) -> None:
        self._boot, self._root, self._disks = boot, root, disks
        self.guest = self._start()

    def _start(self) -> Guest:
        return self._boot(self._root.address, **{serial: disk.address for serial, disk in self._disks.items()})

    def wait_for_write(self, serial: str, count: int) -> None:
        """Until so many writes have come to a disk; it holds the last one, unflushed, until the power is cut."""
        disk = self._disks[serial]
        disk.stall(count)
        assert disk.stalled.wait(guests.SECONDS_MAX), f"there are no {count} writes"

    def cut_power(self, rng: random.Random) -> int:
        """Let it boot without what was in the caches; how many writes to the pool's disks were."""
        self.guest.power_cut()
        self._root.lose_power(rng)
        lost = sum(disk.lose_power(rng) for disk in self._disks.values())
        self.guest = self._start()
        return lost


@pytest.fixture
def machine(
    boot: Boot, root: Path, make_image: MakeImage, volatile: Callable[[Path], FaultyDisk], seed: int
) -> Machine:
    return Machine(boot, volatile(root), **{serial: volatile(make_image(256 * MIB)) for serial in ("ONE", "TWO")})


def test_what_was_acknowledged_survives_power_cuts(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    create_pool(machine.guest, "ONE", "TWO")
    acknowledged = Acknowledged()
    for _ in range(3):
        guest = machine.guest
        acknowledged.start_load(guest)
        machine.wait_for_write(rng.choice(("ONE", "TWO")), rng.randrange(30, 200))
        assert machine.cut_power(rng) > 0
        machine.guest.until(lambda: is_serving(machine.guest), "it serves again by itself")
        assert acknowledged.note(guest) == []
        assert acknowledged.wrong(machine.guest) == {}
        assert "main is ok" in machine.guest.ok("systemctl status rustord")


def test_the_same_without_flushes_shows_what_is_lost(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    module, flush = "/usr/lib/python3/dist-packages/rustord/blockstore.py", "self.writable(index).flush()"
    machine.guest.ok(f"grep -q '{flush}' {module}; sed -i 's/{flush}/pass/' {module}")
    create_pool(machine.guest, "ONE", "TWO")
    acknowledged = Acknowledged()
    guest = machine.guest
    acknowledged.start_load(guest)
    acknowledged.wait(guest, 100)
    machine.cut_power(rng)
    assert acknowledged.note(guest) == []
    failed = "systemctl show --property=NRestarts --value rustord | grep --invert-match '^0$'"
    machine.guest.until(lambda: is_serving(machine.guest) or machine.guest.run(failed)[0] == 0, "it has tried to serve")
    assert not is_serving(machine.guest) or acknowledged.wrong(machine.guest) != {}


# The kernel's nbd


def mount_volume(guest: Guest) -> None:
    """Make a filesystem on a volume, and type what the manual page says so that it is mounted at each boot."""
    manual = (ROOT / "packaging/man/rustord-nbd.7.md").read_text()
    (line,) = re.findall(r"^LABEL=vm-data .*$", manual, re.MULTILINE)
    (enable,) = re.findall(r"\*\*(systemctl enable --now\s+rustord-attach@vm-data)\*\*", manual)
    guest.ok(f"rustorctl volume create vm-data --size 128MiB; {' '.join(enable.split())}")
    guest.ok("mkfs.ext4 -q -L vm-data /dev/nbd0; mkdir /srv/vm")
    guest.ok(f"echo '{line}' >> /etc/fstab; systemctl daemon-reload; mount /srv/vm; sync")


def test_a_filesystem_on_a_volume_is_mounted_at_each_boot(boot: Boot, root: Path, make_image: MakeImage) -> None:
    one = make_image(256 * MIB)
    guest = boot(root, ONE=one)
    create_pool(guest, "ONE")
    mount_volume(guest)
    guest.ok("echo hello > /srv/vm/file")
    for how in ("reboot", "poweroff"):
        guest.shut_down(how)
        guest = boot(root, ONE=one)
        assert guest.run("systemctl is-system-running --wait")[1].strip() == "running", guest.ok("systemctl --failed")
        assert guest.ok("mountpoint --quiet /srv/vm; cat /srv/vm/file").strip() == "hello"
        assert "recovery" not in guest.ok("journalctl --boot --dmesg --grep=EXT4-fs")  # it had been unmounted
        ended = guest.ok("journalctl --boot=-1 --lines=150")
        order = ("srv-vm.mount", "rustord-attach@vm-data.service", "rustord.service")
        assert re.search(".*".join(f"{unit}: Deactivated successfully" for unit in order), ended, re.DOTALL), ended
        assert not re.search("timed out|Failed|I/O error", ended), ended
    guest.ok("umount /srv/vm; fsck.ext4 -fn /dev/nbd0; rustorctl detach vm-data")
    assert guest.ok("rustorctl attached --json").strip() == "[]"


def test_what_was_synced_to_a_volume_survives_a_power_cut(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    guest = machine.guest
    create_pool(guest, "ONE")
    mount_volume(guest)
    writer = f"""while :; do
        file=$(mktemp -p /srv/vm); head -c 50000 /dev/urandom > $file
        sync $file /srv/vm; sha256sum $file > /dev/virtio-ports/{guests.WIRE}
    done"""
    guest.ok(f"systemd-run --unit=load /bin/sh -c {shlex.quote(writer.replace('$', '$$'))}")
    guest.until(lambda: guest.told, "a file is synced")
    machine.wait_for_write("ONE", rng.randrange(30, 200))
    assert machine.cut_power(rng) > 0
    assert machine.guest.run("systemctl is-system-running --wait")[1].strip() == "running"
    sums = "\n".join(guest.told)
    machine.guest.ok(f"mountpoint --quiet /srv/vm; echo {shlex.quote(sums)} | sha256sum --check --strict")
    machine.guest.ok("umount /srv/vm; fsck.ext4 -fn /dev/nbd0")
