"""Outbox: replies that a socket has not taken yet."""

from __future__ import annotations

import socket

from rustord.manifest import Data

_JOIN_BYTES_MAX = 256 << 10
"""Up to here buffers are joined for one plain send; beyond, the copy costs more than sendmsg does."""
_IOV_MAX = 1024


class Outbox:
    """Buffers in the order in which they are to be sent; ``byte_count`` is their length in all."""

    __slots__ = ("_buffers", "_sock", "byte_count")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffers: list[Data] = []
        self.byte_count = 0

    def add(self, data: Data) -> None:
        """Send ``data`` behind what is there."""
        self._buffers.append(data)
        self.byte_count += len(data)

    def send(self) -> bool:
        """Send what the socket takes now. True if nothing is left. Raises OSError if the connection is gone."""
        while self._buffers:
            try:
                if self.byte_count <= _JOIN_BYTES_MAX:
                    sent = self._sock.send(b"".join(self._buffers))
                else:
                    sent = self._sock.sendmsg(self._buffers[:_IOV_MAX])
            except BlockingIOError:
                return False
            self.byte_count -= sent
            if self.byte_count:
                self._drop(sent)
            else:
                self._buffers = []
        return True

    def _drop(self, sent: int) -> None:
        index = 0
        while sent >= len(self._buffers[index]):
            sent -= len(self._buffers[index])
            index += 1
        self._buffers = self._buffers[index:]
        self._buffers[0] = memoryview(self._buffers[0])[sent:]

    def take(self) -> bytes:
        """What is left, for somebody else to send."""
        left, self._buffers, self.byte_count = b"".join(self._buffers), [], 0
        return left
