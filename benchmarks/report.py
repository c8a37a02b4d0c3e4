"""Rows of figures, and the table that people read: each row beside its peers, with ratios and what it must reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import rich.table

SUBJECT = "rustord"
SERVERS = ("Redis", "PostgreSQL")
"""Peers with a column of their own. Others share one: each has only a row or two to say something to."""
OTHERS = "others"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Row:
    """One work, one figure from each round for each that did it."""

    work: str
    unit: str
    figures: dict[str, list[float]]
    goals: Sequence[Goal] = ()
    more_is_better: bool = True
    raw: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """The middle figure of a contestant; None if it took no part."""
        return median(self.figures[name]) if self.figures.get(name) else None

    def ratio(self, name: str) -> float | None:
        """How many times as good as `name` rustord is."""
        ours, theirs = self.median(SUBJECT), self.median(name)
        if not ours or not theirs:
            return None
        return ours / theirs if self.more_is_better else theirs / ours


class Goal(Protocol):
    """What a row must reach."""

    def met(self, row: Row) -> bool | None:
        """None if what it compares with was not measured."""


@dataclass(frozen=True)
class Times:
    """At least `factor` times as good as the best of `peers`."""

    factor: float
    peers: tuple[str, ...]

    def met(self, row: Row) -> bool | None:
        ratios = [row.ratio(peer) for peer in self.peers]
        if None in ratios:
            return None
        return all(ratio is not None and ratio >= self.factor for ratio in ratios)

    def __str__(self) -> str:
        return f"{self.factor:.2g}{TIMES} {' and '.join(self.peers)}"


@dataclass(frozen=True)
class Bound:
    """At least, or at most, so much."""

    value: float

    def met(self, row: Row) -> bool | None:
        ours = row.median(SUBJECT)
        if ours is None:
            return None
        return ours >= self.value if row.more_is_better else ours <= self.value

    def __str__(self) -> str:
        return number(self.value)


def number(value: float) -> str:
    """As few digits as say it: 21,340 but 3.41."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def verdict(row: Row) -> str:
    """Met or missed; nothing when there is no goal, or nothing to hold it against."""
    judged = [goal.met(row) for goal in row.goals]
    if not judged or None in judged:
        return ""
    return "met" if all(judged) else "missed"


def goals(row: Row) -> str:
    """What a row must reach, in words."""
    bound = "≥" if row.more_is_better else "≤"
    return ", ".join(f"{bound} {goal}" for goal in row.goals)


def cell(row: Row, name: str) -> str:
    """A peer's figure with how many times as good rustord is."""
    theirs, ratio = row.median(name), row.ratio(name)
    if theirs is None:
        return ""
    return number(theirs) + (f" ({ratio:.2f}{TIMES})" if ratio is not None else "")


def cells(row: Row) -> list[str]:
    """A row of the table, as text."""
    ours = row.median(SUBJECT)
    others = [name for name in row.figures if name not in (SUBJECT, *SERVERS)]
    return [
        f"{row.work}, {row.unit}",
        "" if ours is None else number(ours),
        *(cell(row, name) for name in SERVERS),
        "; ".join(f"{name} {cell(row, name)}" for name in others),
        goals(row),
        verdict(row),
    ]


HEADINGS = ("work", SUBJECT, *SERVERS, OTHERS, "must reach", "")


def for_terminal(rows: Sequence[Row]) -> rich.table.Table:
    """The table, for rich to print."""
    table = rich.table.Table(*HEADINGS, caption=LEGEND)
    for row in rows:
        colour = {"met": "green", "missed": "red"}.get(verdict(row), "")
        *text, told = cells(row)
        table.add_row(*text, f"[{colour}]{told}[/]" if colour else told)
    return table


def for_readme(rows: Sequence[Row], machine: str) -> str:
    """The table in Markdown."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 3), "---", "---"), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{LEGEND} {machine}\n"


def for_programs(rows: Sequence[Row], machine: str) -> dict[str, Any]:
    """Everything that was measured, for json.dumps."""
    return {"machine": machine, "rows": [{**asdict(row), "goals": goals(row), "verdict": verdict(row)} for row in rows]}


LEGEND = (
    "In brackets: how many times as good rustord is. Medians of rounds in which all took turns, on loop devices over "
    "files written through once; durable means flushed to the device before the reply. Redis: appendonly with "
    "appendfsync always. PostgreSQL: bytea by primary key, prepared statements. In-process: no server, no socket "
    "between; add about 45 µs per operation to compare."
)
