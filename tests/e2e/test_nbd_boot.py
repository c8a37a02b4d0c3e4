"""A machine that boots from a clone of a stored disk image, over NBD."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import guest as guests
from tests.daemon import Daemon, make_pool
from tests.e2e.test_nbd_clients import run, uri
from tests.guest import Guest

MIB = 1 << 20

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_machine_boots_from_a_clone_and_leaves_the_image_alone(
    make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path], disk_path: Path
) -> None:
    if lacking := guests.lacking():
        pytest.skip(f"this test starts a guest: {lacking}")
    (work := disk_path / "work").mkdir()
    guests.make_image(disk := disk_path / "disk.img", work)
    pool = make_image(2500 * MIB)
    make_pool(pool)
    daemon = make_daemon(pool).start()
    with disk.open("rb") as source:
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
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, uri(daemon, "debian"))
    (check := disk_path / "machine.img").touch()
    run("nbdcopy", uri(daemon, "machine"), check)
    assert subprocess.run(["fsck.ext4", "-fn", check], capture_output=True).returncode == 0
