from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress

import pytest

from rustord.frontends.peer import Peer
from rustord.wire.api import Role
from rustord.wire.limits import Limits
from tests.frontends.conftest import Serve
from tests.frontends.served import Served, request, until

MIB = 1 << 20


# Roles


READS = [
    ("GET", "/v1/names"),
    ("GET", "/v1/objects"),
    ("GET", "/v1/names/n"),
    ("HEAD", "/v1/names/n"),
    ("GET", "/metrics"),
]
WRITES = [("POST", "/v1/objects"), ("PUT", "/v1/names/n"), ("DELETE", "/v1/names/n")]
ADMINISTRATION = [("POST", "/v1/devices"), ("DELETE", "/v1/devices/9")]


@pytest.mark.parametrize("role", list(Role))
def test_a_peer_may_do_what_its_role_allows(serve: Serve, role: Role) -> None:
    served = serve(roles=lambda peer: role)
    for needed, requests in ((Role.READER, READS), (Role.WRITER, WRITES), (Role.ADMIN, ADMINISTRATION)):
        for method, target in requests:
            reply = served.ask(method, target, b"" if method in ("PUT", "POST") else None)
            assert (reply.status == 403) == (role < needed), (role, method, target, reply)


def test_nobody_may_not_even_read_by_uuid(serve: Serve) -> None:
    role = Role.WRITER
    served = serve(roles=lambda peer: role)
    where = served.ask("POST", "/v1/objects", b"data").headers["location"]
    with served.connect() as before:
        assert before.ask(request("GET", where)).status == 200
        role = Role.NOBODY
        assert served.ask("GET", where).code == "forbidden"
        assert before.ask(request("GET", where)).status == 200  # a role is that of the connection


def test_large_bodies_are_refused_to_readers_before_they_are_read(serve: Serve) -> None:
    served = serve(roles=lambda peer: Role.READER)
    head = b"PUT /v1/names/n HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
    with served.connect() as peer:
        assert peer.ask(head).code == "forbidden"
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.is_ended()


def test_the_server_knows_who_connects(serve: Serve) -> None:
    peers: list[Peer] = []

    def remember(peer: Peer) -> Role:
        peers.append(peer)
        return Role.READER

    serve(roles=remember).ask("GET", "/v1/names")
    assert [(peer.uid, peer.gid, peer.pid) for peer in peers] == [(os.geteuid(), os.getegid(), os.getpid())]
    assert peers[0].groups == set(os.getgroups())


# Connections


def test_connections_beyond_the_limit_are_refused_until_others_end(serve: Serve) -> None:
    served = serve(limits=Limits(connections=3))
    peers = [served.connect() for _ in range(3)]
    try:
        for peer in peers:
            assert peer.ask(request("GET", "/v1/names")).status == 200
        with served.connect() as refused:
            assert refused.reply().code == "unavailable"
            assert refused.is_ended()
        assert served.server.traffic.connections_refused == 1
        peers.pop().sock.close()
        until(lambda: served.server.traffic.connections == 2, "there is room again")
        assert served.ask("GET", "/v1/names").status == 200
    finally:
        for peer in peers:
            peer.sock.close()


def test_the_server_survives_running_out_of_descriptors(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    served = serve()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with served.connect() as before:
        assert before.ask(request("GET", "/v1/names")).status == 200
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        used = max(int(number) for number in os.listdir("/proc/self/fd"))
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
        try:
            with suppress(OSError):
                while len(held) < 1000:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            sock.connect(str(served.path))
            until(lambda: "no further connection can be accepted" in caplog.text, "the server has noticed")
            assert before.ask(request("GET", "/v1/names")).status == 200
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in held:
                os.close(descriptor)
        with sock:
            sock.settimeout(20)
            sock.sendall(request("GET", "/v1/names"))
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


# The end


def test_idle_connections_are_closed_at_the_end_and_busy_ones_finish(serve: Serve) -> None:
    served = serve()
    data = request("PUT", "/v1/names/n", bytes(4 * MIB), Connection="keep-alive")
    with served.connect() as idle, served.connect() as busy:
        assert idle.ask(request("GET", "/v1/names")).status == 200
        busy.send(data[:MIB])
        until(served.is_busy, "the upload has begun")
        served.drain(20)
        assert idle.is_ended()
        busy.send(data[MIB:])
        reply = busy.reply()
        assert (reply.status, reply.headers["connection"]) == (201, "close")
        assert busy.is_ended()
    with pytest.raises(OSError, match="refused"):
        served.connect()
    served.stop()


def is_refused(served: Served) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(served.path)) != 0


