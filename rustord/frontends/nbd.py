"""NBD: Objects and volumes as block devices, on a socket of their own.

Every connection has a thread of its own, which blocks. That takes 16 µs of CPU for a 4 KiB read at depth 1 and 6.7 µs
at depth 16, nbdkit 16.2 and 8.2 (side by side, system calls included), so there is little that a cleverer model could
save. A second thread (see `rustord.frontends.pipeline`) takes part of what is long: to a client that does nothing with
them, reads of 1 MiB go 1.5 times as fast; writes of 1 MiB 1.2 times.

Connections share the interpreter's lock, and only what the kernel does for them runs side by side. Of two CPUs, which
they share with two clients that do nothing with what they get, two exports use 1.4 in reads of 1 MiB, which is all that
the clients leave; but 1.0 to 1.3 in reads of 4 KiB: 1.1 to 1.3 times as many as of one export, and 0.6 to 0.8 times as
many as nbdkit, whose threads share no lock (with fio as the client, 1.2 to 1.4 times). A process for each export would
use more of them, but then every move of an Object, every change of a volume's map and every device that comes or goes
would have to be told to all of them before the next request. The event loop accepts connections; what they do then is
up to their threads. One that is alone, and whose client asks for one thing after the other, does not go to sleep at
once in between: 1.6 times as many reads at depth 1.

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
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rustord.errors import ConfigError, RustordError
from rustord.export import Kind
from rustord.frontends.exports import Exports, Offered
from rustord.frontends.handover import Handover
from rustord.frontends.listener import Listener
from rustord.frontends.peer import Peer, Roles, peer_of
from rustord.frontends.pipeline import Pipeline
from rustord.frontends.poller import LOOK_S
from rustord.frontends.traffic import ExportTraffic
from rustord.wire.api import Role, created_text
from rustord.wire.limits import NbdLimits
from rustord.wire.nbd import EXTENDED_REQUEST
from rustord.wire.negotiation import Agreement, Negotiation, State
from rustord.wire.transmission import Transmission

log = logging.getLogger(__name__)

_FOLLOW_S = 2.0
"""How often Objects that were moved are looked for."""
_SEND_BUFFER_BYTES = 4 << 20
_READ_BYTES = 4096
_LOOK_UP = struct.pack("@ll", 0, 250_000)
"""A timeval: how often a thread that waits for a request looks whether its connection is to be left."""
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
    loading = certificate
    try:
        context.load_cert_chain(certificate, key)
        loading = authority
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{loading} cannot be used for TLS: {error}", hint="it must be a file in PEM") from error
    return context


def listen_tcp(address: str, tls: ssl.SSLContext | None) -> socket.socket:
    """A listening socket at an address and port. Raises ConfigError, also if it would need TLS and there is none."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        known = ipaddress.ip_address(host)
        if int(port) > 65535:
            raise ValueError("there is no such port")
        if tls is None and not known.is_loopback:
            raise ConfigError(
                f"nbd.listen is {address}, which is not this machine alone, and there is no TLS",
                hint="set nbd.tls_certificate, nbd.tls_key and nbd.tls_authority",
            )
        family = socket.AF_INET6 if known.version == 6 else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=1024)
    except (OSError, ValueError) as error:
        raise ConfigError(f"nobody can listen on {address}: {error}", hint="choose another nbd.listen") from error


