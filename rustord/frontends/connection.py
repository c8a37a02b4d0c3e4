"""Connection: one peer's socket, from which requests are read and to which replies go in the same order."""

from __future__ import annotations

import logging
import math
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from time import monotonic, time

from rustord.errors import Forbidden, InvalidRequest, NotFound, RustordError
from rustord.frontends.exchange import Exchange
from rustord.frontends.outbox import Outbox
from rustord.frontends.service import Service
from rustord.frontends.transfer import PeerGone, Receiving, Sending, Slots, Wait
from rustord.manifest import Data
from rustord.record import Record
from rustord.wire.api import Body, PlainGet, Role, check_body, read_plain_get, read_request
from rustord.wire.http1 import CONTINUE, Reply, RequestHead, RequestTimeout, date_line, read_request_head
from rustord.wire.problem import problem

log = logging.getLogger(__name__)

_FIRST_S = 1.0
"""How long we wait, once we are to stop, for the first request of who has connected."""


class _Phase(Enum):
    """What the connection waits for, which decides what happens at its deadline."""

    NEW = auto()
    """For the first request, which is on its way if the peer has just connected."""
    IDLE = auto()
    """For another request."""
    HEAD = auto()
    """For the rest of a head."""
    BODY = auto()
    """For the rest of a body."""
    STORE = auto()
    """For us, at any length."""
    PEER = auto()
    """For the peer to read."""
    LINGER = auto()
    """For the end of what has been refused."""


