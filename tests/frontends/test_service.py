from __future__ import annotations

import json
import threading
from collections.abc import Iterable

import pytest

from rustord.change import Change
from rustord.objectstore import Cycle
from tests.frontends.conftest import Serve
from tests.frontends.served import Served, request, until


class Gate:
    """Holds up the cycles of a store until it is opened."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._cycle = served.store.cycle
        self.waiting = threading.Event()
        monkeypatch.setattr(served.store, "cycle", self._pass)

    def _pass(self, changes: Iterable[Change]) -> Cycle:
        self.waiting.set()
        assert self._open.wait(20)
        return self._cycle(changes)

    def open(self) -> None:
        self._open.set()


def test_reads_never_wait_for_changes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask("PUT", "/v1/names/n", b"data")
    gate = Gate(served, monkeypatch)
    with served.connect() as writer:
        writer.send(request("PUT", "/v1/names/n", b"new"))
        assert gate.waiting.wait(20)
        assert served.ask("GET", "/v1/names/n").body == b"data"
        gate.open()
        assert writer.reply().status == 200
    assert served.ask("GET", "/v1/names/n").body == b"new"


def test_what_arrives_while_a_cycle_runs_makes_up_the_next_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(served, monkeypatch)
    peers = [served.connect() for _ in range(20)]
    try:
        peers[0].send(request("POST", "/v1/objects", b"first"))
        assert gate.waiting.wait(20)
        for peer in peers[1:]:
            peer.send(request("POST", "/v1/objects", b"data"))
        until(lambda: served.server.traffic.received_bytes == 5 + 19 * 4, "all have arrived")
        gate.open()
        for peer in peers:
            assert peer.reply().status == 201
        assert served.writer.cycle_count <= 3
    finally:
        gate.open()
        for peer in peers:
            peer.sock.close()


def test_a_change_under_way_is_made_though_nobody_waits_for_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(served, monkeypatch)
    with served.connect() as peer:
        peer.send(request("PUT", "/v1/names/n", b"data"))
        assert gate.waiting.wait(20)
    gate.open()
    until(lambda: served.server.traffic.connections == 0, "the connection has ended")
    assert served.ask("GET", "/v1/names/n").body == b"data"


def test_outcomes_that_come_after_the_end_hurt_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(served, monkeypatch)
    with served.connect() as peer:
        peer.send(request("PUT", "/v1/names/n", b"data"))
        assert gate.waiting.wait(20)
        served.drain(0.1)
        assert peer.is_ended()
    until(served.has_ended, "the server has ended")
    gate.open()
    until(lambda: served.store.resolve("n"), "the change is made")
    assert served.writer.is_alive()


def test_a_slow_request_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = serve(slow_request_s=0.0)
    served.ask("PUT", "/v1/names/slow", b"data")
    assert "slow request: PUT /v1/names/slow took" in caplog.text
    (slow,) = json.loads(served.ask("GET", "/v1/slow-requests").body)
    assert (slow["method"], slow["target"], slow["status"]) == ("PUT", "/v1/names/slow", 201)
    assert list(slow["phases_s"]) == ["body", "wait", "place", "write", "journal", "flush", "settle"]
    assert sum(slow["phases_s"].values()) == pytest.approx(slow["taken_s"])
    with served.connect() as peer:  # refused when much of it has arrived: that took the time
        peer.send(b"PUT /v1/names/bad HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        peer.send(b"1\r\nx\r\nnone\r\n")
        assert peer.reply().status == 400
    slow = json.loads(served.ask("GET", "/v1/slow-requests").body)[-1]
    assert (slow["target"], slow["status"]) == ("/v1/names/bad", 400)
    assert slow["phases_s"]["body"] > 0
    served.server.slow_request_s = 60.0
    served.ask("PUT", "/v1/names/quick", b"data")
    assert "quick" not in caplog.text
