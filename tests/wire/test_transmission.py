from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rustord.errors import DeviceError
from rustord.export import Run, State
from rustord.wire.negotiation import Agreement
from rustord.wire.transmission import BUFFER_BYTES, LONG_BYTES, PIECE_BYTES, Transmission, Waiting
from tests.wire.peer import MIB, Chunk, MemoryExport, replies, request, write

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
NONE, DATA, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR = 0, 1, 5, 6, 0x8001
SIMPLE, STRUCTURED, EXTENDED = (False, False), (True, False), (True, True)
MODES = (SIMPLE, STRUCTURED, EXTENDED)
Mode = tuple[bool, bool]


class Talk:
    """A transmission, and what it has answered.

    Whatever may be done late is, at the last moment that is allowed; flushes are when something else has been sent.
    """

    def __init__(self, mode: Mode = SIMPLE, size: int = 1 << 16, *, read_only: bool = False, split: int = 0) -> None:
        self.export = MemoryExport(size, read_only=read_only)
        self.extended = mode[1]
        self.transmission = Transmission(Agreement("disk", self.export, *mode, allocation=mode[0]), self)
        self.taken = 0
        self.flushes_beside = True
        self._split = split or 1 << 30
        self._said = b""
        self._begun: Callable[[], memoryview] | None = None
        self._waiting: list[Waiting] = []

    def take(self, job: Callable[[], memoryview]) -> bool:
        self.wait()
        self.taken += 1
        self._begun = job
        return True

    def wait(self) -> None:
        begun, self._begun = self._begun, None
        if begun:
            self._said += bytes(begun())

    def flush(self, waiting: list[Waiting]) -> bool:
        assert not self._begun
        if self.flushes_beside:
            self._waiting += waiting
        return self.flushes_beside

    def finish(self) -> None:
        waiting, self._waiting = self._waiting, []
        for part in self.transmission.flushed(waiting) if waiting else ():
            self._said += bytes(part)

    def say(self, data: bytes) -> bytes:
        """Hand it over in pieces; what it answers."""
        left = memoryview(data)
        while left and not self.transmission.ended:
            space = self.transmission.space()
            assert len(space) > 0
            count = min(len(space), len(left), self._split)
            space[:count] = left[:count]
            left = left[count:]
            for part in self.transmission.received(count):
                assert 0 < len(part) <= BUFFER_BYTES
                self.wait()
                self._said += bytes(part)
                self.finish()
        self.wait()
        self.finish()
        said, self._said = self._said, b""
        return said

    def ask(self, data: bytes, reads: dict[int, int] | None = None) -> list[Chunk]:
        return replies(self.say(data), reads, extended=self.extended)

    def request(self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 0, flags: int = 0) -> bytes:
        return request(command, offset, length, cookie=cookie, flags=flags, extended=self.extended)

    def one(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> Chunk:
        """The only reply to a request."""
        (reply,) = self.ask(
            self.request(command, offset, length, cookie=77, flags=flags), {77: length * (command == READ)}
        )
        assert reply.cookie == 77
        assert reply.done
        return reply

    def write(self, offset: int, data: bytes, *, cookie: int = 0, flags: int = 0) -> bytes:
        return write(offset, data, cookie=cookie, flags=flags, extended=self.extended)

    def in_sync(self) -> bool:
        return self.one(FLUSH).error == 0


@pytest.fixture(params=MODES, ids=["simple", "structured", "extended"])
def talk(request: pytest.FixtureRequest) -> Talk:
    return Talk(request.param)


def test_read(talk: Talk) -> None:
    talk.export.data[:] = random.Random(1).randbytes(1 << 16)
    for offset, length in ((0, 1), (511, 2), (4096, 4096), (0, 1 << 16), ((1 << 16) - 1, 1)):
        for flags in (0, DF) if not talk.extended else (0, FUA):
            if flags != DF or talk.transmission._structured:
                reply = talk.one(READ, offset, length, flags=flags)
                assert reply.data == talk.export.data[offset : offset + length]
                assert reply.kind in (-1, DATA)
                assert reply.offset == (offset if reply.kind == DATA else 0)


def test_write(talk: Talk) -> None:
    for offset, length in ((0, 1), (511, 2), (4096, 4096), (0, 1 << 16)):
        data = random.Random(length).randbytes(length)
        (reply,) = talk.ask(talk.write(offset, data, cookie=5))
        assert (reply.cookie, reply.error) == (5, 0)
        assert talk.export.data[offset : offset + length] == data
        assert talk.export.log[-1] == ("write", offset, length)


@pytest.mark.parametrize("room", [0, 1, 15, 100])
@pytest.mark.parametrize("command", [TRIM, ZEROES, READ, 99])
@pytest.mark.parametrize("mode", MODES, ids=["simple", "structured", "extended"])
def test_a_reply_behind_reads_that_leave_no_room_for_it(mode: Mode, command: int, room: int) -> None:
    talk = Talk(mode, 2 * MIB)
    head_bytes = talk.transmission._replies.data_head_bytes
    rest = BUFFER_BYTES - PIECE_BYTES - 2 * head_bytes - room
    reads = talk.request(READ, 0, PIECE_BYTES, cookie=1) + talk.request(READ, 0, rest, cookie=2)
    told = talk.ask(reads + talk.request(command, 2 * MIB, command == 99, cookie=3), {1: PIECE_BYTES, 2: rest, 3: 0})
    assert [reply.cookie for reply in told] == [1, 2, 3]
    assert [bool(reply.error) for reply in told] == [False, False, command == 99]
    assert talk.in_sync()


def test_nothing_is_read_and_written(talk: Talk) -> None:
    assert talk.one(READ, 100, 0)[2:] == (0, True, 0, b"")
    assert talk.ask(talk.write(100, b""))[0].error == 0
    for command in (TRIM, ZEROES, CACHE):
        assert talk.one(command, 100, 0).error == 0
    assert talk.export.log == []


def test_the_other_commands(talk: Talk) -> None:
    for command, flags in ((FLUSH, 0), (TRIM, 0), (ZEROES, 0), (ZEROES, NO_HOLE | FAST_ZERO), (CACHE, 0)):
        length = 0 if command == FLUSH else 1000
        assert talk.one(command, length and 24, length, flags=flags).error == 0
    assert talk.export.log == [
        ("flush",),
        ("trim", 24, 1000),
        ("zero", 24, 1000, False, False),
        ("zero", 24, 1000, True, True),
    ]
    assert talk.one(ZEROES, 0, 10, flags=FAST_ZERO).error == errno.EOPNOTSUPP


def test_fua_is_a_flush_before_the_reply(talk: Talk) -> None:
    assert talk.ask(talk.write(0, b"a", flags=FUA))[0].error == 0
    assert talk.one(TRIM, 0, 1, flags=FUA).error == 0
    assert talk.one(ZEROES, 0, 1, flags=FUA).error == 0
    assert [call[0] for call in talk.export.log] == ["write", "flush", "trim", "flush", "zero", "flush"]


def test_a_batch_has_one_flush(talk: Talk) -> None:
    batch = b"".join(talk.write(number, b"x", cookie=number, flags=FUA * (number % 2)) for number in range(20))
    answered = talk.ask(batch + talk.request(FLUSH, cookie=99) + talk.request(READ, 3, 1, cookie=98), {98: 1})
    assert sorted(reply.cookie for reply in answered) == [*range(20), 98, 99]
    assert not any(reply.error for reply in answered)
    assert [call[0] for call in talk.export.log] == ["write"] * 20 + ["flush"]


def test_who_did_not_ask_for_the_flush_does_not_wait_for_it(talk: Talk) -> None:
    talk.flushes_beside = False
    batch = talk.write(0, b"data", cookie=1) + talk.request(FLUSH, cookie=2) + talk.write(4, b"more", cookie=3)
    talk.transmission.space()[: len(batch)] = batch
    answered = []
    for part in talk.transmission.received(len(batch)):
        cookies = [reply.cookie for reply in replies(bytes(part), {}, extended=talk.extended)]
        answered.append((cookies, ("flush",) in talk.export.log))
    assert answered == [([1, 3], False), ([2], True)]


def test_whoever_asked_for_a_flush_that_failed_is_told(talk: Talk) -> None:
    talk.export.flush_failure = DeviceError("it is gone")
    answered = talk.ask(talk.write(0, b"a", cookie=1) + talk.write(1, b"b", cookie=2, flags=FUA) + talk.request(FLUSH))
    assert {reply.cookie: reply.error for reply in answered} == {1: 0, 2: errno.EIO, 0: errno.EIO}


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (READ, 0, (1 << 16) + 1, 0, errno.EINVAL),
        (READ, 1 << 16, 1, 0, errno.EINVAL),
        (READ, (1 << 64) - 1, 0xFFFFFFFF, 0, errno.EINVAL),
        (READ, 0, 1, NO_HOLE, errno.EINVAL),
        (TRIM, 1, 1 << 16, 0, errno.EINVAL),
        (TRIM, 0, 1, NO_HOLE, errno.EINVAL),
        (ZEROES, 1, 1 << 16, 0, errno.ENOSPC),
        (ZEROES, 0, 1, DF, errno.EINVAL),
        (CACHE, 1 << 16, 1, 0, errno.EINVAL),
        (STATUS, 0, 0, 0, errno.EINVAL),
        (STATUS, 0, 0xFFFFFFFF, 0, errno.EINVAL),
        (FLUSH, 0, 0, 1 << 15, errno.EINVAL),
        (8, 0, 0, 0, errno.EINVAL),
        (0xFFFF, 1, 1, 0, errno.EINVAL),
    ],
)
def test_a_refusal_leaves_the_stream_in_sync(
    talk: Talk, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    assert talk.one(command, offset, length, flags=flags).error == error
    assert talk.in_sync()
    assert talk.export.log == [("flush",)]


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, (1 << 16) + 1), (1 << 16, 1), (0, 33 * MIB), (0, 32 * MIB), (1 << 63, 2 * MIB)]
)
def test_a_refused_write_is_taken_in_and_dropped(talk: Talk, offset: int, length: int, read_only: bool) -> None:
    other = Talk((talk.transmission._structured, talk.extended), read_only=read_only)
    (reply,) = other.ask(other.write(offset, bytes(length)))
    assert reply.error == (errno.EPERM if read_only else errno.ENOSPC)
    assert other.in_sync()


