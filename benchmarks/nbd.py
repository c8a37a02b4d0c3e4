"""Rows for block devices over NBD: an Object and a volume, beside nbdkit and qemu-nbd on a device of the same kind."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.effort import MIB, Effort, rotated
from benchmarks.large import clone, expect_volume, put
from benchmarks.load import LoadError, build
from benchmarks.processes import children, cpu_seconds, forget_peak, memory
from benchmarks.report import SUBJECT, Bound, Goal, Row, Times
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
        program = build(CLIENT, place)
        yield beside_flushes(targets, program, effort)
        yield from receiving(subject, targets, program, effort, order="sequential", length=MIB, depth=8)
        yield from receiving(subject, targets, program, effort, order="random", length=4096, depth=16)
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

    def work_on(uri: str) -> float:
        return fio(uri, kind, seconds=min(effort.seconds, SECONDS_MAX), block=block, depth=depth, flush=flush)

    def turn(target: Target) -> float:
        one = target.writing if "write" in kind else target.reading
        return together(work_on, [target.reading, target.writing] if both else [one])

    return Row(work, "MB/s" if block == "1m" else "op/s", in_turns(targets, effort.rounds, turn), goals)


def in_turns(targets: dict[str, Target], rounds: int, turn: Callable[[Target], float]) -> dict[str, list[float]]:
    """The figures of each contestant. Each round begins with another one."""
    figures: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(rounds):
        for name in rotated(list(targets), number):
            figures[name].append(turn(targets[name]))
    return figures


def together(work: Callable[[str], float], uris: Sequence[str]) -> float:
    """What comes of work on several exports at once."""
    with ThreadPoolExecutor(len(uris)) as threads:
        return sum(threads.map(work, uris))


def receiving(
    subject: Rustord, targets: dict[str, Target], program: Path, effort: Effort, *, order: str, length: int, depth: int
) -> Iterator[Row]:
    """What clients get that do nothing with it: fio takes as long over a MiB as a server. Of one export, then of two,
    for which the daemon's CPU time is counted."""
    seconds = min(effort.seconds, SECONDS_MAX)
    work, unit = (f"1 MiB {order}", "MB/s") if length == MIB else (f"4 KiB {order}", "op/s")
    read = partial(receive, program, depth=depth, length=length, seconds=seconds, order=order)
    cpus: list[float] = []

    def of_one(target: Target) -> float:
        return read(target.reading)

    def of_two(target: Target) -> float:
        before = cpu_seconds(subject.pid)
        rate = together(read, [target.reading, target.writing])
        if target is targets[SUBJECT]:
            cpus.append((cpu_seconds(subject.pid) - before) / seconds)
        return rate

    for exports, turn in (("one export", of_one), ("two exports at once", of_two)):
        figures = in_turns(targets, effort.rounds, turn)
        yield Row(f"NBD {work} read of {exports}, only received, depth {depth}", unit, figures)
    yield Row(f"CPUs for the {work} reads of two exports", "CPUs", {SUBJECT: cpus})


def beside_flushes(targets: dict[str, Target], program: Path, effort: Effort) -> Row:
    seconds = min(effort.seconds, SECONDS_MAX)

    def turn(target: Target) -> float:
        return receive(program, target.writing, depth=1, length=4096, seconds=seconds, order="flushing")

    work = "NBD 4 KiB random read, depth 1, beside writes and flushes on the same connection"
    return Row(work, "op/s", in_turns(targets, effort.rounds, turn))


def receive(program: Path, uri: str, *, depth: int, length: int, seconds: float, order: str) -> float:
    """Reads (or, of 1 MiB, MB) a second. Raises LoadError."""
    name, _, socket = uri.removeprefix("nbd+unix:///").partition("?socket=")
    words = [program, socket, name, depth, length, seconds, SIZE, order]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=10 * seconds + 60)
    if done.returncode != 0:
        raise LoadError(f"reading {uri}: {done.stderr.strip()}")
    count, elapsed = done.stdout.split()
    rate = int(count) / float(elapsed)
    return rate * MIB / 1e6 if length == MIB else rate


def busy_memory(subject: Rustord, target: Target, effort: Effort) -> Row:
    """The peak of the memory of all processes, above that of the daemon before, while many clients read long pieces."""
    forget_peak(subject.pid)
    before = memory(subject.pid)["VmRSS"]
    with ThreadPoolExecutor(BUSY_COUNT) as threads:
        seconds = min(effort.seconds, SECONDS_MAX)
        clients = [
            threads.submit(fio, target.reading, "read", seconds=seconds, block="1m", depth=8) for _ in range(BUSY_COUNT)
        ]
        for client in clients:
            client.result()
    peaks = [memory(pid)["VmHWM"] for pid in (subject.pid, *children(subject.pid))]
    work = f"memory of {BUSY_COUNT} busy NBD connections, above idle"
    return Row(work, "MiB", {"rustord": [sum(peaks) - before]}, (Bound(BUSY_MIB_MAX),), more_is_better=False)


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
