"""The Debian package on a machine with a kernel and disks of its own, that loses disks, or its power, under load.

The machine is emulated, and takes a quarter of a minute to boot. So most tests go on with the one that others have
used, whatever the pool on it has become by then.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import guest as guests
from tests.daemon import Daemon, make_pool
from tests.e2e import load
from tests.e2e.test_nbd_clients import run, uri
from tests.faultydisk import FaultyDisk
from tests.guest import Guest

ROOT = Path(__file__).parents[2]
KERNEL_NBD = Path(__file__).with_name("kernel_nbd.sh")
BY_ID = "/dev/disk/by-id/virtio-"
MIB = 1 << 20

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """An empty directory on a disk."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def installed(debian: Path, directory: Path) -> Path:
    """The disk of a machine on which the packages are installed, with scripts in /root. Nobody changes it."""
    if lacking := guests.lacking():
        pytest.skip(f"this test starts a guest: {lacking}")
    if shutil.which("pybuild") is None:
        pytest.skip("there is no debhelper; `./dev package` brings it")
    (built := directory / "packages").mkdir()
    subprocess.run([sys.executable, ROOT / "packaging" / "build.py", built, "deb"], check=True)
    (work := directory / "work").mkdir()
    image = directory / "installed.img"
    guests.make_image(image, work, list(built.glob("*.deb")), [Path(load.__file__), KERNEL_NBD])
    return image


def test_the_kernel_attaches_and_survives_the_daemon(installed: Path, tmp_path: Path) -> None:
    console = tmp_path / "console"
    command = [*guests.command_line(installed, console, f"init=/root/{KERNEL_NBD.name}"), "-snapshot"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    said = console.read_text(errors="replace")
    print(said)
    assert "FAILED" not in said
    assert len(re.findall(r"(?<![a-z])ok [a-z]", said)) == 24  # behind a progress bar, too, which ends no line
    assert "\ndone" in said


def test_a_machine_boots_from_a_clone_and_leaves_the_image_alone(
    installed: Path, make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path], disk_path: Path
) -> None:
    make_pool(pool := make_image(1500 * MIB))
    daemon = make_daemon(pool).start()
    with installed.open("rb") as source:
        daemon.put(source, "debian")
    assert daemon.request("POST", "/v1/volumes", b'{"name": "machine", "source": "debian"}').status == 201

    guest = Guest(disk_path / "first", uri(daemon, "machine"), {})
    guest.ok("echo was here > /root/note; dd if=/dev/urandom of=/root/data bs=1M count=20; sync")
    summed = guest.ok("sha256sum < /root/data")
    guest.shut_down()
    daemon.restart()

    guest = Guest(disk_path / "second", uri(daemon, "machine"), {})
    assert guest.ok("cat /root/note").strip() == "was here"
    assert guest.ok("sha256sum < /root/data") == summed
    guest.shut_down()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", installed, uri(daemon, "debian"))
    (check := disk_path / "machine.img").touch()
    run("nbdcopy", uri(daemon, "machine"), check)
    assert subprocess.run(["fsck.ext4", "-fn", check], capture_output=True).returncode == 0


# One machine