def test_a_payload_that_is_too_long_for_any_export() -> None:
    talk = Talk(size=64 * MIB)
    (reply,) = talk.ask(talk.write(0, bytes(33 * MIB)))
    assert reply.error == errno.EINVAL
    assert talk.one(READ, 0, 33 * MIB).error == errno.EINVAL
    assert talk.in_sync()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_only_is_not_changed(mode: Mode) -> None:
    talk = Talk(mode, read_only=True)
    for command in (TRIM, ZEROES):
        assert talk.one(command, 0, 512).error == errno.EPERM
    assert talk.one(FLUSH).error == 0
    assert talk.one(READ, 0, 512).error == 0
    assert talk.one(READ, 0, 512, flags=FUA).error == errno.EINVAL


def test_a_payload_where_none_belongs() -> None:
    talk = Talk(EXTENDED)
    for command in (READ, FLUSH, STATUS, 99):
        (reply,) = talk.ask(talk.request(command, 0, 1000, flags=PAYLOAD_LEN) + bytes(1000))
        assert (reply.kind, reply.error) == (ERROR, errno.EINVAL)
        assert talk.in_sync()
    assert Talk().one(READ, 0, 1000, flags=PAYLOAD_LEN).error == errno.EINVAL


def test_errors_of_the_export_are_told(talk: Talk) -> None:
    talk.export.bad = 5000
    reply = talk.one(READ, 4096, 4096)
    assert reply.error == errno.EIO
    assert reply.data == (b"" if reply.kind == -1 else b"a bad sector (replace the disk)")
    assert talk.ask(talk.write(4096, bytes(4096)))[0].error == errno.EIO
    for command in (TRIM, ZEROES, CACHE):
        assert talk.one(command, 5000, 1).error == errno.EIO
    assert talk.in_sync()
    answered = talk.ask(b"".join(talk.request(READ, at, 100, cookie=at) for at in (0, 4950, 200)), {0: 100, 200: 100})
    assert [(reply.cookie, reply.error) for reply in answered] == [(0, 0), (4950, errno.EIO), (200, 0)]


