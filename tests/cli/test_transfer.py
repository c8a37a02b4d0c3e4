"""The bar of a long transfer: on a terminal only, and never in what is printed for programs."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord.cli.transfer import Bar
from rustord.objkey import is_uuid

Command = Callable[..., Any]


def test_a_long_upload_shows_a_bar_on_a_terminal(daemon: object, rustorctl: Any) -> None:
    ours, theirs = pty.openpty()
    process = rustorctl.start("put", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = threading.Event()

    def feed() -> None:
        deadline = time.monotonic() + 60
        while not shown.is_set() and time.monotonic() < deadline:
            process.stdin.write(bytes(4096))
            process.stdin.flush()
            time.sleep(0.02)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    drawn = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            drawn += os.read(ours, 65536)
            if b"standard input" in drawn and b"iB" in drawn:
                shown.set()
    except OSError:  # the terminal's other end is closed
        pass
    feeder.join()
    printed = process.stdout.read().decode()
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert shown.is_set(), drawn
    assert is_uuid(printed.strip()), printed


def test_there_is_no_bar_without_a_terminal(daemon: object, rustorctl: Any) -> None:
    process = rustorctl.start("put", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:  # longer than a bar waits
        process.stdin.write(bytes(4096))
        process.stdin.flush()
        time.sleep(0.05)
    printed, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, b"")
    assert is_uuid(printed.decode().strip())


def test_no_bar_is_drawn_when_the_command_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.cli.transfer.is_terminal", lambda output: True)
    monkeypatch.setattr("rustord.cli.transfer.BAR_AFTER_S", -1.0)
    with Bar("n", 2) as bar:
        pass
    bar.advance(1)  # by a thread that is still at it
    assert bar._drawn is None


@pytest.mark.parametrize(
    "command", ["put {file} --name m 2>&-", "get n -o {file} 2>&-", "pool heal --wait 2>&-", "top --count 1 >&-"]
)
def test_closed_standard_output_and_error_are_no_terminals(
    daemon: object, rustorctl: Any, tmp_path: Path, command: str
) -> None:
    rustorctl.ok("put", "-", "--name", "n", input="data")
    (file := tmp_path / "file").write_text("data")
    script = f"{rustorctl.program} {command.format(file=file)}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=rustorctl.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == "data"
