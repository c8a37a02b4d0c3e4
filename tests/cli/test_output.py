"""What is printed cannot harm a terminal, and is aligned for people."""

from __future__ import annotations

import os
import pty
import sys
import termios

import pytest

from rustord.cli import output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("\x1b[2J", "\\u001b[2J"),
        ("a\nb\tc\x7f", "a\\u000ab\\u0009c\\u007f"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        (os.fsdecode(b"\xff"), "\\udcff"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert output.safe(text) == shown


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("NAME", "SIZE", "NOTE"), [("a", "5", ""), ("bcd\x1b", "1000", "x")], right=("SIZE",))
    assert capsys.readouterr().out == "NAME       SIZE  NOTE\na             5\nbcd\\u001b  1000  x\n"


def test_an_empty_table_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("NAME", "SIZE"), [])
    assert capsys.readouterr().out == "NAME  SIZE\n"


def test_a_table_on_a_terminal_keeps_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        output.print_table(("NAME", "SIZE"), [("n" * 80, "5")])
        terminal.flush()
        shown = b""
        while shown.count(b"\n") < 2:  # a terminal hands out what it has so far
            shown += screen.read(65536)
    head, row = shown.decode().splitlines()
    assert head.startswith("\x1b[1mNAME ")
    assert row == "n" * 80 + "  5"


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts([("Pool", "x"), ("Objects", "1")])
    assert capsys.readouterr().out == "Pool     x\nObjects  1\n"
