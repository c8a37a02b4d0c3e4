"""Channel: how the process that serves a connection calls the one that has the pool, for what it cannot do itself.

One call at a time, over a stream that each connection has: a head, what belongs to it, and a reply. And the orders that
are given in the opposite direction, one for all connections. Both processes are ours, of the same version.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from enum import IntEnum
from struct import Struct
from threading import Lock
from typing import NamedTuple

import msgpack

from rustord.errors import RustordError
from rustord.export import Run, State

_HEAD = Struct("<BxHIQQ")
"""call, flags, bytes that follow, offset, length"""
_REPLY = Struct("<BxxxI")
"""whether it is an error, bytes that follow"""
_RUN = Struct("<QB")


class Call(IntEnum):
    """What can be called, with what follows and what is replied."""

    GRANT = 1
    """Chunks from ``offset`` on, ``length`` of them; their `rustord.frontends.holding.Places`."""
    READ = 2
    WRITE = 3
    """The data follows; the places of the chunks that it touches now."""
    FLUSH = 4
    """The handles of the devices that were written to follow; a byte: whether there may be something to flush that only
    the other process knows of, also the next time."""
    FAIL = 5
    """The handle of a device that could not be flushed is ``offset``, the errno ``length``."""
    TOOK = 6
    """Handles of devices that were flushed, and the µs that it took, as 8 bytes each follow; no reply."""
    TRIM = 7
    ZERO = 8
    RUNS = 9
    END = 10
    """The last one, unless the client is gone; no reply. What follows is as the flags say, which are an `End`."""


class End(IntEnum):
    """How a session has ended."""

    LEFT = 0
    """It is to be gone on with: the start of the next request follows."""
    FAILED = 1
    """The socket has; what follows says how."""
    UNKEPT = 2
    """It cannot be gone on with; what follows says why."""
    BROKEN = 3
    """By a fault of ours; what follows says where."""


class Order(IntEnum):
    """What a worker is told; it answers each with a list of numbers."""

    SERVE = 1
    """A connection. Its socket, the channel and the ledger come with it."""
    DEVICE = 2
    """The device with the next handle. The two descriptors come with it; how long it is, if it is a file, else 0."""
    GONE = 3
    """Let go of a device, and wait for nothing."""
    LEAVE = 4
    """Hold nothing of these groups of chunks any more."""
    RECALL = 5
    """Hold nothing of what was granted any more; the handles of devices that were written to and not flushed."""


KEEP, FAST = 1, 2
"""Flags of `Call.ZERO`."""
RUN_COUNT_MAX = 64
"""Runs in the reply to `Call.RUNS`; the worker asks again from there, if it has to."""
ORDER_BYTES_MAX = 64 << 10


class Request(NamedTuple):
    """One call, as it arrives."""

    call: int
    flags: int
    offset: int
    length: int
    data: memoryview


class Remote(RustordError):
    """An error of the other process, as a client is to be told of it."""

    def __init__(self, message: str, hint: str, nbd_error: int) -> None:
        super().__init__(message, hint=hint)
        self.nbd_error = nbd_error  # type: ignore[misc]


class Channel:
    """Either end. `call` is for any thread, `receive` and `reply` for one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._calling = Lock()

    def close(self) -> None:
        self._sock.close()

    # The end that calls

    def call(
        self,
        call: Call,
        offset: int = 0,
        length: int = 0,
        data: bytes | memoryview = b"",
        *,
        flags: int = 0,
        into: memoryview | None = None,
    ) -> memoryview:
        """What is replied, in ``into`` if that is given. Raises OSError if nobody replies, or what the call raised."""
        with self._calling:
            self._send(_HEAD.pack(call, flags, len(data), offset, length), data)
            is_error, count = _REPLY.unpack(self._receive(_REPLY.size))
            reply = self._receive(count, None if is_error else into)
        if is_error:
            raise Remote(*msgpack.unpackb(reply))
        return reply

    def tell(self, call: Call, data: bytes, *, flags: int = 0) -> None:
        """The same without a reply."""
        with self._calling:
            self._send(_HEAD.pack(call, flags, len(data), 0, 0), data)

    # The end that is called

    def receive(self, room: memoryview) -> Request | None:
        """The next call, with its data in ``room``; None if there will be none. Raises OSError."""
        head = self._receive(_HEAD.size, optional=True)
        if not head:
            return None
        call, flags, count, offset, length = _HEAD.unpack(head)
        return Request(call, flags, offset, length, self._receive(count, room[:count]))

    def reply(self, *parts: bytes | memoryview) -> None:
        """Answer the call. Raises OSError."""
        self._send(_REPLY.pack(0, sum(map(len, parts))), *parts)

    def refuse(self, error: RustordError) -> None:
        """Answer the call with an error. Raises OSError."""
        data = msgpack.packb((error.message, error.hint, error.nbd_error))
        self._send(_REPLY.pack(1, len(data)), data)

    # Both

    def _send(self, *parts: bytes | memoryview) -> None:
        sent = self._sock.sendmsg(parts)
        if sent < sum(map(len, parts)):
            self._sock.sendall(memoryview(b"".join(parts))[sent:])

    def _receive(self, count: int, into: memoryview | None = None, *, optional: bool = False) -> memoryview:
        """``count`` bytes; with ``optional`` none if there will be none. Raises ConnectionError if there are fewer."""
        view = memoryview(bytearray(count)) if into is None else into
        done = 0
        while done < count:
            got = self._sock.recv_into(view[done:])
            if not got:
                if optional and not done:
                    return view[:0]
                raise ConnectionResetError("the other process is gone")
            done += got
        return view


def encode_runs(runs: Iterable[Run]) -> bytes:
    return b"".join([_RUN.pack(*run) for run in runs])


def decode_runs(data: memoryview) -> list[Run]:
    return [Run(length, State(state)) for length, state in _RUN.iter_unpack(data)]