class Machine:
    """A guest that goes on through boots, and all of whose disks have a volatile cache."""

    def __init__(self, directory: Path, installed: Path) -> None:
        self._directory = directory
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", installed, directory / "root.img"], check=True)
        self._root = self._disk("root")
        self._disks: dict[str, FaultyDisk] = {}
        self._boot_count = 0
        self.acknowledged = Acknowledged()

    def _disk(self, serial: str) -> FaultyDisk:
        (directory := self._directory / serial).mkdir()
        disk = FaultyDisk(directory, self._directory / f"{serial}.img")
        threading.Thread(target=disk.serve, daemon=True).start()
        return disk

    def add(self, serial: str) -> None:
        """It has one more disk, from the next boot on."""
        with (self._directory / f"{serial}.img").open("xb") as image:
            image.truncate(256 * MIB)
        self._disks[serial] = self._disk(serial)

    def plug(self, serial: str) -> None:
        """The disk appears while the machine runs."""
        self.guest.plug(serial, self._disks[serial].address, port=list(self._disks).index(serial))

    def boot(self) -> None:
        disks = {serial: disk.address for serial, disk in self._disks.items()}
        self.guest = Guest(self._directory / f"boot{self._boot_count}", self._root.address, disks)
        self._boot_count += 1

    def wait_for_boot(self) -> str:
        """What systemd says of all that should run, once the boot is over."""
        return self.guest.run("systemctl is-system-running --wait")[1].strip()

    def check_boot(self) -> None:
        """The machine serves its pool and has mounted a volume, by itself."""
        state = self.wait_for_boot()
        said = self.guest.ok("systemctl --failed --no-legend; journalctl --boot --unit='rustord*' --unit=srv-vm.mount")
        assert state == "running", said
        assert self.guest.run("mountpoint --quiet /srv/vm")[0] == 0, said

    def wait_for_write(self, rng: random.Random) -> None:
        """Until some writes have come to some disk; it holds the last one, unflushed, until the power is cut."""
        disk = self._disks[rng.choice(list(self._disks))]
        disk.stall(rng.randrange(30, 200))
        assert disk.stalled.wait(guests.SECONDS_MAX), "there are not so many writes"

    def cut_power(self, rng: random.Random) -> int:
        """Let it boot without what was in the caches; how many writes to the pool's disks were."""
        self.guest.power_cut()
        self._root.lose_power(rng)
        lost = sum(disk.lose_power(rng) for disk in self._disks.values())
        self.boot()
        return lost


class Acknowledged:
    """What the names may be, by what the machine has told of its load: the step of each, or None if it is deleted."""

    def __init__(self) -> None:
        self._first = 0
        self._noted = 0
        self._may_be: dict[str, set[int | None]] = {name: {None} for name in load.NAMES}
        self.sums: list[str] = []
        """What sha256sum has to find in files that were synced."""

    def start_load(self, guest: Guest, directory: str = "") -> None:
        """Of Objects, and of files if they have a directory."""
        self._noted = len(guest.told)
        guest.ok(f"systemd-run --unit=load /usr/bin/python3 /root/load.py work {self._first} {directory}")

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
            if kind == "synced":
                self.sums.append(f"{step}  {name}")
                continue
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


@pytest.fixture(scope="module")
def machine(directory: Path, installed: Path) -> Iterator[Machine]:
    """It serves a pool on its disks ONE and TWO; THREE is in its configuration, too."""
    machine = Machine(directory, installed)
    machine.add("ONE")
    machine.add("TWO")
    machine.boot()
    one, two, three = (BY_ID + serial for serial in ("ONE", "TWO", "THREE"))
    machine.guest.ok(f"udevadm wait {one} {two}; rustorctl pool create --pool-name main {one} {two}")
    configuration = f"[pool]\ndevices = {json.dumps([one, two, three])}\n"
    machine.guest.ok(f"echo {shlex.quote(configuration)} > /etc/rustord/rustord.toml; systemctl start rustord; sync")
    yield machine
    machine.guest.power_cut()


@pytest.fixture(scope="module")
def volume(machine: Machine) -> None:
    """A filesystem on a volume is mounted, at each boot, by what the manual page says one has to type."""
    manual = (ROOT / "packaging/man/rustord-nbd.7.md").read_text()
    (line,) = re.findall(r"^LABEL=vm-data .*$", manual, re.MULTILINE)
    (enable,) = re.findall(r"\*\*(systemctl enable --now\s+rustord-attach@vm-data)\*\*", manual)
    machine.guest.ok(f"rustorctl volume create vm-data --size 128MiB; {' '.join(enable.split())}")
    machine.guest.ok("mkfs.ext4 -q -L vm-data /dev/nbd0; mkdir /srv/vm")
    machine.guest.ok(f"echo '{line}' >> /etc/fstab; systemctl daemon-reload; mount /srv/vm; sync")