# Long requests


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5, 32 * MIB])
def test_a_long_read_comes_in_pieces(mode: Mode, length: int) -> None:
    talk = Talk(mode, size=33 * MIB)
    talk.export.data[:length] = random.Random(2).randbytes(length)
    answered = talk.ask(talk.request(READ, 1, length), {0: length})
    assert b"".join(reply.data for reply in answered) == talk.export.data[1 : 1 + length]
    assert [reply.done for reply in answered] == [False] * (len(answered) - 1) + [True]
    if mode != SIMPLE:
        assert [reply.offset for reply in answered] == list(range(1, 1 + length, PIECE_BYTES))
    assert talk.in_sync()


def test_a_long_read_that_must_not_be_parted_is_refused() -> None:
    talk = Talk(STRUCTURED, size=4 * MIB)
    assert talk.one(READ, 0, MIB, flags=DF).error == 0
    assert talk.one(READ, 0, MIB + 1, flags=DF).error == errno.EOVERFLOW


@pytest.mark.parametrize("mode", MODES)
def test_an_error_late_in_a_long_read(mode: Mode) -> None:
    talk = Talk(mode, size=4 * MIB)
    talk.export.bad = 3 * MIB
    answered = talk.ask(talk.request(READ, 0, 4 * MIB))
    assert answered[-1].error == errno.EIO
    assert [reply.done for reply in answered] == [False] * (len(answered) - 1) + [True]
    assert (len(answered) == 1) == (mode == SIMPLE)
    assert talk.in_sync()


