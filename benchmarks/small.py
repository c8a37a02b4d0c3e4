"""Rows for 4 KiB objects: durable PUT, verified GET from the cache, DELETE with zeroing, and the CPU time of a PUT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from benchmarks.contestant import Contestant
from benchmarks.effort import Effort, rotated
from benchmarks.load import Load
from benchmarks.processes import cpu_seconds
from benchmarks.report import SERVERS, Bound, Goal, Row, Times

PUT_GOALS = {1: 1.0, 16: 1.5, 64: 1.5}
GET_GOALS: dict[tuple[int, int], tuple[Goal, ...]] = {
    (1, 1): (Times(0.8, ("Redis",)),),
    (16, 1): (Times(0.5, ("Redis",)), Times(1.3, ("PostgreSQL",))),
    (4, 16): (),
}
DELETE_GOALS = {16: Times(1.0, ("PostgreSQL",)), 64: Times(0.6, ("Redis",))}
CPU_US_MAX = 40.0

Turn = Callable[[Contestant], Load]


def put(contestants: Sequence[Contestant], effort: Effort) -> Iterator[Row]:
    """Durable PUT at each concurrency, then the servers' CPU time for one."""
    for connections, factor in PUT_GOALS.items():

        def turn(contestant: Contestant, connections: int = connections) -> Load:
            load = with_cpu(contestant, lambda: contestant.put(connections, effort.seconds))
            contestant.clear()
            return load

        loads = in_turns(contestants, effort.rounds, turn)
        yield rates(f"durable PUT, {plural(connections)}", loads, (Times(factor, SERVERS),))
        if connections == 16:
            cpu = {name: [load.server_cpu_us for load in of_rounds] for name, of_rounds in loads.items()}
            work = f"server CPU for a durable PUT, {plural(connections)}"
            yield Row(work, "µs", cpu, (Bound(CPU_US_MAX),), more_is_better=False)


def get(contestants: Sequence[Contestant], effort: Effort) -> Iterator[Row]:
    """Reads of random objects, all of them in the page cache or, for Redis, in its memory."""
    for contestant in contestants:
        contestant.fill(effort.small_count)
    for (connections, depth), goals in GET_GOALS.items():
        # Not everything can have more than one request under way on a connection.
        able = [each for each in contestants if depth == 1 or each.pipelines]

        def turn(contestant: Contestant, connections: int = connections, depth: int = depth) -> Load:
            return with_cpu(contestant, lambda: contestant.get(connections, depth, effort.seconds))

        at_depth = f" of depth {depth}" if depth > 1 else ""
        loads = in_turns(able, effort.rounds, turn)
        yield rates(f"verified GET, cached, {plural(connections)}{at_depth}", loads, goals)
    for contestant in contestants:
        contestant.clear()


def delete(contestants: Sequence[Contestant], effort: Effort) -> Iterator[Row]:
    """DELETE of each object by a request of its own; rustord's data is zero on the device when it replies."""
    for connections, goal in DELETE_GOALS.items():

        def turn(contestant: Contestant, connections: int = connections) -> Load:
            contestant.fill(effort.small_count)
            os.sync()
            load = with_cpu(contestant, lambda: contestant.delete(connections))
            contestant.clear()
            return load

        loads = in_turns(contestants, effort.rounds, turn)
        yield rates(f"DELETE, zeroed by rustord only, {plural(connections)}", loads, (goal,))


def with_cpu(contestant: Contestant, work: Callable[[], Load]) -> Load:
    """The load that `work` is, with the CPU time that the server took for each of its operations."""
    before = cpu_seconds(contestant.pid)
    load = work()
    spent = cpu_seconds(contestant.pid) - before
    return replace(load, server_cpu_us=spent * 1e6 / max(load.operations, 1))


def in_turns(contestants: Sequence[Contestant], rounds: int, turn: Turn) -> dict[str, list[Load]]:
    """The loads of each contestant. Each round begins with another one, and nobody pays for what another wrote."""
    loads: dict[str, list[Load]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        for contestant in rotated(contestants, number):
            os.sync()
            loads[contestant.name].append(turn(contestant))
    return loads


def rates(work: str, loads: dict[str, list[Load]], goals: Sequence[Goal]) -> Row:
    """A row of operations per second."""
    figures = {name: [load.rate for load in of_rounds] for name, of_rounds in loads.items()}
    raw = {name: [asdict(load) for load in of_rounds] for name, of_rounds in loads.items()}
    return Row(work, "op/s", figures, goals, raw=raw)


def plural(connections: int) -> str:
    """A number of connections in words."""
    return f"{connections} connection{'s' if connections != 1 else ''}"
