"""The commands for block devices: attach, detach, attached and exports."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from rustord.cli.output import print_json, print_table, say
from rustord.cli.parameters import connect, json_option
from rustord.quantity import human_size

nbd_socket_option = click.option(
    "--nbd-socket", type=click.Path(path_type=Path), help="The daemon's NBD socket [nbd.sock beside its other one]."
)


def _nbd_socket(socket: Path | None, nbd_socket: Path | None) -> Path:
    from rustord.client.connection import DEFAULT_SOCKET

    return (nbd_socket or Path(socket or DEFAULT_SOCKET).with_name("nbd.sock")).absolute()


@click.command()
@click.argument("name", metavar="UUID|NAME")
@click.option("--read-only", is_flag=True, help="Let nobody write to it, where it could be written to.")
@click.option("--connections", type=click.IntRange(1, 16), default=1, show_default=True, help="More use more CPUs.")
@click.option("--foreground", is_flag=True, help="Stay, for a service manager; detach when told to end, and unused.")
@nbd_socket_option
@click.pass_obj
def attach(
    socket: Path | None, name: str, read_only: bool, connections: int, foreground: bool, nbd_socket: Path | None
) -> None:
    """Make an Object a block device, /dev/nbdN, through the kernel.

    It survives a restart of the daemon: requests wait meanwhile, and a process that stays in the background
    connects it again. Needs root, and a kernel with nbd.
    """
    from rustord import attachment
    from rustord.supervisor import Supervisor

    path = _nbd_socket(socket, nbd_socket)
    with attachment.Kernel() as kernel:
        number, link, _ = attachment.attach(
            kernel, path, name, connections=connections, read_only=read_only, take_over=foreground
        )
        say(f"/dev/nbd{number}")
        if foreground:
            told: list[int] = []
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signal_number, lambda number, _: told.append(number))
            with contextlib.closing(Supervisor()) as supervisor:
                supervisor.alive(f"{name} is /dev/nbd{number}")
            attachment.keep(
                *(kernel, number, link, path, name, lambda text: click.echo(text, err=True)), lambda: bool(told)
            )
        elif os.fork() == 0:
            _stay(lambda: attachment.keep(kernel, number, link, path, name))


def _stay(keep: Callable[[], None]) -> NoReturn:
    """Go to the background, where nobody is told anything any more, and hold nothing of who began this."""
    try:
        os.setsid()
        os.chdir("/")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
            with contextlib.suppress(OSError):  # that of the directory
                if descriptor > 2 and os.get_inheritable(descriptor):  # our own are not
                    os.close(descriptor)
        keep()
    finally:
        os._exit(0)


@click.command()
@click.argument("which", metavar="UUID|NAME|/dev/nbdN")
def detach(which: str) -> None:
    """Take a block device away. It must not be mounted."""
    from rustord import attachment

    device = attachment.find(which)
    attachment.check_unused(device.path)
    with attachment.Kernel() as kernel:
        kernel.disconnect(device.number)


@click.command()
@json_option
def attached(as_json: bool) -> None:
    """List what is attached as /dev/nbdN."""
    from rustord import attachment

    devices = list(attachment.attached())
    if as_json:
        keys = ("path", "name", "size", "read_only")
        print_json([{key: getattr(device, key) for key in keys} for device in devices])
        return
    rows = [
        (device.path, human_size(device.size), "read-only" if device.read_only else "writable", device.name or "-")
        for device in devices
    ]
    print_table(("DEVICE", "SIZE", "MODE", "NAME"), rows, right=("SIZE",))


@click.command()
@json_option
@click.pass_obj
def exports(socket: Path | None, as_json: bool) -> None:
    """List who has what open as a block device."""
    with connect(socket) as client:
        opened = client.exports()
    if as_json:
        print_json(opened)
        return
    rows = [
        (
            export["name"],
            "read-only" if export["read_only"] else "writable",
            human_size(export["read_bytes"]),
            human_size(export["written_bytes"]),
            export["since"].partition(".")[0] + "Z",
            export["client"],
        )
        for export in opened
    ]
    print_table(("NAME", "MODE", "READ", "WRITTEN", "SINCE", "CLIENT"), rows, right=("READ", "WRITTEN"))


COMMANDS = (attach, detach, attached, exports)
