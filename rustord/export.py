"""Export: what the NBD frontend serves as a block device: a stored Object, or a volume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntFlag, StrEnum
from typing import NamedTuple, Protocol


class Kind(StrEnum):
    """What an export is."""

    OBJECT = "object"
    VOLUME = "volume"


class State(IntFlag):
    """What is known of a run of bytes, as the bits of NBD's ``base:allocation``."""

    DATA = 0
    HOLE = 1
    """Takes no room in the pool."""
    ZERO = 2
    """Reads as zeros."""


class Run(NamedTuple):
    """``length`` bytes, 1 or more, that are all in the same state."""

    length: int
    state: State


class Shape(Protocol):
    """What can be told of an export that is not open."""

    @property
    def key(self) -> str:
        """What it is found by again, also when its name has come to mean another: an Object's uuid, a volume's name."""

    @property
    def size(self) -> int:
        """In bytes, a multiple of 512."""

    @property
    def read_only(self) -> bool: ...

    @property
    def rotational(self) -> bool: ...

    @property
    def block_size(self) -> int:
        """What is best read and written as a whole: a power of two from 512 to 32 MiB."""


class Export(Shape, Protocol):
    """A range of bytes that is open. Offsets and lengths are in bytes, and lie within ``size``.

    Any thread may call any method at any time, beside others: each connection has a thread of its own. Nobody aligns
    what he asks for. If it is read-only then ``write``, ``trim`` and ``zero`` are never called. Every method but
    ``close`` raises RustordErrors, whose ``nbd_error`` the client is told.
    """

    @property
    def kind(self) -> Kind: ...

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, which is not empty. If it raises, what is in the buffer then is undefined."""

    def write(self, offset: int, data: memoryview) -> None:
        """Overwrite; durable after the next ``flush``. ``data`` may change once this has returned."""

    def flush(self) -> None:
        """Make durable all that was written, trimmed or zeroed before the call, by whatever thread."""

    def trim(self, offset: int, length: int) -> None:
        """Give back what room can be given back; what is not given back stays as it is, what is reads as zeros."""

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        """Make it read as zeros; durable after the next ``flush``.

        With ``keep`` later writes to it need no new room. With ``fast`` it raises Unsupported, and changes nothing, if
        it would not be much faster than to write zeros.
        """

    def runs(self, offset: int, length: int) -> Iterable[Run]:
        """What is known of the range from ``offset`` on; may stop before its end, but not at its start."""

    def close(self) -> None:
        """Let go of it, unflushed. Called once, when no other call is under way."""


def merged(runs: Iterable[Run]) -> Iterator[Run]:
    """The same with neighbours in the same state made one."""
    last = Run(0, State.DATA)
    for run in runs:
        if run.state == last.state:
            last = Run(last.length + run.length, run.state)
            continue
        if last.length:
            yield last
        last = run
    if last.length:
        yield last
