"""What systemd and the daemon say to one another. systemd itself is played by the test."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
BIN = Path(sys.executable).parent
SECONDS_MAX = 60

# Becomes a command as systemd would have started it: descriptor 3 is the socket, and variables say for which process.
START_AS_SYSTEMD = """
import os, sys
listener, *command = sys.argv[1:]
os.environ["WATCHDOG_PID"] = str(os.getpid())
if listener:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="rustord.socket")
    os.dup2(int(listener), 3)
os.execv(command[0], command)
"""

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


@needs_analyze
def test_units_are_valid(tmp_path: Path) -> None:
    for unit in UNITS.glob("rustord*.*"):
        text = re.sub(r"/usr/bin/rustor(d|ctl)\b", sys.executable, unit.read_text())
        (tmp_path / unit.name).write_text(text)
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
@pytest.mark.parametrize("unit", [unit.name for unit in UNITS.glob("*.service")])
def test_service_is_sandboxed(unit: str) -> None:
    security = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(UNITS / unit)]
    done = subprocess.run(security, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:]


class Systemd:
    """Starts the daemon on a new pool, and listens to what it says on the notification socket."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.socket_path = directory / "rustord.sock"
        self._directory, self._image = directory, image
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind(str(directory / "notify"))
        self._notifications.settimeout(0.1)
        self._said: list[str] = []
        subprocess.run([BIN / "rustorctl", "pool", "create", "--pool-name", "test", image], check=True)

    @contextmanager
    def running(self, listener: socket.socket | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """A daemon that serves the listening socket, or one that it makes itself."""
        descriptor = "" if listener is None else str(listener.fileno())
        rustord = [f"{BIN}/rustord", "--device", str(self._image), "--directory", str(self._directory / "index")]
        rustord += ["--socket", str(self.socket_path)]  # beside which it makes that for NBD, whoever made this one
        with subprocess.Popen(
            [sys.executable, "-c", START_AS_SYSTEMD, descriptor, *rustord],
            env={"NOTIFY_SOCKET": str(self._directory / "notify"), "WATCHDOG_USEC": "400000"},
            pass_fds=[int(descriptor)] if descriptor else [],
        ) as self._daemon:
            try:
                yield self._daemon
            finally:
                self._daemon.kill()

    def wait_for(self, wanted: Callable[[str], bool]) -> str:
        """The next assignment (`READY=1`) that is wanted. What was said before it is forgotten."""
        deadline = time.monotonic() + SECONDS_MAX
        while time.monotonic() < deadline:
            ended = self._daemon.poll() is not None
            with suppress(TimeoutError):
                self._said += self._notifications.recv(4096).decode().splitlines()
            while self._said:
                if wanted(assignment := self._said.pop(0)):
                    return assignment
            assert not ended, f"the daemon ended with status {self._daemon.returncode}"
        raise TimeoutError("the daemon did not say what was wanted")

    def close(self) -> None:
        self._notifications.close()


@pytest.fixture
def systemd(tmp_path: Path, image: Path) -> Iterator[Systemd]:
    with closing(Systemd(tmp_path, image)) as systemd:
        yield systemd


def test_daemon_tells_what_it_is_doing(systemd: Systemd) -> None:
    with systemd.running() as daemon:
        systemd.wait_for("READY=1".__eq__)
        assert ask(systemd.socket_path).startswith(b"HTTP/1.1 200 ")
        for _ in range(3):
            systemd.wait_for("WATCHDOG=1".__eq__)
        daemon.send_signal(signal.SIGHUP)
        systemd.wait_for("RELOADING=1".__eq__)
        systemd.wait_for("READY=1".__eq__)
        daemon.terminate()
        systemd.wait_for("STOPPING=1".__eq__)
        assert daemon.wait(SECONDS_MAX) == 0


def test_daemon_has_a_status_line(systemd: Systemd) -> None:
    with systemd.running():
        systemd.wait_for(lambda assignment: assignment.startswith("STATUS=test is ok: 0 Objects, "))


@pytest.mark.parametrize("how", ["does not read", "is gone"])
def test_daemon_goes_on_when_nobody_listens(systemd: Systemd, how: str) -> None:
    with systemd.running() as daemon:
        systemd.wait_for("READY=1".__eq__)
        if how == "is gone":
            systemd.close()
        for _ in range(600 if how == "does not read" else 10):  # each reload tells something twice
            daemon.send_signal(signal.SIGHUP)
            assert ask(systemd.socket_path).startswith(b"HTTP/1.1 200 ")
        daemon.terminate()
        assert daemon.wait(SECONDS_MAX) == 0


def test_daemon_serves_the_socket_that_it_is_given(systemd: Systemd) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(systemd.socket_path))
        listener.listen()
        for _ in range(2):  # the socket is not the daemon's, and so outlives it
            with systemd.running(listener) as daemon:
                assert ask(systemd.socket_path).startswith(b"HTTP/1.1 200 ")  # waited in the queue of the socket
                systemd.wait_for("READY=1".__eq__)
                daemon.terminate()
                assert daemon.wait(SECONDS_MAX) == 0


def ask(path: Path) -> bytes:
    """What the daemon behind a socket answers when it is asked for its pool."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS_MAX)
        client.connect(str(path))
        client.sendall(b"GET /v1/pool HTTP/1.1\r\nHost: rustord\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(4096), b""))
