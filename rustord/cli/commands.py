"""Commands: all that rustorctl can do, as one command line."""

from __future__ import annotations

from pathlib import Path

import click

from rustord.cli import attach, mover, objects, pool, put, recovery, report, scrub, setup, top, volume
from rustord.cli.edge import Commands

EPILOG = """\b
Exit status: 2 wrong input, 3 not found, 4 precondition failed, 6 full, 7 not
allowed, 8 no daemon, 10 damaged, 15 in use; rustorctl(1) has them all.
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="RUSTORD_SOCKET",
    help="The daemon's [$RUSTORD_SOCKET or /run/rustord/rustord.sock].",
)
@click.version_option(package_name="rustord", message="%(prog)s %(version)s")
@click.pass_context
def rustorctl(context: click.Context, socket: Path | None) -> None:
    """Store, fetch and delete Objects, and look after the pool that holds them."""
    context.obj = socket


assert mover  # its commands are parts of others

for command in (
    *put.COMMANDS,
    *objects.COMMANDS,
    *pool.COMMANDS,
    *volume.COMMANDS,
    *attach.COMMANDS,
    *scrub.COMMANDS,
    *top.COMMANDS,
    *report.COMMANDS,
    *setup.COMMANDS,
):
    rustorctl.add_command(command)
for command in recovery.COMMANDS:
    pool.pool.add_command(command)
