"""The commands that move Objects from device to device: device remove, fail and replace; pool heal and rebalance."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli.output import is_terminal, print_json, say
from rustord.cli.parameters import ask_patiently, connect, json_option
from rustord.cli.pool import device, dry_run_option, force_option, pool, say_verdict
from rustord.errors import RustordError
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rustord.client import Client

_POLL_S = 0.5

wait_option = click.option("--wait", is_flag=True, help="Wait until it is done, and show how far it is.")


@device.command()
@click.argument("device")
@click.option("--stop", is_flag=True, help="Keep a device that is being emptied.")
@wait_option
@json_option
@click.pass_obj
def remove(socket: Path | None, device: str, stop: bool, wait: bool, as_json: bool) -> None:
    """Take a device out of the pool: DEVICE is its index, uuid or path.

    What is on it is moved to the other devices first, if these have room for it. Meanwhile everything can be read and
    stored. It goes on after a restart, and can be stopped.
    """
    with connect(socket) as client:
        entry = client.keep_device(device) if stop else client.remove_device(device)
        _tell_leaving(client, entry, wait, as_json)


@device.command()
@click.argument("device")
@wait_option
@json_option
@click.pass_obj
def fail(socket: Path | None, device: str, wait: bool, as_json: bool) -> None:
    """Give up a device that is lost or dying: DEVICE is its index, uuid or path.

    Copies on other devices take its place. Of what has none, all that can still be read is moved; the rest is lost.
    Objects that are on a missing device alone keep it in the pool until they are deleted.
    """
    with connect(socket) as client:
        _tell_leaving(client, client.remove_device(device, give_up=True), wait, as_json)


@device.command()
@click.argument("old")
@click.argument("new", type=click.Path(path_type=Path))
@force_option
@dry_run_option
@wait_option
@json_option
@click.pass_obj
def replace(socket: Path | None, old: str, new: Path, force: bool, dry_run: bool, wait: bool, as_json: bool) -> None:
    """Claim the device NEW, and take the device OLD out of the pool (see remove).

    OLD is an index, uuid or path. If it is missing or has failed, it is given up (see fail).
    """
    with connect(socket) as client:
        added = client.add_device(os.fspath(new.absolute()), force=force, dry_run=dry_run, replaces=old)
        if not dry_run:
            _tell_leaving(client, {**added, "standing": "replacing"}, wait, as_json)
        elif as_json:
            print_json(added)
        else:
            say_verdict(added["path"], added["size_bytes"], added["would_erase"])


def _tell_leaving(client: Client, entry: dict[str, Any], wait: bool, as_json: bool) -> None:
    name = f"device {entry['index']} ({entry['path'] or entry['uuid']})"
    if as_json and not wait:
        print_json(entry)
        return
    told = {
        "removed": f"{name} no longer belongs to the pool",
        "in use": f"{name} stays",
        "replacing": f"{name} belongs to the pool, and the other one is being emptied",
    }
    if not as_json:
        say(told.get(entry["standing"], f"{name} is being emptied; 'rustorctl device list' shows when it has gone"))
    if wait and entry["standing"] not in ("removed", "in use"):
        wait_until_done(client, as_json=as_json)


@pool.command()
@click.option("--stop", is_flag=True, help="End it; what has been moved stays where it is.")
@wait_option
@json_option
@click.pass_obj
def heal(socket: Path | None, stop: bool, wait: bool, as_json: bool) -> None:
    """Make the copies anew that are on devices which are missing or have failed.

    Objects with the fewest copies left come first, of these the newest.
    """
    _move(socket, "heal", stop, wait, as_json)


@pool.command()
@click.option("--stop", is_flag=True, help="End it; what has been moved stays where it is.")
@wait_option
@json_option
@click.pass_obj
def rebalance(socket: Path | None, stop: bool, wait: bool, as_json: bool) -> None:
    """Move Objects from the fuller devices to the emptier ones, until all are about equally full."""
    _move(socket, "rebalance", stop, wait, as_json)


def _move(socket: Path | None, work: str, stop: bool, wait: bool, as_json: bool) -> None:
    with connect(socket) as client:
        status = client.stop_mover() if stop else client.start_mover(work)
        if wait and not stop:
            wait_until_done(client, as_json=as_json)
        elif as_json:
            print_json(status)
        else:
            say("stopped" if stop else f"{work} has begun; 'rustorctl pool {work} --wait' shows how far it is")


def wait_until_done(client: Client, *, as_json: bool) -> None:
    """Show how far it is until it has ended. Raises RustordError if it has failed, or was stopped."""
    show = _progress() if is_terminal(sys.stderr) and not as_json else lambda status: None
    status = ask_patiently(client.mover)
    while status["state"] == "running":
        show(status)
        time.sleep(_POLL_S)
        status = ask_patiently(client.mover)
    if as_json:
        print_json(status)
    elif status["state"] == "done":
        say(f"done: {status['moved']:,} Objects have been moved")
    if status["state"] == "failed":
        raise RustordError(f"{status['job']}: {status['error']}", hint="see 'rustorctl status', and rustord's log")
    if status["state"] == "stopped":
        raise RustordError(f"{status['job']}: somebody stopped it before it was done")


def _progress() -> Callable[[dict[str, Any]], None]:
    def show(status: dict[str, Any]) -> None:
        done, total = status["done_bytes"], status["total_bytes"]
        share = f"{done / total:.0%}" if total else "looking"
        click.echo(f"\r{status['job']}: {share} of {human_size(total)}   ", err=True, nl=False)

    return show
