"""NBD: Objects and volumes as block devices, on a socket of their own.

The event loop accepts connections. Each has a thread, which blocks: it negotiates, and has a worker serve the session
from then on, a process that the connections of one export share (see `rustord.frontends.workers`). A session over TLS
is served by the thread itself, for its keys are there.

What one client can take is bounded: how long it may negotiate, how many connections it and all together may have, and
four buffers for each (see `rustord.wire.transmission`). One that reads no replies holds up nobody but itself.

At the end a connection is either cut, or left to the daemon's next process: between two requests, flushed, so that the
client notices nothing but a pause.
"""

from __future__ import annotations

import asyncio
import copy
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from rustord.errors import ConfigError, RustordError
from rustord.event import FAULT
from rustord.export import Kind
from rustord.frontends.exports import Exports, Offered
from rustord.frontends.handover import Handover
from rustord.frontends.ledger import Ledger
from rustord.frontends.listener import Listener
from rustord.frontends.peer import Peer, Roles, peer_of
from rustord.frontends.session import Session
from rustord.frontends.traffic import ExportTraffic
from rustord.frontends.workers import Workers
from rustord.lease import OpenExport
from rustord.wire.api import Role, created_text
from rustord.wire.limits import NbdLimits
from rustord.wire.negotiation import Agreement, Negotiation, State

log = logging.getLogger(__name__)

_FOLLOW_S = 2.0
"""How often Objects that were moved are looked for."""
_SEND_BUFFER_BYTES = 4 << 20
_READ_BYTES = 4096
_CUT_S = 5.0
"""How long the threads of connections that were cut off may take to notice."""