class Connection:
    """Reads what has arrived, begins every request that may begin, and sends all replies of a turn at once.

    Requests are answered in their order. One begins when those before it have been answered; only changes of the store
    follow each other without waiting, since the writer keeps their order. While the peer does not read its replies,
    nothing more is read from it.
    """

    def __init__(self, service: Service, sock: socket.socket, role: Role, on_end: Callable[[Connection], None]) -> None:
        """``on_end`` is called when the connection has ended, and its socket is closed."""
        self.now = monotonic()
        """When it last began to look at what has come."""
        self.deadline = self.now + service.limits.idle_s
        self.closed = False
        self._phase = _Phase.NEW
        self._service = service
        self._on_end = on_end
        self._limits = service.limits
        self._sock = sock
        self._fd = sock.fileno()
        self._role = role
        self._outbox = Outbox(sock)
        self._data = b""
        self._at = 0
        """Where in ``_data`` the first request is that has not begun."""
        self._exchanges: deque[Exchange] = deque()
        """What has begun and is not answered, in order."""
        self._collecting: Exchange | None = None
        """The request whose small body is being gathered in ``_pieces``."""
        self._pieces: list[bytes] = []
        self._missing = 0
        """Bytes of that body that are still to come."""
        self._transfer: Receiving | Sending | None = None
        """The large body of the only exchange."""
        self._slots: Slots | None = None
        """Where the transfer has its slot from, once it has one."""
        self._in_thread = False
        self._last = False
        """No further request will begin."""
        self._held = False
        """A request is there that begins as soon as all replies have been sent."""
        self._unread = False
        """The peer may still be sending what was refused."""
        self._reading = self._writing = False
        self._watch(reading=True, writing=False)

    # Reading

    def readable(self) -> None:
        if self._transfer is not None:
            self._next_turn()
            return
        try:
            data = self._sock.recv(min(self._missing, self._limits.small_body_bytes) or self._limits.read_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self._end_of_input()
        elif self._collecting is not None:
            self._collect(data)
        elif self._phase is not _Phase.LINGER:
            self._data = self._data[self._at :] + data if self._at < len(self._data) else data
            self._at = 0
            self._service.go_on(self)

    def _end_of_input(self) -> None:
        if self._exchanges and self._collecting is None:
            self._last = True
            self._send()
        else:
            self.close()

    def proceed(self) -> None:
        """Take up answers, and begin every request that may begin; the replies are sent at the end of the turn."""
        if self.closed or self._transfer is not None:
            return
        self.now = monotonic()
        unsent_max = self._limits.unsent_bytes
        try:
            while self._exchanges and self._exchanges[0].reply is not None:
                exchange = self._exchanges.popleft()
                assert exchange.reply is not None
                self._finish(exchange, exchange.reply)
            while self._at < len(self._data) and not self._last and self._outbox.byte_count <= unsent_max:
                head = read_request_head(self._data, self._at, self._limits)
                if head is None or not self._begin(Exchange(self, head)):
                    break
        except InvalidRequest as error:
            if not self._exchanges:  # otherwise it is read again when they have been answered
                self._refuse(error, None)
        except Exception:
            log.exception("a connection is cut, since its requests could not be read")
            self.close()
            return
        self._service.unsent.add(self)

    def send(self) -> None:
        """Send all replies that are there, and wait for what comes next."""
        is_held, self._held = self._held or self._outbox.byte_count > self._limits.unsent_bytes, False
        self._send()
        if is_held and not self._outbox.byte_count:
            self._service.poller.wake(lambda: self._service.go_on(self))  # with the next ones, after others

    def plain_get(self) -> PlainGet | None:
        """The request at hand, if it is a plain GET and may begin. Unless it is answered, `proceed` will begin it."""
        may_begin = self._at < len(self._data) and not self._exchanges and not self._last and not self.closed
        if not may_begin or self._role < Role.READER or self._outbox.byte_count > self._limits.unsent_bytes:
            return None
        return read_plain_get(self._data, self._at, self._limits)

    def answer_plain_get(self, request: PlainGet, head: bytes, data: Data) -> None:
        """Answer what `plain_get` gave."""
        self._at = request.end
        self._phase = _Phase.IDLE
        self._outbox.add(head)
        self._outbox.add(data)

    def _begin(self, exchange: Exchange) -> bool:
        """Begin a request. False if no other may follow now: this one has to wait, or its body has not arrived."""
        head = exchange.head
        try:
            exchange.request = request = read_request(head)
            operation = request.operation
            if self._exchanges and self._must_wait(exchange):
                return False
            if self._role < operation.role:
                raise Forbidden(
                    f"this takes the role {operation.role.name.lower()}, and you have {self._role.name.lower()}",
                    hint="[roles] in the configuration says who may do what",
                )
            if head.fields.has_body or operation.body is not Body.NOTHING:
                check_body(head, operation.body, self._limits)
        except RustordError as error:
            return self._refuse_one(exchange, error)
        self._phase = _Phase.IDLE
        if head.fields.has_body:
            return self._begin_body(exchange)
        self._at = head.end
        self._dispatch(exchange)
        return self._transfer is None

    def _must_wait(self, exchange: Exchange) -> bool:
        """Whether the request may not begin before all others have been answered."""
        return (
            not exchange.request.operation.changes
            or not self._exchanges[-1].request.operation.changes
            or exchange.head.fields.expects_continue
            or self._streams(exchange)
            or len(self._exchanges) >= self._limits.pipelined
            or self._is_too_much(exchange.head.fields.content_length or 0)
        )

    def _is_too_much(self, length: int) -> bool:
        """Whether a body is too long to be kept beside those that are under way."""
        length_max = self._limits.small_body_bytes
        if length <= length_max // self._limits.pipelined:
            return False  # so many of these are no more
        return length + sum(other.head.fields.content_length or 0 for other in self._exchanges) > length_max

    def _streams(self, exchange: Exchange) -> bool:
        fields = exchange.head.fields
        return fields.chunked or (fields.content_length or 0) > self._limits.small_body_bytes

    def _refuse_one(self, exchange: Exchange, error: RustordError) -> bool:
        if self._exchanges:
            return False  # their replies come first
        if exchange.head.fields.has_body:  # which would have to be read just to be thrown away
            self._refuse(error, exchange.head)
            return False
        self._at = exchange.head.end
        self._last = not exchange.head.keep_alive
        self._reply(problem(error), exchange.head)
        self._service.traffic.requests_refused[error.http_status] += 1
        return True

    def _refuse(self, error: RustordError, head: RequestHead | None) -> None:
        """Answer with an error, and read no further request: it cannot be told where the next one begins."""
        self._last = self._unread = True
        self._reply(problem(error), head)
        self._service.traffic.requests_refused[error.http_status] += 1

    # Small bodies

    def _begin_body(self, exchange: Exchange) -> bool:
        if self._streams(exchange):
            self._begin_receiving(exchange)
            return False
        start = exchange.head.end
        self._at = start + (exchange.head.fields.content_length or 0)
        exchange.body = self._data[start : self._at]
        self._service.traffic.received_bytes += len(exchange.body)
        if self._at <= len(self._data):
            self._dispatch(exchange)
            return True
        if exchange.head.fields.expects_continue and not exchange.body:
            self._outbox.add(CONTINUE)
        self._collecting, self._pieces = exchange, [exchange.body]
        self._missing = self._at - len(self._data)
        self._data, self._at = b"", 0
        return False

    def _collect(self, data: bytes) -> None:
        self._pieces.append(data)
        self._missing -= len(data)
        self._service.traffic.received_bytes += len(data)
        if self._missing:
            return
        exchange, self._collecting = self._collecting, None
        assert exchange is not None
        exchange.body, self._pieces = b"".join(self._pieces), []
        self.now = exchange.complete = monotonic()
        self._dispatch(exchange)
        self._service.go_on(self)

    # Answering

    def _dispatch(self, exchange: Exchange) -> None:
        self._last = not exchange.head.keep_alive
        try:
            reply = self._service.handlers[exchange.request.operation.id](exchange)
        except Exception as error:
            reply = self._service.failure(exchange, error)
        if reply is not None and not self._exchanges:
            self._finish(exchange, reply)
            return
        exchange.reply = exchange.reply or reply
        self._exchanges.append(exchange)

    def has_answer(self) -> None:
        """An exchange has been answered: take it up, together with all others of this turn."""
        self._service.go_on(self)

    def _finish(self, exchange: Exchange, reply: Reply) -> None:
        self._reply(reply, exchange.head)
        self._service.count(exchange, reply.status)

    def _reply(self, reply: Reply, head: RequestHead | None) -> None:
        self._outbox.add(self._head(reply, head))
        if reply.body and (head is None or head.method != "HEAD"):
            self._outbox.add(reply.body)
            self._service.traffic.sent_bytes += len(reply.body)

    def _head(self, reply: Reply, head: RequestHead | None) -> bytes:
        more = date_line(int(time()))
        if (self._last or self._service.draining) and not self._exchanges:
            self._last = True
            more += b"Connection: close\r\n"
        elif head is not None and head.old:
            more += b"Connection: keep-alive\r\n"
        return reply.head(more)

    def _send(self) -> None:
        """Send what the peer takes, and wait for whatever must happen next."""
        if self.closed or self._transfer is not None:
            return
        unsent = self._outbox.byte_count
        try:
            all_sent = self._outbox.send()
        except OSError:
            self.close()
            return
        if not all_sent:
            if self._phase is not _Phase.PEER or self._outbox.byte_count < unsent:
                self._wait(_Phase.PEER, self.now + self._limits.send_s)
            self._watch(reading=False, writing=True)
        elif self._exchanges:
            self._wait(_Phase.STORE, math.inf)
            self._watch(reading=not self._last and len(self._data) - self._at < self._limits.read_bytes, writing=False)
        elif self._last:
            self._end()
        else:
            self._await_input()

    def _await_input(self) -> None:
        if self._collecting is not None:
            if self._phase is not _Phase.BODY:
                self._wait(_Phase.BODY, self.now + self._limits.body_s)
        elif self._at < len(self._data):
            if self._phase is not _Phase.HEAD:
                self._wait(_Phase.HEAD, self.now + self._limits.head_s)
        elif self._service.draining:
            self.close()
            return
        else:
            self._wait(_Phase.IDLE, self.now + self._limits.idle_s)
        self._watch(reading=True, writing=False)

    def _end(self) -> None:
        """All has been said."""
        if not self._unread:
            self.close()
            return
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._wait(_Phase.LINGER, self.now + self._limits.linger_s)
        self._watch(reading=True, writing=False)

    # Large bodies

    def _begin_receiving(self, exchange: Exchange) -> None:
        with suppress(OSError):  # which the transfer will meet again
            self._outbox.send()
        if self._outbox.byte_count:
            self._held = True  # the peer has to read first what it asked for before
            return
        fields = exchange.head.fields
        try:
            put = self._service.operations.put_of(exchange)
        except RustordError as error:
            self._refuse(error, exchange.head)
            return
        receiving = Receiving(
            self._sock, self._service.store, put, fields.content_length, self._limits, confirm=fields.expects_continue
        )
        receiving.begin_with(self._data[exchange.head.end :])
        self._data, self._at = b"", 0
        self._last = not exchange.head.keep_alive
        self._exchanges.append(exchange)
        self._service.traffic.uploads += 1
        self._begin_transfer(receiving, self._service.upload_slots)

    def send_object(self, exchange: Exchange, reply: Reply, record: Record, start: int, end: int) -> None:
        """Answer with a range of an Object that is too long for one piece; ``reply`` has its head.

        ``record`` is pinned, and let go of in the end.
        """
        exchange.reply = reply
        sending = Sending(
            self._sock,
            self._service.store,
            record,
            start,
            end,
            before=self._outbox.take(),
            head=self._head(reply, exchange.head),
            limits=self._limits,
        )
        self._service.traffic.downloads += 1
        self._begin_transfer(sending, self._service.download_slots)

    def _begin_transfer(self, transfer: Receiving | Sending, slots: Slots) -> None:
        self._transfer = transfer
        self._watch(reading=False, writing=False)
        self._wait(_Phase.STORE, math.inf)

        def begin() -> bool:
            if self.closed:
                return False
            self._slots = slots
            self._next_turn()
            return True

        slots.acquire(begin)

    def _next_turn(self) -> None:
        assert self._transfer is not None
        self._watch(reading=False, writing=False)
        self._wait(_Phase.STORE, math.inf)
        self._in_thread = True
        self._service.in_thread(self._transfer.step, self._turned)

    def _turned(self, outcome: Wait | BaseException) -> None:
        self._in_thread = False
        transfer = self._transfer
        assert transfer is not None
        if self.closed:
            self._let_go()
        elif outcome is Wait.TURN:
            self._next_turn()
        elif outcome is Wait.READABLE:
            self._wait(_Phase.BODY, transfer.deadline())
            self._watch(reading=True, writing=False)
        elif outcome is Wait.WRITABLE:
            self._wait(_Phase.PEER, transfer.deadline())
            self._watch(reading=False, writing=True)
        else:
            self._end_transfer()
            failure = None if isinstance(outcome, Wait) else outcome
            if isinstance(transfer, Receiving):
                self._received(transfer, failure)
            else:
                self._sent(transfer, failure)

    def _end_transfer(self) -> None:
        transfer, self._transfer = self._transfer, None
        traffic = self._service.traffic
        if isinstance(transfer, Receiving):
            traffic.uploads -= 1
            traffic.received_bytes += transfer.received
        elif transfer is not None:
            traffic.downloads -= 1
            traffic.sent_bytes += transfer.sent
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.release()

    def _received(self, receiving: Receiving, failure: BaseException | None) -> None:
        exchange = self._exchanges[0]
        if isinstance(failure, (PeerGone, OSError)):
            self._break_off(exchange, failure)
            return
        exchange.complete = monotonic()
        if failure is None:
            self._data = receiving.leftover
            self._service.operations.submit(exchange, receiving.put)
        else:
            self._last = self._unread = True
            exchange.reply = self._service.failure(exchange, failure)
        self._service.go_on(self)

    def _sent(self, sending: Sending, failure: BaseException | None) -> None:
        exchange = self._exchanges[0]
        if failure is None:
            assert exchange.reply is not None
            self._exchanges.popleft()
            self._service.count(exchange, exchange.reply.status)
        elif sending.started or isinstance(failure, OSError):
            # A cut is the only way to say that what the peer has got is not the whole Object.
            self._break_off(exchange, failure)
            return
        else:
            self._outbox.add(sending.before)
            exchange.reply = self._service.failure(exchange, failure)
        self._service.go_on(self)

    def _break_off(self, exchange: Exchange, why: BaseException) -> None:
        level = logging.INFO if isinstance(why, (PeerGone, OSError, NotFound)) else logging.ERROR
        log.log(
            level,
            "%s %s was broken off: %s",
            exchange.head.method,
            exchange.head.target,
            str(why) or "the peer is gone",
        )
        self._service.traffic.broken_off += 1
        self.close()

    # Waiting and ending

    def writable(self) -> None:
        if self._transfer is not None:
            self._next_turn()
        else:
            self._service.go_on(self)

    def _wait(self, phase: _Phase, deadline: float) -> None:
        self._phase, self.deadline = phase, deadline

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading is not self._reading or writing is not self._writing:
            self._reading, self._writing = reading, writing
            self._service.poller.watch(self._fd, self, reading=reading, writing=writing)

    def expire(self) -> None:
        """The deadline has passed: say so to a peer that is still sending, and end."""
        if self.closed:
            return
        self.now = monotonic()
        if self._phase not in (_Phase.HEAD, _Phase.BODY):
            if self._transfer is not None:
                self._break_off(self._exchanges[0], TimeoutError("the peer reads too slowly"))
            self.close()
            return
        if self._transfer is not None:
            self._transfer.abort()
            self._end_transfer()
            self._exchanges.clear()
            self._service.traffic.broken_off += 1
        self._collecting = None
        self._refuse(RequestTimeout("the request came too slowly", hint="send it faster, or in smaller parts"), None)
        self._send()

    def drain(self) -> None:
        """End as soon as what has begun is answered."""
        if self._phase is _Phase.IDLE:
            self.close()
        elif self._phase is _Phase.NEW:
            self.deadline = min(self.deadline, monotonic() + _FIRST_S)

    def close(self) -> None:
        """End at once. What was given to the writer still happens; a large body under way leaves nothing behind."""
        if self.closed:
            return
        self.closed = True
        self._watch(reading=False, writing=False)
        if self._in_thread:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # so that the thread comes back, and lets go
        else:
            self._let_go()

    def _let_go(self) -> None:
        if self._transfer is not None:
            self._transfer.abort()
            self._end_transfer()
        self._sock.close()
        self._on_end(self)
