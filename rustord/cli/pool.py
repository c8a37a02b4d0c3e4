"""The commands that look after a pool: status, pool and device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli.edge import Commands
from rustord.cli.map import map_devices
from rustord.cli.output import print_facts, print_json, print_table, say
from rustord.cli.parameters import connect, json_option, to_size
from rustord.cli.transfer import named
from rustord.errors import ClaimRefused, InvalidRequest, NotFound
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rustord.claim import Verdict

BLOCK_SIZES = ("4096", "8192", "16384", "32768", "65536")

force_option = click.option("--force", is_flag=True, help="Erase what is on a device that is not in use; says what.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Only look, and say what would be done.")


@click.command()
@json_option
@click.pass_obj
def status(socket: Path | None, as_json: bool) -> None:
    """Show the pool and its devices."""
    with connect(socket) as client:
        pool, devices = client.pool(), client.devices()
    if as_json:
        print_json({**pool, "devices": devices})
        return
    print_facts(_pool_facts(pool))
    click.echo()
    _print_devices(devices)


def _pool_facts(pool: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Pool", f"{pool['name'] or 'without a name'} ({pool['uuid']})"
    yield "State", pool["state"]
    yield from (("Problem", problem) for problem in pool["problems"])
    yield "Objects", f"{pool['objects']:,} with {human_size(pool['data_bytes'])} of data"
    free, size = pool["free_bytes"], pool["size_bytes"]
    yield "Free", f"{human_size(free)} of {human_size(size)} ({_percent(free, size)}) in {pool['free_runs']:,} runs"
    yield "Blocks", f"{pool['block_size']} bytes"
    yield "Placer", pool["placer"]
    yield "Hash", pool["algorithm"]
    yield "Erase", pool["erase"]
    yield "Exports", f"{pool['exports']:,} in use" + (": 'rustorctl exports' lists by whom" if pool["exports"] else "")
    yield "Journal", f"{pool['journal_used']:.0%} in use, the index is {pool['index_lag']:,} changes behind"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _print_devices(devices: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> None:
    """A table of the devices; ``more`` names further columns."""
    head = ("INDEX", "STATE", "SIZE", "FREE", *(name.upper() for name in more), "PATH")
    rows = [
        (
            str(device["index"]),
            device["state"],
            human_size(device["size_bytes"]),
            human_size(device["free_bytes"]),
            *(device[name] for name in more),
            device["path"] or "-",
        )
        for device in devices
    ]
    print_table(head, rows, right=("INDEX", "SIZE", "FREE"))


@click.group(cls=Commands)
def device() -> None:
    """List, add and remove the devices of the pool."""


@device.command("list")
@json_option
@click.pass_obj
def list_devices(socket: Path | None, as_json: bool) -> None:
    """List the pool's devices, missing ones too."""
    with connect(socket) as client:
        devices = client.devices()
    if as_json:
        print_json(devices)
    else:
        _print_devices(devices, ("standing", "uuid", "reason"))


@device.command()
@click.argument("path", type=click.Path(path_type=Path))
@force_option
@dry_run_option
@json_option
@click.pass_obj
def add(socket: Path | None, path: Path, force: bool, dry_run: bool, as_json: bool) -> None:
    """Claim a device, and add it to the pool.

    It is refused, with every reason, unless it is proven free.
    """
    with connect(socket) as client:
        added = client.add_device(os.fspath(path.absolute()), force=force, dry_run=dry_run)
    if as_json:
        print_json(added)
    elif dry_run:
        say_verdict(added["path"], added["size_bytes"], added["would_erase"])
    else:
        say(f"{added['path']} is device {added['index']} ({added['uuid']}) with {human_size(added['size_bytes'])}")


def say_verdict(path: str, size: int, erasures: Sequence[str]) -> None:
    """What would become of a device that is claimed."""
    say(f"{path}: {human_size(size)}, " + ("would be taken" if erasures else "free, would be taken"))
    for erasure in erasures:
        say(f"  would erase {erasure}")


