"""Connections that one server leaves to the next: what their clients notice, which is nothing."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rustord.errors import DeviceError
from rustord.frontends.handover import Handover
from rustord.frontends.peer import Peer
from rustord.wire.api import Role
from rustord.wire.limits import NbdLimits
from tests.frontends.nbdserved import NbdPeer, NbdServed
from tests.frontends.served import no_more_threads, until
from tests.wire.peer import MIB, request

READ, WRITE, DISC = 0, 1, 2
STRUCTURED_REPLY = 8
BLOCK = 4096


def opened(served: NbdServed, name: str = "disk") -> NbdPeer:
    """A connection that has chosen, as the server knows."""
    before = len(list(served.server.exports()))
    peer = served.connect().go(name)
    until(lambda: len(list(served.server.exports())) > before, "it is open")
    return peer


@pytest.fixture
def roles() -> dict[str, Role]:
    """Of everybody, who is a writer until a test says otherwise."""
    return {"all": Role.WRITER}


@pytest.fixture
def served(make_image: Callable[[int], Path], disk_path: Path, roles: dict[str, Role]) -> Iterator[NbdServed]:
    def role(peer: Peer) -> Role:
        return roles["all"]

    served = NbdServed(make_image(64 << 20), disk_path / "nbd.sock", NbdLimits(), role)
    served.volumes.create("volume", 8 * MIB)
    yield served
    served.stop()


@pytest.mark.parametrize("key", ["01a205ee-d6a8-7121-9d86-e40049043250", "a-b.c_d", "x" * 128])
@pytest.mark.parametrize("agreed", [(False, False, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("rest", [b"", bytes(range(31))])
def test_its_name_tells_all(key: str, agreed: tuple[bool, bool, bool], rest: bytes) -> None:
    handover = Handover(key, *agreed, rest)
    assert Handover.named(handover.name) == handover
    assert len(handover.name) <= 255
    assert handover.name.isascii()
    assert handover.name.isprintable()
    assert ":" not in handover.name


@pytest.mark.parametrize(
    "name", ["", "rustord.socket", "stored", "nbd2-s--disk", "nbd1-s-0-disk", "nbd1-s--", "nbd1-x--d"]
)
def test_other_names_tell_nothing(name: str) -> None:
    assert Handover.named(name) is None


def test_a_request_may_be_on_its_way(served: NbdServed) -> None:
    asked = request(WRITE, 100, 300_000, cookie=7)
    data = random.Random(1).randbytes(300_000)
    with opened(served, "volume") as peer:
        for came in (1, 27):
            peer.send(asked[:came])
            assert served.restart() == 1
            peer.send(asked[came:] + data)
            assert peer.receive(16)[8:] == (7).to_bytes(8, "big")
        assert peer.read(100, 300_000).data == data
        (told,) = served.server.exports()
        assert told["name"] == "volume"


@pytest.mark.parametrize("size", [BLOCK, 3 * MIB])
def test_who_leaves_at_once_has_done_something_before(served: NbdServed, size: int) -> None:
    """Or servers that follow each other fast would never do anything."""
    with opened(served, "volume") as peer:
        served.restart_at_once(
            before=lambda: peer.send(request(READ, 0, size, cookie=1) * 2),
            after=lambda: peer.receive(16 + size),
        )
        assert served.restart() == 1
        peer.receive(16 + size)


def test_who_cannot_be_served_lets_go_of_the_export(served: NbdServed) -> None:
    with opened(served, "volume") as peer:
        with no_more_threads("nbd"):
            served.restart()
        assert peer.is_ended()
        assert not list(served.server.exports())
    served.volumes.delete("volume")


def test_a_payload_is_waited_for(served: NbdServed) -> None:
    data = random.Random(2).randbytes(3 * MIB)
    with opened(served, "volume") as peer:
        peer.send(request(WRITE, 0, 3 * MIB, cookie=1) + data[: 2 * MIB])
        (restarting := threading.Thread(target=served.restart)).start()
        peer.send(data[2 * MIB :] + request(READ, MIB, BLOCK, cookie=1))
        assert peer.receive(16)[8:] == (1).to_bytes(8, "big")
        assert peer.receive(16 + BLOCK)[16:] == data[MIB : MIB + BLOCK]
        restarting.join()


def test_who_does_not_finish_his_request_is_cut(served: NbdServed) -> None:
    with opened(served, "volume") as stuck, opened(served) as idle:
        stuck.send(request(READ, 0, BLOCK) + request(WRITE, 0, MIB) + bytes(1000))
        assert stuck.receive(16 + BLOCK)[4:8] == bytes(4)  # so that the next one has been begun
        assert idle.read(0, BLOCK).data == served.data[:BLOCK]
        assert served.restart() == 1
        assert stuck.is_ended()
        assert idle.read(0, BLOCK).data == served.data[:BLOCK]


def test_all_requests_of_a_busy_client_are_answered_once(served: NbdServed, seed: int) -> None:
    chance = random.Random(seed)
    blocks = [chance.randbytes(BLOCK) for _ in range(16)]
    with opened(served, "volume") as peer:
        done = threading.Event()
        answered: list[int] = []

        def receive() -> None:
            while len(answered) < 16 * 400:
                head = peer.receive(16)
                assert head[4:8] == bytes(4)
                answered.append(int.from_bytes(head[8:], "big"))
            done.set()

        def send() -> None:
            for cookie in range(16 * 400):
                block = cookie % 16
                peer.send(request(WRITE, block * BLOCK, BLOCK, cookie=cookie) + blocks[block])

        threads = [threading.Thread(target=work) for work in (receive, send)]
        for thread in threads:
            thread.start()
        restarts = 0
        while not done.wait(0.01) and restarts < 5:
            assert served.restart() == 1
            restarts += 1
        for thread in threads:
            thread.join()
        assert sorted(answered) == list(range(16 * 400))
        for block, data in enumerate(blocks):
            assert peer.read(block * BLOCK, BLOCK).data == data


def test_what_was_agreed_on_stays(served: NbdServed) -> None:
    with served.connect() as peer:
        assert peer.ask(STRUCTURED_REPLY)[-1].kind == 1
        peer.go()
        until(lambda: list(served.server.exports()), "it is open")
        assert served.restart() == 1
        peer.send(request(READ, 0, BLOCK, cookie=1))
        assert peer.receive(4) == b"\x66\x8e\x33\xef"


def test_who_reads_an_object_never_reads_the_next_of_that_name(served: NbdServed) -> None:
    with opened(served) as peer:
        served.writer.call(lambda: served.store.put(b"other", name="disk"))
        served.restart()  # after which nobody holds the one that was replaced
        assert peer.is_ended()


def test_who_has_lost_his_role_writes_no_more(served: NbdServed, roles: dict[str, Role]) -> None:
    with opened(served, "volume") as peer:
        roles["all"] = Role.READER
        assert served.restart() == 1
        assert peer.one(WRITE, 0, 4, payload=b"data").error == errno.EPERM
        roles["all"] = Role.NOBODY
        served.restart()
        assert peer.is_ended()


def test_what_cannot_be_flushed_is_cut(served: NbdServed) -> None:
    with opened(served, "volume") as peer:
        assert peer.one(WRITE, 0, 4, payload=b"data").error == 0
        (connection,) = served.server._connections
        assert connection.agreement is not None

        def fail() -> None:
            raise DeviceError("a bad sector", hint="replace the disk")

        connection.agreement.export.flush = fail  # type: ignore[method-assign]
        assert served.restart() == 0
        assert peer.is_ended()


def test_who_has_not_chosen_yet_comes_again(served: NbdServed) -> None:
    with served.connect() as peer, NbdPeer(served.path, flags=None) as silent:
        assert served.restart() == 0
        assert peer.is_ended()
        assert silent.is_ended()


def test_who_goes_meanwhile_is_forgotten(served: NbdServed) -> None:
    with opened(served) as peer:
        with suppress(OSError):
            peer.sock.shutdown(socket.SHUT_RDWR)
        served.restart()
    assert served.works()
