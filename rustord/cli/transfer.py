"""Transfers: local files on their way in and out, and the bar that shows how far they are."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import click

from rustord.cli.output import is_terminal

STDOUT = "standard output"
STDIN = "standard input"
BAR_AFTER_S = 0.5
"""A transfer that is over sooner needs no bar; and the library that draws it takes a while to load."""


class Write(Protocol):
    """Takes all of ``data``."""

    def __call__(self, data: bytes | memoryview, /) -> object: ...


@contextlib.contextmanager
def named(what: str | Path) -> Iterator[None]:
    """Errors of reading or writing know no file name; in here they get one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(what)
        raise


def shown(path: str) -> str:
    """A local file, as messages name it."""
    return STDIN if path == "-" else path


@contextlib.contextmanager
def open_source(path: str) -> Iterator[BinaryIO]:
    """A local file (``-``: standard input) to read."""
    with named(shown(path)), open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as opened:
        yield opened


@contextlib.contextmanager
def open_destination(path: Path | None) -> Iterator[Write]:
    """What takes the data of an Object: standard output (None), or a file that is whole or is not changed at all."""
    if path is None or str(path) == "-":
        if sys.stdout is None:  # closed by whoever started us; its number may be that of another file by now
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), STDOUT)
        with named(STDOUT):
            yield _writer(sys.stdout.fileno())
    elif path.exists() and not path.is_file():
        with named(path), path.open("wb", buffering=0) as opened:  # /dev/null, a pipe
            yield _writer(opened.fileno())
    else:
        with _replacement(path) as descriptor, named(path):
            yield _writer(descriptor)


def _writer(descriptor: int) -> Write:
    def write(data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(descriptor, left) :]
            except BlockingIOError:  # somebody who shares it has made it so
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll()

    return write


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[int]:
    """A new file beside ``path``, of which it takes the place in the end; it goes away again if anything goes wrong."""
    target = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    name = os.fsdecode(os.fsencode(target.name)[:200])
    unfinished = target.with_name(f".{name}.{os.urandom(4).hex()}.part")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)):
            if target.exists():
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            yield descriptor
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


class Bar:
    """How far a transfer is, on standard error, if that is a terminal and it takes a while.

    ``total`` is in bytes, None if it is not known. Any thread may call.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._since = time.monotonic()
        self._wanted = is_terminal(sys.stderr)
        self._lock = threading.Lock()
        self._drawn: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._wanted = False  # who still sends something draws nothing any more
            if self._drawn is not None:
                self._drawn.stop()

    def advance(self, size: int) -> None:
        """``size`` more bytes have been transferred."""
        if not self._wanted:
            return
        with self._lock:
            self._done += size
            if self._drawn is not None:
                self._drawn.advance(self._drawn.task_ids[0], size)
            elif self._wanted and time.monotonic() - self._since > BAR_AFTER_S:
                self._draw()

    def _draw(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        # Standard output is ours: rich would lead it to standard error.
        console = Console(stderr=True)
        self._drawn = progress.Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._drawn.add_task(self._what, total=self._total, completed=self._done)
        self._drawn.start()

    def say(self, text: str) -> None:
        """A line on standard output, above the bar if both are on a terminal."""
        with self._lock:
            if self._drawn is not None and is_terminal(sys.stdout):
                self._drawn.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(text)
