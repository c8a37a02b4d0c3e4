"""Block devices from the command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rustord import attachment
from rustord.attachment import Attached
from rustord.cli.commands import rustorctl as command
from rustord.errors import InUse
from tests.frontends.nbdserved import NbdPeer

Command = Callable[..., Any]


def test_who_has_what_open(daemon: object, rustorctl: Any, socket_path: Path) -> None:
    rustorctl.ok("put", "-", "--name", "disk", input="x" * 5000)
    assert json.loads(rustorctl.ok("exports", "--json")) == []
    with NbdPeer(socket_path.with_name("nbd.sock")) as peer:
        peer.go("disk").read(0, 512)
        (told,) = json.loads(rustorctl.ok("exports", "--json"))
        assert (told["name"], told["read_only"], told["read_bytes"]) == ("disk", True, 512)
        assert "disk  read-only  512 B" in rustorctl.ok("exports")
        rustorctl.ok("put", "-", "--name", "other", input="x")
        done = rustorctl("delete", "disk", "", "unknown", "other")
        assert done.returncode == 15, "the first error counts, and the others are deleted nevertheless"
        assert rustorctl.ok("ls") == "disk\n"
        assert "is open as a block device" in done.stderr
        assert "hint: " in done.stderr


def test_what_is_not_attached_is_not_detached(rustorctl: Any) -> None:
    done = rustorctl("detach", "disk")
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "rustorctl: 'disk' is not attached")


def test_listing_needs_neither_a_daemon_nor_rights(rustorctl: Any) -> None:
    assert isinstance(json.loads(rustorctl.ok("attached", "--json")), list)
    assert rustorctl.ok("attached").startswith("DEVICE  SIZE  MODE")


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has nbd, and would do it")
def test_without_nbd_in_the_kernel_attaching_shows_other_ways(daemon: object, rustorctl: Any) -> None:
    done = rustorctl("attach", "disk")
    assert done.returncode == 16
    assert "nbdfuse" in done.stderr
    assert "Traceback" not in done.stderr


class FakeKernel:
    """Has one device, which is mounted for a while after its keeper has been told to end."""

    def __init__(self, number: signal.Signals) -> None:
        self.signal = number
        self.is_gone_then = False
        self.looks_until_unmounted = 2
        self.backend = ""

    def __enter__(self) -> FakeKernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, link: object, backend: str) -> int:
        self.backend = backend
        return 3

    def attached(self) -> Iterator[Attached]:
        if self.backend:
            yield Attached("/dev/nbd3", self.backend, 5120, True)

    def wait_for_loss(self, timeout_s: float) -> None:
        if self.looks_until_unmounted == 2:
            self.backend = "" if self.is_gone_then else self.backend
            os.kill(os.getpid(), self.signal)
        else:
            signal.pause()

    def check_unused(self, device: Attached) -> None:
        if self.looks_until_unmounted:
            self.looks_until_unmounted -= 1
            raise InUse(f"{device.path} is mounted", hint="unmount it first")

    def disconnect(self, number: int) -> None:
        assert not self.looks_until_unmounted, "it is mounted"
        self.backend = ""


@pytest.fixture
def attach_in_foreground(
    daemon: object, rustorctl: Any, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[FakeKernel], Result]]:
    rustorctl.ok("put", "-", "--name", "disk", input="x" * 5000)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}

    def attach(kernel: FakeKernel) -> Result:
        monkeypatch.setattr(attachment, "Kernel", lambda: kernel)
        monkeypatch.setattr(attachment, "attached", kernel.attached)
        monkeypatch.setattr(attachment, "check_unused", kernel.check_unused)
        return CliRunner().invoke(command, ["--socket", str(socket_path), "attach", "--foreground", "disk"])

    yield attach
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_keeper_that_is_told_to_end_leaves_no_filesystem_without_its_device(
    attach_in_foreground: Callable[[FakeKernel], Result], number: signal.Signals
) -> None:
    kernel = FakeKernel(number)
    done = attach_in_foreground(kernel)
    assert done.exception is None, done.exception
    assert done.output.splitlines() == ["/dev/nbd3", "/dev/nbd3 is mounted: it stays attached until that has ended"]
    assert not kernel.backend


def test_a_keeper_that_is_told_to_end_when_all_is_detached_just_ends(
    attach_in_foreground: Callable[[FakeKernel], Result],
) -> None:
    kernel = FakeKernel(signal.SIGTERM)
    kernel.is_gone_then = True
    done = attach_in_foreground(kernel)
    assert (done.exception, done.output) == (None, "/dev/nbd3\n")


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("disk", "--connections", "17"), ("disk", "--connections", "0")])
def test_bad_input(rustorctl: Any, arguments: tuple[str, ...]) -> None:
    assert rustorctl("attach", *arguments).returncode == 2