@click.group(cls=Commands)
def pool() -> None:
    """Make a pool, or look after the one that is served."""


@pool.command()
@click.argument("devices", metavar="DEVICE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pool-name", default="", help="A name for people, up to 64 bytes.")
@click.option("--block-size", type=click.Choice(BLOCK_SIZES), default="4096", show_default=True, help="In bytes.")
@click.option("--size", callback=to_size, help='Make image files that do not exist, this large ("4 GiB").')
@force_option
@dry_run_option
@json_option
def create(
    devices: tuple[Path, ...],
    pool_name: str,
    block_size: str,
    size: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Claim devices or image files, and make a new pool of them.

    Works without the daemon. Each device is refused, with every reason, unless it is proven free; if one is, none
    is changed.
    """
    from rustord.pool import check_new

    _check_distinct(devices)
    check_new(len(devices), pool_name, int(block_size))  # before --force erases anything
    with _images(devices, size, dry_run) as missing:
        verdicts = _require_free([path for path in devices if path not in missing], force)
        if dry_run:
            for verdict in verdicts:
                say_verdict(verdict.path, verdict.size, verdict.erasures)
            for path in missing:
                say(f"{path}: would be made with {human_size(size or 0)}")
            return
        label = _create(devices, pool_name, int(block_size), force)
    if as_json:
        print_json(label)
    else:
        say(f"pool {label['name'] or label['uuid']} of {label['devices']} devices, {human_size(label['size_bytes'])}")


def _check_distinct(devices: Sequence[Path]) -> None:
    real = [os.path.realpath(path) for path in devices]
    for index, path in enumerate(devices):
        if real[index] in real[:index]:
            raise InvalidRequest(f"{path} is named twice", hint="name each device once")


@contextlib.contextmanager
def _images(devices: Sequence[Path], size: int | None, dry_run: bool) -> Iterator[list[Path]]:
    """Make the image files that are missing; they go away again unless the pool comes about."""
    missing = [path for path in devices if not path.exists()]
    if missing and size is None:
        raise NotFound(f"there is no {missing[0]}", hint="--size 4GiB makes an image file of that size")
    made: list[Path] = []
    try:
        for path in missing if not dry_run else ():
            with named(path), path.open("xb") as image:
                made.append(path)
                image.truncate(size)
        yield missing
    except BaseException:
        for path in made:
            path.unlink()
        raise


def _require_free(devices: Sequence[Path], force: bool) -> list[Verdict]:
    """Look at all before the first one is changed. Raises ClaimRefused with the reasons against all of them."""
    from rustord.claim import check

    verdicts = [check(path) for path in devices]
    refusals = []
    for verdict in verdicts:
        try:
            verdict.require(force=force)
        except ClaimRefused as refusal:
            refusals.append(refusal)
    if refusals:
        message = ", and ".join(refusal.message for refusal in refusals)
        reasons = [reason for refusal in refusals for reason in refusal.reasons]
        raise ClaimRefused(message, reasons=reasons, hint=refusals[0].hint)
    return verdicts


def _create(devices: Sequence[Path], name: str, block_size: int, force: bool) -> dict[str, Any]:
    from rustord.claim import claim
    from rustord.keygen import HashKeyGen
    from rustord.objkey import uuid_text
    from rustord.pool import create_pool

    with contextlib.ExitStack() as opened:
        claimed = []
        for path in devices:
            device = claim(path, force=force, announce=partial(_announce, path))
            opened.callback(device.close)
            claimed.append(device)
        labels = create_pool(claimed, HashKeyGen("xxh3-128"), name=name, block_size=block_size)
    return {
        "uuid": uuid_text(labels[0].pool_uuid),
        "name": name,
        "block_size": block_size,
        "devices": len(labels),
        "size_bytes": sum(label.geometry.data_block_count for label in labels) * block_size,
    }


def _announce(path: Path, erasure: str) -> None:
    click.echo(f"{path}: erasing {erasure}", err=True)


pool.add_command(status)
pool.add_command(map_devices)

COMMANDS = (status, pool, device)