def server_tls(certificate: Path | None, key: Path | None, authority: Path | None) -> ssl.SSLContext | None:
    """What clients have to prove, and are proven; None without any files. Raises ConfigError."""
    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise ConfigError("TLS needs all of nbd.tls_certificate, nbd.tls_key and nbd.tls_authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    loading = f"{certificate} with the key {key}"
    try:
        context.load_cert_chain(certificate, key)
        loading = str(authority)
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{loading} cannot be used for TLS: {error}", hint="it must be a file in PEM") from error
    return context


def tcp_address(address: str, tls: ssl.SSLContext | None) -> tuple[socket.AddressFamily, str, int]:
    """Family, host and port of an address. Raises ConfigError, also if it would need TLS and there is none."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        known = ipaddress.ip_address(host)
        if int(port) > 65535:
            raise ValueError("there is no such port")
    except ValueError as error:
        raise _no_listening(address, error) from error
    if tls is None and not known.is_loopback:
        raise ConfigError(
            f"nbd.listen is {address}, which is not this machine alone, and there is no TLS",
            hint="set nbd.tls_certificate, nbd.tls_key and nbd.tls_authority",
        )
    return socket.AF_INET6 if known.version == 6 else socket.AF_INET, host, int(port)


def listen_tcp(address: str, tls: ssl.SSLContext | None) -> socket.socket:
    """A listening socket at an address and port. Raises ConfigError as `tcp_address` does."""
    family, host, port = tcp_address(address, tls)
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise _no_listening(address, error) from error


def _no_listening(address: str, error: Exception) -> ConfigError:
    return ConfigError(f"nobody can listen on {address}: {error}", hint="choose another nbd.listen")


class Client:
    """Who has connected: ``key`` is what is counted, ``text`` is for people."""

    __slots__ = ("directory", "key", "text")

    def __init__(self, key: object, text: str, directory: Offered) -> None:
        self.key = key
        self.text = text
        self.directory = directory


_REFUSING = RustordError, OSError, RuntimeError
"""RuntimeError: the system has no more threads."""

Left = tuple[Handover, socket.socket]
"""A connection that this process has left."""


class _Connection:
    """One client's connection, served by a thread."""

    def __init__(
        self,
        sock: socket.socket,
        client: Client,
        tls: ssl.SSLContext | None,
        deadline: float,
        workers: Workers | None,
        on_chosen: Callable[[], None],
    ) -> None:
        """Without ``workers`` the thread does all. ``on_chosen`` is told when there is a `ledger`."""
        self.client = client
        self.since_ns = time.time_ns()
        self.agreement: Agreement | None = None
        self.ledger: Ledger | None = None
        """Since it has chosen an export."""
        self.left: Left | None = None
        """Set when the thread ends, if the connection does not end with it."""
        self._sock = sock
        self._tls = tls
        self._deadline = deadline
        self.makes_room = False
        """It has been cut for others to come, and is about to end: it does not count any more."""
        self._rest: bytes | None = None
        self._workers = workers
        self._on_chosen = on_chosen

    def resume(self, handover: Handover) -> None:
        """Take up what another process has left, in place of the negotiation. Raises OSError, RustordError."""
        export = self.client.directory.open_again(handover.key)
        agreed = handover.structured, handover.extended, handover.allocation
        self.agreement = Agreement(handover.key, export, *agreed)
        self._rest = handover.rest
        self.ledger = Ledger()  # now: until there is one, `leave` would cut the connection off

    def serve(self) -> None:
        """Negotiate, then serve requests until the client goes, breaks the rules, or `cut` or `leave` is called."""
        try:
            rest = self._negotiate() if self._rest is None else self._rest
            if rest is not None:
                assert self.agreement is not None
                self._transmit(self.agreement, rest)
        except RustordError as error:
            log.warning("the connection of %s cannot be kept: %s", self.client.text, error)
        except TimeoutError:
            log.info("%s took too long to choose an export", self.client.text)
        except (OSError, ssl.SSLError) as error:
            log.debug("the connection of %s has ended: %s", self.client.text, error)
        except Exception:
            log.exception("the connection of %s has failed", self.client.text)
        finally:
            self.close()

    def _negotiate(self) -> bytes | None:
        """What has come of the first request; None if none follows. Raises OSError, of which TimeoutError is one."""
        negotiation = Negotiation(self.client.directory, tls=self._tls is not None)
        self._send(negotiation.greeting)
        try:
            state = negotiation.state
            while state not in (State.AGREED, State.ENDED):
                if state is State.TLS:
                    self._begin_tls()
                    negotiation.secured()
                data = self._receive()
                if not data:
                    return None
                for reply in negotiation.feed(data):
                    self._send(reply)
                state = negotiation.state
        finally:
            self.agreement = negotiation.agreed
        return negotiation.rest if state is State.AGREED else None

    def _receive(self) -> bytes:
        self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        return self._sock.recv(_READ_BYTES)

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        self._sock.sendall(data)

    def _begin_tls(self) -> None:
        assert self._tls is not None
        self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        self._sock = sock = self._tls.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        sock.do_handshake()  # only now: whoever wants to `cut` it meanwhile has to find it

    def _transmit(self, agreement: Agreement, rest: bytes) -> None:
        log.info("%s has opened %r", self.client.text, agreement.name)
        self.ledger = ledger = self.ledger or Ledger()
        self._on_chosen()
        left = self._serve(cast(OpenExport, agreement.export), agreement, rest, ledger)
        if left is not None:
            self.left = Handover.of(agreement, left), self._sock

    def _serve(self, export: OpenExport, agreement: Agreement, rest: bytes, ledger: Ledger) -> bytes | None:
        """Have the session served; see `Session.run`."""
        if self._workers is not None and self._tls is None:
            try:
                worker = self._workers.enter(export.key)
            except OSError as error:
                log.warning("there can be no process for %r, which shares ours: %s", agreement.name, error)
            else:
                try:
                    return worker.serve(export, agreement, self._sock, rest, ledger, self.client.text)
                finally:
                    self._workers.leave(export.key, worker)
        with ExitStack() as kept:
            for gate in () if export.read_only else export.grantor.gates:
                kept.enter_context(gate.kept())
            session = Session(self._sock, agreement, ledger, self.client.text, is_plain=self._tls is None)
            return session.run(rest)

    def leave(self) -> None:
        """End it from another thread after the next request; with `left` if the client need not notice."""
        if self.ledger is None or self._tls is not None:
            self.cut(socket.SHUT_RD)
        else:
            self.ledger.leaving = True

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """End it from another thread: with SHUT_RD once what has come is answered, else at once."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, how)  # TLS's own would have what is sent from then on go in the clear

    def close(self) -> None:
        """Let go of everything; for its thread, or who cannot give it one."""
        if self.agreement is not None:
            self.agreement.export.close()
        if self.ledger is not None:
            self.ledger.close()
        if self.left is None:
            self.cut()  # whoever else has it
            self._sock.close()

    def count(self, traffic: Mapping[Kind, ExportTraffic], *, is_open: bool = False) -> None:
        """Add to ``traffic`` what it has done, once it has chosen an export."""
        if self.agreement is not None and self.ledger is not None:
            counted = traffic[self.agreement.export.kind]
            counted.add(self.ledger.counts)
            counted.connections += is_open

    def describe(self) -> dict[str, Any] | None:
        """What /v1/exports tells; None while it negotiates."""
        agreement, ledger = self.agreement, self.ledger
        if agreement is None or ledger is None:
            return None
        return {
            "name": agreement.name,
            "kind": agreement.export.kind,
            "client": self.client.text,
            "since": created_text(self.since_ns),
            "size": agreement.export.size,
            "read_only": agreement.export.read_only,
            **ledger.counts._asdict(),
        }


class NbdServer:
    """Serves exports. Made, used and closed on one event loop; any thread may ask for `exports` and `traffic`."""

    def __init__(
        self,
        exports: Exports,
        roles: Callable[[Peer], Role] | None = None,
        limits: NbdLimits | None = None,
        tcp_role: Role = Role.READER,
        workers: Workers | None = None,
    ) -> None:
        """``roles`` may be changed at any time, for those who connect from then on; ``tcp_role`` is that of others.

        Without ``workers``, which are closed with it, all sessions are served in this process.
        """
        self.roles = roles or Roles()
        self._tcp_role = tcp_role
        self._offer = exports
        self._workers = workers
        self._limits = limits or NbdLimits()
        self._listeners: list[Listener] = []
        self._connections: dict[_Connection, threading.Thread] = {}
        """In the order of their coming."""
        self._ended = {kind: ExportTraffic() for kind in Kind}
        """What connections have done that are there no more."""
        self._lock = threading.Lock()
        """Of `_connections` and `_ended`."""
        self._following = asyncio.create_task(self._follow())

    # Connections

    async def serve(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from a listening socket from now on, until `close`; with ``tls`` only secured ones."""
        self._listeners.append(Listener(sock, partial(self._admit_or_refuse, tls)))

    def _admit_or_refuse(self, tls: ssl.SSLContext | None, sock: socket.socket) -> None:
        try:
            self._admit(sock, tls)
        except _REFUSING as error:
            log.warning("a connection was refused: %s", error)
            sock.close()

    def resume(self, left: Iterable[Left]) -> None:
        """Take up the connections that `close` returned in another process. Blocks; for once, before `serve`."""
        for handover, sock in left:
            try:
                self._admit(sock, None, handover)
            except _REFUSING as error:
                log.warning("a connection that was kept cannot be taken up: %s", error)
                sock.close()

    def _admit(self, sock: socket.socket, tls: ssl.SSLContext | None, handover: Handover | None = None) -> None:
        client = self._identify(sock)
        self._make_room(client)
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        deadline = time.monotonic() + self._limits.handshake_s
        connection = _Connection(sock, client, tls, deadline, self._workers, self._tell_whether_alone)
        thread = threading.Thread(target=self._run, args=(connection,), name="nbd", daemon=True)
        try:
            if handover:
                connection.resume(handover)
            with self._lock:
                self._connections[connection] = thread
            thread.start()
        except _REFUSING:
            connection.close()
            self._forget(connection)
            raise

    def _tell_whether_alone(self) -> None:
        with self._lock:
            for connection in self._connections:
                if connection.ledger is not None:
                    connection.ledger.alone = len(self._connections) == 1

    def _identify(self, sock: socket.socket) -> Client:
        """Who has connected. Raises OSError if he is gone."""
        if sock.family != socket.AF_UNIX:
            host, port = sock.getpeername()[:2]
            return Client(host, f"{host} port {port}", Offered(self._offer, self._tcp_role))
        peer = peer_of(sock)
        return Client(peer.uid, f"process {peer.pid} of user {peer.uid}", Offered(self._offer, self.roles(peer)))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                await asyncio.to_thread(self._offer.follow)
            except Exception:
                log.exception("Objects that were moved cannot be followed", extra=FAULT())

    def _make_room(self, client: Client) -> None:
        """Raise OSError if the limits leave no room for one more connection."""
        with self._lock:
            connections = [connection for connection in self._connections if not connection.makes_room]
            ending_count = len(self._connections) - len(connections)
        open_count = Counter(connection.client.key for connection in connections)
        negotiating = [connection for connection in connections if connection.ledger is None]
        if len(negotiating) >= self._limits.negotiating:
            negotiating[0].makes_room = True
            negotiating[0].cut()
            open_count[negotiating[0].client.key] -= 1
        if max(open_count.total(), ending_count) >= self._limits.connections:
            raise OSError(f"there are {self._limits.connections} connections already")
        if open_count[client.key] >= self._limits.connections_per_client:
            raise OSError(f"{client.text} has {self._limits.connections_per_client} connections already")

    def _run(self, connection: _Connection) -> None:
        try:
            connection.serve()
        finally:
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.pop(connection, None) is not None:
                connection.count(self._ended)
        self._tell_whether_alone()

    def exports(self) -> Iterable[Mapping[str, Any]]:
        """What is open, by whom; an entry for each connection."""
        with self._lock:
            connections = list(self._connections)
        return [told for connection in connections if (told := connection.describe())]

    def traffic(self) -> Mapping[Kind, ExportTraffic]:
        """What all connections have done since the start."""
        with self._lock:
            traffic = copy.deepcopy(self._ended)
            for connection in self._connections:
                connection.count(traffic, is_open=True)
        return traffic

    # The end

    async def close(self, grace_s: float = 10.0, *, leave: bool = False) -> list[Left]:
        """Accept nothing more, let requests that have come be answered for up to ``grace_s`` seconds, then cut.

        With ``leave``, requests are answered that have been begun, and the connections are returned for `resume`.
        """
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        self._following.cancel()
        gently = _Connection.leave if leave else partial(_Connection.cut, how=socket.SHUT_RD)
        return await asyncio.to_thread(self._end, gently, grace_s)

    def _end(self, gently: Callable[[_Connection], None], grace_s: float) -> list[Left]:
        with self._lock:
            connections = list(self._connections)
        for end, patience_s in ((gently, grace_s), (_Connection.cut, _CUT_S)):
            deadline = time.monotonic() + patience_s
            with self._lock:
                remaining = dict(self._connections)
            for connection in remaining:
                end(connection)
            for thread in remaining.values():
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._workers is not None:
            self._workers.close()
        return [connection.left for connection in connections if connection.left]
