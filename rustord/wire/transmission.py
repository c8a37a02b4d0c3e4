"""Transmission: the requests of an NBD connection and their replies, from the server's side. No I/O but the export's.

What a client has sent is taken as a batch: every request in the buffer is worked on, and the replies are gathered in
one buffer, so that many small requests cost one receive and one send. The flushes that a batch asks for (FLUSH, and
FUA of writes) are done as one at its end, by somebody beside if there is more to do meanwhile (see `Beside`); replies
may be in any order.

Two buffers each way, of a fixed size, are all the memory that a connection takes: a long payload is written, and a long
reply read, piece by piece. There are two so that one can be sent, or written to the export, by somebody beside while
the other is filled; of which only what is used takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from mmap import mmap
from struct import Struct
from typing import Protocol

from rustord.errors import InvalidRequest, NoSpace, ReadOnly, RustordError, TooLarge
from rustord.export import Export, Run, merged
from rustord.wire.nbd import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    PAYLOAD_BYTES_MAX,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Reply,
)
from rustord.wire.negotiation import ALLOCATION_ID, Agreement
from rustord.wire.replies import SHORT_REPLY_BYTES, Replies

PIECE_BYTES = 1 << 20
"""What is read from or written to an export at once. Clients rarely ask for more in one request."""
BUFFER_BYTES = PIECE_BYTES + (64 << 10)
"""Either buffer: a piece with what is around it, or a great many small requests."""
LONG_BYTES = 512 << 10
"""From here on it takes longer to copy something than to have another thread do it."""
_FLUSH_REPLY_BYTES = 16 << 10
RUN_COUNT_MAX = 4096
"""Runs in one reply to BLOCK_STATUS; the client asks again from there."""

_FLAGS = {
    Cmd.READ: CmdFlag.DF,
    Cmd.WRITE: CmdFlag.PAYLOAD_LEN,
    Cmd.FLUSH: 0,
    Cmd.TRIM: 0,
    Cmd.CACHE: 0,
    Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
}
"""The flags that each command takes, beside FUA."""
_CHANGES = frozenset((Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES))
_RUN, _EXTENDED_RUN = Struct(">II"), Struct(">QQ")


class _Payload:
    """Data on its way in: ``left`` bytes, to be written at ``offset``, or dropped if there is an ``error``."""

    __slots__ = ("begin", "cookie", "error", "flags", "is_plain", "left", "offset")

    def __init__(self, flags: int, cookie: int, offset: int, length: int, error: RustordError | None) -> None:
        self.flags = flags
        self.cookie = cookie
        self.begin = self.offset = offset
        self.left = length
        self.error = error
        self.is_plain = LONG_BYTES <= length <= PIECE_BYTES and not flags & CmdFlag.FUA
        """It may be written while others are."""


Waiting = tuple[int, int]
"""Cookie and offset of a request that is done but for the flush."""


class Beside(Protocol):
    """Another thread, which does one thing at a time; and one more for flushes."""

    def take(self, job: Callable[[], memoryview]) -> bool:
        """Have it do ``job``, once it has done the last one, and send the reply that this returns; or False."""

    def wait(self) -> None:
        """Return when it has nothing to do but flushes."""

    def flush(self, waiting: list[Waiting]) -> bool:
        """Have `Transmission.flushed` done for these, beside all else; or False."""

    def finish(self) -> None:
        """Return when it has no flushes to do."""


class Transmission:
    """The requests of one connection: receive into `space`, tell `received` how much came, and send what that yields.

    After ``ended`` nothing more is to be received.
    """

    def __init__(self, agreement: Agreement, beside: Beside | None = None) -> None:
        """``beside`` may send long replies, and write long payloads, while this goes on."""
        self.ended = False
        self.requests = 0
        self.read_bytes = 0
        self._beside = beside
        self._written_bytes = self._written_beside_bytes = 0
        self._export: Export = agreement.export
        self._structured = agreement.structured
        self._extended = agreement.extended
        self._allocation = agreement.allocation
        self._flags_known = ~0 if agreement.extended else ~CmdFlag.PAYLOAD_LEN
        self._flags_always = 0 if agreement.export.read_only else CmdFlag.FUA
        self._request = EXTENDED_REQUEST if agreement.extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if agreement.extended else REQUEST_MAGIC
        # Memory that goes back to the system at the end, and of which only what is used counts.
        self._in, self._other_in, out, other_out = [memoryview(mmap(-1, BUFFER_BYTES)) for _ in range(4)]
        self._replies, self._other_replies = Replies(agreement, out), Replies(agreement, other_out)
        self._beside_replies = Replies(agreement, memoryview(bytearray(SHORT_REPLY_BYTES)))
        self._at = self._end = 0
        """What has been received and not been looked at lies between them."""
        self._payload: _Payload | None = None
        self._flush_replies = Replies(agreement, memoryview(bytearray(_FLUSH_REPLY_BYTES)))
        self._unflushed: list[Waiting] = []

    def close(self) -> None:
        """Nothing is received any more: let go of who is beside, and so of the memory."""
        self._beside = None

    @property
    def errors(self) -> int:
        """Requests that were answered with an error."""
        replies = self._replies, self._other_replies, self._beside_replies, self._flush_replies
        return sum(each.errors for each in replies)

    @property
    def written_bytes(self) -> int:
        return self._written_bytes + self._written_beside_bytes

    # Receiving

    @property
    def lacking(self) -> int:
        """Bytes that the payload under way still lacks; 0 between two requests."""
        return self._payload.left - (self._end - self._at) if self._payload else 0

    @property
    def rest(self) -> bytes:
        """What has come of the next request. Between two requests only."""
        return bytes(self._in[self._at : self._end])

    @property
    def has_more(self) -> bool:
        """Something has come that was not worked on."""
        return self._end > self._at

    def space(self) -> memoryview:
        """Where to put what comes next; never empty."""
        left = self._payload.left if self._payload else self._request.size
        if self._at == self._end:
            self._at = self._end = 0
        elif self._at and self._at + left > BUFFER_BYTES:
            length = self._end - self._at
            self._in[:length] = self._in[self._at : self._end]
            self._at, self._end = 0, length
        # What follows a long payload stays where it is: it would be moved to the front of the buffer afterwards.
        stop = self._at + left if left > BUFFER_BYTES // 16 else BUFFER_BYTES
        return self._in[self._end : stop]

    def received(self, count: int) -> Iterator[memoryview]:
        """``count`` bytes more have come: work on all requests that are complete, and yield the replies.

        Each has to be sent before the next is asked for.
        """
        self._end += count
        while not self.ended:
            if self._replies.is_full:
                yield from self._send()
            if self._payload is not None and not self._take_payload(self._payload):
                break
            if self._end - self._at < self._request.size:
                break
            yield from self._small_reads()
            if self._end - self._at >= self._request.size:
                yield from self._next()
        yield from self._flush()
        yield from self._send()

    def _small_reads(self) -> Iterator[memoryview]:
        """The reads at the head of the buffer, up to anything that is not quite plain.

        Everything that `_next` does, at half the time: this is where the speed of random reads is decided.
        """
        request, magic, view, replies = self._request, self._magic, self._in, self._replies
        size, read, structured = self._export.size, self._export.read, self._structured
        at, last, filled, head_bytes = self._at, self._end - request.size, replies.filled, replies.data_head_bytes
        while at <= last:
            told, flags, command, cookie, offset, length = request.unpack_from(view, at)
            if command or flags or told != magic or not 0 < length <= PIECE_BYTES or offset + length > size:
                break
            start = filled + head_bytes
            if start + length > BUFFER_BYTES:
                replies.filled = filled
                yield from self._send()
                replies = self._replies
                start = head_bytes
                filled = 0
            try:
                read(offset, replies.buffer[start : start + length])
            except RustordError:
                break  # and tried again, to be answered as an error is
            if structured:
                replies.put_data_head(filled, cookie, offset, offset, length, done=True)
            else:
                SIMPLE_REPLY.pack_into(replies.buffer, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
            filled = start + length
            at += request.size
            self.requests += 1
            self.read_bytes += length
        self._at, replies.filled = at, filled

    def _next(self) -> Iterator[memoryview]:
        """Work on one request, whatever it is."""
        if self._replies.is_full:  # of small reads
            yield from self._send()
        magic, flags, command, cookie, offset, length = self._request.unpack_from(self._in, self._at)
        if magic != self._magic:
            self.ended = True
            return
        self._at += self._request.size
        self.requests += 1
        if command == Cmd.DISC:
            self.ended = True
        elif command == Cmd.WRITE or (self._extended and flags & CmdFlag.PAYLOAD_LEN):
            self._payload = _Payload(flags, cookie, offset, length, self._refusal(command, flags, offset, length))
        elif refusal := self._refusal(command, flags, offset, length):
            self._replies.put(cookie, offset, refusal, command)
        else:
            try:
                yield from self._do(command, flags, cookie, offset, length)
            except RustordError as error:
                self._replies.put(cookie, offset, error, command)

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> RustordError | None:
        """Why the request is not even tried; None if it is."""
        allowed = _FLAGS.get(command)
        if allowed is None:
            return InvalidRequest(f"command {command} is not known here")
        if flags & ~(allowed & self._flags_known | self._flags_always):
            return InvalidRequest(f"command {command} does not take the flags {flags:#x}")
        if command in _CHANGES and self._export.read_only:
            return ReadOnly("the export is read-only")
        if command == Cmd.FLUSH:
            return None
        if offset + length > self._export.size:
            beyond = f"{length} bytes at {offset} reach beyond the end at {self._export.size}"
            return NoSpace(beyond) if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else InvalidRequest(beyond)
        if command in (Cmd.READ, Cmd.WRITE) and length > PAYLOAD_BYTES_MAX:
            return InvalidRequest(f"{length} bytes at once; the most is {PAYLOAD_BYTES_MAX}")
        if command == Cmd.BLOCK_STATUS and not (self._allocation and length):
            return InvalidRequest("no context was agreed on" if length else "a range of no bytes has no state")
        return None

    def _do(self, command: int, flags: int, cookie: int, offset: int, length: int) -> Iterator[memoryview]:
        export = self._export
        if command == Cmd.READ:
            yield from self._read(flags, cookie, offset, length)
        elif command == Cmd.BLOCK_STATUS:
            yield from self._block_status(flags, cookie, offset, length)
        elif command == Cmd.FLUSH:
            self._unflushed.append((cookie, offset))
        else:
            if command == Cmd.CACHE:
                yield from self._send()
                for at in range(offset, offset + min(length, PAYLOAD_BYTES_MAX), PIECE_BYTES):
                    export.read(at, self._replies.buffer[: min(PIECE_BYTES, offset + length - at)])
            elif command == Cmd.TRIM and length:
                export.trim(offset, length)
            elif command == Cmd.WRITE_ZEROES and length:
                keep, fast = bool(flags & CmdFlag.NO_HOLE), bool(flags & CmdFlag.FAST_ZERO)
                export.zero(offset, length, keep=keep, fast=fast)
            self._changed(flags, cookie, offset)

    # Writing

    def _take_payload(self, payload: _Payload) -> bool:
        """Write, or drop, what has come of a payload; whether that was the last of it."""
        count = min(self._end - self._at, payload.left)
        if count < payload.left and not payload.error and self._end < BUFFER_BYTES:
            return False  # in one piece, if it fits into the buffer
        data = self._in[self._at : self._at + count]
        self._at += count
        payload.left -= count
        is_last_and_plain = payload.is_plain and not payload.left and not payload.error
        if is_last_and_plain and self._lend(partial(self._write_beside, payload, data)):
            length = self._end - self._at
            self._other_in[:length] = self._in[self._at : self._end]
            self._in, self._other_in = self._other_in, self._in
            self._at, self._end = 0, length
            self._payload = None
            return True
        if not payload.error and count:
            try:
                self._export.write(payload.offset, data)
                self._written_bytes += count
            except RustordError as error:
                payload.error = error
            payload.offset += count
        if payload.left:
            return False
        self._payload = None
        if payload.error:
            self._replies.put(payload.cookie, payload.begin, payload.error)
        else:
            self._changed(payload.flags, payload.cookie, payload.begin)
        return True

    def _lend(self, job: Callable[[], memoryview]) -> bool:
        """Whether the job, with the buffer that has its data, is somebody else's until he has done it."""
        return self._beside is not None and self._beside.take(job)

    def _write_beside(self, payload: _Payload, data: memoryview) -> memoryview:
        """Write the rest of a payload, in another thread; the reply."""
        replies = self._beside_replies
        replies.filled = 0
        try:
            self._export.write(payload.offset, data)
        except RustordError as error:
            replies.put(payload.cookie, payload.begin, error)
        else:
            replies.put(payload.cookie, payload.begin)
            self._written_beside_bytes += len(data)
        return replies.buffer[: replies.filled]

    def _changed(self, flags: int, cookie: int, offset: int) -> None:
        if flags & CmdFlag.FUA:
            self._unflushed.append((cookie, offset))
        else:
            self._replies.put(cookie, offset)

    def _flush(self) -> Iterator[memoryview]:
        """Do the flush that this batch asked for, and answer all who did; or have it done."""
        if not self._unflushed:
            return
        yield from self._send()  # what is done already: its client may go on, and ask for the next flush meanwhile
        waiting, self._unflushed = self._unflushed, []
        if self._beside is not None:
            self._beside.wait()
            if self._beside.flush(waiting):
                return
        yield from self.flushed(waiting)

    def flushed(self, waiting: Iterable[Waiting]) -> Iterator[memoryview]:
        """Flush the export, and yield the replies to all who wait for that. For one thread at a time, whichever."""
        failure: RustordError | None = None
        try:
            self._export.flush()
        except RustordError as error:
            failure = error
        replies = self._flush_replies
        replies.filled = 0
        for cookie, offset in waiting:
            if replies.is_full:
                yield replies.buffer[: replies.filled]
                replies.filled = 0
            replies.put(cookie, offset, failure)
        yield replies.buffer[: replies.filled]

    # Reading

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> Iterator[memoryview]:
        """One READ of any length, piece by piece."""
        if length > PIECE_BYTES:
            yield from self._send()
            if self._structured and flags & CmdFlag.DF:
                raise TooLarge(f"{length} bytes in one chunk; the most is {PIECE_BYTES}")
            if not self._structured:
                # Nothing may come in between the parts of a simple reply.
                if self._beside is not None:
                    self._beside.finish()
                # It has no way to tell of an error once it has begun, so that is looked for first.
                for at in range(offset, offset + length, PIECE_BYTES):
                    self._export.read(at, self._replies.buffer[: min(PIECE_BYTES, offset + length - at)])
        if not length:
            self._replies.put(cookie, offset, None, Cmd.READ)
        for at in range(offset, offset + length, PIECE_BYTES):
            yield from self._read_piece(cookie, offset, at, offset + length)
            if self.ended:
                return
        if length > PIECE_BYTES and not self._structured:
            yield from self._send()  # its end now: the reply to a payload that is written beside must not come before

    def _read_piece(self, cookie: int, offset: int, at: int, end: int) -> Iterator[memoryview]:
        """The bytes from ``at`` on, of a READ from ``offset`` to before ``end``."""
        length = min(PIECE_BYTES, end - at)
        head_bytes = self._replies.data_head_bytes if self._structured or at == offset else 0
        if self._replies.filled + head_bytes + length > BUFFER_BYTES:
            yield from self._send()
        replies = self._replies
        start = replies.filled + head_bytes
        try:
            self._export.read(at, replies.buffer[start : start + length])
        except RustordError:
            if not self._structured and at > offset:
                self.ended = True  # all that is left to say that this is not what was asked for
                self._unflushed = []  # nobody is answered: that would be taken for the rest of it
                return
            raise
        if self._structured:
            replies.put_data_head(replies.filled, cookie, offset, at, length, done=at + length == end)
        elif head_bytes:
            SIMPLE_REPLY.pack_into(replies.buffer, replies.filled, SIMPLE_REPLY_MAGIC, 0, cookie)
        replies.filled = start + length
        self.read_bytes += length

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> Iterator[memoryview]:
        runs = merged(self._known_runs(offset, length))
        chosen = list(islice(runs, 1 if flags & CmdFlag.REQ_ONE else RUN_COUNT_MAX))
        if self._extended:
            kind, head = Reply.BLOCK_STATUS_EXT, _RUN.pack(ALLOCATION_ID, len(chosen))
            table = b"".join([_EXTENDED_RUN.pack(*run) for run in chosen])
        else:
            kind, head = Reply.BLOCK_STATUS, ALLOCATION_ID.to_bytes(4, "big")
            table = b"".join([_RUN.pack(*run) for run in chosen])
        if self._replies.filled + len(table) > BUFFER_BYTES - SHORT_REPLY_BYTES:
            yield from self._send()
        self._replies.put_chunk(kind, cookie, offset, head + table)

    def _known_runs(self, offset: int, length: int) -> Iterator[Run]:
        """The export's, cut off where the request ends."""
        for run in self._export.runs(offset, length):
            yield Run(min(run.length, length), run.state)
            length -= run.length
            if length <= 0:
                return

    def _send(self) -> Iterator[memoryview]:
        replies = self._replies
        filled, replies.filled = replies.filled, 0
        if filled >= LONG_BYTES and self._lend(lambda: replies.buffer[:filled]):
            self._replies, self._other_replies = self._other_replies, replies
        elif filled:
            yield replies.buffer[:filled]
