"""Discovery with the kernel's own events: loop devices that come, go, grow and are exchanged."""

from __future__ import annotations

import fcntl
import os
import select
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from rustord import discovery
from rustord.config import DeviceTable
from rustord.discovery import (
    Candidate,
    Change,
    DeviceAdded,
    DeviceChanged,
    DeviceRemoved,
    DeviceRule,
    Watcher,
    candidates,
    matches,
)

MIB = 1 << 20
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # linux/loop.h
UDEVD = Path("/usr/lib/systemd/systemd-udevd")
UDEVD_RUNS = Path("/run/udev/control").exists()

DISK = Candidate(
    path="/dev/sdx",
    by_id=("/dev/disk/by-id/ata-ACME_9000_S1", "/dev/disk/by-id/wwn-0x5000"),
    serial="S1",
    model="ACME_9000",
    size=100 * MIB,
    devnum=os.makedev(8, 1),
    diskseq=7,
)


def storm(device: Path, count: int) -> None:
    """Events that say nothing, of a device in sysfs."""
    with (device / "uevent").open("w") as uevent:
        for _ in range(count):
            uevent.write("change")
            uevent.flush()


class Hotplug:
    """A loop device of our own that comes and goes: with a number that nobody else uses."""

    def __init__(self, make_image: Callable[[int], Path]) -> None:
        self._make_image = make_image
        self._control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        self._number = 1000 + os.getpid() % 100_000
        self.path = Path(f"/dev/loop{self._number}")
        self.sysfs = Path(f"/sys/block/loop{self._number}")

    def plug(self, size: int = 16 * MIB) -> None:
        with suppress(FileExistsError):
            fcntl.ioctl(self._control, LOOP_CTL_ADD, self._number)
        self.attach(size)

    def unplug(self) -> None:
        self.detach()
        _until(self._removed)

    def _removed(self) -> bool:
        with suppress(FileNotFoundError, OSError):  # absent already; or busy, as somebody looks at what is going
            fcntl.ioctl(self._control, LOOP_CTL_REMOVE, self._number)
        return not self.sysfs.exists()

    def attach(self, size: int = 16 * MIB) -> None:
        subprocess.run(["losetup", self.path, self._make_image(size)], check=True)

    def detach(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)
        size = self.sysfs / "size"
        _until(lambda: size.read_text() == "0\n")

    def grow(self, size: int) -> None:
        backing = (self.sysfs / "loop/backing_file").read_text().strip()
        os.truncate(backing, size)
        subprocess.run(["losetup", "--set-capacity", self.path], check=True)

    def make_node(self, kind: int = stat.S_IFBLK, devnum: int | None = None) -> None:
        """Another node in place of the device's own."""
        if devnum is None:
            major, minor = (self.sysfs / "dev").read_text().split(":")
            devnum = os.makedev(int(major), int(minor))
        self.path.unlink(missing_ok=True)
        os.mknod(self.path, 0o600 | kind, devnum)

    def close(self) -> None:
        if self.sysfs.exists():
            self.make_node()
            with suppress(subprocess.CalledProcessError):
                self.detach()
            _until(self._removed)
        self.path.unlink(missing_ok=True)  # the kernel removes only nodes of its own
        os.close(self._control)


@pytest.fixture
def hotplug(make_image: Callable[[int], Path]) -> Iterator[Hotplug]:
    device = Hotplug(make_image)
    yield device
    device.close()


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    with Watcher() as watcher:
        watcher.wait()
        yield watcher


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def _is(change: Change, device: Hotplug) -> bool:
    return change.candidate.path == str(device.path)


