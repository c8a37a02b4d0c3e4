from __future__ import annotations

import errno

import pytest

from rustord.errors import DeviceError
from rustord.wire.negotiation import Agreement
from rustord.wire.replies import SHORT_REPLY_BYTES, Replies
from tests.wire.peer import Chunk, MemoryExport, replies

SIMPLE, STRUCTURED, EXTENDED = (False, False), (True, False), (True, True)
READ, WRITE = 0, 1


class Gathered:
    def __init__(self, mode: tuple[bool, bool], size: int = 1 << 16) -> None:
        self.extended = mode[1]
        self.replies = Replies(Agreement("disk", MemoryExport(), *mode, allocation=False), memoryview(bytearray(size)))

    def chunks(self) -> list[Chunk]:
        return replies(bytes(self.replies.buffer[: self.replies.filled]), extended=self.extended)


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
def test_replies_without_data(mode: tuple[bool, bool]) -> None:
    gathered = Gathered(mode)
    gathered.replies.put(1, 512)
    gathered.replies.put(2, 512, DeviceError("a bad sector"), WRITE)
    gathered.replies.put(3, 512, DeviceError("a bad sector"), READ)
    gathered.replies.put(4, 512, command=READ)
    told = {reply.cookie: reply.error for reply in gathered.chunks()}
    assert told == {1: 0, 2: errno.EIO, 3: errno.EIO, 4: 0}
    assert gathered.replies.errors == 2


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
def test_it_is_full_before_there_is_no_room(mode: tuple[bool, bool]) -> None:
    gathered = Gathered(mode, 3 * SHORT_REPLY_BYTES)
    count = 0
    while not gathered.replies.is_full:
        gathered.replies.put(count, 0, DeviceError("x" * 10_000), READ)
        count += 1
    assert len(gathered.chunks()) == count
    assert gathered.replies.filled <= len(gathered.replies.buffer)


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_data_in_chunks(mode: tuple[bool, bool]) -> None:
    gathered = Gathered(mode)
    for at in (1000, 1004):
        filled = gathered.replies.filled
        gathered.replies.put_data_head(filled, 7, 1000, at, 4, done=at == 1004)
        start = filled + gathered.replies.data_head_bytes
        gathered.replies.buffer[start : start + 4] = b"data"
        gathered.replies.filled = start + 4
    assert [(chunk.offset, chunk.done, chunk.data) for chunk in gathered.chunks()] == [
        (1000, False, b"data"),
        (1004, True, b"data"),
    ]
