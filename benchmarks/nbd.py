"""Rows for block devices over NBD: an Object and a volume, beside nbdkit and qemu-nbd on a device of the same kind."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.effort import MIB, Effort
from benchmarks.large import clone, expect_volume, put
from benchmarks.load import LoadError, build
from benchmarks.processes import cpu_seconds, forget_peak, memory
from benchmarks.report import Bound, Goal, Row, Times
from benchmarks.subject import Rustord, connection

CLIENT = Path(__file__).with_name("nbdclient.c")
SIZE = 256 * MIB
SECONDS_MAX = 3.0
"""Longer turns tell no more: everything is cached."""
BUSY_COUNT, BUSY_MIB_MAX = 16, 64.0
NBDKIT, QEMU = "nbdkit", "qemu-nbd"


class Target(NamedTuple):
    """Where a contestant serves what is only read, what is written, and a clone; all of `SIZE` bytes."""

    reading: str
    writing: str
    clone: str


def nbd(subject: Rustord, device: str, place: Path, effort: Effort) -> Iterator[Row]:
    """All rows. ``device`` is what the peers serve."""
    with peer(NBDKIT, device, place) as nbdkit, peer(QEMU, device, place) as qemu:
        targets = {
            "rustord": make_exports(subject),
            NBDKIT: Target(nbdkit, nbdkit, nbdkit),
            QEMU: Target(qemu, qemu, qemu),
        }
        for target in targets.values():
            for uri in set(target):
                fio(uri, "read", seconds=0.0, block="1m", depth=4)
        yield from rows(targets, effort)
        yield from receiving(subject, targets, place, effort)
    yield busy_memory(subject, targets["rustord"], effort)


def rows(targets: dict[str, Target], effort: Effort) -> Iterator[Row]:
    for depth, factor in ((1, 0.85), (16, 1.1), (64, 1.2)):
        work = f"NBD 4 KiB random read of an Object, verified, cached, depth {depth}"
        yield row(work, targets, effort, "randread", depth, Times(factor, (NBDKIT,)))
    clones = {name: target._replace(reading=target.clone) for name, target in targets.items()}
    yield row("NBD 4 KiB random read of a clone, cached, depth 16", clones, effort, "randread", 16)
    for depth in (1, 16, 64):
        yield row(
            f"NBD 4 KiB random write to a volume, depth {depth}",
            targets,
            effort,
            "randwrite",
            depth,
            Times(0.8, (NBDKIT,)),
        )
    yield row("NBD 1 MiB sequential read of an Object", targets, effort, "read", 8, Times(1.3, (NBDKIT,)), block="1m")
    yield row("NBD 1 MiB sequential write to a volume", targets, effort, "write", 8, Times(0.9, (NBDKIT,)), block="1m")
    for depth in (1, 16):
        yield row(
            f"NBD 4 KiB random write and flush, depth {depth}",
            targets,
            effort,
            "randwrite",
            depth,
            Times(1.0, (NBDKIT, QEMU)),
            flush=True,
        )
    yield row("NBD 4 KiB random read of two exports at once, depth 16", targets, effort, "randread", 16, both=True)


def row(
    work: str,
    targets: dict[str, Target],
    effort: Effort,
    kind: str,
    depth: int,
    *goals: Goal,
    block: str = "4k",
    flush: bool = False,
    both: bool = False,
) -> Row:
    """Operations or MiB a second of all, in turns; with ``both`` of two exports together."""
    figures: dict[str, list[float]] = {name: [] for name in targets}
    names = list(targets)
    for turn in range(effort.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            target = targets[name]
            uris = [target.reading, target.writing] if both else [target.writing if "write" in kind else target.reading]
            with ThreadPoolExecutor(len(uris)) as threads:
                seconds = min(effort.seconds, SECONDS_MAX)
                rates = [
                    threads.submit(fio, uri, kind, seconds=seconds, block=block, depth=depth, flush=flush)
                    for uri in uris
                ]
                figures[name].append(sum(rate.result() for rate in rates))
    return Row(work, "MB/s" if block == "1m" else "op/s", figures, goals)


def receiving(subject: Rustord, targets: dict[str, Target], place: Path, effort: Effort) -> Iterator[Row]:
    """What clients get that do nothing with it: fio takes as long over a MiB as a server. Of one export, then of two,
    for which the daemon's CPU time is counted."""
    program = build(CLIENT, place)
    for work, order, length, depth in (
        ("1 MiB sequential", "sequential", MIB, 8),
        ("4 KiB random", "random", 4096, 16),
    ):
        unit = "MB/s" if length == MIB else "op/s"
        for count in (1, 2):
            figures: dict[str, list[float]] = {name: [] for name in targets}
            cpus = []
            for turn in range(effort.rounds):
                names = list(targets)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    seconds = min(effort.seconds, SECONDS_MAX)
                    uris = [targets[name].reading, targets[name].writing][:count]
                    before = cpu_seconds(subject.pid)
                    with ThreadPoolExecutor(count) as threads:
                        rates = [threads.submit(receive, program, uri, depth, length, seconds, order) for uri in uris]
                        rate = sum(rate.result() for rate in rates)
                    figures[name].append(rate * MIB / 1e6 if length == MIB else rate)
                    if name == "rustord":
                        cpus.append((cpu_seconds(subject.pid) - before) / seconds)
            exports = "one export" if count == 1 else "two exports at once"
            yield Row(f"NBD {work} read of {exports}, only received, depth {depth}", unit, figures)
        yield Row(f"CPUs for the {work} reads of two exports", "CPUs", {"rustord": cpus})


