"""Transfer: a large body on its way between a socket and the store.

A transfer is moved by a thread, since hashing, reading and writing release the interpreter's lock, and only as long
as it can move: when its socket would block it is handed back to the event loop, which waits for all sockets at once. So
slow peers hold no threads, and a few threads serve any number of transfers.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from time import monotonic

from rustord.change import Put
from rustord.manifest import CHUNK_BYTES
from rustord.objectstore import ObjectStore
from rustord.record import Record
from rustord.upload import Upload
from rustord.wire.http1 import CONTINUE, Chunked
from rustord.wire.limits import Limits

_PATIENCE_MS = 2
"""How long a thread waits for a socket itself: going back to the event loop costs about 0.1 ms of both."""
_SEND_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE = 32


class Wait(Enum):
    """What a transfer needs before its next step."""

    READABLE = auto()
    WRITABLE = auto()
    TURN = auto()
    """Only its turn: it has had a thread for long."""
    NOTHING = auto()
    """It is complete."""


class PeerGone(Exception):
    """The peer closed the connection in the middle of a transfer."""


class Receiving:
    """The body of a request on its way into the store.

    Afterwards, ``put`` is ready to be submitted, and ``leftover`` is what came behind the body. A body of unknown size
    that turns out to be small becomes the Put's plain data.
    """

    def __init__(
        self, sock: socket.socket, store: ObjectStore, put: Put, size: int | None, limits: Limits, *, confirm: bool
    ) -> None:
        """``confirm``: send "100 Continue" once the store has accepted."""
        self.put = put
        self.leftover = b""
        self.received = 0
        self._sock = sock
        self._store = store
        self._size = size
        self._limits = limits
        self._confirm = confirm
        self._chunked = Chunked() if size is None else None
        self._upload: Upload | None = None
        self._view = memoryview(b"")
        """The buffer; made by the first step, so that what waits for its turn costs nothing."""
        self._filled = 0
        self._early = b""
        self._piece_began = monotonic()

    def begin_with(self, data: bytes) -> None:
        """Take what has arrived behind the head already; before the first step."""
        if self._size is not None:
            data, self.leftover = data[: self._size], data[self._size :]
        self._early = data

    def step(self) -> Wait:
        """Move what can be moved; called by one thread at a time. When it raises, it has aborted."""
        try:
            return self._step()
        except BaseException:
            self.abort()
            raise

    def _step(self) -> Wait:
        turn_end = monotonic() + self._limits.transfer_turn_s
        try:
            self._open()
        except BlockingIOError:  # the peer has not read yet what it asked for before
            return Wait.WRITABLE
        while not self._complete:
            try:
                received = self._receive()
            except BlockingIOError:
                if not _ready(self._sock, select.POLLIN):
                    return Wait.READABLE
                continue
            if not received:
                raise PeerGone
            if monotonic() > turn_end:
                return Wait.TURN
        self._finish()
        return Wait.NOTHING

    def _open(self) -> None:
        if not self._view:
            self._view = memoryview(bytearray(self._limits.upload_piece_bytes))
            self._piece_began = monotonic()
        if self._size is not None and self._upload is None:
            self._upload = self._store.upload(self.put, self._size)
        if self._confirm:
            if not self._early:
                self._sock.send(CONTINUE)
            self._confirm = False
        if self._early:
            early, self._early = self._early, b""
            if self._chunked:
                self._decode(early)
            else:
                self._take(memoryview(early))

    @property
    def _complete(self) -> bool:
        return self._chunked.done if self._chunked else self.received == self._size

    def _receive(self) -> int:
        if self._chunked:
            data = self._sock.recv(self._limits.read_bytes)
            self._decode(data)
            return len(data)
        assert self._size is not None
        end = min(len(self._view), self._filled + self._size - self.received)
        count = self._sock.recv_into(self._view[self._filled : end])
        self._filled += count
        self.received += count
        if self._filled == len(self._view):
            self._write()
        return count

    def _decode(self, data: bytes) -> None:
        assert self._chunked is not None
        pieces, self.leftover = self._chunked.feed(data)
        for piece in pieces:
            self._take(piece)

    def _take(self, data: memoryview) -> None:
        self.received += len(data)
        while data:
            piece = data[: len(self._view) - self._filled]
            self._view[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == len(self._view):
                self._write()

    def _write(self) -> None:
        if self._upload is None:
            self._upload = self._store.upload(self.put, None)
        self._upload.write(self._view[: self._filled])
        self._filled = 0
        self._piece_began = monotonic()

    def _finish(self) -> None:
        if self._upload is None and self.received <= self._limits.small_body_bytes:
            self.put.source = bytes(self._view[: self._filled])
        elif self._filled:
            self._write()

    def abort(self) -> None:
        """Leave nothing behind; called between steps."""
        if self._upload is not None:
            self._upload.abort()

    def deadline(self) -> float:
        """The `monotonic` time by which the peer must have let the transfer go on."""
        return self._piece_began + self._limits.body_s


class Sending:
    """A range of an Object on its way to the peer, read, verified and sent piece by piece.

    The first piece is read before the head is sent: whatever is wrong with it can still be answered properly.
    """

    def __init__(
        self,
        sock: socket.socket,
        store: ObjectStore,
        record: Record,
        start: int,
        end: int,
        *,
        before: bytes,
        head: bytes,
        limits: Limits,
    ) -> None:
        """``before`` is what the socket has to be given first: replies to earlier requests.

        ``record`` is pinned, and let go of in the end.
        """
        self.before = before
        self.started = False
        """Whether anything has been sent, so that an error can only be told by cutting the connection."""
        self.sent = 0
        """Bytes of data that the socket has taken."""
        self._sock = sock
        self._store = store
        self._record = record
        self._at = start
        self._end = end
        self._head = before + head
        self._limits = limits
        self._room = memoryview(b"")
        """For one piece after the other; made by the first step."""
        self._piece = memoryview(b"")
        self._piece_began = monotonic()
        self._pinned = True

    def step(self) -> Wait:
        """As `Receiving.step`."""
        try:
            wait = self._step()
        except BaseException:
            self.abort()
            raise
        if wait is Wait.NOTHING:
            self.abort()
        return wait

    def _step(self) -> Wait:
        turn_end = monotonic() + self._limits.transfer_turn_s
        while self._piece or self._at < self._end:
            if not self._piece:
                self._read()
            try:
                self._send()
            except BlockingIOError:
                if not _ready(self._sock, select.POLLOUT):
                    return Wait.WRITABLE
            if monotonic() > turn_end:
                return Wait.TURN
        return Wait.NOTHING

    def _read(self) -> None:
        # Pieces end where those of the whole Object do, so that no chunk is read and verified twice.
        piece_bytes = self._limits.download_piece_bytes
        length = min(self._end, (self._at // piece_bytes + 1) * piece_bytes) - self._at
        if not self._room:
            self._room = memoryview(bytearray(min(piece_bytes, self._end - self._at + CHUNK_BYTES)))
        self._piece = self._store.read(self._record, self._at, length, self._room)
        self._at += length
        self._piece_began = monotonic()

    def _send(self) -> None:
        if self._head:
            enlarge_send_buffer(self._sock)
            count = self._sock.sendmsg((self._head, self._piece))
            self._head, count = self._head[count:], max(0, count - len(self._head))
            self.started = True
        else:
            count = self._sock.send(self._piece)
        self._piece = self._piece[count:]
        self.sent += count

    def abort(self) -> None:
        """As `Receiving.abort`."""
        if self._pinned:
            self._pinned = False
            self._store.pins.remove(self._record)

    def deadline(self) -> float:
        """As `Receiving.deadline`."""
        return self._piece_began + self._limits.send_s


def _ready(sock: socket.socket, event: int) -> bool:
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(_PATIENCE_MS))


def enlarge_send_buffer(sock: socket.socket) -> None:
    """Let the kernel hold 4 MiB for the peer, which doubles the speed of streams; what it allows, if it is less."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
    except OSError:  # only CAP_NET_ADMIN may go beyond net.core.wmem_max
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


class Slots:
    """Bounds how many transfers of one kind are under way; the others wait in the order of their coming."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[Callable[[], bool]] = deque()

    def acquire(self, begin: Callable[[], bool]) -> None:
        """Call ``begin`` as soon as there is a slot, which may be now. It returns False if it does not need it."""
        self._waiting.append(begin)
        self._hand_out()

    def release(self) -> None:
        """Give the slot to the next one that waits."""
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            if self._waiting.popleft()():
                self._free -= 1
