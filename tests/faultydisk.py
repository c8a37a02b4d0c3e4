"""A disk with a volatile write cache that fails on demand, as a server of the NBD protocol's oldest and simplest form.

What has not been flushed is lost when a flush fails, as it is when the disk dies: a later flush that succeeds says
nothing of it. When the power is cut, each write that was not flushed is kept, lost or torn.

A test serves it from a thread, or runs it as a program of its own, ``faultydisk.py DIRECTORY IMAGE``, until its
standard input ends. It serves on DIRECTORY/socket, and each request for which there is a file DIRECTORY/fail-read,
-write or -flush is answered EIO.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

OPERATIONS: Final = ("read", "write", "flush")
"""What can be made to fail."""
SECTOR: Final = 512
"""What is written as a whole or not at all."""

# The NBD protocol: doc/proto.md of its reference implementation
_HEAD = struct.Struct(">8sQQI124x")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OLD_STYLE: Final = 0x00420281861253
_HAS_FLAGS: Final = 1
_SENDS_FLUSH: Final = 4
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)


class FaultyDisk:
    """One disk. The image file is what is durable; what it answers differs from that in what was not flushed."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.address = f"nbd+unix:///?socket={directory}/socket"
        with image.open("r+b") as file:
            self._medium = mmap.mmap(file.fileno(), 0)
            self._cache = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._directory = directory
        self._unflushed: list[tuple[slice, bytes]] = []
        self._connected = threading.Lock()
        self._writes_left = 0
        self.stalled = threading.Event()
        """The write that `stall` has named has come."""

    def serve(self) -> None:
        """Answer one client after the other, for ever."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._directory / "socket"))
            listener.listen()
            while True:
                connection, _ = listener.accept()
                with self._connected, connection, suppress(ConnectionError):
                    self._serve(connection)

    def stall(self, count: int) -> None:
        """Answer nothing any more once ``count`` more writes have come, of which the last is not flushed then."""
        self.stalled.clear()
        self._writes_left = count

    def lose_power(self, rng: random.Random) -> int:
        """Some of what was not flushed is gone, once the client is; returns how many writes were not flushed."""
        with self._connected:
            unflushed, self._unflushed = self._unflushed, []
            for where, data in unflushed:
                fate = rng.choice(("kept", "lost", "torn"))
                for start in range(0, len(data), SECTOR):
                    if fate == "kept" or (fate == "torn" and rng.random() < 0.5):
                        sector = data[start : start + SECTOR]
                        self._medium[where.start + start : where.start + start + len(sector)] = sector
            for where, _ in unflushed:
                self._cache[where] = self._medium[where]
        return len(unflushed)

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as incoming:
            connection.sendall(_HEAD.pack(b"NBDMAGIC", _OLD_STYLE, len(self._medium), _HAS_FLAGS | _SENDS_FLUSH))
            while len(request := incoming.read(_REQUEST.size)) == _REQUEST.size:
                _, _, kind, handle, offset, length = _REQUEST.unpack(request)
                if kind == _DISCONNECT:
                    return
                data = incoming.read(length) if kind == _WRITE else b""
                if kind == _WRITE and len(data) < length:
                    return
                error, answer = self._answer(kind, slice(offset, offset + length), data)
                self._writes_left -= kind == _WRITE
                if kind == _WRITE and self._writes_left == 0:
                    self.stalled.set()
                    incoming.read()  # until the client is gone
                    return
                connection.sendall(_REPLY.pack(0x67446698, error, handle) + answer)

    def _answer(self, kind: int, where: slice, data: bytes) -> tuple[int, bytes]:
        """The error and what is read."""
        fails = (self._directory / f"fail-{ ({_READ: 'read', _WRITE: 'write', _FLUSH: 'flush'}[kind]) }").exists()
        if kind == _FLUSH:
            target, source = (self._cache, self._medium) if fails else (self._medium, self._cache)
            for written, _ in self._unflushed:
                target[written] = source[written]
            self._unflushed.clear()
        elif kind == _WRITE and not fails:
            self._cache[where] = data
            self._unflushed.append((where, data))
        if fails:
            return errno.EIO, b""
        return 0, self._cache[where] if kind == _READ else b""


def main() -> None:
    disk = FaultyDisk(Path(sys.argv[1]), Path(sys.argv[2]))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    disk.serve()


if __name__ == "__main__":
    main()
