"""rustord: the command that runs the daemon."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli import edge

if TYPE_CHECKING:
    from rustord.config import Config

LEVELS = ("debug", "info", "warning", "error")


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog="Stop it with Ctrl-C or SIGTERM.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration [/etc/rustord/rustord.toml].")
@click.option("--socket", type=click.Path(path_type=Path), help="Serve on this Unix socket.")
@click.option("--device", "devices", multiple=True, type=click.Path(path_type=Path), help="Open this device or image.")
@click.option("--directory", type=click.Path(path_type=Path), help="Keep the index in this directory.")
@click.option("--log-level", type=click.Choice(LEVELS), help="Log what is at least this severe.")
@click.option("--print-settings", is_flag=True, help="Print the reference of all settings, and exit.")
@click.option("--print-example", is_flag=True, help="Print an example configuration, and exit.")
@click.version_option(package_name="rustord", message="%(prog)s %(version)s")
def rustord(file: Path | None, print_settings: bool, print_example: bool, **overrides: Any) -> None:
    """Serve a pool of block devices as an object store.

    An option takes precedence over the configuration; --device (which can be repeated) over all devices named there.
    """
    if print_settings or print_example:
        from rustord.cli import reference

        click.echo(reference.markdown() if print_settings else reference.toml(), nl=False)
        return

    from rustord.config import load
    from rustord.daemon import run

    def configure() -> Config:
        return _override(load(file), **overrides)

    run(configure)


def _override(
    loaded: Config, socket: Path | None, devices: tuple[Path, ...], directory: Path | None, log_level: str | None
) -> Config:
    if socket:
        loaded = dataclasses.replace(loaded, socket=dataclasses.replace(loaded.socket, path=socket.absolute()))
    pool = loaded.pool
    if devices:
        pool = dataclasses.replace(pool, devices=tuple(device.absolute() for device in devices))
    if directory:
        pool = dataclasses.replace(pool, directory=directory.absolute())
    if log_level:
        loaded = dataclasses.replace(loaded, log=dataclasses.replace(loaded.log, level=log_level))
    return dataclasses.replace(loaded, pool=pool)


def main() -> None:
    """Entry point of the command."""
    edge.run(rustord, "rustord")
