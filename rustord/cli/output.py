"""Output: tables, JSON and text on standard output, for a person or a program."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TextIO

import click

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    """``text`` without control characters and such, shown as escapes: a name must not move somebody's cursor."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_terminal(output: TextIO | None) -> bool:
    """Whether standard output, or standard error, is a terminal; it is None if whoever started us has closed it."""
    return output is not None and output.isatty()


def say(text: str) -> None:
    """A line of text; what is not printable is escaped."""
    click.echo(safe(text))


def print_json(value: object) -> None:
    """``value`` on one line and in ASCII, so that a program reads line by line whatever it asked for."""
    click.echo(json.dumps(value))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Rows under a head, the columns in ``right`` aligned to the right.

    Nothing is cut off or folded to fit into a terminal: a uuid or a name that is printed can be copied.
    """
    cells = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for row in (head, *cells):
        line = "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        click.echo(click.style(line, bold=True) if row is head else line)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """One fact a line, the values aligned."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(f"{name.ljust(width)}  {value}")
