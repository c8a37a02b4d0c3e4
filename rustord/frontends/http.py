"""HTTP: the object API on a Unix socket.

The shell around `rustord.wire`: one event loop that reads, parses and answers; the store's writer thread for changes; a
few threads for large bodies and for reads that miss the page cache. There is no asyncio transport: a `Poller` watches
the sockets, so that all that has come is one turn, with one recv and one send for each connection, and a large body can
be handed to a thread and back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from rustord.errors import RustordError, Unavailable
from rustord.frontends.connection import Connection
from rustord.frontends.listener import Listener
from rustord.frontends.operations import Admin, Submit
from rustord.frontends.peer import Peer, Roles, peer_of
from rustord.frontends.service import Service
from rustord.frontends.traffic import Traffic
from rustord.objectstore import ObjectStore
from rustord.wire.api import Role
from rustord.wire.limits import Limits
from rustord.wire.problem import problem

log = logging.getLogger(__name__)

_TICK_S = 0.5
"""How often deadlines are looked at. They are seconds, and nobody relies on them to the tenth."""


def turn_away(sock: socket.socket, error: RustordError) -> None:
    """Answer a connection with an error, before it has asked for anything, and close it."""
    reply = problem(error)
    with sock, suppress(OSError):  # it may be gone already
        sock.send(reply.head(b"Connection: close\r\n") + reply.body)


class HttpServer:
    """Serves the object API. Made, used and closed on one running event loop.

    ``roles`` may be changed at any time, for those who connect from then on.
    """

    def __init__(
        self,
        store: ObjectStore,
        writer: Submit,
        admin: Admin,
        *,
        limits: Limits | None = None,
        roles: Callable[[Peer], Role] | None = None,
        slow_request_s: float = 1.0,
    ) -> None:
        """``slow_request_s``: longer requests are logged."""
        self.roles = roles or Roles()
        self._limits = limits or Limits()
        self._service = Service(store, writer, admin, self._limits, slow_request_s)
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._listeners: list[Listener] = []
        self._ticking: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def traffic(self) -> Traffic:
        """What has passed through."""
        return self._service.traffic

    @property
    def slow_request_s(self) -> float:
        """From which time on a request is logged; may be changed at any time."""
        return self._service.slow_request_s

    @slow_request_s.setter
    def slow_request_s(self, seconds: float) -> None:
        self._service.slow_request_s = seconds

    def stuck(self, limit_s: float) -> list[str]:
        """Where in the code transfers are that have not moved for ``limit_s`` seconds. None waits for its peer."""
        return self._service.stuck(limit_s)

    # Connections

    async def serve(self, sock: socket.socket) -> None:
        """Accept connections from a listening Unix socket from now on, until `close`, which closes it."""
        self._listeners.append(Listener(sock, self._admit))

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.traffic.connections_total += 1
        if len(self._connections) >= self._limits.connections:
            self.traffic.connections_refused += 1
            error = Unavailable(
                f"there are {self._limits.connections} connections already", hint="try again later, or use fewer"
            )
            turn_away(sock, error)
            return
        try:
            role = self.roles(peer_of(sock))
        except OSError:  # the peer is gone, or this is no Unix socket
            role = Role.NOBODY
        self._connections.add(Connection(self._service, sock, role, self._forget))
        self._empty.clear()
        self.traffic.connections = len(self._connections)
        if self._ticking is None:
            self._ticking = self._loop.call_later(_TICK_S, self._tick)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.traffic.connections = len(self._connections)
        if not self._connections:
            self._empty.set()

    def _tick(self) -> None:
        # Before anything that could raise, since no other connection would ever expire after that.
        self._ticking = self._loop.call_later(_TICK_S, self._tick) if self._connections else None
        now = monotonic()
        for connection in [connection for connection in self._connections if connection.deadline < now]:
            connection.expire()

    # The end

    async def close(self, grace_s: float = 10.0) -> None:
        """Accept nothing more, let what has begun end for up to ``grace_s`` seconds, then cut off what is left."""
        self._service.draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        for connection in list(self._connections):
            connection.drain()
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except TimeoutError:
            log.warning("%d connections were still busy after %.1f s, and are cut", len(self._connections), grace_s)
            for connection in list(self._connections):
                connection.close()
            await self._empty.wait()  # transfers in threads come back at once: their sockets are shut
        if self._ticking is not None:
            self._ticking.cancel()
        self._service.close()
