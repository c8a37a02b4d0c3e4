"""NBD on a real socket: what clients do, and what nobody should do."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rustord.errors import InUse
from rustord.frontends.peer import Peer
from rustord.frontends.session import Session
from rustord.wire.api import Role
from rustord.wire.limits import NbdLimits
from tests.frontends.nbdserved import GO, NbdPeer, NbdServed
from tests.frontends.served import until
from tests.wire.peer import MIB, info_request, option, replies, request, string

READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
LIST, INFO = 3, 6
INVALID, POLICY, UNKNOWN = 0x80000003, 0x80000002, 0x80000006

Serve = Callable[..., NbdServed]


@pytest.fixture(params=["workers", "threads"])
def serve_nbd(make_image: Callable[[int], Path], disk_path: Path, request: pytest.FixtureRequest) -> Iterator[Serve]:
    started: list[NbdServed] = []

    def start(*, limits: NbdLimits | None = None, roles: Callable[[Peer], Role] | None = None) -> NbdServed:
        image, path = make_image(64 << 20), disk_path / f"nbd{len(started)}.sock"
        with_workers = request.param == "workers"
        started.append(NbdServed(image, path, limits or NbdLimits(), roles, with_workers=with_workers))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture
def served(serve_nbd: Serve) -> NbdServed:
    return serve_nbd()


def open_count(served: NbdServed) -> int:
    return len(list(served.server.exports()))


def test_an_object_is_read_by_its_name_and_its_uuid(served: NbdServed) -> None:
    uuid = served.store.resolve("disk")
    assert uuid is not None
    for name in ("disk", str(served.store.stat(uuid).key)):
        with served.connect() as peer:
            peer.go(name)
            assert peer.read(100, 5000).data == served.data[100:5100]
            assert peer.one(WRITE, 0, 4, payload=b"data").error == errno.EPERM
            assert peer.one(FLUSH).error == 0
            peer.send(request(DISC))
            assert peer.is_ended()


def test_the_list_has_names(served: NbdServed) -> None:
    with served.connect() as peer:
        assert [reply.data for reply in peer.ask(LIST)] == [string("disk") + b"Object, 8.0 MiB", b""]


def test_who_is_connected(served: NbdServed) -> None:
    with served.connect() as idle, served.connect().go() as peer:
        assert idle.ask(LIST)
        peer.read(0, 4096)
        peer.read(4096, 100)
        (told,) = served.server.exports()
        assert told["client"] == f"process {os.getpid()} of user {os.geteuid()}"
        assert (told["name"], told["size"], told["read_only"]) == ("disk", 8 * MIB, True)
        assert (told["requests"], told["read_bytes"], told["written_bytes"]) == (2, 4196, 0)
    until(lambda: not open_count(served), "both are gone")


def test_who_has_no_role_opens_nothing(serve_nbd: Serve) -> None:
    served = serve_nbd(roles=lambda peer: Role.NOBODY)
    with served.connect() as peer:
        for number, data in ((LIST, b""), (INFO, info_request("disk")), (GO, info_request("disk"))):
            assert [reply.kind for reply in peer.ask(number, data)] == [POLICY]


def test_an_export_opens_at_go_and_not_before(served: NbdServed) -> None:
    uuid = served.store.resolve("disk")
    assert uuid is not None
    with served.connect() as peer:
        assert peer.ask(INFO, info_request("disk"))[-1].kind == 1
        assert peer.ask(GO, info_request("nothing"))[-1].kind == UNKNOWN
        assert not served.store.pins._exports
        peer.go()
        with pytest.raises(InUse):
            served.writer.call(lambda: served.store.delete(uuid))
    until(lambda: not served.store.pins._exports, "it is closed")
    served.writer.call(lambda: served.store.delete(uuid))
    with served.connect() as peer:
        assert peer.ask(GO, info_request("disk"))[-1].kind == UNKNOWN


# Limits


def test_who_does_not_negotiate_in_time_has_to_go(serve_nbd: Serve) -> None:
    served = serve_nbd(limits=NbdLimits(handshake_s=0.3))
    with served.connect(flags=None) as silent, served.connect() as slow, served.connect().go() as chosen:
        assert silent.is_ended()
        assert slow.is_ended()
        assert chosen.read(0, 512).data == served.data[:512]


def test_a_crowd_that_never_negotiates_locks_nobody_out(served: NbdServed) -> None:
    crowd = [served.connect(flags=None if number % 2 else 3) for number in range(150)]
    assert served.works()
    until(lambda: len(served.server._connections) <= served.limits.negotiating, "the first ones have gone")
    assert crowd[0].is_ended()
    for peer in crowd:
        peer.sock.close()
    assert served.works()


def test_one_client_may_have_so_many_connections(serve_nbd: Serve) -> None:
    served = serve_nbd(limits=NbdLimits(connections_per_client=3))
    peers = [served.connect().go() for _ in range(3)]
    with NbdPeer(served.path, flags=None) as refused:
        assert refused.is_ended()
    assert peers[2].read(0, 512).data == served.data[:512]
    peers[0].sock.close()
    until(lambda: open_count(served) == 2, "one has gone")
    assert served.works()
    for peer in peers:
        peer.sock.close()


def test_all_together_may_have_so_many_connections(serve_nbd: Serve) -> None:
    served = serve_nbd(limits=NbdLimits(connections=2))
    with served.connect().go(), served.connect().go(), NbdPeer(served.path, flags=None) as refused:
        assert refused.is_ended()
    until(lambda: not open_count(served), "they have gone")
    assert served.works()


# What three other servers stumble over


def test_many_reads_whose_replies_are_never_read(served: NbdServed) -> None:
    with served.connect().go() as peer:
        peer.send(b"".join(request(READ, 0, MIB, cookie=number) for number in range(20)))
        until(lambda: any(told["requests"] > 2 for told in served.server.exports()), "it has begun")
        assert served.works()
    until(lambda: not open_count(served), "it is gone")
    assert served.works()


@pytest.mark.parametrize("length", [33 * MIB, 32 * MIB])
def test_a_write_without_measure_is_answered(served: NbdServed, length: int) -> None:
    with served.connect().go() as peer:
        assert peer.one(WRITE, 0, length, payload=bytes(length)).error == errno.EPERM
        assert peer.read(0, 512).data == served.data[:512]


def test_an_option_of_4_gib(served: NbdServed) -> None:
    with served.connect() as peer:
        peer.send(b"IHAVEOPT" + struct.pack(">II", LIST, 0xFFFFFFFF))
        assert peer.is_ended()


def test_a_name_that_is_longer_than_its_option(served: NbdServed) -> None:
    with served.connect() as peer:
        assert peer.ask(GO, b"\0\0\1\0disk\0\0")[-1].kind == INVALID
        assert peer.ask(GO, b"\xff\xff\xff\xffdisk\0\0")[-1].kind == INVALID
        assert peer.go().read(0, 512).data == served.data[:512]


def test_unknown_flags_of_a_client(served: NbdServed) -> None:
    with served.connect(flags=0x80) as peer:
        assert peer.is_ended()


def test_options_without_end_whose_replies_are_not_read(served: NbdServed) -> None:
    with served.connect() as peer:
        with suppress(BrokenPipeError, ConnectionResetError):
            peer.send(option(LIST) * 5000)
        assert served.works()
        assert peer.is_ended()


@pytest.mark.parametrize("length", [0, 3, 4, 12, 20, 24, 30, 34])
def test_a_handshake_that_breaks_off_anywhere(served: NbdServed, length: int) -> None:
    said = struct.pack(">I", 3) + option(GO, info_request("disk"))
    for how in (socket.SHUT_WR, socket.SHUT_RDWR):
        with served.connect(flags=None) as peer:
            peer.send(said[:length])
            peer.sock.shutdown(how)
    with served.connect() as peer:
        peer.send(option(1, b"no such export"))
        assert peer.is_ended()
    assert served.works()


def test_long_writes_and_reads_of_a_client_that_waits_for_no_reply(served: NbdServed) -> None:
    served.volumes.create("volume", 32 * MIB)
    pieces = [bytes((number,)) * MIB for number in range(32)]
    with served.connect().go("volume") as peer:
        writes = [request(WRITE, number * MIB, MIB, cookie=number) + piece for number, piece in enumerate(pieces)]
        peer.send(b"".join(writes) + request(FLUSH, cookie=99))
        answered = replies(peer.receive(16 * 33))
        assert sorted(reply.cookie for reply in answered) == [*range(32), 99]
        assert not any(reply.error for reply in answered)
        peer.send(b"".join(request(READ, number * MIB, MIB, cookie=number) for number in range(32)))
        got = replies(peer.receive(32 * (16 + MIB)), dict.fromkeys(range(32), MIB))
        assert {reply.cookie: reply.data for reply in got} == dict(enumerate(pieces))


@pytest.mark.parametrize("serve_nbd", ["threads"], indirect=True)
def test_nothing_is_sent_while_a_long_reply_is_being_sent(served: NbdServed, monkeypatch: pytest.MonkeyPatch) -> None:
    with served.connect().go() as peer:
        do, is_free = Session._do, threading.Event()

        def do_later(session: Session, job: Callable[[], memoryview]) -> None:
            assert is_free.wait(10)
            do(session, job)

        monkeypatch.setattr(Session, "_do", do_later)
        peer.send(request(READ, 0, MIB, cookie=1) + request(READ, MIB, MIB, cookie=2))
        until(lambda: [told["requests"] for told in served.server.exports()] == [2], "the second reply is there")
        assert not select.select((peer.sock,), (), (), 0.5)[0]
        is_free.set()
        got = replies(peer.receive(2 * (16 + MIB)), {1: MIB, 2: MIB})
    assert {reply.cookie: reply.data for reply in got} == {1: served.data[:MIB], 2: served.data[MIB : 2 * MIB]}


def test_clients_that_vanish_in_the_middle_of_anything(served: NbdServed) -> None:
    served.volumes.create("volume", 8 * MIB)
    for said in (
        request(READ, 0, MIB)[:20],
        request(WRITE, 0, MIB) + bytes(1000),
        request(READ, 0, MIB) * 8,
        (request(WRITE, 0, MIB) + bytes(MIB)) * 3,
        b"\0" * 28,
        request(DISC) + request(READ, 0, MIB),
    ):
        for name in ("disk", "volume"):
            with served.connect().go(name) as peer:
                peer.send(said)
    until(lambda: not served.server._connections, "they are gone")
    assert not served.store.pins._pins
    assert served.works()


def test_a_request_that_dribbles_in_byte_by_byte(served: NbdServed) -> None:
    with served.connect().go() as peer:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in request(READ, 4096, 4096, cookie=1):
            peer.send(bytes((byte,)))
        assert peer.receive(16 + 4096)[16:] == served.data[4096:8192]


def test_a_fault_of_ours_ends_one_connection_only(served: NbdServed, caplog: pytest.LogCaptureFixture) -> None:
    with served.connect().go() as peer, served.connect().go() as other:
        (connection, *_) = served.server._connections
        assert connection.agreement is not None
        connection.agreement.export.runs = None  # type: ignore[method-assign,assignment]
        connection.agreement.export.read = None  # type: ignore[method-assign,assignment]
        connection.agreement.export.grant = None  # type: ignore[attr-defined]
        peer.send(request(READ, 0, 512))
        assert peer.is_ended()
        assert other.read(0, 512).data == served.data[:512]
    until(lambda: not served.server._connections, "they are gone")
    assert "has failed" in caplog.text
    assert not served.store.pins._pins


# The end


def test_stopping_answers_what_has_come_and_waits_for_nobody(serve_nbd: Serve) -> None:
    served = serve_nbd()
    idle, stuck, silent = served.connect().go(), served.connect().go(), served.connect()
    stuck.send(request(READ, 0, MIB) * 20)
    until(lambda: open_count(served) == 2, "both are open")
    served.stop()
    for peer in (idle, stuck, silent):
        assert peer.is_ended()
        peer.sock.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd")]
