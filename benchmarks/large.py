"""Rows for one large object: in and out over one connection, and how much memory the daemon takes meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb

from benchmarks.effort import LARGE_SIZE, MIB, Effort
from benchmarks.load import LoadError
from benchmarks.processes import forget_peak, memory
from benchmarks.report import Bound, Goal, Row, Times
from benchmarks.subject import Rustord, UnixConnection, connection

SIZE = LARGE_SIZE
PIECE = MIB
GET_MB_PER_S_MIN = 2500.0
EXTRA_MIB_MAX = 96.0
CLONE_MS_MAX = 50.0

Seconds = float


def large(subject: Rustord, filesystem: Path, effort: Effort) -> Iterator[Row]:
    """64 MiB durably in, beside cp and fsync; 64 MiB out of the cache, beside LMDB."""
    data = os.urandom(SIZE)
    source = Path("/dev/shm/rustord-benchmark")
    source.write_bytes(data)
    try:
        writers = {
            "rustord": lambda: put_durably(subject, data),
            "cp, fsync": lambda: copy_durably(source, filesystem),
        }
        yield speeds("durable PUT of 64 MiB, one stream", writers, effort, (Times(1.0, ("cp, fsync",)),))
    finally:
        source.unlink()
    with connection(subject.socket) as talking, lmdb.open(str(filesystem / "lmdb"), map_size=2 * SIZE) as database:
        uuid = put(talking, SIZE, data)
        with database.begin(write=True) as transaction:
            transaction.put(b"key", data)
        check(talking, uuid, data)
        room = bytearray(PIECE)
        readers = {"rustord": lambda: get(talking, uuid, SIZE, room), "LMDB": lambda: get_from_lmdb(database)}
        goals = (Bound(GET_MB_PER_S_MIN), Times(1.3, ("LMDB",)))
        yield speeds("verified GET of 64 MiB, cached", readers, effort, goals)


def speeds(work: str, contestants: dict[str, Callable[[], Seconds]], effort: Effort, goals: Sequence[Goal]) -> Row:
    """A row of MB/s of contestants that move SIZE bytes in turns."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(effort.rounds):
        for name, move in contestants.items():
            os.sync()
            seconds = sum(move() for _ in range(effort.large_repeats))
            figures[name].append(effort.large_repeats * SIZE / seconds / 1e6)
    return Row(work, "MB/s", figures, goals)


def huge(subject: Rustord, effort: Effort) -> Iterator[Row]:
    """The peak of the daemon's memory above what it had before, during one PUT and one GET of an object of 8 GiB."""
    size = effort.huge_size
    gib = f"{size / (1 << 30):.3g} GiB"
    room = bytearray(os.urandom(PIECE))
    extra: dict[str, list[float]] = {"PUT": [], "GET": []}
    speed: dict[str, list[float]] = {"PUT": [], "GET": []}

    def watch(work: str, move: Callable[[], Seconds]) -> None:
        forget_peak(subject.pid)
        before = memory(subject.pid)["VmRSS"]
        speed[work].append(size / move() / 1e6)
        extra[work].append(memory(subject.pid)["VmHWM"] - before)

    with connection(subject.socket) as talking:
        uuid = ""

        def store() -> Seconds:
            nonlocal uuid
            start = time.monotonic()
            uuid = put(talking, size, room)
            return time.monotonic() - start

        watch("PUT", store)
        watch("GET", lambda: get(talking, uuid, size, room))
        clones = [clone(talking, uuid, f"clone{number}") for number in range(effort.rounds)]
        delete(talking, uuid)
    for work in extra:
        figures = {"rustord": extra[work]}
        goals = (Bound(EXTRA_MIB_MAX),)
        yield Row(f"memory for one {work} of {gib}, above idle", "MiB", figures, goals, more_is_better=False)
        yield Row(f"speed of that {work}", "MB/s", {"rustord": speed[work]})
    figures = {"rustord": [seconds * 1000 for seconds in clones]}
    yield Row(f"a clone of {gib}, writable", "ms", figures, (Bound(CLONE_MS_MAX),), more_is_better=False)


def put_durably(subject: Rustord, data: bytes) -> Seconds:
    """Stores it over a connection of its own; the clock stops at the reply."""
    with connection(subject.socket) as talking:
        talking.connect()
        start = time.monotonic()
        put(talking, len(data), data)
        return time.monotonic() - start


def copy_durably(source: Path, directory: Path) -> Seconds:
    """`cp` to a new file, then fsync."""
    target = directory / f"copy-{time.monotonic_ns()}"
    start = time.monotonic()
    subprocess.run(["cp", source, target], check=True)
    file = os.open(target, os.O_RDONLY)
    os.fsync(file)
    seconds = time.monotonic() - start
    os.close(file)
    return seconds


def get_from_lmdb(database: lmdb.Environment) -> Seconds:
    """A read transaction and one get, which copies the value out of the map."""
    start = time.monotonic()
    with database.begin() as transaction:
        assert len(transaction.get(b"key", b"")) == SIZE
    return time.monotonic() - start


def clone(talking: UnixConnection, uuid: str, name: str) -> float:
    """Makes a volume of an Object; in how many seconds. Raises LoadError if that fails."""
    start = time.monotonic()
    talking.request("POST", "/v1/volumes", json.dumps({"name": name, "source": uuid}))
    expect_volume(talking)
    return time.monotonic() - start


def expect_volume(talking: UnixConnection) -> None:
    """Waits for the reply to the making of a volume. Raises LoadError if that failed."""
    reply = talking.getresponse()
    said = reply.read()
    if reply.status != 201:
        raise LoadError(f"no volume: {reply.status} {said!r}")


def put(talking: UnixConnection, size: int, piece: bytes | bytearray) -> str:
    """Stores `piece` repeated until it is `size` bytes, and returns the uuid. Raises LoadError if that fails."""
    body = (piece for _ in range(size // len(piece)))
    talking.request("POST", "/v1/objects", body, {"Content-Length": str(size)})
    reply = talking.getresponse()
    text = reply.read()
    if reply.status != 201:
        raise LoadError(f"PUT of {size} bytes: {reply.status} {text!r}")
    return (reply.getheader("Location") or "").rpartition("/")[2]


def get(talking: UnixConnection, uuid: str, size: int, room: bytearray) -> Seconds:
    """Reads a whole object into the same room over and over. Raises LoadError if it is short."""
    start = time.monotonic()
    talking.request("GET", f"/v1/objects/{uuid}")
    reply = talking.getresponse()
    got = 0
    while count := reply.readinto(room):
        got += count
    if reply.status != 200 or got != size:
        raise LoadError(f"GET of {size} bytes: {reply.status}, {got} bytes")
    return time.monotonic() - start


def check(talking: UnixConnection, uuid: str, data: bytes) -> None:
    """Raises LoadError unless the object holds just `data`."""
    talking.request("GET", f"/v1/objects/{uuid}")
    if talking.getresponse().read() != data:
        raise LoadError("GET returned other bytes than PUT took")


def delete(talking: UnixConnection, uuid: str) -> None:
    """Deletes an object."""
    talking.request("DELETE", f"/v1/objects/{uuid}")
    talking.getresponse().read()
