"""The command top: what the daemon is doing now."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from rustord.cli.output import is_terminal, print_json, safe
from rustord.cli.parameters import connect, json_option
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rustord.client import Client

_SLOW_SHOWN = 5

Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """What the daemon told at one moment; ``values`` are its metrics by name and labels."""

    at: float
    pool: Mapping[str, Any]
    devices: Sequence[Mapping[str, Any]]
    slow: Sequence[Mapping[str, Any]]
    values: Mapping[tuple[str, Labels], float]


def take_sample(client: Client) -> Sample:
    """Ask the daemon."""
    from prometheus_client.parser import text_string_to_metric_families

    text = client.metrics()
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Sample(time.monotonic(), client.pool(), client.devices(), client.slow_requests(), values)


class Changes:
    """What happened between two samples."""

    def __init__(self, before: Sample, after: Sample) -> None:
        self.seconds = after.at - before.at
        self._before, self._after = before.values, after.values

    def count(self, name: str, **labels: str) -> float:
        """By how much the counter rose. A daemon that was restarted begins at 0 again."""
        key = (name, tuple(sorted(labels.items())))
        value, old = self._after.get(key, 0.0), self._before.get(key, 0.0)
        return value - old if value >= old else value

    def labels(self, name: str, label: str) -> list[str]:
        """The values of ``label`` for which there is a metric of that name, in the order of the metrics."""
        found = (dict(labels) for metric, labels in self._after if metric == name)
        return list(dict.fromkeys(labels[label] for labels in found if label in labels))

    def mean(self, histogram: str, **labels: str) -> float | None:
        """The mean of what a histogram took in; None if that is nothing."""
        count = self.count(f"{histogram}_count", **labels)
        return self.count(f"{histogram}_sum", **labels) / count if count else None

    def quantile(self, part: float, histogram: str, **labels: str) -> float | None:
        """The upper end of the bucket in which that quantile lies; None if nothing was taken in."""
        total = self.count(f"{histogram}_count", **labels)
        bounds = sorted(self.labels(f"{histogram}_bucket", "le"), key=float)
        reached = (bound for bound in bounds if self.count(f"{histogram}_bucket", le=bound, **labels) >= part * total)
        return float(next(reached)) if total else None


def summary(before: Sample, after: Sample) -> dict[str, Any]:
    """What is shown, ready for JSON. Times in seconds; None where nothing happened."""
    changes = Changes(before, after)
    operations = {
        name: {
            "per_s": changes.count("rustord_request_seconds_count", operation=name) / changes.seconds,
            "mean_s": changes.mean("rustord_request_seconds", operation=name),
            "p99_s": changes.quantile(0.99, "rustord_request_seconds", operation=name),
        }
        for name in changes.labels("rustord_request_seconds_count", "operation")
    }
    return {
        "seconds": changes.seconds,
        "pool": after.pool,
        "received_bytes_s": changes.count("rustord_received_bytes_total") / changes.seconds,
        "sent_bytes_s": changes.count("rustord_sent_bytes_total") / changes.seconds,
        "connections": after.values.get(("rustord_connections_open", ()), 0),
        "operations": {name: told for name, told in operations.items() if told["per_s"]},
        "cycles_per_s": changes.count("rustord_cycle_seconds_count") / changes.seconds,
        "cycle_changes": changes.mean("rustord_cycle_changes"),
        "phases_s": {
            phase: changes.mean("rustord_phase_seconds", phase=phase)
            for phase in changes.labels("rustord_phase_seconds_count", "phase")
        },
        "devices": [
            {**device, "flush_s": changes.mean("rustord_flush_seconds", device=str(device["index"]))}
            for device in after.devices
        ],
        "slow": sorted(after.slow, key=lambda request: -request["taken_s"])[:_SLOW_SHOWN],
    }


@click.command()
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="In seconds.")
@click.option("--count", type=click.IntRange(1), help="End after so many intervals.")
@json_option
@click.pass_obj
def top(socket: Path | None, interval: float, count: int | None, as_json: bool) -> None:
    """Watch what the daemon is doing: requests, cycles, devices. Ctrl-C ends it.

    With --json, or if the output is no terminal, one picture follows the other.
    """
    with connect(socket) as client, contextlib.suppress(KeyboardInterrupt):
        pictures = _pictures(client, interval, count)
        if as_json:
            for told in pictures:
                print_json(told)
                sys.stdout.flush()
        elif is_terminal(sys.stdout):
            _show_live(pictures)
        else:
            from rich.console import Console

            for told in pictures:
                Console(width=100).print(picture(told))


def _pictures(client: Client, interval: float, count: int | None) -> Iterator[dict[str, Any]]:
    before = take_sample(client)
    while count is None or count > 0:
        time.sleep(interval)
        after = take_sample(client)
        yield summary(before, after)
        before = after
        count = None if count is None else count - 1


def _show_live(pictures: Iterator[dict[str, Any]]) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(Text("measuring"), screen=True, auto_refresh=False) as live:
        for told in pictures:
            live.update(picture(told), refresh=True)


def picture(told: Mapping[str, Any]) -> RenderableType:
    """What a person sees."""
    from rich.console import Group
    from rich.text import Text

    pool = told["pool"]
    lines = [
        f"Pool {pool['name'] or pool['uuid']} is {pool['state']}: {pool['objects']:,} Objects with "
        f"{human_size(pool['data_bytes'])}, {human_size(pool['free_bytes'])} of {human_size(pool['size_bytes'])} free",
        *(f"! {problem}" for problem in pool["problems"]),
        f"In {human_size(int(told['received_bytes_s']))}/s, out {human_size(int(told['sent_bytes_s']))}/s, "
        f"{told['connections']:.0f} connections",
        f"{told['cycles_per_s']:,.0f} cycles/s of {told['cycle_changes'] or 0:.1f} changes: "
        + ", ".join(f"{phase} {_duration(told['phases_s'].get(phase))}" for phase in told["phases_s"]),
        f"Journal {pool['journal_used']:.0%} in use, the index is {pool['index_lag']:,} changes behind",
    ]
    return Group(
        Text(safe_lines(lines)),
        _table(
            ("OPERATION", "PER S", "MEAN", "99 %"),
            [
                (name, f"{one['per_s']:,.1f}", _duration(one["mean_s"]), _duration(one["p99_s"], "≤ "))
                for name, one in told["operations"].items()
            ],
        ),
        _table(
            ("DEVICE", "STATE", "FULL", "FLUSH", "PATH"),
            [
                (
                    str(device["index"]),
                    device["state"],
                    f"{1 - device['free_bytes'] / device['size_bytes']:.1%}" if device["size_bytes"] else "-",
                    _duration(device["flush_s"]),
                    device["path"] or "-",
                )
                for device in told["devices"]
            ],
        ),
        _table(
            ("SLOWEST OF LATE", "TOOK", "WHERE"),
            [
                (
                    f"{request['method']} {request['target'][:40]}",
                    _duration(request["taken_s"]),
                    ", ".join(f"{phase} {_duration(seconds)}" for phase, seconds in request["phases_s"].items()),
                )
                for request in told["slow"]
            ],
        ),
    )


def safe_lines(lines: Sequence[str]) -> str:
    """The lines, without what would move the cursor."""
    return "\n".join(map(safe, lines)) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text()
    table = Table(*head, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    return table


def _duration(seconds: float | None, prefix: str = "") -> str:
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{prefix}{seconds * 1e6:.0f} µs"
    return f"{prefix}{seconds * 1e3:.1f} ms" if seconds < 1 else f"{prefix}{seconds:.2f} s"


COMMANDS = (top,)
