"""Load on a socket: builds and runs `loadgen.c`, the generator that drives rustord and Redis alike."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Protocol = Literal["http", "resp"]

ID = b"{id}"
"""Stands in a request template where the id goes."""

GENERATOR = Path(__file__).with_name("loadgen.c")


class LoadError(Exception):
    """The generator or a server under load did not do what it should; the figures are void."""


@dataclass(frozen=True)
class Load:
    """What one run of a generator saw. `server_cpu_us` is the server's CPU time per operation in microseconds."""

    operations: int
    seconds: float
    p50_us: float = 0.0
    p99_us: float = 0.0
    client_cpu_us: float = 0.0
    server_cpu_us: float = 0.0

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds


def build(source: Path, directory: Path) -> Path:
    """Compiles a program into `directory`. Raises LoadError if there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise LoadError(f"no C compiler for {source.name}: apt install gcc libc6-dev")
    program = directory / source.stem
    subprocess.run([compiler, "-O2", "-o", program, source], check=True)
    return program


class Generator:
    """Drives the server on one socket in one protocol. Scratch files go to `directory`."""

    def __init__(self, program: Path, protocol: Protocol, socket: Path, directory: Path) -> None:
        self._program = program
        self._protocol = protocol
        self._socket = socket
        self._template = directory / f"{protocol}.request"
        self._body = directory / f"{protocol}.body"

    def run(
        self,
        request: bytes,
        *,
        connections: int,
        depth: int = 1,
        seconds: float = 0.0,
        count: int = 0,
        ids: Path | None = None,
        random: bool = False,
        expect: bytes | None = None,
        save_ids: Path | None = None,
    ) -> Load:
        """Sends `request` over and over until `seconds` have passed, `count` were sent, or each of the ids was used.

        `{id}` in the request is replaced by a line of the file `ids`, whose lines all have the same width: each once in
        their order, or for ever at random. With `expect`, each reply's body must be these bytes. With `save_ids`, the
        uuid in each reply's Location goes to that file. Raises LoadError if even one reply was bad.
        """
        head, found, tail = request.partition(ID)
        id_offset = -1
        if found:
            if ids is None:
                raise ValueError("a request with {id} needs a file of ids")
            id_offset = len(head)
            with ids.open("rb") as lines:
                head += b"0" * len(lines.readline().rstrip(b"\n"))
        self._template.write_bytes(head + tail)
        if expect is not None:
            self._body.write_bytes(expect)
        command: list[object] = [self._program, self._protocol, self._socket, connections, depth, seconds, count]
        command += [self._template, id_offset, ids or "-", "random" if random else "once"]
        command += ["-" if expect is None else self._body, save_ids or "-"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise LoadError(f"load on {self._socket}: {done.stderr.strip()}")
        operations, errors, elapsed, cpu, p50, p99 = done.stdout.split()
        if int(errors):
            raise LoadError(f"{errors} of {operations} replies from {self._socket} were bad: {done.stderr.strip()}")
        per_operation = 1e6 / max(int(operations), 1)
        return Load(int(operations), float(elapsed), float(p50), float(p99), float(cpu) * per_operation)


@contextmanager
def id_file(path: Path, ids: Iterable[str]) -> Iterator[Path]:
    """A file with an id a line, removed at the end."""
    path.write_text("".join(f"{text}\n" for text in ids))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
