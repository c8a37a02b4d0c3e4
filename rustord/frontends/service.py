"""Service: what all connections of a server share: the operations, the threads and the writer behind them, counters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from time import monotonic, time
from typing import TypeVar

from rustord.change import Change, Delete, Put
from rustord.errors import RustordError
from rustord.event import FAULT, REQUEST_SLOW
from rustord.frontends.exchange import Exchange, Exchanging
from rustord.frontends.operations import Admin, Done, Operations, Submit
from rustord.frontends.poller import Poller
from rustord.frontends.traffic import SlowRequest, Traffic
from rustord.frontends.transfer import Slots
from rustord.objectstore import ObjectStore
from rustord.record import Record
from rustord.whereabouts import whereabouts
from rustord.wire.api import ROUTES
from rustord.wire.http1 import STATUS_LINES, Reply, date_line
from rustord.wire.limits import Limits
from rustord.wire.problem import problem

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


class Service:
    """Belongs to the event loop that runs when it is made; all but `close` is for that loop's thread.

    ``draining`` tells connections to end with what they have begun.
    """

    def __init__(self, store: ObjectStore, writer: Submit, admin: Admin, limits: Limits, slow_request_s: float) -> None:
        self.store = store
        self.limits = limits
        self.slow_request_s = slow_request_s
        self.draining = False
        self.poller = Poller(self._end_turn)
        self.unsent: set[Exchanging] = set()
        """Connections that have something to send, or to wait for, at the end of this turn."""
        self.upload_slots = Slots(limits.uploads)
        self.download_slots = Slots(limits.downloads)
        self.traffic = Traffic(operation.id for methods in ROUTES.values() for operation in methods.values())
        self._writer = writer
        self._threads = ThreadPoolExecutor(limits.transfer_threads, "http-transfer")
        self._admin_threads = ThreadPoolExecutor(limits.admin_threads, "http-admin")
        self.operations = Operations(
            store,
            self._submit,
            admin,
            limits,
            self.in_thread,
            self._in_admin_thread,
            self.failure,
            self.traffic.slow,
        )
        self.handlers = self.operations.handlers()
        self._gathered: dict[Change, Done] = {}
        """Changes of this turn, which are handed to the writer together."""
        self._submitted: dict[Change, Done] = {}
        self._working: dict[int, float] = {}
        """Since when each thread for transfers, by its ident, does what it does."""
        self._ready: set[Exchanging] = set()
        """Connections that have received something in this turn, or have been answered."""
        self._phase_s: Sequence[float] = ()
        """How long each phase of the cycle took whose changes are being answered."""

    def _end_turn(self) -> bool:
        """All that has come has been received. Tells whether clients have been answered, and nothing is under way.

        Every step is taken for all connections before the next one: what was just done is still in the processor's
        caches, so that it takes half of the time.
        """
        self._proceed()
        unsent, self.unsent = self.unsent, set()
        for connection in unsent:
            connection.send()
        if self._gathered:
            gathered, self._gathered = self._gathered, {}
            self._submitted |= gathered
            self._writer.submit(list(gathered), self._deliver)
        return bool(unsent) and not self._submitted and not self._working

    # The writer

    def _submit(self, change: Put | Delete, done: Done) -> None:
        self._gathered[change] = done

    def _deliver(self, outcomes: Sequence[tuple[Change, Record | RustordError]]) -> None:
        phase_s = self.store.last_phase_s
        self.poller.wake(lambda: self._take_changes(outcomes, phase_s))

    def _take_changes(self, outcomes: Sequence[tuple[Change, Record | RustordError]], phase_s: Sequence[float]) -> None:
        self._phase_s = phase_s
        for change, outcome in outcomes:
            self._submitted.pop(change)(outcome)
        self._proceed()
        self._phase_s = ()

    # Threads

    def in_thread(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        """Do ``work`` in a thread, then call ``done`` with what it returned or raised, on the event loop."""
        self._threads.submit(self._transfer, work, done)

    def _transfer(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        thread = get_ident()
        self._working[thread] = monotonic()
        self._run(work, done)
        del self._working[thread]

    def stuck(self, limit_s: float) -> list[str]:
        """Where those threads for transfers are that have moved nothing for ``limit_s`` seconds."""
        since = monotonic() - limit_s
        return [whereabouts(thread) for thread, began in list(self._working.items()) if began < since]

    def _in_admin_thread(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        self._admin_threads.submit(self._run, work, done)

    def _run(self, work: Callable[[], Outcome], done: Callable[[Outcome | BaseException], None]) -> None:
        outcome: Outcome | BaseException
        try:
            outcome = work()
        except BaseException as error:
            outcome = error
        self.poller.wake(lambda: done(outcome))

    # Answers

    def go_on(self, connection: Exchanging) -> None:
        """Let the connection go on with what it has received, or with its answers, once all others have theirs."""
        self._ready.add(connection)

    def _proceed(self) -> None:
        ready, self._ready = self._ready, set()
        if not self.draining:
            self._answer_plain_gets(ready)
        for connection in ready:
            connection.proceed()

    def _answer_plain_gets(self, connections: Iterable[Exchanging]) -> None:
        """Answer the plain GETs with which these connections go on, the first ones of all before the second ones."""
        began = monotonic()
        counted = self.traffic.operations["get_object"]
        while plain := [(each, request) for each in connections if (request := each.plain_get())]:
            connections = []
            start = STATUS_LINES[200] + date_line(int(time()))
            found = self.operations.plain_gets([request.uuid for _, request in plain])
            for (connection, request), answer in zip(plain, found, strict=True):
                if answer is not None:
                    fields, data = answer
                    head = b"%b%bContent-Length: %d\r\n\r\n" % (start, fields, len(data))
                    connection.answer_plain_get(request, head, data)
                    connections.append(connection)
                    self.traffic.sent_bytes += len(data)
                    counted.count(200, monotonic() - began)

    def failure(self, exchange: Exchange, error: BaseException) -> Reply:
        """The reply to a request that failed. What is the server's fault is logged."""
        what = f"{exchange.head.method} {exchange.head.target}"
        if not isinstance(error, RustordError):
            log.error("%s failed", what, exc_info=error, extra=FAULT())
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
            slow = SlowRequest(
                time(), exchange.head.method, exchange.head.target, status, taken_s, self._phases(exchange, now)
            )
            self.traffic.slow.append(slow)
            log.warning("slow request: %s", slow, extra=REQUEST_SLOW())

    def _phases(self, exchange: Exchange, now: float) -> dict[str, float]:
        phases_s = {"body": exchange.complete - exchange.began}
        if exchange.request.operation.changes and self._phase_s:
            phases_s["wait"] = max(0.0, now - exchange.complete - sum(self._phase_s))
            phases_s |= zip(self.store.phase_s, self._phase_s, strict=True)
        else:
            phases_s["reply"] = now - exchange.complete
        return phases_s

    def close(self) -> None:
        """End the threads. Those that answer for the daemon may be stuck in there, and are left to it."""
        self.poller.close()
        self._threads.shutdown()
        self._admin_threads.shutdown(wait=False, cancel_futures=True)