@pytest.mark.parametrize("before", [b"", request(FLUSH), write(0, b"x", flags=FUA)], ids=["", "flush", "fua"])
def test_an_error_that_comes_up_in_the_middle_of_a_simple_reply_ends_the_connection(before: bytes) -> None:
    """And nothing comes in place of what is missing."""
    talk = Talk(size=4 * MIB)
    plain_read, count = talk.export.read, 0

    def read(offset: int, buffer: memoryview) -> None:
        nonlocal count
        count += 1
        if count == 7:  # four to look, and the third of those that are sent
            raise DeviceError("now it is gone")
        plain_read(offset, buffer)

    talk.export.read = read  # type: ignore[method-assign]
    assert len(talk.say(before + talk.request(READ, 0, 4 * MIB))) == 16 + 2 * MIB
    assert talk.transmission.ended


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [0, 100_000, 4096 + 28])
def test_long_writes(mode: Mode, split: int) -> None:
    talk = Talk(mode, size=33 * MIB, split=split)
    data = random.Random(3).randbytes(32 * MIB)
    said = talk.write(1, b"begin") + talk.write(MIB, data, cookie=1, flags=FUA) + talk.write(9, b"end", cookie=2)
    assert {reply.cookie: reply.error for reply in talk.ask(said)} == {0: 0, 1: 0, 2: 0}
    assert talk.export.data[MIB:] == data
    assert (talk.export.data[1:6], talk.export.data[9:12]) == (b"begin", b"end")
    assert talk.transmission.written_bytes == 32 * MIB + 8


