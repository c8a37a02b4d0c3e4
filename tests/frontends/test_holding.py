"""What a process that serves an export holds: right places or none, whatever order things happen in."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from xxhash import xxh3_64_digest

from rustord.blockdevice import ImageFile
from rustord.errors import DeviceError, RustordError
from rustord.export import Kind
from rustord.frontends.channel import Call, Channel, Request
from rustord.frontends.holding import HeldExport, Holding, Places, Question, chunks_of
from rustord.lease import Place
from rustord.page import CHUNK_BYTES, PAGE_CHUNKS

CHUNK_COUNT = 2 * PAGE_CHUNKS
DATA = memoryview(b"data")
SIZE = CHUNK_COUNT * CHUNK_BYTES


def at(chunk: int) -> int:
    """Where a chunk is on the disk."""
    return (chunk + 16) * CHUNK_BYTES


class Side(NamedTuple):
    """One process's side of an export, with what the other one grants, and does when it is called."""

    disk: ImageFile
    export: HeldExport
    holding: Holding
    calls: list[Request]
    places: dict[int, Place | None]
    replies: dict[int, Callable[[Request], bytes]]


@pytest.fixture
def side(make_image: Callable[[int], Path]) -> Iterator[Side]:
    disk = ImageFile(make_image(at(CHUNK_COUNT)), read_only=False, exclusive=True)
    ours, theirs = socket.socketpair()
    channel, called = Channel(ours), Channel(theirs)
    holding = Holding([disk.fileno()])
    export = HeldExport(holding, channel, "volume", Kind.VOLUME, SIZE, read_only=False, rotational=False)
    side = Side(disk, export, holding, [], {}, {})
    thread = threading.Thread(target=_answer, args=(side, called))
    thread.start()
    yield side
    channel.close()
    thread.join()
    called.close()
    disk.close()


def _answer(side: Side, called: Channel) -> None:
    room = memoryview(bytearray(1 << 20))
    while request := called.receive(room):
        side.calls.append(request._replace(data=memoryview(bytes(request.data))))
        try:
            called.reply(side.replies.get(request.call, lambda request: _reply(side, request))(request))
        except RustordError as error:
            called.refuse(error)


def _reply(side: Side, request: Request) -> bytes:
    call, _, offset, length, data = request
    if call == Call.GRANT:
        return granted(side, offset, offset + length)
    if call == Call.READ:
        return b"r" * length
    if call == Call.WRITE:
        side.disk.write(at(0) + offset, (data,))
        first, end = chunks_of(offset, length)
        for chunk in range(first, end):
            side.places[chunk] = Place(0, side.disk, at(chunk), writable=True)
        return granted(side, first, end)
    return b"\0" if call == Call.FLUSH else b""


def granted(side: Side, first: int, end: int) -> bytes:
    return Places.of([side.places.get(chunk) for chunk in range(first, end)], lambda slot, device: 0).encode()


def read(side: Side, offset: int, length: int) -> bytes:
    buffer = memoryview(bytearray(b"?" * length))
    side.export.read(offset, buffer)
    return bytes(buffer)


def called(side: Side) -> list[int]:
    """What has been called since the last time."""
    calls = [request.call for request in side.calls]
    side.calls.clear()
    return calls


def own(side: Side, *chunks: int) -> None:
    for chunk in chunks:
        side.places[chunk] = Place(0, side.disk, at(chunk), writable=True)


def test_a_page_is_asked_for_once_and_then_read_without_asking(side: Side) -> None:
    own(side, 3, 4, 300)
    side.places[5] = Place()
    side.disk.write(at(3), (b"three" + bytes(CHUNK_BYTES - 5) + b"four",))
    assert read(side, 3 * CHUNK_BYTES, 5) == b"three"
    assert read(side, 4 * CHUNK_BYTES, 4) == b"four"
    assert read(side, 4 * CHUNK_BYTES - 2, 6) == bytes(2) + b"four"
    assert read(side, 5 * CHUNK_BYTES, 4) == bytes(4)
    assert read(side, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES)[CHUNK_BYTES:][:4] == b"four"
    assert called(side) == [Call.GRANT]
    assert read(side, 300 * CHUNK_BYTES, 4) == bytes(4)
    assert called(side) == [Call.GRANT]
    assert read(side, 7 * CHUNK_BYTES, 4) == b"rrrr"
    assert read(side, 5 * CHUNK_BYTES, 3 * CHUNK_BYTES) == b"r" * (3 * CHUNK_BYTES)
    assert called(side) == [Call.READ, Call.READ]


