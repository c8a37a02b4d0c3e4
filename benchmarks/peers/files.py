"""A file an object on xfs, written by threads of this very process: no socket, no server, no verifying."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count as counter
from pathlib import Path

from benchmarks.contestant import Contestant
from benchmarks.load import Load

FOLDERS = 64


class Files(Contestant):
    """Files in 64 folders. A put is durable when it returns: write, fsync, rename, fsync of the folder."""

    name = "files on xfs"

    def __init__(self, directory: Path, data: bytes) -> None:
        self._data = data
        self._folders = [directory / f"{number:02x}" for number in range(FOLDERS)]
        for folder in self._folders:
            folder.mkdir(parents=True)
        self._handles = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in self._folders]
        self._numbers = counter()
        self._stored = range(0)

    @property
    def pid(self) -> int:
        return os.getpid()

    def put(self, connections: int, seconds: float) -> Load:
        return self._run(connections, seconds, lambda: self._put(next(self._numbers)))

    def fill(self, count: int) -> None:
        first = next(self._numbers)
        self._stored = range(first, first + count)
        self._numbers = counter(first + count)
        for number in self._stored:
            self._path(number).write_bytes(self._data)
        os.sync()

    def get(self, connections: int, depth: int, seconds: float) -> Load:
        """There is no depth without a connection."""
        return self._run(connections, seconds, lambda: self._get(random.choice(self._stored)))

    def delete(self, connections: int) -> Load:
        numbers = iter(self._stored)
        return self._run(connections, float("inf"), lambda: self._delete(next(numbers)))

    def clear(self) -> None:
        for folder in self._folders:
            for path in folder.iterdir():
                path.unlink()
        os.sync()

    def close(self) -> None:
        """Closes the folders."""
        for handle in self._handles:
            os.close(handle)

    def _path(self, number: int) -> Path:
        return self._folders[number % FOLDERS] / str(number)

    def _put(self, number: int) -> None:
        path = os.fspath(self._path(number))
        temporary = path + ".new"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, self._data)
        os.fsync(file)
        os.close(file)
        os.rename(temporary, path)
        os.fsync(self._handles[number % FOLDERS])

    def _get(self, number: int) -> None:
        file = os.open(self._path(number), os.O_RDONLY)
        data = os.read(file, len(self._data) + 1)
        os.close(file)
        assert len(data) == len(self._data)

    def _delete(self, number: int) -> None:
        os.unlink(self._path(number))
        os.fsync(self._handles[number % FOLDERS])

    def _run(self, threads: int, seconds: float, operation: Callable[[], None]) -> Load:
        """Calls `operation` in so many threads until the time is up or it raises StopIteration."""
        start = time.monotonic()

        def work() -> int:
            for done in counter():
                if time.monotonic() - start >= seconds:
                    return done
                try:
                    operation()
                except StopIteration:
                    return done
            raise AssertionError("counter() does not end")

        with ThreadPoolExecutor(threads) as pool:
            operations = sum(future.result() for future in [pool.submit(work) for _ in range(threads)])
        return Load(operations, time.monotonic() - start)


@contextmanager
def files(filesystem: Path, data: bytes) -> Iterator[Files]:
    """Files in a new directory on `filesystem`."""
    contestant = Files(filesystem / "files", data)
    try:
        yield contestant
    finally:
        contestant.close()
