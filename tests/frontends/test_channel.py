"""Calls between the two processes: whole, in order, and with errors that say what the other process said."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rustord.errors import NoSpace, RustordError
from rustord.export import Run, State
from rustord.frontends.channel import Call, Channel, Request, decode_runs, encode_runs

Answering = Callable[[Callable[[Channel, Request], None]], Channel]


@pytest.fixture
def answering() -> Iterator[Answering]:
    opened: list[tuple[Channel, threading.Thread, Channel]] = []

    def make(answer: Callable[[Channel, Request], None]) -> Channel:
        ours, theirs = map(Channel, socket.socketpair())

        def run() -> None:
            room = memoryview(bytearray(4 << 20))
            while request := theirs.receive(room):
                answer(theirs, request)

        thread = threading.Thread(target=run)
        thread.start()
        opened.append((ours, thread, theirs))
        return ours

    yield make
    for ours, thread, theirs in opened:
        ours.close()
        thread.join()
        theirs.close()


@pytest.mark.parametrize("length", [0, 1, 4096, 3 << 20])
def test_data_goes_both_ways(answering: Answering, length: int) -> None:
    channel = answering(lambda channel, request: channel.reply(bytes(request.data)[::-1]))
    data = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
    assert channel.call(Call.WRITE, 1 << 60, length, data) == data[::-1]
    into = memoryview(bytearray(length))
    channel.call(Call.READ, data=data, into=into)
    assert into == data[::-1]


def test_what_is_called_arrives(answering: Answering) -> None:
    arrived: list[Request] = []

    def keep(channel: Channel, request: Request) -> None:
        arrived.append(request._replace(data=memoryview(bytes(request.data))))
        channel.reply()

    channel = answering(keep)
    assert channel.call(Call.ZERO, 1 << 43, 1 << 40, flags=3) == b""
    assert arrived == [Request(Call.ZERO, 3, 1 << 43, 1 << 40, memoryview(b""))]


def test_an_error_is_the_same_on_the_other_side(answering: Answering) -> None:
    channel = answering(lambda channel, request: channel.refuse(NoSpace("it is full", hint="delete something")))
    for _ in range(2):
        with pytest.raises(RustordError, match="it is full") as caught:
            channel.call(Call.WRITE, data=b"data", into=memoryview(bytearray(1)))
        assert (caught.value.hint, caught.value.nbd_error) == ("delete something", errno.ENOSPC)


def test_calls_of_many_threads_are_not_mixed_up(answering: Answering) -> None:
    channel = answering(lambda channel, request: channel.reply(request.offset.to_bytes(8, "little")))

    def work(number: int) -> None:
        for turn in range(100):
            offset = number << 32 | turn
            assert channel.call(Call.READ, offset) == offset.to_bytes(8, "little")

    with ThreadPoolExecutor(8) as threads:
        assert len([*threads.map(work, range(8))]) == 8


def test_who_calls_is_told_if_nobody_is_there_any_more() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.call(Call.FLUSH)
    ours.close()


def test_runs() -> None:
    runs = [Run(1, State.DATA), Run(1 << 43, State.HOLE | State.ZERO), Run(512, State.ZERO)]
    assert decode_runs(memoryview(encode_runs(runs))) == runs
