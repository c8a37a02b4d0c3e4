"""rustord itself: a daemon with a pool of its own on one device, started, crashed and measured."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contestant import Contestant
from benchmarks.load import ID, Generator, Load, LoadError

PROGRAMS = Path(sys.executable).parent
READY_SECONDS_MAX = 120.0
DELETERS = 64
"""Connections that make the store empty again, outside of what is measured."""


class Rustord(Contestant):
    """A daemon on a Unix socket in `directory`; `data` is what each small object holds."""

    name = "rustord"
    pipelines = True

    def __init__(self, device: str, directory: Path, generator_program: Path, data: bytes) -> None:
        self._device = device
        self._directory = directory
        self._data = data
        self.socket = directory / "socket"
        self._generator = Generator(generator_program, "http", self.socket, directory)
        self._put_ids = directory / "put.ids"
        self._fill_ids = directory / "fill.ids"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Starts the daemon; how many seconds it took until it told systemd (that is, us) READY=1."""
        told = self._directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
            notifications.bind(os.fspath(told))
            notifications.settimeout(0.5)
            start = time.monotonic()
            command: list[str | Path] = [PROGRAMS / "rustord", "--device", self._device, "--socket", self.socket]
            command += ["--directory", self._directory / "index"]
            with (self._directory / "log").open("ab") as log:
                environment = {**os.environ, "NOTIFY_SOCKET": os.fspath(told)}
                self._process = subprocess.Popen(command, env=environment, stderr=log)
            try:
                self._wait_for(b"READY=1", notifications, start + READY_SECONDS_MAX)
            finally:
                told.unlink()
            return time.monotonic() - start

    def _wait_for(self, message: bytes, notifications: socket.socket, deadline: float) -> None:
        assert self._process is not None
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if message in notifications.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                continue
        raise LoadError(f"rustord did not become ready: {(self._directory / 'log').read_text()[-2000:]}")

    def rebuild(self) -> tuple[float, int]:
        """Makes the index anew, from the device alone; the seconds that took, and the bytes that the device has."""
        self.stop()
        index = self._directory / "index"
        shutil.rmtree(index)
        start = time.monotonic()
        command: list[str | Path] = [PROGRAMS / "rustorctl", "pool", "rebuild", "--directory", index, self._device]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        self.start()
        with open(self._device, "rb") as device:
            return seconds, device.seek(0, os.SEEK_END)

    def crash(self) -> None:
        """Ends the daemon by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ends the daemon cleanly, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)

    def put(self, connections: int, seconds: float) -> Load:
        self._delete_all(self._put_ids)
        request = post(self._data)
        return self._generator.run(request, connections=connections, seconds=seconds, save_ids=self._put_ids)

    def put_count(self, connections: int, count: int) -> Load:
        """Like `put`, for so many objects."""
        self._delete_all(self._put_ids)
        return self._generator.run(post(self._data), connections=connections, count=count, save_ids=self._put_ids)

    def fill(self, count: int, data: bytes | None = None) -> None:
        """More objects, beside those of the last `fill`."""
        added = self._fill_ids.with_suffix(".added")
        request = post(self._data if data is None else data)
        self._generator.run(request, connections=DELETERS, count=count, save_ids=added)
        with self._fill_ids.open("ab") as ids:
            ids.write(added.read_bytes())
        added.unlink()

    def get(self, connections: int, depth: int, seconds: float) -> Load:
        return self._generator.run(
            b"GET /v1/objects/%s HTTP/1.1\r\nHost: rustord\r\n\r\n" % ID,
            connections=connections,
            depth=depth,
            seconds=seconds,
            ids=self._fill_ids,
            random=True,
            expect=self._data,
        )

    def delete(self, connections: int) -> Load:
        load = self._delete(self._fill_ids, connections)
        self._fill_ids.unlink()
        return load

    def clear(self) -> None:
        self._delete_all(self._put_ids)
        self._delete_all(self._fill_ids)

    def filled(self) -> list[str]:
        """The uuids of what `fill` stored."""
        return self._fill_ids.read_text().split()

    def delete_filled(self, uuids: set[str]) -> None:
        """Deletes these of what `fill` stored."""
        kept = [uuid for uuid in self.filled() if uuid not in uuids]
        self._fill_ids.write_text("".join(f"{uuid}\n" for uuid in sorted(uuids)))
        self._delete_all(self._fill_ids)
        self._fill_ids.write_text("".join(f"{uuid}\n" for uuid in kept))

    def pool(self) -> dict[str, Any]:
        """What `GET /v1/pool` says."""
        with connection(self.socket) as asking:
            asking.request("GET", "/v1/pool")
            answer: dict[str, Any] = json.loads(asking.getresponse().read())
            return answer

    def _delete_all(self, ids: Path) -> None:
        if ids.exists() and ids.stat().st_size:
            self._delete(ids, DELETERS)
        ids.unlink(missing_ok=True)

    def _delete(self, ids: Path, connections: int) -> Load:
        request = b"DELETE /v1/objects/%s HTTP/1.1\r\nHost: rustord\r\n\r\n" % ID
        return self._generator.run(request, connections=connections, ids=ids)


def post(data: bytes) -> bytes:
    """A request that stores `data`."""
    return b"POST /v1/objects HTTP/1.1\r\nHost: rustord\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


class UnixConnection(http.client.HTTPConnection):
    """The standard library's HTTP client on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("rustord")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.sock.connect(os.fspath(self._path))


@contextmanager
def connection(path: Path) -> Iterator[UnixConnection]:
    """A connection that is closed at the end."""
    opened = UnixConnection(path)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def rustord(device: str, directory: Path, generator_program: Path, data: bytes) -> Iterator[Rustord]:
    """A running daemon with a new pool on `device`, whose label and content are lost. Stopped at the end."""
    directory.mkdir()
    create: list[str | Path] = [PROGRAMS / "rustorctl", "pool", "create", "--force", device]
    subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
    contestant = Rustord(device, directory, generator_program, data)
    try:
        contestant.start()
        yield contestant
    finally:
        contestant.stop()
