"""What several commands take or need: shared options, conversions, the connection to the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from rustord.errors import Unavailable
from rustord.quantity import parse_size

if TYPE_CHECKING:
    from rustord.client import Client

T = TypeVar("T")

_RESTART_S = 300.0
_POLL_S = 0.5

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def to_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    if value is None:
        return None
    try:
        size = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if size >> 63:
        raise click.BadParameter(f"{value!r} is more than a file can have")
    return size


def connect(socket: Path | None) -> Client:
    """A client of the daemon on ``socket``; None: where it listens by default."""
    from rustord.client import Client

    return Client() if socket is None else Client(socket)


def ask_patiently(ask: Callable[[], T]) -> T:
    """What the daemon answers; one that is started again meanwhile goes on with what it did."""
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            return ask()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
