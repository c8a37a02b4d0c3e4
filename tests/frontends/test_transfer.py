from __future__ import annotations

import os
import random
import socket
import threading
from contextlib import suppress

import pytest

from rustord.frontends.transfer import Slots
from rustord.wire.limits import Limits
from tests.frontends.conftest import Serve
from tests.frontends.served import Served, request, until

MIB = 1 << 20


def chunked(data: bytes, sizes: list[int]) -> bytes:
    """A request that stores ``data`` in chunks of these sizes, over and over."""
    parts = [b"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"]
    at = number = 0
    while at < len(data):
        piece = data[at : at + sizes[number % len(sizes)]]
        parts += [b"%x\r\n" % len(piece), piece, b"\r\n"]
        at, number = at + len(piece), number + 1
    return b"".join([*parts, b"0\r\n\r\n"])


@pytest.mark.parametrize("size", [0, 1, 4096, 262144, 262145, MIB - 1, MIB, MIB + 1, 3 * MIB + 12345])
@pytest.mark.parametrize("sizes", [[1 << 30], [1000, 1, 70000]])
def test_data_of_unknown_size_comes_back_as_it_was(served: Served, size: int, sizes: list[int]) -> None:
    data = os.urandom(size)
    with served.connect() as peer:
        stored = peer.ask(chunked(data, sizes) + request("GET", "/v1/names/n"))
        assert (stored.status, stored.json()["size"]) == (201, size)
        assert peer.reply().body == data


@pytest.mark.parametrize("piece", [1000, 77_777, 3 * MIB])
def test_a_large_body_may_come_in_any_pieces_with_another_request_behind(served: Served, piece: int) -> None:
    data = os.urandom(2 * MIB + 3)
    sent = request("PUT", "/v1/names/n", data) + request("GET", "/v1/names/n") + request("GET", "/v1/names/none")
    with served.connect() as peer:
        for at in range(0, len(sent), piece):
            peer.send(sent[at : at + piece])
        assert peer.reply().status == 201
        assert peer.reply().body == data
        assert peer.reply().status == 404


@pytest.mark.parametrize("size", [1000, 200_000, 300_000, 5 * MIB])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_an_upload_that_breaks_off_leaves_nothing_behind(served: Served, size: int, part: float) -> None:
    free = served.free_blocks()
    for data in (request("PUT", "/v1/names/n", bytes(size)), chunked(bytes(size), [50_000])):
        head = data.index(b"\r\n\r\n") + 4
        with served.connect() as peer:
            peer.send(data[: head + int((len(data) - head) * part)])
        with served.connect() as peer:
            peer.send(data[: head + int((len(data) - head) * part)])
            peer.sock.shutdown(socket.SHUT_WR)
            assert peer.is_ended()
    until(lambda: not served.is_busy() and served.free_blocks() == free, "all blocks are free")
    assert served.ask("GET", "/v1/objects").body == b""


def test_a_body_longer_than_it_was_declared_is_no_request(served: Served) -> None:
    with served.connect() as peer:
        peer.send(request("PUT", "/v1/names/n", bytes(MIB)) + b"superfluous\r\n\r\n")
        assert peer.reply().status == 201
        assert peer.reply().code == "invalid-request"
        assert peer.is_ended()
    assert len(served.ask("GET", "/v1/names/n").body) == MIB


@pytest.mark.parametrize("bad", [b"zz\r\n", b"5\r\nabcdeX\r\n", b"-1\r\n", b"1\n"])
def test_an_invalid_chunk_ends_the_upload_and_the_connection(served: Served, bad: bytes) -> None:
    free = served.free_blocks()
    for before in (0, MIB):
        good = chunked(bytes(before), [65536]).removesuffix(b"0\r\n\r\n")
        with served.connect() as peer:
            peer.send(good + bad + request("GET", "/v1/pool"))
            assert peer.reply().code == "invalid-request"
            peer.sock.shutdown(socket.SHUT_WR)
            assert peer.is_ended()
    until(lambda: served.free_blocks() == free, "all blocks are free")


