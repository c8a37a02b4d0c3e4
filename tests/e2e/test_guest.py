"""The Debian package on a machine with a kernel and disks of its own, that loses its power."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import guest as guests
from tests.guest import Guest

ROOT = Path(__file__).parents[2]
BY_ID = "/dev/disk/by-id/virtio-"

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture
def boot(disk_path: Path, debian: Path) -> Iterator[Callable[..., Guest]]:
    """`boot(ONE=path)` starts the same machine with these disks; it has the packages in /root/dist."""
    if lacking := guests.lacking():
        pytest.skip(f"this test starts a guest: {lacking}")
    if shutil.which("pybuild") is None:
        pytest.skip("there is no debhelper; `./dev package` brings it")
    subprocess.run([sys.executable, ROOT / "packaging" / "build.py", disk_path / "dist", "deb"], check=True)
    (work := disk_path / "work").mkdir()
    guests.make_image(image := disk_path / "root.img", {"root/dist": disk_path / "dist"}, work)
    running: list[Guest] = []

    def start(**disks: Path) -> Guest:
        running.append(Guest(disk_path / f"guest{len(running)}", image, disks))
        return running[-1]

    yield start
    running[-1].power_cut()


def test_a_pool_on_disks_of_a_machine(boot: Callable[..., Guest], make_image: Callable[..., Path]) -> None:
    one, two = make_image(), make_image()
    guest = boot(ONE=one)
    guest.ok("DEBIAN_FRONTEND=noninteractive apt-get install --yes /root/dist/*.deb")
    guest.ok(f"rustorctl pool create --pool-name main {BY_ID}ONE")
    devices = f'[pool]\\ndevices = ["{BY_ID}ONE", "{BY_ID}TWO"]'
    guest.ok(f"printf '{devices}\\n' > /etc/rustord/rustord.toml; systemctl start rustord")
    guest.ok("printf hello | rustorctl put - --name greeting")

    guest.plug("TWO", two, port=1)
    guest.until(lambda: guest.run(f"test -b {BY_ID}TWO")[0] == 0, "udev knows the second disk")
    guest.ok(f"rustorctl device add {BY_ID}TWO")
    assert "ID_FS_TYPE=rustor_member" in guest.ok(f"udevadm settle; udevadm info {BY_ID}TWO")
    guest.ok("head -c 90000000 /dev/urandom > /var/tmp/large; rustorctl put /var/tmp/large --name large")
    guest.ok("sync; sha256sum < /var/tmp/large > /var/tmp/sum; sync")

    guest.power_cut()
    guest = boot(ONE=one, TWO=two)
    guest.until(lambda: "active" in guest.run("systemctl is-active rustord")[1].split(), "it serves again by itself")
    assert guest.ok("rustorctl get greeting").strip() == "hello"
    guest.ok("rustorctl get large | sha256sum | cmp - /var/tmp/sum")
    assert "main is ok" in guest.ok("systemctl status rustord")

    guest.unplug("TWO")
    guest.until(lambda: "degraded" in guest.run("rustorctl status")[1], "the disk is missed")
    assert guest.ok("rustorctl get greeting").strip() == "hello"
    guest.shut_down()
