"""Redis with an append-only file that is flushed before each reply: its only mode that keeps what it acknowledged."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contestant import Contestant
from benchmarks.load import ID, Generator, Load

SETTINGS = (
    "port 0",
    "save ''",
    "appendonly yes",
    "appendfsync always",
    "auto-aof-rewrite-percentage 0",
    "daemonize no",
    "loglevel warning",
)


class Redis(Contestant):
    """redis-server on a Unix socket; `data` is what each object holds."""

    name = "Redis"
    pipelines = True

    def __init__(self, process: subprocess.Popen[bytes], generator: Generator, address: Path, data: bytes) -> None:
        self._process = process
        self._generator = generator
        self._address = address
        self._data = data
        self._keys = address.with_suffix(".keys")
        self._next_key = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def put(self, connections: int, seconds: float) -> Load:
        self._name_keys(round(100_000 * seconds))
        request = command(b"SET", ID, self._data)
        return self._generator.run(request, connections=connections, seconds=seconds, ids=self._keys)

    def fill(self, count: int) -> None:
        self._name_keys(count)
        self._generator.run(command(b"SET", ID, self._data), connections=4, depth=16, ids=self._keys)

    def get(self, connections: int, depth: int, seconds: float) -> Load:
        request = command(b"GET", ID)
        return self._generator.run(
            request,
            connections=connections,
            depth=depth,
            seconds=seconds,
            ids=self._keys,
            random=True,
            expect=self._data,
        )

    def delete(self, connections: int) -> Load:
        return self._generator.run(command(b"DEL", ID), connections=connections, ids=self._keys)

    def clear(self) -> None:
        """Empties it and its file too: a rewrite leaves nothing of what was deleted."""
        self.ask(b"FLUSHALL", b"SYNC")
        self.ask(b"BGREWRITEAOF")
        deadline = time.monotonic() + 60
        while b"aof_rewrite_in_progress:1" in self.ask(b"INFO", b"persistence"):
            if time.monotonic() > deadline:
                raise TimeoutError("Redis did not rewrite its file within a minute")
            time.sleep(0.05)

    def ask(self, *words: bytes) -> bytes:
        """One command on a connection of its own; the reply as it came (up to 64 KiB)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(self._address))
            connection.sendall(command(*words))
            return connection.recv(1 << 16)

    def _name_keys(self, count: int) -> None:
        first = self._next_key
        self._next_key += count
        self._keys.write_text("".join(f"key:{number:012d}\n" for number in range(first, first + count)))


def command(*words: bytes) -> bytes:
    """A command in Redis' protocol. An ID stands for sixteen bytes."""
    lengths = [16 if word == ID else len(word) for word in words]
    parts = (b"$%d\r\n%s\r\n" % pair for pair in zip(lengths, words, strict=True))
    return b"*%d\r\n%s" % (len(words), b"".join(parts))


@contextmanager
def redis(filesystem: Path, generator_program: Path, data: bytes) -> Iterator[Redis]:
    """A Redis that keeps its files in a new directory on `filesystem`."""
    directory = filesystem / "redis"
    directory.mkdir()
    address = directory / "socket"
    settings = directory / "redis.conf"
    settings.write_text("\n".join((*SETTINGS, f"dir {directory}", f"unixsocket {address}")))
    process = subprocess.Popen(["redis-server", settings], stdout=subprocess.DEVNULL)
    try:
        generator = Generator(generator_program, "resp", address, directory)
        contestant = Redis(process, generator, address, data)
        wait_until_it_answers(contestant)
        yield contestant
    finally:
        process.kill()
        process.wait()


def wait_until_it_answers(contestant: Redis) -> None:
    """Waits for PONG. Raises TimeoutError after ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if contestant.ask(b"PING") == b"+PONG\r\n":
                return
        except OSError:
            pass
        time.sleep(0.02)
    raise TimeoutError("redis-server does not answer")