def test_disks_come_and_go_under_load(machine: Machine) -> None:
    guest, acknowledged = machine.guest, machine.acknowledged
    began = len(guest.told)
    acknowledged.start_load(guest)
    machine.add("THREE")
    machine.plug("THREE")
    guest.ok(f"udevadm wait {BY_ID}THREE; rustorctl device add {BY_ID}THREE")
    assert "ID_FS_TYPE=rustor_member" in guest.ok(f"udevadm settle; udevadm info {BY_ID}THREE")
    acknowledged.wait(guest, 100)
    assert [line for line in guest.told[began:] if not line.startswith("done ")] == []

    guest.unplug("THREE")
    guest.until(lambda: "device 2 is missing" in guest.run("rustorctl status")[1], "the disk is missed")
    acknowledged.wait(guest, 40)
    guest.ok("systemctl stop load")
    failures = acknowledged.note(guest)
    assert failures
    assert [line for line in failures if not re.search(r"\b(device 2 \(|virtio-THREE\b)", line)] == []
    unreadable = acknowledged.wrong(guest)
    assert unreadable
    assert [why for why in unreadable.values() if not re.match("on device 2: .*device 2 .* is missing", why)] == []

    acknowledged.start_load(guest)
    acknowledged.wait(guest, 40)
    machine.plug("THREE")
    guest.until(lambda: "State    ok" in guest.run("rustorctl status")[1], "the disk is taken in again")
    back = len(guest.told)
    acknowledged.wait(guest, 100)
    guest.ok("systemctl stop load")
    acknowledged.note(guest)
    assert [line for line in guest.told[back + len(load.CLIENTS) :] if not line.startswith("done ")] == []
    assert acknowledged.wrong(guest) == {}


@pytest.mark.usefixtures("volume")
@pytest.mark.parametrize("how", ["reboot", pytest.param("poweroff", marks=pytest.mark.long)])
def test_a_filesystem_on_a_volume_is_mounted_at_each_boot(machine: Machine, how: str) -> None:
    machine.guest.ok(f"echo {how} > /srv/vm/file")
    machine.guest.shut_down(how)
    machine.boot()
    machine.check_boot()
    guest = machine.guest
    assert guest.ok("cat /srv/vm/file").strip() == how
    assert "recovery" not in guest.ok("journalctl --boot --dmesg --grep=EXT4-fs")  # it had been unmounted
    ended = guest.ok("journalctl --boot=-1 --lines=150 | grep --invert-match systemd-journald")
    order = ("srv-vm.mount", "rustord-attach@vm-data.service", "rustord.service")
    assert re.search(".*".join(f"{unit}: Deactivated successfully" for unit in order), ended, re.DOTALL), ended
    assert not re.search("timed out|Failed|I/O error", ended), ended


@pytest.mark.usefixtures("volume")
def test_what_was_acknowledged_survives_power_cuts(machine: Machine, seed: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(seed)
    for _ in range(3 if request.config.getoption("--long") else 1):
        guest = machine.guest
        machine.acknowledged.start_load(guest, "/srv/vm")
        guest.until(lambda guest=guest: any(line.startswith("synced ") for line in guest.told), "a file is synced")
        machine.wait_for_write(rng)
        assert machine.cut_power(rng) > 0
        machine.check_boot()
        assert machine.acknowledged.note(guest) == []
        assert machine.acknowledged.wrong(machine.guest) == {}
        assert "main is ok" in machine.guest.ok("systemctl status rustord")
        sums = shlex.quote("\n".join(machine.acknowledged.sums))
        machine.guest.ok(f"echo {sums} | sha256sum --check --strict")
    machine.guest.ok("umount /srv/vm; fsck.ext4 -fn /dev/nbd0; mount /srv/vm")


@pytest.mark.usefixtures("volume")
def test_a_volume_that_is_not_mounted_can_be_detached(machine: Machine) -> None:
    assert machine.guest.run("rustorctl detach vm-data")[0] == 15
    machine.guest.ok("umount /srv/vm; rustorctl detach vm-data")
    assert machine.guest.ok("rustorctl attached --json").strip() == "[]"


def test_without_flushes_what_was_acknowledged_is_lost(machine: Machine, seed: int) -> None:
    """The last one, since it leaves no pool to go on with."""
    rng = random.Random(seed)
    guest, acknowledged = machine.guest, machine.acknowledged
    module, flush = "/usr/lib/python3/dist-packages/rustord/blockstore.py", "self.writable(index).flush()"
    guest.ok("sed -i /vm-data/d /etc/fstab; systemctl disable rustord-attach@vm-data")
    guest.ok(f"grep -q '{flush}' {module}; sed -i 's/{flush}/pass/' {module}; systemctl restart rustord; sync")
    acknowledged.start_load(guest)
    acknowledged.wait(guest, 100)
    machine.cut_power(rng)
    assert acknowledged.note(guest) == []
    machine.wait_for_boot()
    serves = machine.guest.run("systemctl is-active rustord")[0] == 0
    assert not serves or acknowledged.wrong(machine.guest) != {}
