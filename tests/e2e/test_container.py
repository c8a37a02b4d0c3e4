"""The machine on which other tests stand: what they need of it is there, so that none of them passes for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.container import Container

MIB = 1 << 20


def test_everything_on_it_has_started(container: Container) -> None:
    assert container.ok("systemctl", "is-system-running", "--wait") == "running\n"
    assert container.ok("systemctl", "is-active", "systemd-udevd", "systemd-journald") == "active\nactive\n"
    assert container.ok("ls", "/sys/class/net") == "lo\n"


def test_udevd_hears_of_a_device_that_comes_and_goes(container: Container, make_image: Callable[..., Path]) -> None:
    loop = container.new_loop(image := make_image(MIB))
    known = Path(f"/run/udev/data/b7:{loop.number}")

    def is_known() -> bool:
        return container.run("test", "-e", known).returncode == 0

    container.until(is_known, "udevd knows the device")
    assert container.ok("blockdev", "--getsize64", loop.path) == f"{MIB}\n"
    container.unplug(loop)
    container.until(lambda: not is_known(), "udevd has forgotten the device")
    container.plug(loop, image)
    container.until(is_known, "udevd knows the device again")


def test_systemd_keeps_a_service_from_devices(container: Container, make_image: Callable[..., Path]) -> None:
    allowed, other = (container.new_loop(make_image(MIB)).path for _ in range(2))
    service = ["systemd-run", "--wait", "--pipe", "-pDevicePolicy=closed", f"-pDeviceAllow={allowed} r"]
    container.ok(*service, "head", "--bytes=1", allowed)
    refused = container.run(*service, "head", "--bytes=1", other)
    assert refused.returncode != 0
    assert "Operation not permitted" in refused.stderr