def test_a_write_of_a_piece_is_one_call() -> None:
    talk = Talk(size=8 * MIB, split=60_000)
    talk.say(b"".join(talk.write(number * MIB, bytes(MIB)) for number in range(8)))
    assert talk.export.log == [("write", number * MIB, MIB) for number in range(8)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [0, 300_000, LONG_BYTES + 28])
def test_long_writes_beside_reads(mode: Mode, split: int, seed: int) -> None:
    random_ = random.Random(seed)
    talk = Talk(mode, size=32 * MIB, split=split)
    talk.export.data[:] = random_.randbytes(32 * MIB)
    said, model, expected = b"", talk.export.data[:], {}
    for cookie, start in enumerate(range(0, 32 * MIB, MIB)):
        length = random_.choice((1, 4096, LONG_BYTES, MIB - LONG_BYTES, MIB))
        if random_.random() < 0.5:
            model[start : start + length] = data = random_.randbytes(length)
            said += talk.write(start, data, cookie=cookie)
        else:
            expected[cookie] = bytes(model[start : start + length])
            said += talk.request(READ, start, length, cookie=cookie)
    answered = talk.ask(said, {cookie: len(data) for cookie, data in expected.items()})
    assert sorted(reply.cookie for reply in answered) == list(range(32))
    assert {reply.cookie: reply.data for reply in answered if reply.cookie in expected} == expected
    assert talk.export.data == model
    assert talk.transmission.written_bytes == sum(length for name, _, length in talk.export.log if name == "write")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rest", [1, LONG_BYTES, MIB])
def test_no_other_reply_comes_in_the_middle_of_a_long_one(mode: Mode, rest: int, seed: int) -> None:
    """It is read in pieces; what follows it is a payload that is written beside."""
    talk = Talk(mode, size=8 * MIB)
    talk.export.data[:] = data = random.Random(seed).randbytes(8 * MIB)
    asked = talk.request(READ, 0, 2 * MIB + rest, cookie=1) + talk.write(4 * MIB, bytes(LONG_BYTES), cookie=2)
    answered = talk.ask(asked, {1: 2 * MIB + rest})
    assert talk.taken >= 2
    assert b"".join(reply.data for reply in answered if reply.cookie == 1) == data[: 2 * MIB + rest]
    assert [reply.error for reply in answered if reply.cookie == 2] == [0]


@pytest.mark.parametrize("mode", MODES)
def test_no_reply_to_a_flush_comes_in_the_middle_of_a_long_one(mode: Mode, seed: int) -> None:
    talk = Talk(mode, size=4 * MIB)
    talk.export.data[:] = data = random.Random(seed).randbytes(4 * MIB)
    talk._split = len(talk.request(FLUSH))
    answered = talk.ask(talk.request(FLUSH, cookie=2) + talk.request(READ, 0, 3 * MIB, cookie=1), {1: 3 * MIB})
    assert b"".join(reply.data for reply in answered if reply.cookie == 1) == data[: 3 * MIB]
    assert [reply.error for reply in answered if reply.cookie == 2] == [0]


def test_flushes_that_come_during_one_are_done_together(talk: Talk) -> None:
    other = Talk((talk.transmission._structured, talk.extended), split=len(talk.request(FLUSH)))
    answered = other.ask(b"".join(other.request(FLUSH, cookie=cookie) for cookie in range(3000)))
    assert [reply.cookie for reply in answered] == [*range(3000)]
    assert other.export.log == [("flush",)]


def test_a_flush_comes_after_the_writes_before_it(talk: Talk) -> None:
    other = Talk((talk.transmission._structured, talk.extended), size=MIB)
    other.say(other.write(0, bytes(LONG_BYTES)) + other.request(FLUSH))
    assert other.taken == 1
    assert other.export.log == [("write", 0, LONG_BYTES), ("flush",)]
    other.say(other.write(0, bytes(LONG_BYTES), flags=FUA))
    assert other.export.log[2:] == [("write", 0, LONG_BYTES), ("flush",)]
    assert other.taken == 1


