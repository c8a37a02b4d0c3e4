"""What the service manager is told, also one that does not listen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from rustord.supervisor import Supervisor

SECONDS_MAX = 20

Say = Callable[[Supervisor], None]
EVERYTHING: list[Say] = [
    lambda supervisor: supervisor.progress("x" * 100),
    lambda supervisor: supervisor.alive("fine"),
    lambda supervisor: supervisor.status("\ud800"),
    lambda supervisor: supervisor.reloading(),
    lambda supervisor: supervisor.stopping("bye"),
]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        yield manager


def supervisor_at(address: str) -> closing[Supervisor]:
    return closing(Supervisor({"NOTIFY_SOCKET": address}))


def test_it_is_told_what_happens(manager: socket.socket) -> None:
    with supervisor_at(manager.getsockname()) as supervisor:
        supervisor.progress("replaying")
        assert manager.recv(4096) == b"STATUS=starting: replaying\nEXTEND_TIMEOUT_USEC=300000000"
        supervisor.alive("two\nlines")
        assert manager.recv(4096) == b"READY=1\nSTATUS=two lines\nWATCHDOG=1"
        supervisor.reloading()
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        supervisor.stopping("bye")
        assert manager.recv(4096) == b"STOPPING=1\nSTATUS=bye"


def test_its_address_may_be_abstract() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"rustord-test-{os.getpid()}"
        manager.bind(f"\0{name}")
        with supervisor_at(f"@{name}") as supervisor:
            supervisor.status("fine")
        assert manager.recv(4096) == b"STATUS=fine"


def test_one_that_does_not_read_keeps_nobody_waiting(manager: socket.socket) -> None:
    with supervisor_at(manager.getsockname()) as supervisor:
        for _ in range(10_000):
            supervisor.alive("x" * 1000)


# What it keeps


def test_it_keeps_sockets_under_names(manager: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    with supervisor_at(manager.getsockname()) as supervisor, ours, theirs:
        assert supervisor.keeps
        keeping = Thread(target=supervisor.keep, args=([("one", ours), ("two", ours)],))
        keeping.start()
        manager.settimeout(SECONDS_MAX)
        for name in ("one", "two"):
            message, (number,), _, _ = socket.recv_fds(manager, 4096, 2)
            assert message == f"FDSTORE=1\nFDNAME={name}".encode()
            with socket.socket(fileno=number) as kept:
                assert kept.getsockname() == ours.getsockname()
        message, (number,), _, _ = socket.recv_fds(manager, 4096, 2)
        assert message == b"BARRIER=1"
        assert keeping.is_alive()  # until we have taken everything in
        os.close(number)
        keeping.join(SECONDS_MAX)
        assert not keeping.is_alive()


def test_it_drops_what_it_kept(manager: socket.socket) -> None:
    with supervisor_at(manager.getsockname()) as supervisor:
        dropping = Thread(target=supervisor.drop, args=(["one"],))
        dropping.start()
        manager.settimeout(SECONDS_MAX)
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=one"
        assert manager.recv(4096) == b"BARRIER=1"  # whose descriptor goes with the message
        dropping.join(SECONDS_MAX)
        assert not dropping.is_alive()


def test_one_that_is_not_there_keeps_nothing(tmp_path: Path) -> None:
    with supervisor_at(str(tmp_path / "gone")) as supervisor, pytest.raises(FileNotFoundError):
        supervisor.drop(["one"])
    with supervisor_at("") as supervisor:
        assert not supervisor.keeps


@pytest.mark.parametrize("say", EVERYTHING)
@pytest.mark.parametrize("address", ["", "gone", "a" * 200])
def test_one_that_is_not_there_is_no_error(say: Say, address: str, tmp_path: Path) -> None:
    with supervisor_at(address and str(tmp_path / address)) as supervisor:
        say(supervisor)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, 0.0),
    ],
)
def test_it_says_how_often_it_wants_a_sign_of_life(environment: dict[str, str], seconds: float) -> None:
    with closing(Supervisor(environment)) as supervisor:
        assert supervisor.watchdog_s == seconds