def test_any_range_that_is_held(side: Side, seed: int) -> None:
    chance = random.Random(seed)
    where = chance.sample(range(64), 40)
    side.places.update({chunk: Place(0, side.disk, at(where[chunk]), writable=True) for chunk in range(40)})
    for chunk in chance.sample(range(40), 10):
        side.places[chunk] = Place()
    data = chance.randbytes(64 * CHUNK_BYTES)
    side.disk.write(at(0), (data,))
    chunks = [side.places[chunk] for chunk in range(40)]
    whole = b"".join(
        data[place.offset - at(0) :][:CHUNK_BYTES] if place and place.device else bytes(CHUNK_BYTES) for place in chunks
    )
    for _ in range(200):
        offset = chance.randrange(40 * CHUNK_BYTES)
        length = min(chance.choice([1, 4096, CHUNK_BYTES, 5 * CHUNK_BYTES, 1 << 20]), 40 * CHUNK_BYTES - offset)
        assert read(side, offset, length) == whole[offset : offset + length]
    assert called(side) == [Call.GRANT]


def test_what_is_not_writable_is_written_by_the_other_process_and_then_in_place(side: Side) -> None:
    side.places[1] = Place()
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    assert called(side) == [Call.GRANT, Call.WRITE]
    side.export.write(CHUNK_BYTES, memoryview(b"DATA"))
    assert read(side, CHUNK_BYTES, 4) == b"DATA"
    own(side, 2)
    side.export.write(2 * CHUNK_BYTES - 2, memoryview(b"....."))
    assert called(side) == [Call.WRITE]


@pytest.mark.parametrize("change", ["trim", "zero"])
def test_what_was_given_back_is_asked_for_again(side: Side, change: str) -> None:
    own(side, 1)
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    side.places[1] = Place()
    if change == "trim":
        side.export.trim(CHUNK_BYTES, CHUNK_BYTES)
    else:
        side.export.zero(CHUNK_BYTES, CHUNK_BYTES, keep=False, fast=False)
    called(side)
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    assert called(side) == [Call.GRANT]


def test_a_reply_that_was_on_its_way_when_it_was_recalled_is_not_believed(side: Side) -> None:
    own(side, 1)
    side.disk.write(at(1), (b"old",))

    def recalled(request: Request) -> bytes:
        reply = _reply(side, request)
        side.holding.recall()
        side.places[1] = Place()
        return reply

    side.replies[Call.GRANT] = recalled
    assert read(side, CHUNK_BYTES, 4) == b"rrrr"
    side.replies.clear()
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    side.replies[Call.WRITE] = recalled
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    side.replies.clear()
    assert read(side, CHUNK_BYTES, 4) == bytes(4), "what it was recalled for has changed that"


def test_a_reply_that_is_older_than_a_write_is_not_believed(side: Side) -> None:
    side.places[1] = Place()
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    question = side.holding.ask(0, PAGE_CHUNKS)
    answer = Places.decode(memoryview(granted(side, 0, PAGE_CHUNKS)))
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    side.holding.learn(question, answer)
    assert read(side, CHUNK_BYTES, 4) == b"data"


@pytest.mark.parametrize("change", ["recall", "leave", "trim"])
def test_a_reply_from_before_a_change_does_not_bring_back_what_was_before(side: Side, change: str) -> None:
    own(side, 1)
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    question = side.holding.ask(1, 2, changes=True)
    answer = Places.decode(memoryview(granted(side, 1, 2)))
    side.places[1] = Place()
    if change == "recall":
        side.holding.recall()
    elif change == "leave":
        side.holding.leave([0])
    else:
        side.export.trim(CHUNK_BYTES, CHUNK_BYTES)
    side.disk.write(at(1), (b"old",))
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    side.holding.learn(question, answer)
    assert read(side, CHUNK_BYTES, 4) == bytes(4)


def test_a_write_to_two_pages_of_which_one_is_held(side: Side) -> None:
    side.places.update(dict.fromkeys(range(CHUNK_COUNT), Place()))
    assert read(side, 255 * CHUNK_BYTES, 4) == bytes(4)
    question = side.holding.ask(255, 257, changes=True)
    own(side, 255, 256)
    side.disk.write(at(255), (b"data",))
    side.holding.learn(question, Places.decode(memoryview(granted(side, 255, 257))))
    called(side)
    assert read(side, 255 * CHUNK_BYTES, 4) == b"data"
    assert called(side) == []
    assert read(side, 257 * CHUNK_BYTES, 4) == bytes(4)
    assert called(side) == [Call.GRANT]


def test_writes_to_other_pages_do_not_make_an_answer_void(side: Side) -> None:
    side.places.update(dict.fromkeys(range(CHUNK_COUNT), Place()))
    question = side.holding.ask(0, PAGE_CHUNKS)
    side.export.write(300 * CHUNK_BYTES, memoryview(b"data"))
    side.holding.learn(question, Places.decode(memoryview(granted(side, 0, PAGE_CHUNKS))))
    called(side)
    assert read(side, 0, 4) == bytes(4)
    assert called(side) == []


