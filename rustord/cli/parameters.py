"""What several commands take or need: shared options, conversions, the connection to the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rustord.quantity import parse_size

if TYPE_CHECKING:
    from rustord.client import Client

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def to_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def connect(socket: Path | None) -> Client:
    """A client of the daemon on ``socket``; None: where it listens by default."""
    from rustord.client import Client

    return Client() if socket is None else Client(socket)
