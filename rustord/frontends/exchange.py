"""Exchange: one request, from its head to its reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from rustord.manifest import Data
from rustord.record import Record
from rustord.wire.api import PlainGet, Request
from rustord.wire.http1 import Reply, RequestHead


class Exchanging(Protocol):
    """What an exchange needs of its `Connection`."""

    now: float
    """The `monotonic` time at which it began to look at what has come."""

    def has_answer(self) -> None:
        """An exchange has been answered."""

    def proceed(self) -> None:
        """Take up what has been answered, and begin what can begin."""

    def send(self) -> None:
        """Send what can be sent."""

    def plain_get(self) -> PlainGet | None:
        """The request to go on with, if it is a plain GET."""

    def answer_plain_get(self, request: PlainGet, head: bytes, data: Data) -> None:
        """Answer it."""

    def send_object(self, exchange: Exchange, reply: Reply, record: Record, start: int, end: int) -> None:
        """Answer with a range of an Object that is too long for one piece; ``reply`` has its head.

        ``record`` is pinned, and let go of in the end.
        """


class Exchange:
    """``began`` and ``complete`` are the `monotonic` times at which the head and the whole body had arrived."""

    __slots__ = ("began", "body", "complete", "connection", "head", "reply", "request")

    request: Request

    def __init__(self, connection: Exchanging, head: RequestHead) -> None:
        self.connection = connection
        self.head = head
        self.body: Data = b""
        self.reply: Reply | None = None
        self.began = self.complete = connection.now

    def answer(self, reply: Reply) -> None:
        """Answer a request whose handler gave no reply at once. Called on the event loop."""
        self.reply = reply
        self.connection.has_answer()


Handler = Callable[[Exchange], Reply | None]
"""Carries out one operation: gives the reply, or sees to it that `Exchange.answer` is called later."""
