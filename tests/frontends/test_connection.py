from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Sequence

import pytest

from rustord.change import Change
from rustord.frontends.connection import Connection
from rustord.frontends.exchange import Exchange
from rustord.record import Record
from rustord.wire.limits import Limits
from rustord.writer import Deliver, Outcome
from tests.frontends.conftest import Serve
from tests.frontends.served import Peering, Served, request, until
from tests.wire.test_http1 import MALFORMED

MIB = 1 << 20
SECRET = b"GET /v1/names/secret HTTP/1.1\r\nHost: a\r\n\r\n"
"""A request that must never be taken for one: it is what a smuggler would hide in another's body."""


def test_a_connection_carries_many_requests(served: Served) -> None:
    with served.connect() as peer:
        for number in range(50):
            data = os.urandom(number * 100)
            assert peer.ask(request("PUT", "/v1/names/n", data)).status in (200, 201)
            assert peer.ask(request("GET", "/v1/names/n")).body == data
            assert peer.ask(request("HEAD", "/v1/names/n"), head=True).status == 200
            assert peer.ask(request("GET", "/v1/names/none")).status == 404
            assert peer.ask(request("DELETE", "/v1/names/n")).status == 204


def mixed_requests(count: int, chance: random.Random) -> list[tuple[bytes, str, int, bytes | None]]:
    """Requests as bytes, their methods, and the status and body that each must have if they happen in this order."""
    names: dict[str, bytes] = {}
    made = []
    for number in range(count):
        name = f"n{chance.randrange(4)}"
        target = f"/v1/names/{name}"
        match chance.choice(["PUT", "PUT", "POST", "GET", "HEAD", "DELETE", "bad"]):
            case "PUT":
                data = b"%d" % number * chance.choice([0, 1, 1000, 30_000])
                made.append((request("PUT", target, data), "PUT", 200 if name in names else 201, None))
                names[name] = data
            case "POST":
                made.append((request("POST", "/v1/objects", b"x" * chance.choice([0, 5000])), "POST", 201, None))
            case "DELETE":
                made.append((request("DELETE", target), "DELETE", 204 if name in names else 404, None))
                names.pop(name, None)
            case "bad":
                made.append((request("GET", "/nowhere"), "GET", 404, None))
            case method:
                made.append((request(method, target), method, 200 if name in names else 404, names.get(name)))
    return made


@pytest.mark.parametrize("piece", [1 << 20, 1000, 7])
def test_pipelined_requests_are_answered_in_order_as_if_one_by_one(served: Served, seed: int, piece: int) -> None:
    requests = mixed_requests(200 if piece > 100 else 25, random.Random(seed))
    data = b"".join(sent for sent, *_ in requests)
    with served.connect() as peer:
        # It has to be read meanwhile: the server stops reading from those who do not.
        sender = threading.Thread(
            target=lambda: [peer.send(data[at : at + piece]) for at in range(0, len(data), piece)]
        )
        sender.start()
        for number, (_, method, status, body) in enumerate(requests):
            reply = peer.reply(head=method == "HEAD")
            assert reply.status == status, (number, method, reply)
            if body is not None and method == "GET":
                assert reply.body == body
        sender.join()


def test_a_request_is_understood_byte_by_byte(served: Served) -> None:
    data = request("PUT", "/v1/names/n", b"data") + request("GET", "/v1/names/n") + SECRET
    with served.connect() as peer:
        for at in range(len(data)):
            peer.send(data[at : at + 1])
        assert peer.reply().status == 201
        assert peer.reply().body == b"data"
        assert peer.reply().status == 404


def test_changes_of_one_connection_share_a_cycle(served: Served) -> None:
    with served.connect() as peer:
        before = served.writer.cycle_count
        peer.send(request("POST", "/v1/objects", b"data") * 50)
        for _ in range(50):
            assert peer.reply().status == 201
    assert served.writer.cycle_count - before < 10