def test_a_long_write_beside_that_fails_is_told(talk: Talk) -> None:
    other = Talk((talk.transmission._structured, talk.extended), size=4 * MIB)
    other.export.bad = MIB
    batch = [other.write(number * MIB, bytes(MIB), cookie=number) for number in range(4)]
    assert {reply.cookie: reply.error for reply in other.ask(b"".join(batch))} == {0: 0, 1: errno.EIO, 2: 0, 3: 0}
    assert (other.taken, other.transmission.errors, other.transmission.written_bytes) == (4, 1, 3 * MIB)


def test_a_long_write_that_fails_is_taken_in_to_its_end(talk: Talk) -> None:
    other = Talk((talk.transmission._structured, talk.extended), size=33 * MIB)
    other.export.bad = 2 * MIB
    (reply,) = other.ask(other.write(0, bytes(32 * MIB)))
    assert reply.error == errno.EIO
    assert other.in_sync()


# BLOCK_STATUS


def runs_of(reply: Chunk) -> list[tuple[int, int]]:
    if reply.kind == BLOCK_STATUS:
        assert reply.data[:4] == b"\0\0\0\1"
        return list(struct.iter_unpack(">II", reply.data[4:]))
    assert reply.kind == BLOCK_STATUS_EXT
    context, count = struct.unpack_from(">II", reply.data)
    assert (context, count * 16) == (1, len(reply.data) - 8)
    return list(struct.iter_unpack(">QQ", reply.data[8:]))


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_block_status(mode: Mode) -> None:
    talk = Talk(mode)
    hole = State.HOLE | State.ZERO
    talk.export.known = [Run(4096, State.DATA), Run(4096, State.DATA), Run(8192, hole), Run(49152, State.DATA)]
    assert runs_of(talk.one(STATUS, 0, 1 << 16)) == [(8192, 0), (8192, 3), (49152, 0)]
    assert runs_of(talk.one(STATUS, 100, 8200)) == [(8092, 0), (108, 3)]
    assert runs_of(talk.one(STATUS, 0, 1 << 16, flags=REQ_ONE)) == [(8192, 0)]
    assert runs_of(talk.one(STATUS, 8000, 50, flags=REQ_ONE)) == [(50, 0)]


def test_block_status_has_to_be_agreed_on() -> None:
    assert Talk().one(STATUS, 0, 512).error == errno.EINVAL


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_block_status_near_4_gib(mode: Mode) -> None:
    talk = Talk(mode)
    talk.export.size = 1 << 40
    talk.export.known = [Run(1 << 40, State.HOLE)]
    for length in (0xFFFFFFFF, 0xFFFFFE00, 0x80000000):
        assert runs_of(talk.one(STATUS, 512, length)) == [(length, 1)]
    if mode == EXTENDED:
        assert runs_of(talk.one(STATUS, 0, 1 << 40)) == [(1 << 40, 1)]


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_no_more_runs_are_told_than_a_client_can_take(mode: Mode) -> None:
    talk = Talk(mode, size=MIB)
    talk.export.known = [Run(1, State(number & 1)) for number in range(MIB)]
    batch = b"".join(talk.request(STATUS, 0, MIB) for _ in range(20))
    for reply in talk.ask(batch):
        assert runs_of(reply) == [(1, number & 1) for number in range(4096)]


# Disconnecting, and breaking the rules


