"""Flushes beside the other requests of a connection. All else that a session does is in test_nbd.py."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from rustord.errors import DeviceError
from rustord.frontends.ledger import Ledger
from rustord.frontends.session import Session
from rustord.wire.negotiation import Agreement
from tests.frontends.served import SECONDS_MAX, until
from tests.wire.peer import MIB, MemoryExport, request, write

READ, WRITE, DISC, FLUSH = range(4)
FUA = 1
BLOCK = 4096


class Disk(MemoryExport):
    """Flushes take as long as a test lets them; at first they take none. ``kept`` is what is durable."""

    def __init__(self) -> None:
        super().__init__(4 * MIB)
        self.kept = bytes(self.data)
        self.may_end = threading.Event()
        self.may_end.set()
        self.flusher = ""
        """The thread that has flushed it last."""

    def flush(self) -> None:
        self.flusher = threading.current_thread().name
        kept = bytes(self.data)
        super().flush()
        assert self.may_end.wait(SECONDS_MAX)
        self.kept = kept

    @property
    def flush_count(self) -> int:
        return self.log.count(("flush",))


class Client:
    """Of a session that a thread serves."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(SECONDS_MAX)
        self.ledger = Ledger()
        self.left: bytes | None = None
        agreement = Agreement("disk", self.disk, structured=False, extended=False, allocation=False)
        self.session = session = Session(theirs, agreement, self.ledger, "somebody")

        def run() -> None:
            with theirs:
                self.left = session.run(b"")

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def send(self, *requests: bytes) -> None:
        self.sock.sendall(b"".join(requests))

    def reply(self, data_bytes: int = 0) -> tuple[int, int]:
        """Cookie and error of the next one."""
        head = self.receive(16)
        assert head[:4] == b"\x67\x44\x66\x98"
        error = int.from_bytes(head[4:8], "big")
        self.receive(0 if error else data_bytes)
        return int.from_bytes(head[8:], "big"), error

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "the connection has ended"
            data += part
        return data

    def flush_begins(self, cookie: int, *requests: bytes) -> None:
        """Ask for one that does not end, as the last of ``requests``."""
        before = self.disk.flush_count
        self.disk.may_end.clear()
        self.send(*requests, request(FLUSH, cookie=cookie))
        until(lambda: self.disk.flush_count > before, "the flush has begun")

    def learn(self) -> None:
        """Have the session notice that there is more to do during a flush."""
        self.flush_begins(100)
        self.send(request(READ, 0, BLOCK, cookie=101))
        self.disk.may_end.set()
        assert [self.reply(), self.reply(BLOCK)] == [(100, 0), (101, 0)]

    def end(self) -> None:
        self.disk.may_end.set()
        self.sock.close()
        self.thread.join(SECONDS_MAX)
        assert not self.thread.is_alive()
        self.ledger.close()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.end()


def test_a_flush_holds_up_nothing_else(client: Client) -> None:
    client.learn()
    client.flush_begins(1)
    client.send(request(READ, 0, BLOCK, cookie=2), write(0, bytes(BLOCK), cookie=3), request(9, cookie=4))
    assert [client.reply(BLOCK), client.reply(), client.reply()] == [(2, 0), (3, 0), (4, errno.EINVAL)]
    client.disk.may_end.set()
    assert client.reply() == (1, 0)


def test_flushes_that_come_during_one_are_one(client: Client) -> None:
    client.learn()
    client.flush_begins(1)
    for cookie in range(2, 20):
        client.send(write(0, b"data", cookie=100 + cookie), request(FLUSH, cookie=cookie))
        assert client.reply() == (100 + cookie, 0)
    before = client.disk.flush_count
    client.disk.may_end.set()
    assert [client.reply()[0] for _ in range(19)] == [*range(1, 20)]
    assert client.disk.flush_count == before + 1