def test_a_page_may_go_while_it_is_read(side: Side) -> None:
    """What one session trims another one may be comparing at that moment."""
    data = bytes(range(256)) * (CHUNK_BYTES // 256)
    side.disk.write(at(0), [data] * 4)
    for chunk in range(4):
        side.places[chunk] = Place(0, side.disk, at(chunk), xxh3_64_digest(data))
    over = threading.Event()

    def trim() -> None:
        while not over.is_set():
            side.holding.learn(side.holding.ask(0, 1, changes=True), None)

    trimming = threading.Thread(target=trim)
    trimming.start()
    try:
        for _ in range(300):
            got = read(side, 100, 3 * CHUNK_BYTES)
            assert got in ((data * 4)[100:][: len(got)], b"r" * len(got))
    finally:
        over.set()
        trimming.join()


def test_a_recall_tells_what_is_not_flushed(side: Side) -> None:
    own(side, 1)
    side.export.flush()
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    assert side.holding.recall() == [0]
    assert side.holding.recall() == []
    called(side)
    side.export.flush()
    assert called(side) == [Call.FLUSH], "the other process has it to flush now"


def test_a_flush_is_its_own_unless_the_other_process_has_something_to_flush(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    own(side, 1)
    side.export.flush()
    assert called(side) == [Call.FLUSH], "nobody knows what was before"
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    side.export.flush()
    side.export.flush()
    assert (called(side), flushed) == ([Call.GRANT], [side.disk.fileno()])
    side.export.trim(0, CHUNK_BYTES)
    side.export.flush()
    assert called(side) == [Call.TRIM, Call.FLUSH]
    side.export.flush()
    assert called(side) == []
    side.replies[Call.FLUSH] = lambda request: b"\1"
    side.holding.called()
    for _ in range(3):
        side.export.flush()
    assert called(side) == [Call.FLUSH] * 3, "as long as it says so"


@pytest.mark.parametrize("when", ["before it is answered", "as soon as that is known"])
def test_a_flush_beside_a_change_is_one_of_the_other_process(
    side: Side, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The chunk has been granted and written already; but only a flush of the other process makes its place durable."""
    side.places[1] = Place()
    assert read(side, CHUNK_BYTES, 4) == bytes(4)
    side.export.flush()
    called(side)
    learn = side.holding.learn

    def flush_then(question: Question, places: Places | None) -> None:
        if when == "before it is answered":
            side.export.flush()
        learn(question, places)
        if when == "as soon as that is known":
            side.export.flush()

    monkeypatch.setattr(side.holding, "learn", flush_then)
    side.export.write(CHUNK_BYTES, DATA)
    assert called(side) == [Call.WRITE, Call.FLUSH]


def test_a_flush_that_fails_is_told_and_flushed_again_by_nobody_alone(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def refuse(request: Request) -> bytes:
        raise DeviceError("the disk is gone", hint="replace it")

    own(side, 1)
    side.export.flush()
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    called(side)
    monkeypatch.setattr(os, "fdatasync", fail)
    side.replies[Call.FLUSH] = refuse
    for expected in ([Call.FAIL, Call.FLUSH], [Call.FLUSH]):
        with pytest.raises(RustordError, match="the disk is gone") as caught:
            side.export.flush()
        assert caught.value.nbd_error == errno.EIO
        told = side.calls[-1].data.tobytes()
        assert (called(side), told) == (expected, b"\0\0")
    assert side.holding.recall() == [0]


def test_a_flush_waits_for_one_that_is_under_way(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    own(side, 1)
    side.export.flush()
    begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def sync(fd: int) -> None:
        begun.set()
        assert may_end.wait(20)
        ended.append("sync")

    monkeypatch.setattr(os, "fdatasync", sync)
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    first = threading.Thread(target=side.export.flush)
    first.start()
    assert begun.wait(20)
    assert side.holding.recall() == [0], "it may fail yet"
    second = threading.Thread(target=lambda: (side.export.flush(), ended.append("second")))
    second.start()
    may_end.set()
    first.join()
    second.join()
    assert ended == ["sync", "second"]


def test_a_chunk_with_a_checksum_is_compared_before_it_is_relied_on(side: Side) -> None:
    data = [bytes((chunk,)) * CHUNK_BYTES for chunk in range(4)]
    side.disk.write(at(0), data)
    for chunk in range(4):
        side.places[chunk] = Place(0, side.disk, at(chunk), xxh3_64_digest(data[chunk]))
    side.places[2] = Place(0, side.disk, at(2), xxh3_64_digest(b"something else"))
    assert read(side, 100, 100) == data[0][:100]
    assert read(side, 0, 2 * CHUNK_BYTES) == data[0] + data[1]
    assert called(side) == [Call.GRANT]
    assert read(side, 2 * CHUNK_BYTES, 4) == b"rrrr"
    assert read(side, 2 * CHUNK_BYTES + 1, 2 * CHUNK_BYTES - 1) == b"r" * (2 * CHUNK_BYTES - 1)
    assert called(side) == [Call.READ, Call.READ]
    assert read(side, 3 * CHUNK_BYTES, 4) == data[3][:4]
    assert called(side) == []


def test_a_chunk_that_left_the_page_cache_is_compared_again(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [bytes((chunk,)) * CHUNK_BYTES for chunk in range(2)]
    side.disk.write(at(0), data)
    for chunk in range(2):
        side.places[chunk] = Place(0, side.disk, at(chunk), xxh3_64_digest(data[chunk]))
    assert read(side, 0, 2 * CHUNK_BYTES) == b"".join(data)
    preadv = os.preadv

    def not_cached(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", not_cached)
    assert read(side, 0, 4) == b"rrrr"
    monkeypatch.setattr(os, "preadv", preadv)
    side.disk.write(at(1), (b"changed meanwhile",))
    assert read(side, CHUNK_BYTES, 4) == b"rrrr"
    assert read(side, 0, 4) == data[0][:4]


def test_who_is_to_leave_some_keeps_the_others_and_has_nothing_to_tell(side: Side) -> None:
    own(side, 1, 300)
    side.export.flush()
    for chunk in (1, 300):
        side.export.write(chunk * CHUNK_BYTES, memoryview(b"data"))
    called(side)
    side.holding.leave([1])
    read(side, CHUNK_BYTES, 4)
    assert called(side) == []
    read(side, 300 * CHUNK_BYTES, 4)
    assert called(side) == [Call.GRANT]
    side.export.flush()
    assert called(side) == []


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("how", ["recall", "leave"])
def test_who_is_to_leave_ends_what_is_under_way_first(
    side: Side, monkeypatch: pytest.MonkeyPatch, how: str, what: str
) -> None:
    own(side, 1)
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    begun, may_end, ended = threading.Event(), threading.Event(), list[str]()

    def stuck(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        begun.set()
        assert may_end.wait(20)
        ended.append(what)
        return sum(map(len, buffers))

    monkeypatch.setattr(os, "preadv" if what == "read" else "pwritev", stuck)
    do = (lambda: read(side, CHUNK_BYTES, 4)) if what == "read" else (lambda: side.export.write(CHUNK_BYTES, DATA))
    leave = side.holding.recall if how == "recall" else (lambda: side.holding.leave([0]))
    doing = threading.Thread(target=do)
    doing.start()
    assert begun.wait(20)
    leaving = threading.Thread(target=lambda: (leave(), ended.append(how)))
    leaving.start()
    leaving.join(0.1)
    may_end.set()
    doing.join()
    leaving.join()
    assert ended == [what, how]


def test_it_holds_no_more_than_so_many_pages(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.frontends.holding._PAGES_MAX", 1)
    own(side, 1, 300)
    for _ in range(2):
        read(side, CHUNK_BYTES, 4)
        read(side, 300 * CHUNK_BYTES, 4)
    assert called(side) == [Call.GRANT] * 4
    assert len(side.holding._pages) == 1


def test_a_device_that_has_gone_is_flushed_only_if_something_was_written_before(side: Side) -> None:
    """It may be back, and what is written now goes there by way of the other process."""
    own(side, 1)
    side.export.write(CHUNK_BYTES, memoryview(b"data"))
    side.export.flush()
    called(side)
    nothing = os.open(os.devnull, os.O_RDONLY)
    side.holding._fds[0] = nothing
    side.export.write(CHUNK_BYTES, memoryview(b"more"))
    side.export.flush()
    os.close(nothing)
    assert [(request.call, bytes(request.data)) for request in side.calls] == [(Call.WRITE, b"more"), (Call.FLUSH, b"")]


def test_a_file_that_was_truncated_is_not_said_to_be_flushed(side: Side) -> None:
    holding = Holding([side.disk.fileno()], [side.disk.size])
    export = HeldExport(holding, side.export._channel, "volume", Kind.VOLUME, SIZE, read_only=False, rotational=False)
    own(side, 1)
    export.flush()
    export.write(CHUNK_BYTES, memoryview(b"data"))
    export.flush()
    assert called(side) == [Call.FLUSH, Call.GRANT]
    os.truncate(side.disk.path, at(0))
    export.write(CHUNK_BYTES, memoryview(b"data"))
    export.flush()
    assert called(side) == [Call.FAIL, Call.FLUSH]
