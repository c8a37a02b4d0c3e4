"""What the tests of the commands share: the commands as processes, and a daemon on an image file."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
START_SECONDS_MAX = 30


class Command:
    """A command with the socket of a daemon in its environment; a call runs it to its end."""

    def __init__(self, program: str, socket_path: Path) -> None:
        self.program = str(BIN / program)
        self.environment = {**os.environ, "RUSTORD_SOCKET": str(socket_path)}
        self._started: list[subprocess.Popen[bytes]] = []

    def __call__(self, *arguments: str | Path, **keywords: Any) -> subprocess.CompletedProcess[str]:
        settings = {"capture_output": True, "text": True, "timeout": 60, "env": self.environment}
        if "input" not in keywords:
            settings["stdin"] = subprocess.DEVNULL
        return subprocess.run([self.program, *map(str, arguments)], **(settings | keywords))

    def ok(self, *arguments: str | Path, **keywords: Any) -> str:
        """What it printed; it must have ended well, without a word on standard error."""
        done = self(*arguments, **keywords)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def start(self, *arguments: str | Path, **keywords: Any) -> subprocess.Popen[bytes]:
        """The running command. It is killed in the end, whatever became of the test, and its pipes are closed."""
        settings = {"env": self.environment, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([self.program, *map(str, arguments)], **(settings | keywords))
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def socket_path(disk_path: Path) -> Path:
    return disk_path / "rustord.sock"


@pytest.fixture
def rustorctl(socket_path: Path) -> Iterator[Command]:
    with contextlib.closing(Command("rustorctl", socket_path)) as command:
        yield command


@pytest.fixture
def pool_image(disk_path: Path, rustorctl: Command) -> Path:
    """An image file with a new pool of 64 MiB."""
    path = disk_path / "pool.img"
    rustorctl.ok("pool", "create", "--pool-name", "test", "--size", "64 MiB", path)
    return path


@pytest.fixture
def start_daemon(disk_path: Path, socket_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a daemon, waits until it listens, and stops it in the end."""
    started = []

    def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
        command = [BIN / "rustord", "--directory", disk_path / "index", "--socket", socket_path, *arguments]
        with (disk_path / "daemon.log").open("ab") as log:
            daemon = subprocess.Popen(list(map(str, command)), stderr=log)
        started.append(daemon)
        deadline = time.monotonic() + START_SECONDS_MAX
        while not _answers(socket_path):
            assert daemon.poll() is None, (disk_path / "daemon.log").read_text()
            assert time.monotonic() < deadline, (disk_path / "daemon.log").read_text()
            time.sleep(0.01)
        return daemon

    yield start
    for daemon in started:
        daemon.terminate()
    for daemon in started:
        daemon.wait(timeout=60)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@pytest.fixture
def daemon(pool_image: Path, start_daemon: Callable[..., subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A daemon that serves `pool_image`."""
    return start_daemon("--device", pool_image)