def changes_of(watcher: Watcher, device: Hotplug) -> list[Change]:
    """The next changes of one device (others' devices come and go, too), told by events alone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert select.select([watcher], [], [], 20)[0], "no event came"
        changes = [change for change in watcher.wait(0) if _is(change, device)]
        if changes:
            return changes
    raise AssertionError("no change was seen")


@pytest.mark.root
class TestWatcher:
    def test_a_device_comes_grows_and_goes(self, watcher: Watcher, hotplug: Hotplug) -> None:
        hotplug.plug(16 * MIB)
        (added,) = changes_of(watcher, hotplug)
        assert isinstance(added, DeviceAdded)
        assert (added.candidate.size, added.candidate.devnum) == (16 * MIB, hotplug.path.stat().st_rdev)
        hotplug.grow(32 * MIB)
        (changed,) = changes_of(watcher, hotplug)
        assert changed == DeviceChanged(replace(added.candidate, size=32 * MIB), added.candidate)
        hotplug.unplug()
        assert changes_of(watcher, hotplug) == [DeviceRemoved(changed.candidate)]

    def test_the_first_look_finds_what_is_there_already(self, hotplug: Hotplug) -> None:
        hotplug.plug()
        with Watcher() as watcher:
            found = [change.candidate.path for change in watcher.wait() if isinstance(change, DeviceAdded)]
            assert str(hotplug.path) in found
            assert not any(_is(change, hotplug) for change in watcher.wait(0))

    def test_an_exchange_behind_the_same_name_is_seen(self, watcher: Watcher, hotplug: Hotplug) -> None:
        hotplug.plug()
        (added,) = changes_of(watcher, hotplug)
        hotplug.detach()
        hotplug.attach()
        removed, other = changes_of(watcher, hotplug)
        assert removed == DeviceRemoved(added.candidate)
        assert isinstance(other, DeviceAdded)
        assert other.candidate == replace(added.candidate, diskseq=other.candidate.diskseq)

    @pytest.mark.parametrize("noisy", ["ours"] if UDEVD_RUNS else ["ours", "no block device"])
    def test_lost_events_lose_no_device(self, hotplug: Hotplug, noisy: str) -> None:
        """Whatever fills the buffer. (Behind udevd, the kernel filters out all but block devices.)"""
        noise = hotplug.sysfs if noisy == "ours" else Path("/sys/devices/virtual/mem/null")
        with Watcher(receive_bytes=1) as watcher:
            watcher.wait()
            hotplug.plug()
            for _ in range(3):  # it goes on after a loss
                (added,) = changes_of(watcher, hotplug)
                assert isinstance(added, DeviceAdded)
                storm(noise, 300)
                hotplug.detach()
                assert _lost(watcher), "the kernel delivered every event; the storm must be stronger"
                assert changes_of(watcher, hotplug) == [DeviceRemoved(added.candidate)]
                storm(noise, 300)
                hotplug.attach()

    def test_a_storm_is_few_looks(self, watcher: Watcher, hotplug: Hotplug, monkeypatch: pytest.MonkeyPatch) -> None:
        hotplug.plug()
        changes_of(watcher, hotplug)
        looks = Mock(side_effect=candidates)
        monkeypatch.setattr(discovery, "candidates", looks)
        storm(hotplug.sysfs, 1000)
        while select.select([watcher], [], [], 0)[0]:  # others' devices have events, too
            watcher.wait(0)
        assert 1 <= looks.call_count < 50

    def test_a_change_without_an_event_is_found_in_time(self, watcher: Watcher, hotplug: Hotplug) -> None:
        hotplug.plug()
        changes_of(watcher, hotplug)
        hotplug.path.unlink()  # nobody tells of this
        _until(lambda: any(isinstance(change, DeviceRemoved) for change in watcher.wait(0.1) if _is(change, hotplug)))

    def test_with_udevd_the_links_are_there(self, hotplug: Hotplug, disk_path: Path) -> None:
        """A udevd in a mount namespace of its own, with one rule; the watcher has to hear from it, not the kernel."""
        if UDEVD_RUNS or not UDEVD.exists():
            pytest.skip("udevd runs here (so all other tests used it), or `apt-get install udev` brings it")
        rule = disk_path / "99-rustord-test.rules"
        rule.write_text(f'KERNEL=="{hotplug.path.name}", SYMLINK+="disk/by-id/{hotplug.path.name}-x"\n')
        script = f"""
            mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /usr/lib/udev/rules.d || exit
            mkdir -p /run/udev/rules.d
            cp {rule} /run/udev/rules.d/
            {UDEVD} --children-max=1 & udevd=$!
            until [ -S /run/udev/control ]; do sleep 0.05; done
            {sys.executable} -c '{LISTEN}' {hotplug.path}
            kill $udevd; wait $udevd"""
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        root = Path(discovery.__file__).parents[1]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "listening\n"
            hotplug.plug()
            assert listener.stdout.readline() == f"('/dev/disk/by-id/{hotplug.path.name}-x',)\n"
        # What this udevd would have removed with the device.
        Path(f"/dev/disk/by-id/{hotplug.path.name}-x").unlink(missing_ok=True)
        _remove_if_empty("/dev/disk/by-id", "/dev/disk")


LISTEN = """
import select, sys
from rustord.discovery import Watcher
watcher = Watcher()
watcher.wait()
print("listening", flush=True)
while select.select([watcher], [], [], 20)[0]:
    for change in watcher.wait(0):
        if change.candidate.path == sys.argv[1]:
            print(change.candidate.by_id, flush=True)
            sys.exit()
