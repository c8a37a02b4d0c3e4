"""rustorctl as a whole: its help fits on a screen, it starts quickly, and it says its version."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import rustord
from rustord.cli.commands import rustorctl as root

Command = Callable[..., Any]
HEAVY = ("asyncio", "BTrees", "concurrent.futures", "email", "http.client", "importlib.metadata", "lmdb", "logging")
HEAVY += ("pluggy", "prometheus_client", "pyudev", "rich", "sqlite3", "ssl", "subprocess", "systemd")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def help_of(*arguments: str) -> list[str]:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(root, [*arguments, "--help"], terminal_width=80)
    assert shown.exit_code == 0
    return shown.output.splitlines()


def test_the_help_fits_on_a_screen() -> None:
    lines = help_of()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines[1:]), "a summary is cut off"


@pytest.mark.parametrize("path", [path for path, _ in commands(root)])
def test_each_command_explains_itself(path: tuple[str, ...]) -> None:
    lines = help_of(*path)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_every_option_is_documented() -> None:
    for path, command in commands(root):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)


def test_the_version(rustorctl: Command) -> None:
    assert rustorctl.ok("--version") == f"rustorctl {rustord.__version__}\n"


def test_the_socket_is_named_by_option_or_environment(daemon: object, rustorctl: Command, socket_path: Path) -> None:
    other = {key: value for key, value in rustorctl.environment.items() if key != "RUSTORD_SOCKET"}  # type: ignore[attr-defined]
    assert rustorctl.ok("--socket", socket_path, "ls", env=other) == ""
    assert rustorctl("ls", env={**other, "RUSTORD_SOCKET": "/nowhere"}).returncode == 8


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_it_is_being_loaded(rustorctl: Command, ignored: bool) -> None:
    script = (
        "import os, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from rustord.cli.rustorctl import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, *others):\n"
        "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()\n"
    )
    environment = rustorctl.environment  # type: ignore[attr-defined]
    done = subprocess.run(
        [sys.executable, "-c", script, "ls"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (8 if ignored else -signal.SIGINT), done


def test_a_small_get_imports_nothing_heavy(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "-", "--name", "small", input="hello")
    script = (
        "import sys\n"
        "from rustord.cli.rustorctl import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "get", "small"],
        capture_output=True,
        text=True,
        env=rustorctl.environment,  # type: ignore[attr-defined]
    )
    assert (done.stdout, done.stderr.strip()) == ("hello", "")
