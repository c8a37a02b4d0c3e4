"""The edge: every error ends as text on standard error and as the documented exit status."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rustord import errors
from rustord.cli import commands, edge
from rustord.errors import ClaimRefused, RangeNotSatisfiable, RustordError

BIN = Path(sys.executable).parent


def all_errors() -> Iterator[type[RustordError]]:
    kinds = [RustordError]
    for kind in kinds:
        yield kind
        kinds += [below for below in kind.__subclasses__() if below.__module__ == errors.__name__]


def made(kind: type[RustordError]) -> RustordError:
    if issubclass(kind, ClaimRefused):
        return kind("it is so", reasons=["one", "two"], hint="do that")
    if issubclass(kind, RangeNotSatisfiable):
        return kind("it is so", size=5, hint="do that")
    return kind("it is so", hint="do that")


def run(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and standard error of a command that fails with ``error``."""

    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["rustorctl"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        edge.run(command, "rustorctl")
    code = ended.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("kind", list(all_errors()))
def test_each_error_ends_with_its_documented_status(
    kind: type[RustordError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = run(made(kind), monkeypatch, capsys)
    assert status == kind.exit_status
    assert said.startswith("rustorctl: it is so\n")
    assert said.endswith("hint: do that\n")
    assert re.search(rf"^{status}\s", edge.__doc__ or "", re.MULTILINE), f"the exit status {status} is not documented"


def test_reasons_are_listed_between_message_and_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = run(made(ClaimRefused), monkeypatch, capsys)
    assert said == "rustorctl: it is so\n  - one\n  - two\nhint: do that\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), 74, "rustorctl: /x/y: No such file\n"),
        (OSError(errno.ENOSPC, "No space left"), 74, "rustorctl: standard output: No space left\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", ""), 74, "rustorctl: '': No such file\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "\x1b[2J"), 74, "rustorctl: \\u001b[2J: No such file\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oh"), 1, "rustorctl: ZeroDivisionError: oh\nhint: this is a fault of rustord"),
    ],
)
def test_other_errors(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(error, monkeypatch, capsys)
    assert ended[0] == status
    assert ended[1].startswith(said)
    assert "Traceback" not in ended[1]


def test_a_wrong_command_line_says_where_help_is() -> None:
    done = subprocess.run([BIN / "rustorctl", "pool", "create", "--what"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rustorctl: No such option")
    assert done.stderr.endswith("hint: 'rustorctl pool create --help' shows what it takes\n")


@pytest.mark.parametrize("arguments", [[], ["pool"], ["device"]])
def test_no_command_prints_the_help_and_fails(arguments: list[str]) -> None:
    done = subprocess.run([BIN / "rustorctl", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Commands:" in done.stderr


def test_standard_output_that_is_full_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([BIN / "rustord", "--print-settings"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (74, "rustord: standard output: No space left on device\n")


def test_a_reader_that_went_away_ends_it_quietly() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed:
        done = subprocess.run([BIN / "rustord", "--print-settings"], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_statuses_in_the_help_are_those_of_the_errors() -> None:
    shown = CliRunner().invoke(commands.rustorctl, ["--help"]).output
    listed = {int(number) for number in re.findall(r"(\d+) [a-z]", shown[shown.index("Exit status") :])}
    assert len(listed) > 5
    assert listed < {edge.LOCAL_FILE, *(kind.exit_status for kind in all_errors())}
