"""Ledger: what a session has done and what it is told, in memory that two processes may share.

It is read and written at any time: each number has one writer, and is written whole.
"""

from __future__ import annotations

import os
from mmap import PAGESIZE, mmap
from struct import Struct
from typing import NamedTuple

_COUNTS = Struct("@QQQQ")
_LEAVING, _ALONE = _COUNTS.size, _COUNTS.size + 1


class Counts(NamedTuple):
    """``errors`` are the requests that were answered with one."""

    requests: int
    errors: int
    read_bytes: int
    written_bytes: int


class Ledger:
    """Of one session."""

    __slots__ = ("_fd", "_memory")

    def __init__(self, fd: int = -1) -> None:
        """With the ``fd`` of another one, which this takes over, it is the same. Raises OSError."""
        self._fd = fd
        if fd < 0:
            self._fd = os.memfd_create("ledger", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, PAGESIZE)
        self._memory = mmap(self._fd, PAGESIZE)

    def fileno(self) -> int:
        """What the other process makes its own from."""
        return self._fd

    def close(self) -> None:
        """It is not shared with anybody else from then on."""
        os.close(self._fd)

    def count(self, requests: int, errors: int, read_bytes: int, written_bytes: int) -> None:
        """Say what has been done up to now."""
        _COUNTS.pack_into(self._memory, 0, requests, errors, read_bytes, written_bytes)

    @property
    def counts(self) -> Counts:
        return Counts._make(_COUNTS.unpack_from(self._memory))

    @property
    def leaving(self) -> bool:
        """The session is to end between two requests, for another process to go on."""
        return bool(self._memory[_LEAVING])

    @leaving.setter
    def leaving(self, value: bool) -> None:
        self._memory[_LEAVING] = value

    @property
    def alone(self) -> bool:
        """There is no other connection that may need the CPU."""
        return bool(self._memory[_ALONE])

    @alone.setter
    def alone(self, value: bool) -> None:
        self._memory[_ALONE] = value
