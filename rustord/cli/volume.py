"""The commands for volumes: writable block devices that are kept in the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli.edge import Commands, complain
from rustord.cli.output import print_facts, print_json, print_table, say
from rustord.cli.parameters import connect, json_option, to_size
from rustord.errors import RustordError
from rustord.objkey import is_uuid
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rustord.client import Client

_ROW = ("SIZE", "OWN", "SHARED", "OPEN")


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of volumes for the shell; none if the daemon cannot be asked."""
    try:
        with connect(context.find_root().params["socket"]) as client:
            return [volume["name"] for volume in client.volumes() if volume["name"].startswith(incomplete)]
    except (RustordError, OSError):
        return []


def _to_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("it is empty")
    return value


def _to_object_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    if value == "":
        raise click.BadParameter("it is empty; leave it out if the Object needs none of its own")
    if value and is_uuid(value):
        raise click.BadParameter(f"{value!r} would be taken for a uuid")
    return value or ""


_name = click.argument("name", callback=_to_name, shell_complete=_complete)
_size = click.option("--size", callback=to_size, required=True, help='Such as "100 GiB"; rounded up to 64 KiB.')
_as_name = click.option("--as", "object_name", callback=_to_object_name, metavar="NAME", help="Name of the Object.")


@click.group(cls=Commands)
def volume() -> None:
    """Writable block devices that are kept in the pool.

    A volume takes room only where it has been written. 'rustorctl attach'
    makes it a device of this machine; any NBD client can use it by its name.
    """


@volume.command()
@click.argument("name")
@_size
@json_option
@click.pass_obj
def create(socket: Path | None, name: str, size: int, as_json: bool) -> None:
    """Make an empty volume.

    It is kept once, also where the pool keeps each Object twice.
    """
    with connect(socket) as client:
        _show(client.create_volume(name, size), as_json)
        _warn(client)


@volume.command()
@click.argument("source", metavar="UUID|NAME")
@click.argument("name")
@json_option
@click.pass_obj
def clone(socket: Path | None, source: str, name: str, as_json: bool) -> None:
    """Make a volume of what an Object has.

    Nothing is copied: the volume shares the Object's blocks, until it is
    written there. The Object may be deleted nevertheless.
    """
    with connect(socket) as client:
        _show(client.clone_volume(source, name), as_json)
        _warn(client)


def _warn(client: Client) -> None:
    """Say that a volume is not kept as safely as the Objects of the pool, if that is so."""
    if client.pool()["placer"] == "mirrored":
        text = "the pool keeps each Object more than once, but a volume once: it is lost with a device that it is on"
        complain("rustorctl", text, hint="take snapshots, and copy them elsewhere: 'rustorctl get'")


@volume.command("ls")
@json_option
@click.pass_obj
def list_volumes(socket: Path | None, as_json: bool) -> None:
    """List the volumes."""
    with connect(socket) as client:
        volumes = client.volumes()
    if as_json:
        print_json(volumes)
    else:
        print_table((*_ROW, "NAME"), [(*_columns(volume), volume["name"]) for volume in volumes], right=_ROW)


def _columns(volume: dict[str, Any]) -> Sequence[str]:
    sizes = (volume["size"], volume["own_bytes"], volume["shared_bytes"])
    return (*map(human_size, sizes), str(volume["open"]))


@volume.command()
@_name
@json_option
@click.pass_obj
def stat(socket: Path | None, name: str, as_json: bool) -> None:
    """Show what is known of a volume: how much is its own, how much shared."""
    with connect(socket) as client:
        _show(client.volume(name), as_json)


@volume.command()
@_name
@_size
@json_option
@click.pass_obj
def resize(socket: Path | None, name: str, size: int, as_json: bool) -> None:
    """Make a volume longer, or shorter if nothing is beyond the new end.

    Nobody may be using it when it becomes shorter. Who is using it sees
    that it is longer when he attaches or connects again.
    """
    with connect(socket) as client:
        _show(client.resize_volume(name, size), as_json)


@volume.command()
@_name
@click.pass_obj
def delete(socket: Path | None, name: str) -> None:
    """Delete a volume. What nobody else needs of it has been erased then."""
    with connect(socket) as client:
        client.delete_volume(name)


@volume.command()
@_name
@_as_name
@json_option
@click.pass_obj
def freeze(socket: Path | None, name: str, object_name: str, as_json: bool) -> None:
    """Make a volume an Object, named like it. It is a volume no more.

    Nothing is copied. Nobody may be using it; take a snapshot then.
    """
    with connect(socket) as client:
        _show_object(client.freeze_volume(name, object_name)._asdict(), as_json)


@volume.command()
@_name
@_as_name
@json_option
@click.pass_obj
def snapshot(socket: Path | None, name: str, object_name: str, as_json: bool) -> None:
    """Make an Object of what a volume has now, also while it is in use.

    Nothing is copied. It has what was written before this moment, as after
    a power cut: let the filesystem sync or freeze before.
    """
    with connect(socket) as client:
        _show_object(client.snapshot_volume(name, object_name)._asdict(), as_json)


def _show(volume: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(volume)
        return
    print_facts(
        [
            ("Name", volume["name"]),
            ("Size", f"{volume['size']} ({human_size(volume['size'])})"),
            ("Own", human_size(volume["own_bytes"])),
            ("Shared", human_size(volume["shared_bytes"])),
            ("Created", volume["created"]),
            ("Layers", str(volume["layers"])),
            ("Open", f"{volume['open']} times"),
        ]
    )


def _show_object(stored: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(stored)
    else:
        say(f"{stored['uuid']}  {stored['name']}".rstrip())


COMMANDS = (volume,)