def test_who_asks_for_nothing_else_needs_no_other_thread(client: Client) -> None:
    client.learn()
    flushers = []
    while client.thread.name not in flushers and len(flushers) < 100:  # some may be counted late
        client.send(request(FLUSH, cookie=1))
        assert client.reply() == (1, 0)
        flushers.append(client.disk.flusher)
    assert (flushers[0], flushers[-1]) == ("nbd flusher", client.thread.name)


def test_whoever_waits_for_a_flush_that_fails_is_told(client: Client) -> None:
    client.learn()
    client.flush_begins(1, write(0, b"a", cookie=2, flags=FUA))
    client.send(request(FLUSH, cookie=3), request(READ, 0, BLOCK, cookie=4))
    assert client.reply(BLOCK) == (4, 0)
    client.disk.flush_failure = DeviceError("it is gone")
    client.disk.may_end.set()
    assert sorted(client.reply() for _ in range(3)) == [(1, 0), (2, 0), (3, errno.EIO)]
    assert client.ledger.counts.errors == 1


def test_a_long_simple_reply_is_in_one_piece(client: Client) -> None:
    client.learn()
    client.disk.data[:] = random.Random(1).randbytes(4 * MIB)
    client.flush_begins(1)
    client.send(request(READ, 0, 4 * MIB, cookie=2))
    client.disk.may_end.set()
    assert client.reply() == (1, 0)
    assert client.receive(16)[8:] == (2).to_bytes(8, "big")
    assert client.receive(4 * MIB) == client.disk.data


@pytest.mark.parametrize("how", ["it is left", "it disconnects"])
def test_a_session_ends_after_its_flushes(client: Client, how: str) -> None:
    client.learn()
    client.flush_begins(1)
    client.send(write(0, b"data", cookie=2))
    assert client.reply() == (2, 0)
    before = client.session._transmission.requests
    client.send(request(FLUSH, cookie=3), request(DISC) if how == "it disconnects" else b"\x25")
    until(lambda: client.session._transmission.requests > before, "it has come")
    client.ledger.leaving = how == "it is left"
    client.thread.join(0.5)
    assert client.thread.is_alive()
    client.disk.may_end.set()
    assert [client.reply(), client.reply()] == [(1, 0), (3, 0)]
    client.thread.join(SECONDS_MAX)
    assert client.left == (b"\x25" if how == "it is left" else None)
    assert client.disk.kept[:4] == b"data"


def test_a_client_may_vanish_during_a_flush(client: Client) -> None:
    client.learn()
    client.flush_begins(1)
    client.send(write(0, b"data", cookie=2), request(FLUSH, cookie=3))
    assert client.reply() == (2, 0)
    client.sock.close()
    client.disk.may_end.set()
    client.thread.join(SECONDS_MAX)
    assert client.disk.kept[:4] == b"data"


def test_what_was_written_before_a_flush_is_kept_after_it(seed: int) -> None:
    """The flush is asked for when the writes have been answered, and others are on their way."""
    chance = random.Random(seed)
    client = Client()
    version = [0] * 16
    """Of each block, as the last write that was answered left it."""
    writing: dict[int, tuple[int, int]] = {}
    flushing: dict[int, list[int]] = {}
    sent = 0
    while sent < 3000 or writing or flushing:
        while sent < 3000 and len(writing) + len(flushing) < 8:
            sent += 1
            free = [block for block in range(16) if block not in {block for block, _ in writing.values()}]
            if chance.random() < 0.3:
                flushing[sent] = version[:]
                client.send(request(FLUSH, cookie=sent))
            else:
                block = chance.choice(free)
                writing[sent] = block, sent
                client.send(write(block * BLOCK, sent.to_bytes(8, "big"), cookie=sent))
        cookie, error = client.reply()
        assert not error
        if cookie in writing:
            block, number = writing.pop(cookie)
            version[block] = number
        else:
            for block, number in enumerate(flushing.pop(cookie)):
                kept = client.disk.kept[block * BLOCK :][:8]
                assert int.from_bytes(kept, "big") >= number, f"seed {seed}: block {block}"
    client.end()
