"""Block devices from the command line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord import attachment
from rustord.cli.attach import attach
from rustord.errors import InUse
from tests.frontends.nbdserved import NbdPeer
from tests.frontends.served import SECONDS_MAX

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


def test_who_stays_in_the_background_holds_nothing_of_who_began_it() -> None:
    """A script that has a lock in a descriptor lets go of it when it ends."""
    ours, theirs = os.pipe()
    program = "import signal; from rustord.cli.attach import _stay; _stay(signal.pause)"
    with open(ours, "rb") as until_nobody_has_it:
        begun = subprocess.Popen([sys.executable, "-c", program], pass_fds=(theirs,))
        os.close(theirs)
        try:
            ready, _, _ = select.select([until_nobody_has_it], [], [], SECONDS_MAX)
            assert ready
            assert begun.poll() is None
        finally:
            begun.kill()
            begun.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_mounted_outlives_the_wish_to_end(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    done: list[str] = []

    class Kernel:
        def __enter__(self) -> Kernel:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait_for_loss(self, timeout_s: float) -> None:
            if not done:
                os.kill(os.getpid(), number)
                done.append("told to end")

        def disconnect(self, number: int) -> None:
            done.append("detached")

    def check_unused(path: str) -> None:
        if done[-1] == "told to end":
            done.append("unmounted")
            raise InUse("it is mounted")

    link = attachment.Link([], 512, 0, "disk")
    monkeypatch.setattr(attachment, "Kernel", Kernel)
    monkeypatch.setattr(attachment, "attach", lambda *_, **__: (3, link, ""))
    monkeypatch.setattr(attachment, "_is_attached", lambda *_: "detached" not in done)
    monkeypatch.setattr(attachment, "check_unused", check_unused)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        attach.main(["--foreground", "disk"], standalone_mode=False)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert done == ["told to end", "unmounted", "detached"]


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("disk", "--connections", "17"), ("disk", "--connections", "0")])
def test_bad_input(rustorctl: Any, arguments: tuple[str, ...]) -> None:
    assert rustorctl("attach", *arguments).returncode == 2
