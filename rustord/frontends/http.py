"""HTTP: the object API on a Unix socket.

The shell around `rustord.wire`: one event loop that reads, parses and answers; the store's writer thread for changes; a
few threads for large bodies and for reads that miss the page cache. There is no asyncio transport: the sockets are
watched directly, so that a wake-up costs one recv and one send, and a large body can be handed to a thread and back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

from rustord.change import Change, Delete, Put
from rustord.errors import RustordError, Unavailable
from rustord.frontends.connection import Connection
from rustord.frontends.exchange import Exchange
from rustord.frontends.operations import Admin, Operations, Submit
from rustord.frontends.peer import Peer, Roles, peer_of
from rustord.frontends.traffic import Traffic
from rustord.frontends.transfer import Slots
from rustord.objectstore import ObjectStore
from rustord.record import Record
from rustord.wire.api import ROUTES, Role
from rustord.wire.http1 import Reply
from rustord.wire.limits import Limits
from rustord.wire.problem import problem

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")
Done = Callable[[Record | RustordError], None]

_ACCEPT_AGAIN_S = 1.0
"""After the process ran out of file descriptors."""
_TICK_S = 0.5
"""How often deadlines are looked at. They are seconds, and nobody relies on them to the tenth."""


class HttpServer:
    """Serves the object API. Made, used and closed on one running event loop.

    ``store``, ``limits``, ``traffic`` and the slots are for the connections and for metrics; ``roles`` and
    ``slow_request_s`` may be changed at any time, the former for those who connect from then on.
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
        self.store = store
        self.limits = limits or Limits()
        self.roles = roles or Roles()
        self.slow_request_s = slow_request_s
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.answered: set[Connection] = set()
        """Connections with exchanges that have been answered in this wake-up."""
        self.upload_slots = Slots(self.limits.uploads)
        self.download_slots = Slots(self.limits.downloads)
        self.traffic = Traffic(operation.id for methods in ROUTES.values() for operation in methods.values())
        self._writer = writer
        self._threads = ThreadPoolExecutor(self.limits.transfer_threads, "http-transfer")
        self._admin_threads = ThreadPoolExecutor(self.limits.admin_threads, "http-admin")
        self.operations = Operations(
            store, self._submit, admin, self.limits, self.in_thread, self._in_admin_thread, self.failure
        )
        self.handlers = self.operations.handlers()
        self._connections: set[Connection] = set()
        self._sockets: list[socket.socket] = []
        self._outcomes: deque[Callable[[], None]] = deque()
        self._woken = False
        self._gathered: dict[Change, Done] = {}
        """Changes of this wake-up, which are handed to the writer together."""
        self._submitted: dict[Change, Done] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    # Connections

    async def serve(self, sock: socket.socket) -> None:
        """Accept connections from a listening Unix socket from now on, until `close`, which closes it."""
        sock.setblocking(False)
        self._sockets.append(sock)
        self.loop.add_reader(sock, self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(64):  # then others first
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("no further connection can be accepted: %s", error.strerror)
                self.loop.remove_reader(listening)
                self.loop.call_later(_ACCEPT_AGAIN_S, self._accept_again, listening)
                return
            self._admit(sock)

    def _accept_again(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self.loop.add_reader(listening, self._accept, listening)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.traffic.connections_total += 1
        if len(self._connections) >= self.limits.connections:
            self.traffic.connections_refused += 1
            error = Unavailable(
                f"there are {self.limits.connections} connections already", hint="try again later, or use fewer"
            )
            reply = problem(error)
            with sock:
                sock.send(reply.head(b"Connection: close\r\n") + reply.body)
            return
        try:
            role = self.roles(peer_of(sock))
        except OSError:  # the peer is gone, or this is no Unix socket
            role = Role.NOBODY
        self._connections.add(Connection(self, sock, role))
        self._empty.clear()
        self.traffic.connections = len(self._connections)
        if self._ticking is None:
            self._ticking = self.loop.call_later(_TICK_S, self._tick)

    def forget(self, connection: Connection) -> None:
        """The connection has ended."""
        self._connections.discard(connection)
        self.traffic.connections = len(self._connections)
        if not self._connections:
            self._empty.set()

    def _tick(self) -> None:
        now = monotonic()
        for connection in [connection for connection in self._connections if connection.deadline < now]:
            connection.expire()
        self._ticking = self.loop.call_later(_TICK_S, self._tick) if self._connections else None

    # Work elsewhere

    def in_thread(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        """Do ``work`` in a thread, then call ``done`` with what it returned or raised, on the event loop."""
        self._threads.submit(self._run, work, done)

    def _in_admin_thread(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        self._admin_threads.submit(self._run, work, done)

    def _run(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        outcome: Outcome | BaseException
        try:
            outcome = work()
        except BaseException as error:
            outcome = error
        self._call_soon(lambda: done(outcome))

    def _submit(self, change: Put | Delete, done: Done) -> None:
        if not self._gathered:
            self.loop.call_soon(self._hand_over)  # once all that has become readable in this wake-up has been read
        self._gathered[change] = done

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, {}
        self._submitted |= gathered
        self._writer.submit(list(gathered), self._deliver)

    def _deliver(self, outcomes: Sequence[tuple[Change, Record | RustordError]]) -> None:
        self.loop.call_soon_threadsafe(self._take_changes, outcomes)

    def _take_changes(self, outcomes: Sequence[tuple[Change, Record | RustordError]]) -> None:
        for change, outcome in outcomes:
            self._submitted.pop(change)(outcome)
        self._proceed()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._outcomes.append(callback)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._take_outcomes)

    def _take_outcomes(self) -> None:
        self._woken = False
        while self._outcomes:
            self._outcomes.popleft()()
        self._proceed()

    def _proceed(self) -> None:
        answered, self.answered = self.answered, set()
        for connection in answered:
            connection.proceed()

    # What became of requests

    def failure(self, exchange: Exchange, error: BaseException) -> Reply:
        """The reply to a request that failed. What is the server's fault is logged."""
        what = f"{exchange.head.method} {exchange.head.target}"
        if not isinstance(error, RustordError):
            log.error("%s failed", what, exc_info=error)
            error = RustordError("an unexpected error", hint="the daemon's log tells more; please report it")
        elif error.http_status == 500:
            log.error("%s failed: %s", what, error)
        return problem(error)

    def count(self, exchange: Exchange, status: int) -> None:
        """An exchange has been answered."""
        now = monotonic()
        taken_s = now - exchange.began
        self.traffic.operations[exchange.request.operation.id].count(status, taken_s)
        if taken_s > self.slow_request_s:
            log.warning(
                "slow request: %s %s took %.3f s (%.3f s for its body, %.3f s for the reply), status %d",
                exchange.head.method,
                exchange.head.target,
                taken_s,
                exchange.complete - exchange.began,
                now - exchange.complete,
                status,
            )

    # The end

    async def close(self, grace_s: float = 10.0) -> None:
        """Accept nothing more, let what has begun end for up to ``grace_s`` seconds, then cut off what is left."""
        self.draining = True
        for sock in self._sockets:
            self.loop.remove_reader(sock)
            sock.close()
        self._sockets = []
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
        self._threads.shutdown()
        self._admin_threads.shutdown(wait=False, cancel_futures=True)
