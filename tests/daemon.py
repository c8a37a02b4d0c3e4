"""A daemon as a process of its own, and its API as a client sees it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rustord.claim import claim
from rustord.keygen import HashKeyGen
from rustord.pool import create_pool

SECONDS_MAX = 60
"""What takes longer than this has failed; nothing should take a tenth of it."""

MIB = 1 << 20

# The command, after a test has changed what only a test wants to change (how long it waits, say).
LAUNCH = """
import rustord.daemon as daemon
{patch}
from rustord.cli.rustord import main
main()
"""


def until(met: Callable[[], object], what: str) -> None:
    """Waits until it is so, which must be soon."""
    deadline = time.monotonic() + SECONDS_MAX
    while not met():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def make_pool(*paths: Path, name: str = "test") -> None:
    """Makes a pool of devices or image files."""
    with ExitStack() as opened:
        devices = [opened.enter_context(closing(claim(path))) for path in paths]
        create_pool(devices, HashKeyGen("xxh3-128"), name=name)


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """What an error says, for people: message and hint."""
        problem = self.json()
        return f"{problem['detail']}: {problem['hint']}"


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("rustord", timeout=SECONDS_MAX)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS_MAX)
        self.sock.connect(str(self._path))


class Daemon:
    """`rustord` with a configuration of its own in ``directory``; not running until `start`."""

    def __init__(self, directory: Path, devices: tuple[Path, ...], config: str = "", patch: str = "") -> None:
        self.directory = directory
        self.socket = directory / "rustord.sock"
        self.index = directory / "index"
        self.config = directory / "rustord.toml"
        self.log_file = directory / "log"
        self.environment = dict(os.environ)
        self.prefix: list[str] = []
        """What to run it with."""
        self.process: subprocess.Popen[bytes] | None = None
        self._patch = patch
        (directory / "conf.d").mkdir(parents=True)
        self.config.write_text(
            f"[pool]\ndevices = {json.dumps([str(device) for device in devices])}\ndirectory = '{self.index}'\n"
            f"[socket]\npath = '{self.socket}'\n"
        )
        self.configure(config)

    def configure(self, config: str) -> None:
        """Settings beside the paths of devices, index and socket; they count from the next start, or SIGHUP."""
        (self.directory / "conf.d" / "test.toml").write_text(config)

    @property
    def command(self) -> list[str]:
        return [*self.prefix, sys.executable, "-c", LAUNCH.format(patch=self._patch), "--config", str(self.config)]

    def begin(self) -> subprocess.Popen[bytes]:
        """Start it, and do not wait until it is ready."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )
        return self.process

    def start(self) -> Daemon:
        """Start it, and wait until it serves."""
        process = self.begin()
        until(lambda: process.poll() is not None or self.answers(), "the daemon serves")
        with suppress(OSError, http.client.HTTPException):
            self.request("GET", "/v1/pool")  # once that is answered, it listens to NBD, too
        assert process.poll() is None, self.log
        return self

    def refusal(self) -> tuple[int, str]:
        """Start it, as it will not start: its exit status, and what it says about that at the end."""
        before = len(self.log)
        process = self.begin()
        until(lambda: process.poll() is not None or self.answers(), "the daemon refuses to start")
        if process.poll() is None:
            raise AssertionError(f"it starts:\n{self.stop()}\n{self.log}")
        said = self.log[before:]
        return process.returncode, said[said.index("rustord: ") :]

    def answers(self) -> bool:
        """Whether somebody listens on the socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    @property
    def log(self) -> str:
        """What it has logged in all its runs."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log, f"the log says {text!r}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it with a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(SECONDS_MAX)

    def end(self) -> None:
        """Make sure that it does not run, however it is."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS_MAX)

    def restart(self) -> Daemon:
        assert self.stop() == 0, self.log
        return self.start()

    def reload(self, config: str) -> str:
        """Give it other settings while it runs; what it logs about that."""
        assert self.process is not None
        before = len(self.log)
        self.configure(config)
        self.process.send_signal(signal.SIGHUP)
        until(lambda: "the configuration " in self.log[before:], "the configuration was looked at")
        return self.log[before:]

    # The API

    def connect(self) -> UnixConnection:
        return UnixConnection(self.socket)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own; ``_`` in the name of a header stands for a hyphen."""
        with closing(self.connect()) as connection:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            reply = connection.getresponse()
            return Reply(reply.status, dict(reply.headers), reply.read())

    def put(self, data: Any, name: str = "") -> str:
        """Store an Object; its uuid."""
        if name:
            reply = self.request("PUT", f"/v1/names/{name}", data)
        else:
            reply = self.request("POST", "/v1/objects", data)
        assert reply.status in (200, 201), reply
        uuid: str = reply.json()["uuid"]
        return uuid

    def get(self, uuid: str) -> bytes:
        reply = self.request("GET", f"/v1/objects/{uuid}")
        assert reply.status == 200, reply
        return reply.body

    def delete(self, uuid: str) -> None:
        reply = self.request("DELETE", f"/v1/objects/{uuid}")
        assert reply.status == 204, reply

    def pool(self) -> dict[str, Any]:
        pool: dict[str, Any] = self.request("GET", "/v1/pool").json()
        return pool

    def devices(self) -> list[dict[str, Any]]:
        devices: list[dict[str, Any]] = self.request("GET", "/v1/devices").json()
        return devices