"""


def _remove_if_empty(*directories: str) -> None:
    for directory in directories:
        with suppress(OSError):
            os.rmdir(directory)


def _lost(watcher: Watcher) -> bool:
    """Whether the kernel has dropped events for this socket."""
    inode = str(os.fstat(watcher.fileno()).st_ino)
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()]
    (drops,) = (row[rows[0].index("Drops")] for row in rows if row[-1] == inode)
    return int(drops) > 0


@pytest.mark.root
class TestCandidates:
    def test_an_unused_loop_device_is_none(self, hotplug: Hotplug) -> None:
        hotplug.plug()
        assert str(hotplug.path) in {candidate.path for candidate in candidates()}
        hotplug.detach()
        assert str(hotplug.path) not in {candidate.path for candidate in candidates()}

    def test_without_a_node_or_with_the_node_of_another_it_is_none(self, hotplug: Hotplug) -> None:
        """As a container sees the host's devices."""
        hotplug.plug()
        hotplug.path.unlink()
        assert str(hotplug.path) not in {candidate.path for candidate in candidates()}
        hotplug.make_node(stat.S_IFCHR)
        assert str(hotplug.path) not in {candidate.path for candidate in candidates()}
        hotplug.make_node(devnum=os.makedev(7, 0))
        assert str(hotplug.path) not in {candidate.path for candidate in candidates()}
        hotplug.make_node()
        assert str(hotplug.path) in {candidate.path for candidate in candidates()}

    def test_links_by_id(self, hotplug: Hotplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hotplug.plug()
        (tmp_path / "b").symlink_to(hotplug.path)
        (tmp_path / "a").symlink_to(os.path.relpath(hotplug.path, tmp_path))
        (tmp_path / "other").symlink_to("/dev/null")
        monkeypatch.setattr(discovery, "_BY_ID", tmp_path)
        (found,) = (candidate for candidate in candidates() if candidate.path == str(hotplug.path))
        assert found.by_id == (f"{tmp_path}/a", f"{tmp_path}/b")


class TestRules:
    @pytest.mark.parametrize(
        "rule",
        [
            DeviceTable(path="/dev/sdx"),
            DeviceTable(path="/dev/disk/by-id/wwn-0x5000"),
            DeviceTable(path="/dev/disk/by-id/ata-*"),
            DeviceTable(serial="S1"),
            DeviceTable(model="ACME_*"),
            DeviceTable(size_min=100 * MIB, size_max=100 * MIB),
            DeviceTable(path="/dev/sd?", serial="S1", model="ACME*", size_min=1, size_max=1 << 40),
        ],
    )
    def test_fits(self, rule: DeviceRule) -> None:
        assert matches(rule, DISK)

    @pytest.mark.parametrize(
        "rule",
        [
            DeviceTable(),
            DeviceTable(path="/dev/sdxa"),
            DeviceTable(path="/dev/disk/by-id/nvme-*"),
            DeviceTable(serial="s1"),
            DeviceTable(serial="S"),
            DeviceTable(model="*8000"),
            DeviceTable(size_min=100 * MIB + 1),
            DeviceTable(size_max=100 * MIB - 1),
            DeviceTable(path="/dev/sdx", serial="S2"),
        ],
    )
    def test_does_not_fit(self, rule: DeviceRule) -> None:
        assert not matches(rule, DISK)

    def test_a_link_that_udev_did_not_make(self, tmp_path: Path) -> None:
        (tmp_path / "mine").symlink_to("/dev/sdx")
        assert matches(DeviceTable(path=str(tmp_path / "mine")), DISK)
