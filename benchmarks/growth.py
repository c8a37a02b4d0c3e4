"""Rows for a pool with many Objects: the start after a crash, the memory of the index, and how it is made anew."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.effort import Effort
from benchmarks.processes import memory
from benchmarks.report import Bound, Row
from benchmarks.subject import Rustord

START_SECONDS_MAX = 4.0
RESIDENT_MIB_MAX = 350.0
MILLION = 1_000_000
RECENT = 0.01
"""The part of the Objects that is stored right before each crash, so that there is a journal to read again."""


def growth(subject: Rustord, effort: Effort) -> Iterator[Row]:
    """SIGKILL with more and more Objects in the pool, and the time from the start of the process to READY=1."""
    stored = 0
    for count in effort.start_counts:
        seconds = []
        for number in range(effort.rounds):
            more = max(count - stored, 0) if number == 0 else round(count * RECENT)
            subject.fill(more)
            stored += more
            resident_before = memory(subject.pid)["VmRSS"]
            subject.crash()
            seconds.append(subject.start())
        goals = (Bound(START_SECONDS_MAX),) if count == MILLION else ()
        yield Row(f"start after a crash, {count:,} Objects", "s", {"rustord": seconds}, goals, more_is_better=False)
    goals = (Bound(RESIDENT_MIB_MAX),) if count == MILLION else ()
    for when, resident in (("stored", resident_before), ("after the start", memory(subject.pid)["VmRSS"])):
        work = f"memory with {count:,} Objects, {when}"
        yield Row(work, "MiB", {"rustord": [resident]}, goals, more_is_better=False)
    taken, size = subject.rebuild()
    yield Row(f"rebuild of a lost index, {stored:,} Objects", "s", {"rustord": [taken]}, more_is_better=False)
    yield Row("the same, of the device that is read from end to end", "MB/s", {"rustord": [size / taken / 1e6]})