def test_a_peer_that_is_gone_in_the_middle_of_a_download_costs_nothing(served: Served) -> None:
    served.ask("PUT", "/v1/names/n", os.urandom(8 * MIB))
    for received in (0, 100, 3 * MIB):
        with served.connect() as peer:
            peer.send(request("GET", "/v1/names/n"))
            left = received
            while left:
                left -= len(peer.sock.recv(min(left, 1 << 16)))
    until(lambda: not served.is_busy(), "the downloads are over")
    assert served.ask("DELETE", "/v1/names/n").status == 204


def test_a_replaced_object_is_sent_to_its_end_to_those_who_read_it(served: Served) -> None:
    old = os.urandom(8 * MIB)
    served.ask("PUT", "/v1/names/n", old)
    with served.connect() as peer:
        peer.send(request("GET", "/v1/names/n"))
        until(served.is_busy, "the download has begun")
        assert served.ask("PUT", "/v1/names/n", b"new").status == 200
        free = served.free_blocks()
        for _ in range(100):  # cycles, each of which could erase it
            served.ask("POST", "/v1/objects", b"")
        assert served.free_blocks() <= free
        assert peer.reply().body == old
    until(lambda: served.free_blocks() > free, "its blocks are free then")


def test_what_is_deleted_while_it_is_sent_is_cut_off_and_not_taken_for_damaged(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(16 * MIB)
    served.ask("PUT", "/v1/names/n", data)
    with served.connect() as peer:
        peer.send(request("GET", "/v1/names/n"))
        until(served.is_busy, "the download has begun")
        assert served.ask("DELETE", "/v1/names/n").status == 204
        body = peer.rest().partition(b"\r\n\r\n")[2]
    assert len(body) < len(data)
    assert data.startswith(body)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_what_turns_out_damaged_in_the_middle_is_cut_off(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    data = os.urandom(8 * MIB)
    uuid = served.ask("PUT", "/v1/names/n", data).json()["uuid"]
    ((extent,),) = served.ask("GET", f"/v1/objects/{uuid}/manifest").json()["copies"]
    device = served.store.blocks.slots[0].device
    assert device is not None
    at = extent["block"] * 4096
    device.write(at + 6 * MIB + 5, (bytes([data[6 * MIB + 5] ^ 1]),))
    with served.connect() as peer:
        peer.send(request("GET", "/v1/names/n"))
        received = peer.rest()
    body = received.partition(b"\r\n\r\n")[2]
    assert b"Content-Length: 8388608\r\n" in received
    assert len(body) <= 6 * MIB + 5
    assert data.startswith(body)
    assert "does not match its checksum" in caplog.text
    assert served.ask("GET", "/v1/names/n", Range="bytes=0-9").body == data[:10]
    bad = served.ask("GET", "/v1/names/n", Range=f"bytes={6 * MIB}-{6 * MIB + 9}")
    assert (bad.status, bad.code) == (500, "damaged")
    device.write(at, (bytes([data[0] ^ 1]),))
    assert served.ask("GET", "/v1/names/n").code == "damaged"  # known before anything was sent


def test_a_peer_that_reads_slowly_holds_up_nobody_and_is_cut_off_in_the_end(serve: Serve) -> None:
    served = serve(limits=Limits(transfer_threads=2, send_s=2.0))
    data = os.urandom(12 * MIB)
    served.ask("PUT", "/v1/names/n", data)
    slow = [served.connect() for _ in range(6)]
    try:
        for peer in slow:
            peer.send(request("GET", "/v1/names/n"))
        until(lambda: served.server.traffic.downloads == 6, "all have begun")
        assert served.ask("GET", "/v1/names/n").body == data
        until(lambda: served.server.traffic.downloads == 0, "they are cut off")
    finally:
        for peer in slow:
            peer.sock.close()
    assert served.server.traffic.broken_off == 6


def test_peers_that_send_slowly_hold_up_nobody(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.frontends.transfer._PATIENCE_MS", 1000)  # so that the next byte comes in time
    served = serve(limits=Limits(transfer_threads=2))
    slow = [served.connect() for _ in range(6)]
    stop = threading.Event()
    try:
        for peer in slow:
            peer.send(request("PUT", "/v1/names/slow", bytes(2 * MIB))[:MIB])
            peer.sock.setblocking(False)  # MSG_DONTWAIT is not enough: Python waits until there is room

        def dribble() -> None:
            while not stop.wait(0.01):
                for peer in slow:
                    with suppress(BlockingIOError):
                        peer.sock.send(b"x")

        dribbling = threading.Thread(target=dribble)
        dribbling.start()
        data = os.urandom(12 * MIB)
        assert served.ask("PUT", "/v1/names/quick", data).status == 201
        assert served.ask("GET", "/v1/names/quick").body == data
        stop.set()
        dribbling.join()
    finally:
        stop.set()
        for peer in slow:
            peer.sock.close()
    until(lambda: not served.is_busy(), "they are forgotten")


def test_only_so_many_uploads_are_under_way_and_the_others_wait(serve: Serve) -> None:
    served = serve(limits=Limits(uploads=2))
    data = request("PUT", "/v1/names/n", os.urandom(MIB))
    head = data.index(b"\r\n\r\n") + 4
    first = [served.connect() for _ in range(2)]
    waiting = [served.connect() for _ in range(3)]
    try:
        for peer in first:
            peer.send(data[: head + 300_000])
        for peer in waiting:
            peer.send(data[:head])
        until(lambda: served.server.traffic.uploads == 5, "all are known")
        waiting.pop().sock.close()  # while it waits
        senders = [threading.Thread(target=peer.send, args=(data[head:],)) for peer in waiting]
        for sender in senders:
            sender.start()
        peer = first.pop()
        peer.send(data[head + 300_000 :])
        assert peer.reply().status == 201
        peer.sock.close()
        for peer in waiting:
            assert peer.reply().status == 200
        for sender in senders:
            sender.join()
    finally:
        for peer in (*first, *waiting):
            peer.sock.close()
    until(lambda: not served.is_busy(), "all have ended")


def test_the_time_that_an_upload_waits_for_its_turn_is_not_held_against_it(serve: Serve) -> None:
    served = serve(limits=Limits(uploads=1, body_s=1.5))
    data = request("PUT", "/v1/names/n", bytes(MIB))
    with served.connect() as first, served.connect() as second:
        first.send(data[:-1])
        until(served.is_busy, "the first has begun")
        second.send(data[:1000])
        until(lambda: served.server.traffic.uploads == 2, "the second waits")
        threading.Event().wait(1.0)
        first.send(data[-1:])
        assert first.reply().status == 201
        threading.Event().wait(1.0)
        second.send(data[1000:])
        assert second.reply().status == 200


def test_many_transfers_at_once(served: Served, seed: int) -> None:
    chance = random.Random(seed)
    failures: list[BaseException] = []

    def work(number: int, sizes: list[int]) -> None:
        try:
            with served.connect() as peer:
                for size in sizes:
                    data = os.urandom(size)
                    assert peer.ask(request("PUT", f"/v1/names/{number}", data)).status in (200, 201)
                    assert peer.ask(request("GET", f"/v1/names/{number}")).body == data
        except BaseException as failure:
            failures.append(failure)

    threads = [
        threading.Thread(target=work, args=(number, [chance.choice([10, 4096, 300_000, MIB]) for _ in range(8)]))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_slots_go_to_those_who_want_them_in_the_order_of_their_coming() -> None:
    slots = Slots(2)
    begun: list[int] = []

    def begin(number: int, wanted: bool = True) -> bool:
        if wanted:
            begun.append(number)
        return wanted

    for number in range(4):
        slots.acquire(lambda number=number: begin(number))  # type: ignore[misc]
    for _ in range(2000):
        slots.acquire(lambda: begin(-1, False))
    slots.acquire(lambda: begin(9))
    assert begun == [0, 1]
    slots.release()
    slots.release()
    assert begun == [0, 1, 2, 3]
    slots.release()
    assert begun == [0, 1, 2, 3, 9]
    slots.release()
    slots.release()
    slots.acquire(lambda: begin(5))
    slots.acquire(lambda: begin(6))
    slots.acquire(lambda: begin(7))
    assert begun == [0, 1, 2, 3, 9, 5, 6]