def receive(program: Path, uri: str, depth: int, length: int, seconds: float, order: str) -> float:
    """Reads a second. Raises LoadError."""
    name, _, socket = uri.removeprefix("nbd+unix:///").partition("?socket=")
    words = [program, socket, name, depth, length, seconds, SIZE, order]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=10 * seconds + 60)
    if done.returncode != 0:
        raise LoadError(f"reading {uri}: {done.stderr.strip()}")
    count, elapsed = done.stdout.split()
    return int(count) / float(elapsed)


def busy_memory(subject: Rustord, target: Target, effort: Effort) -> Row:
    """The peak of the daemon's memory above what it had before, while many clients read long pieces."""
    forget_peak(subject.pid)
    before = memory(subject.pid)["VmRSS"]
    with ThreadPoolExecutor(BUSY_COUNT) as threads:
        seconds = min(effort.seconds, SECONDS_MAX)
        clients = [
            threads.submit(fio, target.reading, "read", seconds=seconds, block="1m", depth=8) for _ in range(BUSY_COUNT)
        ]
        for client in clients:
            client.result()
    figures = {"rustord": [memory(subject.pid)["VmHWM"] - before]}
    work = f"memory of {BUSY_COUNT} busy NBD connections, above idle"
    return Row(work, "MiB", figures, (Bound(BUSY_MIB_MAX),), more_is_better=False)


def fio(uri: str, kind: str, *, seconds: float, block: str, depth: int, flush: bool = False) -> float:
    """Operations (or, of 1 MiB, MB) a second. Without ``seconds`` all of it once. Raises LoadError."""
    command = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", f"--bs={block}", "--norandommap"]
    command += [f"--iodepth={depth}", f"--size={SIZE}", "--randrepeat=0", "--output-format=json"]
    command += ["--time_based", f"--runtime={round(seconds * 1000)}ms"] if seconds else []
    command += ["--fsync=1"] if flush else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise LoadError(f"fio on {uri}: {done.stderr[-500:]}{done.stdout[-500:]}")
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    told = job["write" if "write" in kind else "read"]
    return float(told["bw_bytes"] / 1e6 if block == "1m" else told["iops"])


def make_exports(subject: Rustord) -> Target:
    """An Object, a volume that is written all over, and a clone of the Object."""
    piece = bytearray(range(1, 256)) * (MIB // 255 + 1)
    with connection(subject.socket) as talking:
        uuid = put(talking, SIZE, piece[:MIB])
        talking.request("POST", "/v1/volumes", json.dumps({"name": "volume", "size": SIZE}))
        expect_volume(talking)
        clone(talking, uuid, "clone")
    ours = subject.socket.with_name("nbd.sock")
    fio(address(ours, "volume"), "write", seconds=0.0, block="1m", depth=4)
    return Target(address(ours, uuid), address(ours, "volume"), address(ours, "clone"))


def address(socket: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={socket}"


@contextmanager
def peer(name: str, device: str, place: Path) -> Iterator[str]:
    """Serves ``device`` on a socket of its own; yields the address."""
    socket = place / f"{name}.socket"
    commands: dict[str, Sequence[str | Path]] = {
        NBDKIT: ("nbdkit", "--foreground", "--unix", socket, "file", device),
        QEMU: (
            "qemu-nbd",
            "--persistent",
            "--shared=16",
            "--format=raw",
            "--cache=writeback",
            "--socket",
            socket,
            device,
        ),
    }
    with subprocess.Popen(commands[name], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 10
            while not socket.exists():
                if time.monotonic() > deadline:
                    raise LoadError(f"{name} does not serve")
                time.sleep(0.02)
            yield address(socket)
        finally:
            process.terminate()
