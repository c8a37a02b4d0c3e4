"""What systemd and the daemon say to one another. systemd itself is played by the test."""

from __future__ import annotations

import json
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

from tests.test_errors import all_errors

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


def test_what_needs_a_person_is_not_tried_again() -> None:
    (listed,) = re.findall(r"^RestartPreventExitStatus=(.*)$", (UNITS / "rustord.service").read_text(), re.MULTILINE)
    kinds = [(kind.exit_status, kind.needs_person) for kind in all_errors()]
    assert {int(status) for status in listed.split()} == {status for status, needs_person in kinds if needs_person}
    assert not {status for status, _ in kinds if (status, True) in kinds and (status, False) in kinds}


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
    def running(self, listener: socket.socket | None = None, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """A daemon that serves the listening socket, or one that it makes itself; ``options`` are for its command."""
        descriptor = "" if listener is None else str(listener.fileno())
        rustord = [f"{BIN}/rustord", "--device", str(self._image), "--directory", str(self._directory / "index")]
        rustord += ["--socket", str(self.socket_path)]  # beside which it makes that for NBD, whoever made this one
        with subprocess.Popen(
            [sys.executable, "-c", START_AS_SYSTEMD, descriptor, *rustord, *options],
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
            try:
                self._said += self._notifications.recv(4096).decode().splitlines()
            except TimeoutError:
                assert not ended, f"the daemon ended with status {self._daemon.returncode}"
            while self._said:
                if wanted(assignment := self._said.pop(0)):
                    return assignment
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
    with listening(systemd.socket_path) as listener:
        for _ in range(2):  # the socket is not the daemon's, and so outlives it
            with systemd.running(listener) as daemon:
                assert ask(systemd.socket_path).startswith(b"HTTP/1.1 200 ")  # waited in the queue of the socket
                systemd.wait_for("READY=1".__eq__)
                daemon.terminate()
                assert daemon.wait(SECONDS_MAX) == 0


SETTINGS = {
    "an unknown setting": "[pool]\nspare = 1\n",
    "settings that turn out to be wrong late": "[nbd]\nlisten = '127.0.0.1:10809'\ntls_certificate = '/nowhere'\n"
    "tls_key = '/nowhere'\ntls_authority = '/nowhere'\n",
}


@pytest.mark.parametrize("harm", ["no pool", *SETTINGS])
def test_who_waits_for_what_needs_a_person_is_told(systemd: Systemd, image: Path, tmp_path: Path, harm: str) -> None:
    (config := tmp_path / "rustord.toml").write_text(SETTINGS.get(harm, ""))
    if harm == "no pool":
        image.write_bytes(bytes(image.stat().st_size))
    with listening(systemd.socket_path) as listener:
        with asking(systemd.socket_path) as first, asking(systemd.socket_path) as second:
            with systemd.running(listener, "--config", config) as daemon:
                assert daemon.wait(SECONDS_MAX) == (13 if harm == "no pool" else 78)
                told = systemd.wait_for(lambda said: said.endswith(")"))  # a hint
            replies = {answer(first), answer(second)}
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # for whom systemd would start it again
            listener.accept()
    (reply,) = replies
    assert reply.startswith(b"HTTP/1.1 503 ")
    problem = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert problem["code"] == "unavailable"
    assert told == f"STATUS={problem['detail'].removeprefix('rustord cannot start: ')} ({problem['hint']})"


def test_who_waits_for_a_late_disk_goes_on_waiting(systemd: Systemd, image: Path) -> None:
    late = image.rename(image.with_name("late"))
    with listening(systemd.socket_path) as listener, asking(systemd.socket_path) as client:
        with systemd.running(listener) as daemon:
            assert daemon.wait(SECONDS_MAX) == 11
            systemd.wait_for(f"STATUS=none of {image} is there (see whether the devices are attached)".__eq__)
        late.rename(image)
        with systemd.running(listener):
            assert answer(client).startswith(b"HTTP/1.1 200 ")


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket as systemd makes it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def ask(path: Path) -> bytes:
    """What the daemon behind a socket answers when it is asked for its pool."""
    with asking(path) as client:
        return answer(client)


@contextmanager
def asking(path: Path) -> Iterator[socket.socket]:
    """A client that has asked for the pool."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS_MAX)
        client.connect(str(path))
        client.sendall(b"GET /v1/pool HTTP/1.1\r\nHost: rustord\r\nConnection: close\r\n\r\n")
        yield client


def answer(client: socket.socket) -> bytes:
    """All that a client is answered, up to the end of the connection."""
    received = b""
    with suppress(ConnectionResetError):  # what it asked was not read
        while data := client.recv(4096):
            received += data
    return received
