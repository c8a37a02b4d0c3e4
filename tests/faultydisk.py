"""A disk with a volatile write cache that fails on demand, as a server of the NBD protocol's oldest and simplest form.

What has not been flushed is lost when a flush fails, as it is when the disk dies: a later flush that succeeds says
nothing of it. Runs as a program of its own, ``faultydisk.py DIRECTORY BYTES``, until its standard input ends: it serves
on DIRECTORY/socket, and each request for which there is a file DIRECTORY/fail-read, -write or -flush is answered EIO.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Final

OPERATIONS: Final = ("read", "write", "flush")
"""What can be made to fail."""

# The NBD protocol: doc/proto.md of its reference implementation
_HEAD = struct.Struct(">8sQQI124x")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OLD_STYLE: Final = 0x00420281861253
_HAS_FLAGS: Final = 1
_SENDS_FLUSH: Final = 4
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)


class FaultyDisk:
    """One disk. ``medium`` is what is durable, ``cache`` what it answers."""

    def __init__(self, directory: Path, size: int) -> None:
        self.medium = bytearray(size)
        self.cache = bytearray(size)
        self._directory = directory
        self._unflushed: list[slice] = []

    def serve(self, connection: socket.socket) -> None:
        """Answer a client until it goes."""
        with connection, connection.makefile("rb") as incoming:
            connection.sendall(_HEAD.pack(b"NBDMAGIC", _OLD_STYLE, len(self.medium), _HAS_FLAGS | _SENDS_FLUSH))
            while request := incoming.read(_REQUEST.size):
                _, _, kind, handle, offset, length = _REQUEST.unpack(request)
                if kind == _DISCONNECT:
                    return
                data = incoming.read(length) if kind == _WRITE else b""
                error, answer = self._answer(kind, slice(offset, offset + length), data)
                connection.sendall(_REPLY.pack(0x67446698, error, handle) + answer)

    def _answer(self, kind: int, where: slice, data: bytes) -> tuple[int, bytes]:
        """The error and what is read."""
        fails = (self._directory / f"fail-{ ({_READ: 'read', _WRITE: 'write', _FLUSH: 'flush'}[kind]) }").exists()
        if kind == _FLUSH:
            target, source = (self.cache, self.medium) if fails else (self.medium, self.cache)
            for written in self._unflushed:
                target[written] = source[written]
            self._unflushed.clear()
        elif kind == _WRITE and not fails:
            self.cache[where] = data
            self._unflushed.append(where)
        if fails:
            return errno.EIO, b""
        return 0, bytes(self.cache[where]) if kind == _READ else b""


def main() -> None:
    directory = Path(sys.argv[1])
    disk = FaultyDisk(directory, int(sys.argv[2]))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
        listener.listen()
        while True:
            disk.serve(listener.accept()[0])


if __name__ == "__main__":
    main()