def test_a_change_waits_for_what_was_asked_before_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = json.loads(served.ask("PUT", "/v1/names/n", b"data").body)["uuid"]
    read, has_begun, may_read = served.store.read, threading.Event(), threading.Event()

    def read_late(record: Record, offset: int, length: int) -> memoryview:
        has_begun.set()
        assert may_read.wait(20)
        return read(record, offset, length)

    monkeypatch.setattr(served.store, "read_now", lambda *_: None)
    monkeypatch.setattr(served.store, "read", read_late)
    with served.connect() as peer:
        peer.send(request("GET", f"/v1/objects/{uuid}") + request("DELETE", f"/v1/objects/{uuid}"))
        assert has_begun.wait(20)
        for _ in range(3):
            served.ask("POST", "/v1/objects", b"in later cycles")
        may_read.set()
        reply = peer.reply()
        assert (reply.status, reply.body) == (200, b"data")
        assert peer.reply().status == 204


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_ends_the_connection_and_nothing_behind_it_is_done(served: Served, data: bytes) -> None:
    before = request("POST", "/v1/objects", b"before")
    with served.connect() as peer:
        peer.send(before + data + SECRET)
        assert peer.reply().status == 201
        assert peer.reply().status in (400, 501, 505)
        assert peer.is_ended()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "unknown-version"),
        (b"PUT /v1/names/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "unknown-coding"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", "target-too-long"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 33000, "head-too-large"),
        (b"PUT /v1/names/a HTTP/1.1\r\nHost: a\r\n\r\n", "length-required"),
        (b"GET /v1/pool HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\n", "invalid-request"),
        (b"GET /v1/pool HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "invalid-request"),
        (b"BREW /v1/pool HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\n", "method-not-allowed"),
        (b"PUT /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\n", "not-found"),
        (b"POST /v1/devices HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n", "too-large"),
    ],
)
def test_a_refused_body_is_never_taken_for_requests(served: Served, data: bytes, code: str) -> None:
    with served.connect() as peer:
        peer.send(data)
        if code != "length-required":
            peer.send(SECRET * 20)
        assert peer.reply().code == code
        if code != "length-required":
            assert peer.is_ended()


