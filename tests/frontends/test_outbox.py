from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import pytest

from rustord.frontends.outbox import Outbox


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket whose peer reads only when it is told to, and the peer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def test_what_is_small_goes_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0])
    assert outbox.send()
    for data in (b"a", bytearray(b"b"), memoryview(b"c")):
        outbox.add(data)
    assert outbox.byte_count == 3
    assert outbox.send()
    assert outbox.byte_count == 0
    assert pair[1].recv(10) == b"abc"


def test_what_the_peer_does_not_take_is_kept_in_order(pair: tuple[socket.socket, socket.socket], seed: int) -> None:
    chance = random.Random(seed)
    buffers = [os.urandom(chance.choice([0, 1, 1000, 100_000, 500_000])) for _ in range(60)]
    outbox, received, left = Outbox(pair[0]), b"", sum(map(len, buffers))
    for buffer in buffers:
        outbox.add(buffer)
    while not outbox.send():
        assert outbox.byte_count <= left  # the peer may not have made room enough
        left = outbox.byte_count
        received += pair[1].recv(chance.randrange(1, 1 << 20))
    while len(received) < sum(map(len, buffers)):
        received += pair[1].recv(1 << 20)
    assert received == b"".join(buffers)


def test_more_buffers_than_one_call_takes(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox, received = Outbox(pair[0]), b""
    for number in range(5000):
        outbox.add(b"%05d" % number * 20)
    while not outbox.send():
        received += pair[1].recv(1 << 20)
    while len(received) < 500_000:
        received += pair[1].recv(1 << 20)
    assert received == b"".join(b"%05d" % number * 20 for number in range(5000))


def test_what_is_left_can_be_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0])
    outbox.add(b"a")
    outbox.add(memoryview(b"bc"))
    assert outbox.take() == b"abc"
    assert outbox.byte_count == 0
    assert outbox.send()


def test_a_peer_that_is_gone_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(pair[0])
    outbox.add(b"a")
    pair[1].close()
    with pytest.raises(OSError, match="Broken pipe"):
        outbox.send()
