"""Replies: what the server answers in the transmission phase of NBD, gathered in a buffer until they are sent."""

from __future__ import annotations

from struct import Struct
from typing import Final

from rustord.errors import RustordError
from rustord.wire.nbd import (
    EXTENDED_CHUNK,
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_CHUNK,
    STRUCTURED_REPLY_MAGIC,
    Cmd,
    Reply,
    error_number,
    error_text,
)
from rustord.wire.negotiation import Agreement

SHORT_REPLY_BYTES: Final = 2048
"""More than a reply without data takes, with the text of an error."""

_DATA_HEAD, _EXTENDED_DATA_HEAD = Struct(">IHHQIQ"), Struct(">IHHQQQQ")
"""A chunk's head with the offset that data begins with."""
_ERROR = Struct(">IH")


class Replies:
    """Replies in the form that was agreed on: ``filled`` bytes at the front of ``buffer``."""

    __slots__ = ("_extended", "_structured", "buffer", "data_head_bytes", "errors", "filled")

    def __init__(self, agreement: Agreement, buffer: memoryview) -> None:
        self._structured = agreement.structured
        self._extended = agreement.extended
        heads = SIMPLE_REPLY.size, _DATA_HEAD.size, _EXTENDED_DATA_HEAD.size
        self.data_head_bytes = heads[agreement.structured + agreement.extended]
        self.buffer = buffer
        self.filled = 0
        self.errors = 0
        """Replies that told of an error."""

    @property
    def is_full(self) -> bool:
        """There may be no room for one more reply without data."""
        return self.filled > len(self.buffer) - SHORT_REPLY_BYTES

    def put(self, cookie: int, offset: int, error: RustordError | None = None, command: int = Cmd.FLUSH) -> None:
        """A reply without data."""
        self.errors += error is not None
        if self._extended or (self._structured and command in (Cmd.READ, Cmd.BLOCK_STATUS)):
            if error is None:
                self.put_chunk(Reply.NONE, cookie, offset, b"")
            else:
                text = error_text(error)
                self.put_chunk(Reply.ERROR, cookie, offset, _ERROR.pack(error_number(error), len(text)) + text)
            return
        number = error_number(error) if error else 0
        SIMPLE_REPLY.pack_into(self.buffer, self.filled, SIMPLE_REPLY_MAGIC, number, cookie)
        self.filled += SIMPLE_REPLY.size

    def put_chunk(self, kind: int, cookie: int, offset: int, payload: bytes) -> None:
        """The only, or last, chunk of a reply."""
        if self._extended:
            head = EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, kind, cookie, offset, len(payload))
        else:
            head = STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, kind, cookie, len(payload))
        end = self.filled + len(head) + len(payload)
        self.buffer[self.filled : end] = head + payload
        self.filled = end

    def put_data_head(self, filled: int, cookie: int, offset: int, at: int, length: int, *, done: bool) -> None:
        """The head of data that follows it, with the bytes from ``at`` on of a READ from ``offset`` on."""
        kind, length = Reply.OFFSET_DATA, length + 8
        if self._extended:
            _EXTENDED_DATA_HEAD.pack_into(
                self.buffer, filled, EXTENDED_REPLY_MAGIC, done, kind, cookie, offset, length, at
            )
        else:
            _DATA_HEAD.pack_into(self.buffer, filled, STRUCTURED_REPLY_MAGIC, done, kind, cookie, length, at)
