"""The command report: what whoever looks into a fault needs to know, and nothing secret."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from rustord.cli.output import safe
from rustord.cli.parameters import connect
from rustord.cli.setup import config_option
from rustord.errors import RustordError

_PACKAGES = ("rustord", "BTrees", "click", "lmdb", "msgpack", "pluggy", "prometheus-client", "pyudev", "rich", "xxhash")
_COMMANDS = (
    ("lsblk", "--output", "NAME,KNAME,TYPE,SIZE,ROTA,LOG-SEC,RO,FSTYPE,MOUNTPOINTS,MODEL"),
    ("systemctl", "--no-pager", "status", "rustord.service"),
    ("journalctl", "--no-pager", "--unit=rustord.service", "--lines=200"),
)
_COMMAND_S = 20.0


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@config_option
@click.pass_obj
def report(socket: Path | None, output: Path | None, file: Path | None) -> None:
    """Gather what a bug report needs: versions, settings, state, log.

    Options of plugins may hold passwords and are left out; names and data of Objects are not in it, except that the
    log may name Objects. Works without the daemon, too.
    """
    text = "\n".join(f"== {title}\n{body.rstrip()}\n" for title, body in _sections(socket, file))
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        click.echo(f"{output} is for reading before you send it to somebody", err=True)


def _sections(socket: Path | None, file: Path | None) -> Iterator[tuple[str, str]]:
    yield "versions", _versions()
    yield "configuration", _told(lambda: _configuration(file))
    with connect(socket) as client:
        for title, ask in (
            ("pool", client.pool),
            ("devices", client.devices),
            ("plugins", client.plugins),
            ("slow requests", lambda: [{**slow, "target": "..."} for slow in client.slow_requests()]),
        ):
            yield title, _told(lambda ask=ask: json.dumps(ask(), indent=2))  # type: ignore[misc]
        yield "metrics", _told(client.metrics)
    for command in _COMMANDS:
        yield " ".join(command), _output(command)


def _told(ask: Callable[[], str]) -> str:
    """What it returns, or why there is nothing."""
    try:
        return ask()
    except RustordError as error:
        return f"not available: {error}"


def _versions() -> str:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"Python {sys.version}", f"Linux {platform.release()} {platform.machine()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def _configuration(file: Path | None) -> str:
    from rustord.config import load

    return json.dumps(_plain(load(file)), indent=2, default=str)


def _plain(config: object) -> dict[str, Any]:
    """The settings, without the options of plugins."""
    from dataclasses import fields, is_dataclass

    told: dict[str, Any] = {}
    for setting in fields(config):  # type: ignore[arg-type]
        value = getattr(config, setting.name)
        if setting.name == "options":
            told[setting.name] = dict.fromkeys(value, "...")
        elif isinstance(value, tuple):
            told[setting.name] = [_plain(one) if is_dataclass(one) else one for one in value]
        else:
            told[setting.name] = _plain(value) if is_dataclass(value) else value
    return told


def _output(command: tuple[str, ...]) -> str:
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"
    return "\n".join(map(safe, (done.stdout + done.stderr).decode(errors="replace").splitlines()))


COMMANDS = (report,)