def test_who_has_just_connected_is_answered_at_the_end(serve: Serve) -> None:
    served = serve()
    with served.connect() as peer, served.connect() as mute:
        until(lambda: served.server.traffic.connections == 2, "the connections are known")
        served.drain(20)
        until(lambda: is_refused(served), "nobody else is let in")
        reply = peer.ask(request("GET", "/v1/names"))
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert peer.is_ended()
        assert mute.is_ended()  # after a second
    served.stop()


@pytest.mark.parametrize("what", ["upload", "download", "head", "body"])
def test_what_does_not_finish_is_cut_off_in_the_end(serve: Serve, what: str) -> None:
    served = serve()
    free = served.free_blocks()
    served.ask("PUT", "/v1/names/n", bytes(8 * MIB))
    with served.connect() as peer:
        match what:
            case "upload":
                peer.send(request("PUT", "/v1/names/m", bytes(4 * MIB))[: 2 * MIB])
            case "download":
                peer.send(request("GET", "/v1/names/n"))
            case "head":
                peer.send(b"GET")
            case "body":
                peer.send(request("PUT", "/v1/names/m", bytes(1000))[:500])
        until(lambda: served.is_busy() or what in ("head", "body"), "it has begun")
        until(lambda: served.server.traffic.connections == 1, "the connection is known")
        threading.Event().wait(0.05)
        served.drain(0.2)
        peer.rest()
        until(lambda: not served.server.traffic.connections, "all is over")
    until(lambda: served.free_blocks() == free - 2049 or served.free_blocks() > free - 2100, "it is cleaned up")
    served.stop()


def test_changes_that_were_submitted_are_answered_while_the_server_ends(serve: Serve) -> None:
    served = serve()
    with served.connect() as peer:
        peer.send(request("POST", "/v1/objects", b"data") * 30)
        assert peer.reply().status == 201
        served.drain(20)
        statuses = [201]
        rest = peer.rest()
        statuses += [201] * rest.count(b"HTTP/1.1 201 Created")
    stored = served.store.stock.count
    assert len(statuses) == stored
    served.stop()


# What is counted


def test_traffic_is_counted(served: Served) -> None:
    small, large = os.urandom(1000), os.urandom(MIB)
    served.ask("PUT", "/v1/names/s", small)
    served.ask("PUT", "/v1/names/l", large)
    served.ask("GET", "/v1/names/s")
    where = served.ask("GET", "/v1/names/l").headers["rustor-uuid"]
    served.ask("GET", "/v1/names/none")
    served.ask("GET", "/nowhere")
    with served.connect() as peer:
        peer.ask(b"nonsense\r\n\r\n")
    until(lambda: served.server.traffic.connections == 0, "all have ended")
    traffic = served.server.traffic
    assert traffic.operations["store_named"].statuses == {201: 2}
    assert traffic.operations["get_named"].statuses == {200: 2, 404: 1}
    assert traffic.requests_refused == {404: 1, 400: 1}
    assert traffic.connections_total == 7
    assert traffic.received_bytes == 1000 + MIB
    assert traffic.sent_bytes >= 1000 + MIB
    assert sum(traffic.operations["get_named"].latency_s.counts) == 3
    served.ask("GET", f"/v1/objects/{where}", Range="bytes=0-9")
    assert traffic.operations["get_object"].statuses == {206: 1}
    small_uuid = served.ask("HEAD", "/v1/names/s").headers["rustor-uuid"]
    assert served.ask("GET", f"/v1/objects/{small_uuid}").body == small
    assert traffic.operations["get_object"].statuses == {206: 1, 200: 1}
