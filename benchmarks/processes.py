"""What a server costs, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, of its ended children and of its living ones, user and system, in seconds."""
    while True:
        try:
            return _cpu_ticks(pid) / TICKS
        except FileNotFoundError:  # a child ended in between: its parent has its time by now
            Path(f"/proc/{pid}").stat()


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) + sum(map(_cpu_ticks, children(pid)))  # utime, stime, cutime, cstime


def children(pid: int) -> list[int]:
    """The living children of all threads of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.extend(map(int, (task / "children").read_text().split()))
    return found


def memory(pid: int) -> dict[str, float]:
    """The memory figures of /proc/PID/status in MiB: VmRSS, VmHWM (its peak), RssAnon, RssFile, ..."""
    figures = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            figures[name] = int(value.split()[0]) / 1024
    return figures


def forget_peak(pid: int) -> None:
    """Sets VmHWM back to the present VmRSS."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