def test_disconnecting_after_writes_that_are_unanswered(talk: Talk) -> None:
    batch = b"".join(talk.write(number * 512, b"w" * 512, cookie=number) for number in range(64))
    answered = talk.ask(batch + talk.request(FLUSH, cookie=64) + talk.request(DISC) + b"behind")
    assert sorted(reply.cookie for reply in answered) == list(range(65))
    assert talk.transmission.ended
    assert talk.export.data[: 64 * 512] == b"w" * (64 * 512)
    assert talk.export.log[-1] == ("flush",)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_request_ends_the_connection(mode: Mode) -> None:
    talk = Talk(mode)
    said = talk.say(talk.request(FLUSH, cookie=1) + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert [reply.cookie for reply in replies(said, extended=talk.extended)] == [1]
    assert talk.transmission.ended
    other = Talk(mode)
    other.say(request(FLUSH, extended=not talk.extended) + bytes(32))
    assert other.transmission.ended


# Everything at once, at every split


def changes(random_: random.Random, talk: Talk, model: bytearray, count: int) -> tuple[bytes, dict[int, bytes]]:
    """Random valid requests, and what each READ must give."""
    said, expected = b"", {}
    for cookie in range(count):
        offset = random_.randrange(len(model))
        length = random_.randrange(1, min(len(model) - offset, random_.choice((8, 600, 70_000))) + 1)
        command = random_.choice((READ, READ, WRITE, TRIM, ZEROES, FLUSH, CACHE))
        if command == WRITE:
            data = random_.randbytes(length)
            said += talk.write(offset, data, cookie=cookie, flags=random_.choice((0, 0, FUA)))
            model[offset : offset + length] = data
            continue
        if command in (TRIM, ZEROES):
            model[offset : offset + length] = bytes(length)
        elif command == READ:
            expected[cookie] = bytes(model[offset : offset + length])
        said += talk.request(command, offset, length, cookie=cookie)
    return said, expected


@pytest.mark.parametrize("mode", MODES)
def test_random_requests_at_random_splits(mode: Mode, seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(20):
        talk = Talk(mode, size=100_000, split=random_.choice((0, 1, 13, 28, 5000)))
        said, expected = changes(random_, talk, model := bytearray(100_000), 60 if talk._split > 1 else 6)
        answered = talk.ask(said, {cookie: len(data) for cookie, data in expected.items()})
        assert {reply.cookie: reply.data for reply in answered if reply.cookie in expected} == expected
        assert not any(reply.error for reply in answered)
        assert talk.export.data == model


@settings(max_examples=100)
@given(
    st.sampled_from(MODES),
    st.booleans(),
    st.lists(
        st.builds(
            lambda *numbers: numbers,
            st.integers(0, 9) | st.integers(0, 0xFFFF),
            st.integers(0, 63) | st.integers(0, 0xFFFF),
            st.integers(0, 1 << 17) | st.integers(0, (1 << 64) - 1),
            st.integers(0, 1 << 17) | st.integers(0, 0xFFFFFFFF),
        ),
        max_size=12,
    ),
    st.integers(1, 300),
)
def test_whatever_requests_come_each_is_answered_once(
    mode: Mode, read_only: bool, requests: list[tuple[int, int, int, int]], split: int
) -> None:
    talk = Talk(mode, read_only=read_only, split=split)
    answered = 0
    for command, flags, offset, length in requests:
        if command == DISC:
            continue
        has_payload = command == WRITE or (talk.extended and flags & PAYLOAD_LEN)
        if has_payload:
            length %= 1 << 18
        said = talk.request(command, offset, length, cookie=9, flags=flags) + bytes(length if has_payload else 0)
        final = [reply for reply in talk.ask(said, {9: length * (command == READ)}) if reply.done]
        assert [reply.cookie for reply in final] == [9]
        answered += 1
    assert talk.transmission.requests == answered
    assert talk.in_sync()


@given(st.binary(max_size=300), st.sampled_from(MODES))
def test_garbage_ends_or_is_waited_for(data: bytes, mode: Mode) -> None:
    talk = Talk(mode)
    talk.say(data)
    assert talk.transmission.ended or len(data) < 32 or data[:4] in (b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71")