class Client:
    """Who has connected: ``key`` is what is counted, ``text`` is for people."""

    __slots__ = ("directory", "key", "text")

    def __init__(self, key: object, text: str, directory: Offered) -> None:
        self.key = key
        self.text = text
        self.directory = directory


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
        is_alone: Callable[[], bool],
    ) -> None:
        """``is_alone`` tells whether there is no other connection that may need the CPU."""
        self.client = client
        self.since_ns = time.time_ns()
        self.agreement: Agreement | None = None
        self.transmission: Transmission | None = None
        self.left: Left | None = None
        """Set when the thread ends, if the connection does not end with it."""
        self._sock = sock
        self._tls = tls
        self._deadline = deadline
        self.makes_room = False
        """It has been cut for others to come, and is about to end: it does not count any more."""
        self._rest: bytes | None = None
        self._leaving = False
        self._is_alone = is_alone if tls is None else lambda: False
        self._pipeline = Pipeline()
        self._arrival = select.poll()
        self._arrival.register(sock, select.POLLIN)
        self._is_brisk = False
        """The last request came alone, and soon."""

    def resume(self, handover: Handover) -> None:
        """Take up what another process has left, in place of the negotiation. Raises RustordError."""
        export = self.client.directory.open_again(handover.key)
        agreed = handover.structured, handover.extended, handover.allocation
        self.agreement = Agreement(handover.key, export, *agreed)
        self._rest = handover.rest

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
            self._close()

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
        self._sock = self._tls.wrap_socket(self._sock, server_side=True)

    def _transmit(self, agreement: Agreement, rest: bytes) -> None:
        log.info("%s has opened %r", self.client.text, agreement.name)
        sock = self._sock
        sock.settimeout(None)
        if self._tls is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK_UP)
        self.transmission = transmission = Transmission(agreement, self)
        for first in range(0, len(rest), _READ_BYTES):
            part = rest[first : first + _READ_BYTES]
            transmission.space()[: len(part)] = part
            self._answer(transmission, len(part))
        while not transmission.ended:
            space = transmission.space()
            if self._leaving:
                if not transmission.lacking:
                    self._leave(Handover.of(agreement, transmission.rest))
                    return
                space = space[: transmission.lacking]  # what comes behind it is for the next process
            try:
                count = self._receive_next(sock, space)
            except BlockingIOError:
                continue  # nothing has come for a while
            if not count:
                return
            self._answer(transmission, count)

    def _answer(self, transmission: Transmission, count: int) -> None:
        """Work on what has come, and send the replies. Raises OSError."""
        for reply in transmission.received(count):
            self.wait()
            self._sock.sendall(reply)

    # Of `rustord.wire.transmission.Beside`

    def take(self, job: Callable[[], memoryview]) -> bool:
        """Not if this thread would have nothing to do meanwhile."""
        assert self.transmission is not None
        if self._tls is not None or not (self.transmission.has_more or self._arrival.poll(0)):
            return False
        try:
            self._pipeline.put(partial(self._do, job))
        except RuntimeError:  # the system has no more threads
            return False
        return True

    def wait(self) -> None:
        self._pipeline.wait()

    def _do(self, job: Callable[[], memoryview]) -> None:
        try:
            self._sock.sendall(job())
        except OSError:
            self.cut()
        except Exception:
            log.exception("the connection of %s has failed, and is cut", self.client.text)
            self.cut()

    def _receive_next(self, sock: socket.socket, space: memoryview) -> int:
        """How many bytes have come. Raises BlockingIOError if none have for a while, or another OSError."""
        since = time.monotonic()
        count = self._look(sock, space, since + LOOK_S) if self._is_brisk and self._is_alone() else 0
        if not count:
            count = sock.recv_into(space)
        self._is_brisk = count <= EXTENDED_REQUEST.size and time.monotonic() - since < LOOK_S
        return count

    def _look(self, sock: socket.socket, space: memoryview, until: float) -> int:
        """The same without going to sleep; 0 if nothing comes, or the client is gone."""
        while time.monotonic() < until:
            try:
                return sock.recv_into(space, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
        return 0

    def _leave(self, handover: Handover) -> None:
        """Raises RustordError: the client must learn then that what it wrote may be lost."""
        assert self.agreement is not None
        self.wait()
        self.agreement.export.flush()
        self.left = handover, self._sock

    def leave(self) -> None:
        """End it from another thread after the next request; with `left` if the client need not notice."""
        if self.transmission is None or self._tls is not None:
            self.cut(socket.SHUT_RD)
        else:
            self._leaving = True

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """End it from another thread: with SHUT_RD once what has come is answered, else at once."""
        with suppress(OSError):
            self._sock.shutdown(how)

    def _close(self) -> None:
        self._pipeline.close()
        if self.agreement is not None:
            self.agreement.export.close()
        if self.left is None:
            self._sock.close()

    def count(self, traffic: Mapping[Kind, ExportTraffic], *, is_open: bool = False) -> None:
        """Add to ``traffic`` what it has done, once it has chosen an export."""
        if self.agreement is not None and self.transmission is not None:
            counted = traffic[self.agreement.export.kind]
            counted.add(self.transmission)
            counted.connections += is_open

    def describe(self) -> dict[str, Any] | None:
        """What /v1/exports tells; None while it negotiates."""
        agreement, transmission = self.agreement, self.transmission
        if agreement is None or transmission is None:
            return None
        return {
            "name": agreement.name,
            "kind": agreement.export.kind,
            "client": self.client.text,
            "since": created_text(self.since_ns),
            "size": agreement.export.size,
            "read_only": agreement.export.read_only,
            "requests": transmission.requests,
            "errors": transmission.errors,
            "read_bytes": transmission.read_bytes,
            "written_bytes": transmission.written_bytes,
        }


class NbdServer:
    """Serves exports. Made, used and closed on one event loop; any thread may ask for `exports` and `traffic`."""

    def __init__(
        self,
        exports: Exports,
        roles: Callable[[Peer], Role] | None = None,
        limits: NbdLimits | None = None,
        tcp_role: Role = Role.READER,
    ) -> None:
        """``roles`` may be changed at any time, for those who connect from then on; ``tcp_role`` is that of others."""
        self.roles = roles or Roles()
        self._tcp_role = tcp_role
        self._offer = exports
        self._limits = limits or NbdLimits()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._connections: dict[_Connection, threading.Thread] = {}
        """In the order of their coming."""
        self._ended = {kind: ExportTraffic() for kind in Kind}
        """What connections have done that are there no more."""
        self._lock = threading.Lock()
        """Of `_connections` and `_ended`."""
        self._following = self._loop.call_later(_FOLLOW_S, self._follow)

    # Connections

    async def serve(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from a listening socket from now on, until `close`; with ``tls`` only secured ones."""
        self._listeners.append(Listener(sock, partial(self._admit_or_refuse, tls)))

    def _admit_or_refuse(self, tls: ssl.SSLContext | None, sock: socket.socket) -> None:
        try:
            self._admit(sock, tls)
        except (RustordError, OSError) as error:
            log.warning("a connection was refused: %s", error)
            sock.close()

    def resume(self, left: Iterable[Left]) -> None:
        """Take up the connections that `close` returned in another process. Blocks; for once, before `serve`."""
        for handover, sock in left:
            try:
                self._admit(sock, None, handover)
            except (RustordError, OSError) as error:
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
        connection = _Connection(sock, client, tls, time.monotonic() + self._limits.handshake_s, self._is_single)
        if handover:
            connection.resume(handover)
        thread = threading.Thread(target=self._run, args=(connection,), name="nbd", daemon=True)
        with self._lock:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._forget(connection)
            raise OSError(str(error)) from error

    def _is_single(self) -> bool:
        return len(self._connections) == 1

    def _identify(self, sock: socket.socket) -> Client:
        """Who has connected. Raises OSError if he is gone."""
        if sock.family != socket.AF_UNIX:
            host, port = sock.getpeername()[:2]
            return Client(host, f"{host} port {port}", Offered(self._offer, self._tcp_role))
        peer = peer_of(sock)
        return Client(peer.uid, f"process {peer.pid} of user {peer.uid}", Offered(self._offer, self.roles(peer)))

    def _follow(self) -> None:
        self._loop.run_in_executor(None, self._offer.follow)
        self._following = self._loop.call_later(_FOLLOW_S, self._follow)

    def _make_room(self, client: Client) -> None:
        """Raise OSError if the limits leave no room for one more connection."""
        with self._lock:
            connections = [connection for connection in self._connections if not connection.makes_room]
            ending_count = len(self._connections) - len(connections)
        open_count = Counter(connection.client.key for connection in connections)
        negotiating = [connection for connection in connections if connection.transmission is None]
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
        return [connection.left for connection in connections if connection.left]
