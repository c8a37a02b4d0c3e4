"""Session: the requests of an NBD connection that has chosen its export, served by a thread that blocks.

That takes 16 µs of CPU for a 4 KiB read at depth 1 and 6.7 µs at depth 16, nbdkit 16.2 and 8.2 (side by side, system
calls included), so there is little that a cleverer model could save. A second thread (see `rustord.frontends.pipeline`)
takes part of what is long: to a client that does nothing with them, reads of 1 MiB go 1.5 times as fast; writes of
1 MiB 1.2 times. A third (see `rustord.frontends.flusher`) does the flushes of a client that asks for other things
meanwhile: beside writes that are flushed one by one, it answers 5 times as many reads. A session that is alone, and
whose client asks for one thing after the other, does not go to sleep at once in between: 1.6 times as many reads at
depth 1.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from rustord.frontends.flusher import Flusher
from rustord.frontends.ledger import Ledger
from rustord.frontends.pipeline import Pipeline
from rustord.wire.nbd import EXTENDED_REQUEST
from rustord.wire.negotiation import Agreement
from rustord.wire.transmission import Transmission, Waiting

log = logging.getLogger(__name__)

LOOK_S = 200e-6
"""How long a server looks for the next request of a lone client before it goes to sleep, if the last one came that
soon. To be woken takes 50 µs in a virtual machine; KVM waits for its guests in the same way (halt polling)."""
_READ_BYTES = 4096
_LOOK_UP = struct.pack("@ll", 0, 250_000)
"""A timeval: how often a thread that waits for a request looks whether its connection is to be left."""


class Session:
    """Serves what was agreed on; implements `rustord.wire.transmission.Beside`."""

    def __init__(
        self, sock: socket.socket, agreement: Agreement, ledger: Ledger, client: str, *, is_plain: bool = True
    ) -> None:
        """What is done is counted in ``ledger``; ``client`` is for people. A socket of TLS is not ``is_plain``."""
        self._sock = sock
        self._agreement = agreement
        self._ledger = ledger
        self._client = client
        self._is_plain = is_plain
        self._transmission = Transmission(agreement, self)
        self._pipeline = Pipeline()
        self._flusher = Flusher(self._flush)
        self._sending, self._counting = threading.Lock(), threading.Lock()
        self._is_flushing = False
        """In the thread that receives, which sends the replies next."""
        self._overlaps = False
        """Requests have come during the last flush."""
        self._arrival = select.poll()
        self._arrival.register(sock, select.POLLIN)
        self._is_brisk = False
        """The last request came alone, and soon."""

    def run(self, rest: bytes) -> bytes | None:
        """Serve until the client goes or breaks the rules, or the session is to be left.

        ``rest`` is what has come already. Returns what has come of the next request if the session is left: all that
        was done is durable then; else None. Raises OSError, or RustordError if it cannot be made durable.
        """
        try:
            return self._run(rest)
        finally:
            self._pipeline.close()
            self._flusher.close()
            self._transmission.close()
            self._count()

    def _run(self, rest: bytes) -> bytes | None:
        sock, transmission, ledger = self._sock, self._transmission, self._ledger
        sock.settimeout(None)
        if self._is_plain:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK_UP)
        for first in range(0, len(rest), _READ_BYTES):
            part = rest[first : first + _READ_BYTES]
            transmission.space()[: len(part)] = part
            self._answer(len(part))
        while not transmission.ended:
            space = transmission.space()
            if ledger.leaving and (transmission.requests or not self._arrival.poll(0)):
                # Not before it has done some of what waits: processes that follow each other fast would do none of it.
                if not transmission.lacking:
                    return self._leave()
                space = space[: transmission.lacking]  # what comes behind it is for the next process
            try:
                count = self._receive_next(space)
            except BlockingIOError:
                continue  # nothing has come for a while
            if not count:
                return None
            self._answer(count)
        return None

    def _answer(self, count: int) -> None:
        """Work on what has come, and send the replies. Raises OSError."""
        for reply in self._transmission.received(count):
            if self._is_flushing:
                self._is_flushing, self._overlaps = False, bool(self._arrival.poll(0))
            self._count()  # now: once it has its reply, a client may look
            self.wait()
            self._send(reply)

    def _send(self, reply: memoryview) -> None:
        with self._sending:
            self._sock.sendall(reply)

    def _count(self) -> None:
        done = self._transmission
        with self._counting:
            self._ledger.count(done.requests, done.errors, done.read_bytes, done.written_bytes)

    # Of `rustord.wire.transmission.Beside`

    def take(self, job: Callable[[], memoryview]) -> bool:
        """Not if this thread would have nothing to do meanwhile."""
        if not self._is_plain or not (self._transmission.has_more or self._arrival.poll(0)):
            return False
        self._count()
        try:
            self._pipeline.put(partial(self._do, job))
        except RuntimeError:  # the system has no more threads
            return False
        return True

    def wait(self) -> None:
        self._pipeline.wait()

    def flush(self, waiting: list[Waiting]) -> bool:
        """Not if the client seems to do nothing meanwhile."""
        if self._is_plain and (self._overlaps or self._flusher.is_busy):
            with suppress(RuntimeError):  # as above
                self._flusher.put(waiting)
                return True
        self._is_flushing = True
        return False

    def finish(self) -> None:
        self._flusher.wait()

    def _flush(self, waiting: list[Waiting]) -> None:
        self._go_on(lambda: self._flushed(waiting))

    def _flushed(self, waiting: list[Waiting]) -> Iterator[memoryview]:
        before = self._transmission.requests
        for reply in self._transmission.flushed(waiting):
            self._overlaps = self._transmission.requests > before
            self._count()
            yield reply

    def _do(self, job: Callable[[], memoryview]) -> None:
        self._go_on(lambda: (job(),))

    def _go_on(self, work: Callable[[], Iterable[memoryview]]) -> None:
        """Send what ``work`` yields, in whichever thread; if that fails, nothing more can be sent."""
        try:
            for reply in work():
                self._send(reply)
        except OSError:
            self._cut()
        except Exception:
            log.exception("the connection of %s has failed, and is cut", self._client)
            self._cut()

    def _cut(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _receive_next(self, space: memoryview) -> int:
        """How many bytes have come. Raises BlockingIOError if none have for a while, or another OSError."""
        since = time.monotonic()
        count = self._look(space, since + LOOK_S) if self._is_brisk and self._ledger.alone else 0
        if not count:
            count = self._sock.recv_into(space)
        self._is_brisk = self._is_plain and count <= EXTENDED_REQUEST.size and time.monotonic() - since < LOOK_S
        return count

    def _look(self, space: memoryview, until: float) -> int:
        """The same without going to sleep; 0 if nothing comes, or the client is gone."""
        while time.monotonic() < until:
            try:
                return self._sock.recv_into(space, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
        return 0

    def _leave(self) -> bytes:
        """Raises RustordError: the client must learn then that what it wrote may be lost."""
        self.wait()
        self._agreement.export.flush()
        return self._transmission.rest
