"""The commands for Objects that are stored: get, delete, stat and ls."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli import edge
from rustord.cli.output import print_facts, print_json, print_table, say
from rustord.cli.parameters import connect, json_option
from rustord.cli.transfer import Bar, open_destination
from rustord.errors import InUse, InvalidRequest, NotFound, RustordError
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rustord.client import Stored

_RANGE = re.compile(r"(?P<first>[0-9]{1,18})-(?P<last>[0-9]{1,18})?|-(?P<suffix>[0-9]{1,18})")
_COMPLETIONS_MAX = 100
_ROWS_AT_ONCE = 1000
"""Rows whose columns are aligned with one another: a listing of millions is not held in memory."""


def _complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of Objects for the shell; none if the daemon cannot be asked."""
    try:
        with connect(context.find_root().params["socket"]) as client:
            return [stored.name for stored in client.names(incomplete, limit=_COMPLETIONS_MAX)]
    except (RustordError, OSError):
        return []


def _to_range(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int | None]:
    """Half-open from the form that HTTP and curl use; a negative start counts from the end."""
    if value is None:
        return 0, None
    found = _RANGE.fullmatch(value)
    if found is None or found["suffix"] == "0":
        raise click.BadParameter(f"{value!r} is not a range: write 0-99, 100- (from there) or -100 (the last ones)")
    if found["suffix"]:
        return -int(found["suffix"]), None
    first, end = int(found["first"]), int(found["last"]) + 1 if found["last"] else None
    if end is not None and end <= first:
        raise click.BadParameter(f"{value!r} ends before it begins")
    return first, end


@click.command()
@click.argument("key", metavar="UUID|NAME", shell_complete=_complete_name)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file, whole or not at all.")
@click.option("--range", "part", metavar="A-B", callback=_to_range, help="Only bytes A to B, both included; A-, -N.")
@click.pass_obj
def get(socket: Path | None, key: str, output: Path | None, part: tuple[int, int | None]) -> None:
    """Write an Object's data to standard output, or to a file."""
    start, end = part
    with (
        connect(socket) as client,
        client.open(key, start=start, end=end) as download,
        open_destination(output) as write,
        Bar(key, download.size) as bar,
    ):
        for piece in download:
            write(piece)
            bar.advance(len(piece))


@click.command()
@click.argument("keys", metavar="UUID|NAME...", nargs=-1, required=True, shell_complete=_complete_name)
@click.pass_context
def delete(context: click.Context, keys: tuple[str, ...]) -> None:
    """Delete Objects. Their blocks have been erased when it returns."""
    status = 0
    with connect(context.obj) as client:
        for key in keys:
            try:
                client.delete(key)
            except (NotFound, InUse, InvalidRequest) as error:  # the others are deleted nevertheless
                edge.complain("rustorctl", error.message, error.hint)
                status = status or error.exit_status
    context.exit(status)


@click.command()
@click.argument("key", metavar="UUID|NAME", shell_complete=_complete_name)
@json_option
@click.pass_obj
def stat(socket: Path | None, key: str, as_json: bool) -> None:
    """Show what is known of an Object, and where its data is."""
    with connect(socket) as client:
        manifest = client.manifest(client.stat(key).uuid)
    if as_json:
        print_json(manifest)
        return
    print_facts(
        [
            ("Uuid", manifest["uuid"]),
            ("Name", manifest["name"] or "-"),
            ("Size", f"{manifest['size']} ({human_size(manifest['size'])})"),
            ("Type", manifest["content_type"] or "-"),
            ("Created", manifest["created"]),
            ("Hash", f"{manifest['algorithm']} {manifest['digest']}"),
            *((f"Meta {name}", value) for name, value in sorted(manifest["attributes"].items())),
            ("Layout", manifest["layout"]),
            *((f"Copy {number}", _copy_text(copy)) for number, copy in enumerate(manifest["copies"])),
        ]
    )


def _copy_text(extents: Iterable[dict[str, Any]]) -> str:
    return ", ".join(
        (f"layer {extent['layer']}" if "layer" in extent else f"device {extent['index']}")
        + f" blocks {extent['block']}-{extent['block'] + extent['count'] - 1}"
        for extent in extents
    )


@click.command()
@click.argument("prefix", default="", shell_complete=_complete_name)
@click.option("-l", "--long", is_flag=True, help="Show uuid, size, time and type, too.")
@click.option("-a", "--all", "unnamed", is_flag=True, help="All Objects by uuid, those without a name, too.")
@json_option
@click.pass_obj
def ls(socket: Path | None, prefix: str, long: bool, unnamed: bool, as_json: bool) -> None:
    """List the names that begin with PREFIX, or all."""
    if unnamed and prefix:
        raise click.UsageError("--all lists by uuid, and takes no PREFIX")
    with connect(socket) as client:
        listed = client.objects() if unnamed else client.names(prefix)
        if as_json:
            for stored in listed:
                print_json(stored._asdict())
        elif long:
            _print_long(listed)
        else:
            for stored in listed:
                say(f"{stored.uuid}  {stored.name}".rstrip() if unnamed else stored.name)


def _print_long(listed: Iterable[Stored]) -> None:
    rows: list[tuple[str, ...]] = []
    for stored in listed:
        created = stored.created.partition(".")[0] + "Z"  # a person needs no microseconds
        rows.append((stored.uuid, str(stored.size), created, stored.content_type or "-", stored.name))
        if len(rows) == _ROWS_AT_ONCE:
            _print_rows(rows)
            rows.clear()
    if rows:
        _print_rows(rows)


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    print_table(("UUID", "SIZE", "CREATED", "TYPE", "NAME"), rows, right=("SIZE",))


COMMANDS = (get, delete, stat, ls)