def test_a_refusal_is_read_by_a_peer_that_is_still_sending(served: Served) -> None:
    with served.connect() as peer:
        peer.send(b"PUT /v1/names/%ff HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        peer.send(bytes(8 * MIB))  # no broken pipe
        assert peer.reply().code == "invalid-request"
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.is_ended()


def test_nobody_may_send_refused_data_for_ever(serve: Serve) -> None:
    served = serve(limits=Limits(linger_s=0.2))
    with served.connect() as peer:
        peer.send(b"PUT /v1/names/%ff HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _send_for_ever(peer)


def _send_for_ever(peer: Peering) -> None:
    while True:
        peer.send(bytes(MIB))


def test_http_1_0_is_spoken(served: Served) -> None:
    with served.connect() as peer:
        reply = peer.ask(b"GET /v1/names HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert reply.headers["connection"] == "keep-alive"
        reply = peer.ask(b"PUT /v1/names/n HTTP/1.0\r\nContent-Length: 1\r\n\r\nx")
        assert (reply.status, reply.headers["connection"]) == (201, "close")
        assert peer.is_ended()


def test_connection_close_is_obeyed_and_said(served: Served) -> None:
    for data in (
        request("GET", "/v1/names", Connection="close"),
        request("PUT", "/v1/names/n", b"", Connection="close"),
    ):
        with served.connect() as peer:
            peer.send(data + SECRET)
            assert peer.reply().headers["connection"] == "close"
            assert peer.is_ended()


def test_who_sends_no_more_still_gets_his_replies(served: Served) -> None:
    with served.connect() as peer:
        peer.send(request("PUT", "/v1/names/n", b"x") + request("PUT", "/v1/names/m", b"y"))
        peer.sock.shutdown(socket.SHUT_WR)
        assert [peer.reply().status, peer.reply().status] == [201, 201]
        assert peer.is_ended()


def test_a_body_is_confirmed_when_it_is_wanted(served: Served) -> None:
    for size in (100, 5 * MIB):
        with served.connect() as peer:
            head = f"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\nExpect: 100-continue\r\n\r\n"
            assert peer.ask(head.encode()).status == 100
            assert peer.ask(bytes(size)).status in (200, 201)
            assert peer.ask(head.encode() + bytes(size)).status == 200  # it was here already
            assert peer.ask(request("GET", "/v1/names/n")).body == bytes(size)


def test_a_body_that_is_confirmed_waits_for_the_replies_before_it(served: Served) -> None:
    with served.connect() as peer:
        peer.send(request("POST", "/v1/objects", b"data") * 5)
        peer.send(b"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert [peer.reply().status for _ in range(6)] == [201] * 5 + [100]
        assert peer.ask(b"data").status == 201


def test_a_body_is_confirmed_when_there_is_room_for_that(served: Served) -> None:
    with served.connect() as peer:
        data = bytes(peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 1000)
        served.ask("PUT", "/v1/names/n", data)  # the kernel takes it whole, and nothing more
        head = b"PUT /v1/names/m HTTP/1.1\r\nHost: a\r\nContent-Length: 5242880\r\nExpect: 100-continue\r\n\r\n"
        peer.send(request("GET", "/v1/names/n") + head)
        until(lambda: served.server.traffic.uploads == 1, "the upload has begun")
        until(lambda: not served.server.stuck(0), "it waits for its peer")
        assert peer.reply().body == data
        assert peer.reply().status == 100
        assert peer.ask(bytes(5 * MIB)).status == 201


@pytest.mark.parametrize(("size", "count_max"), [(4, 8), (20 << 10, 3)])
def test_only_so_many_changes_of_a_connection_are_under_way(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, size: int, count_max: int
) -> None:
    served = serve(limits=Limits(pipelined=8, small_body_bytes=64 << 10))
    under_way = most = 0
    submit = served.writer.submit

    def counting(changes: Sequence[Change], deliver: Deliver) -> None:
        nonlocal under_way, most
        under_way += len(changes)
        most = max(most, under_way)

        def finished(outcomes: Sequence[tuple[Change, Outcome]]) -> None:
            nonlocal under_way
            under_way -= len(outcomes)
            deliver(outcomes)

        submit(changes, finished)

    monkeypatch.setattr(served.writer, "submit", counting)
    with served.connect() as peer:
        peer.send(request("POST", "/v1/objects", bytes(size)) * 40)
        assert [peer.reply().status for _ in range(40)] == [201] * 40
    assert 1 < most <= count_max


def test_a_peer_that_does_not_read_is_not_read_from(serve: Serve) -> None:
    served = serve(limits=Limits(send_s=60))
    data = os.urandom(200_000)
    served.ask("PUT", "/v1/names/n", data)
    with served.connect() as peer:
        one = request("GET", "/v1/names/n")
        peer.sock.settimeout(0.3)
        sent = sent_now = len(one) * 100
        while sent_now == len(one) * 100 and sent < 8 * MIB:
            try:
                sent_now = peer.sock.send(one * 100)
            except TimeoutError:
                sent_now = 0
            sent += sent_now
        sent -= len(one) * 100
        assert sent < MIB
        assert served.ask("GET", "/v1/names/n").body == data  # others are served
        peer.sock.settimeout(20)
        for _ in range(sent // len(one)):
            assert peer.reply().body == data


def test_an_upload_begins_though_the_replies_before_it_were_read_in_this_moment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(limits=Limits(head_s=1))
    served.ask("PUT", "/v1/names/n", bytes(200_000))
    read = 0
    tried = threading.Event()
    begin = Connection._begin_receiving

    def late(connection: Connection, exchange: Exchange) -> None:
        nonlocal read
        begin(connection, exchange)
        if connection._transfer is None:  # it waits for its peer to read
            read += len(peer.sock.recv(1 << 20))
        tried.set()

    monkeypatch.setattr(Connection, "_begin_receiving", late)
    with served.connect() as peer:
        upload = b"PUT /v1/names/m HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n0\r\n\r\n"
        peer.send(request("GET", "/v1/names/n") * 2 + upload + request("GET", "/nowhere", Connection="close"))
        assert tried.wait(20)  # whoever reads before that may leave nothing to wait for
        received = peer.rest()
    assert read
    assert b"HTTP/1.1 201 " in received
    assert b"HTTP/1.1 404 " in received


def test_a_peer_that_does_not_read_is_cut_off_in_the_end(serve: Serve) -> None:
    served = serve(limits=Limits(send_s=0.3))
    served.ask("PUT", "/v1/names/n", bytes(200_000))
    with served.connect() as peer:
        peer.send(request("GET", "/v1/names/n") * 100)
        until(lambda: served.server.traffic.connections == 0, "the connection is cut")


# Time


def test_an_idle_connection_is_closed(serve: Serve) -> None:
    served = serve(limits=Limits(idle_s=0.3))
    with served.connect() as fresh, served.connect() as used:
        assert used.ask(request("GET", "/v1/names")).status == 200
        assert fresh.is_ended()
        assert used.is_ended()


def test_a_connection_that_cannot_be_closed_keeps_no_other_open(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(limits=Limits(idle_s=0.3))
    expire = Connection.expire
    failed: list[Connection] = []

    def fail_once(connection: Connection) -> None:
        if not failed:
            failed.append(connection)
            raise RuntimeError("it fails")
        expire(connection)

    monkeypatch.setattr(Connection, "expire", fail_once)
    with served.connect() as one, served.connect() as other:
        assert one.is_ended()
        assert other.is_ended()
    assert failed


@pytest.mark.parametrize("data", [b"G", b"GET / HTTP/1.1\r\nHost: a\r\n", request("GET", "/v1/names") + b"GET"])
def test_a_head_that_comes_too_slowly_is_refused(serve: Serve, data: bytes) -> None:
    served = serve(limits=Limits(head_s=0.3))
    with served.connect() as peer:
        peer.send(data)
        if data.startswith(b"GET /v1"):
            assert peer.reply().status == 200
        assert peer.reply().code == "request-timeout"
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.is_ended()


def test_dribbling_does_not_extend_the_time_of_a_head(serve: Serve) -> None:
    served = serve(limits=Limits(head_s=0.5))
    with served.connect() as peer:
        peer.send(b"GET / HTTP/1.1\r\n")
        until(lambda: _dribbled(peer), "the dribbling ends")
        assert peer.reply().code == "request-timeout"


def _dribbled(peer: Peering) -> bool:
    """Sends a little more; whether a reply has come."""
    peer.send(b"X: y\r\n")
    time.sleep(0.02)
    peer.sock.setblocking(False)
    try:
        return bool(peer.sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        peer.sock.settimeout(20)


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_a_body_that_comes_too_slowly_is_refused(serve: Serve, size: int) -> None:
    served = serve(limits=Limits(body_s=0.4))
    free = served.free_blocks()
    with served.connect() as peer:
        peer.send(f"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\nabc".encode())
        assert peer.reply().code == "request-timeout"
    until(lambda: served.free_blocks() == free, "all blocks are free")
    assert served.ask("GET", "/v1/names").body == b""


def test_many_who_say_nothing_hold_up_nobody(serve: Serve) -> None:
    served = serve(limits=Limits(connections=200))
    silent = [served.connect() for _ in range(150)]
    try:
        for peer in silent[:75]:
            peer.send(b"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n")
        assert served.ask("PUT", "/v1/names/n", b"data").status == 201
    finally:
        for peer in silent:
            peer.sock.close()
    until(lambda: served.server.traffic.connections == 0, "all are gone")


def test_a_fault_of_ours_ends_one_connection_and_is_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    with served.connect() as good, served.connect() as bad, monkeypatch.context() as patched:
        assert good.ask(request("GET", "/v1/names")).status == 200
        patched.setattr("rustord.frontends.connection.read_request_head", fail)
        bad.send(request("GET", "/v1/names"))
        assert bad.is_ended()
        patched.undo()
        assert good.ask(request("GET", "/v1/names")).status == 200
    assert "ZeroDivisionError" in caplog.text


def test_garbage_ends_in_an_answer_or_the_end(served: Served, seed: int) -> None:
    chance = random.Random(seed)
    good = [sent for sent, *_ in mixed_requests(20, chance)]
    for _ in range(150):
        data = bytearray(b"".join(chance.choices(good, k=3)))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randrange(40)]
                case 2:
                    data[at:at] = chance.choice(
                        [b"\r\n", b"\n", b"\0", b"Content-Length: 3\r\n", b"0\r\n\r\n", b"\xff"]
                    )
        with served.connect() as peer:
            peer.send(bytes(data))
            peer.sock.shutdown(socket.SHUT_WR)
            for line in peer.rest().split(b"\r\n"):
                assert not line.startswith(b"HTTP/1.1 5") or line.startswith((b"HTTP/1.1 501", b"HTTP/1.1 505")), data
    assert json.loads(served.ask("GET", "/v1/pool").body)["state"] == "ok"
