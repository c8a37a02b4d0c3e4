"""The client for asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from rustord.client.blocking import Client
from rustord.client.connection import DEFAULT_SOCKET, EXPECT_BYTES, HEAD_BYTES_MAX, Connection, SourceFailed
from rustord.errors import Unavailable
from rustord.manifest import Data
from rustord.wire import request as ask
from rustord.wire.http1 import ReplyHead, read_reply_head
from rustord.wire.problem import read_problem
from rustord.wire.request import Info, Listing, Request, Stored

P = ParamSpec("P")
T = TypeVar("T")

_READ_BYTES = 256 << 10


class AsyncClient(Connection):
    """A connection to the daemon, made when it is needed, and again when it was lost.

    Any number of tasks may use it: their requests take turns. Use several for requests at the same time.
    """

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_SOCKET, *, timeout_s: float = 300.0) -> None:
        """``timeout_s``: how long the daemon may stay silent, unless it is asked for what takes long."""
        super().__init__(path, timeout_s=timeout_s)
        self._silent_s = timeout_s
        self._turn = asyncio.Lock()
        self._left = 0
        """Bytes of the reply under way that are still to be read; -1 before its head."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Objects

    async def put(
        self,
        data: Data | AsyncIterable[Data],
        *,
        name: str = "",
        content_type: str = "",
        attributes: Mapping[str, str] | None = None,
        replace: bool = True,
        if_match: str = "",
    ) -> Stored:
        """Store an Object, as `rustord.client.Client.put`; ``data`` may come piece by piece."""
        request = ask.store(name, content_type, attributes or {}, replace, if_match)
        return ask.read_stored(await self._whole(request, data))

    async def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """The data of an Object, or the part of it from ``start`` to before ``end``."""
        return await self._whole(ask.fetch(key, start, end))

    async def pieces(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The same piece by piece. Raises Unavailable if the rest does not come: what came is not the Object.

        It has its turn until the last piece: a task that asks for something else in between waits for itself.
        """
        async with self._reply(ask.fetch(key, start, end)):
            while self._left:
                yield await self._some()

    async def stat(self, key: str) -> Info:
        """An Object's metadata. Raises NotFound."""
        async with self._reply(ask.look(key)) as head:
            pass
        return ask.read_looked(head, key)

    async def delete(self, key: str, *, if_match: str = "") -> None:
        """Delete an Object; on return its blocks have been erased. Raises NotFound, PreconditionFailed."""
        await self._whole(ask.delete(key, if_match))

    async def manifest(self, uuid: str) -> dict[str, Any]:
        """All that is known of an Object, with the extents that hold it."""
        return dict(json.loads(await self._whole(ask.manifest(uuid))))

    def names(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> AsyncIterator[Stored]:
        """Objects that have a name with this ``prefix``, by name, from behind ``after`` on; at most ``limit``."""
        return self._list(Listing("/v1/names", {"prefix": prefix, "after": after}, limit))

    def objects(self, *, after: str = "", limit: int | None = None) -> AsyncIterator[Stored]:
        """All Objects by uuid, from behind the uuid ``after`` on; at most ``limit``."""
        return self._list(Listing("/v1/objects", {"after": after}, limit))

    async def _list(self, listing: Listing) -> AsyncIterator[Stored]:
        while not listing.done:
            async with self._reply(listing.request) as head:
                page = listing.feed(head, await self._body())
            for stored in page:
                yield stored

    # The daemon

    async def call(self, method: Callable[Concatenate[Client, P], T], *args: P.args, **keywords: P.kwargs) -> T:
        """Whatever else `rustord.client.Client` can do: ``await client.call(Client.create_volume, "vm", 1 << 30)``.

        It runs in a thread, on a connection of its own, and to its end, also if nobody waits for it any more.
        """

        def run() -> T:
            with Client(self._path, timeout_s=self._timeout_s) as client:
                return method(client, *args, **keywords)

        return await asyncio.to_thread(run)

    # Requests

    async def _whole(self, request: Request, data: Data | AsyncIterable[Data] | None = None) -> bytes:
        async with self._reply(request, data):
            return await self._body()

    @asynccontextmanager
    async def _reply(
        self, request: Request, data: Data | AsyncIterable[Data] | None = None
    ) -> AsyncIterator[ReplyHead]:
        """The head of the reply, and the connection for its body. Raises what the daemon answered if it is an error."""
        async with self._turn:
            self._left = -1
            ends = False
            try:
                head = await self._ask(request, data)
                ends = head.fields.closes
                self._left = 0 if request.method == "HEAD" else head.fields.content_length or 0
                if head.status >= 400 and request.method != "HEAD":
                    raise read_problem(head.status, await self._body())
                yield head
            finally:
                if ends or self._left:  # broken off somewhere in between
                    self.close()

    async def _ask(self, request: Request, data: Data | AsyncIterable[Data] | None) -> ReplyHead:
        try:
            await self._connect()
            self._silent_s = self._silence_s(request)
            if data is None:
                await self._send(request.head())
            elif isinstance(data, (bytes, bytearray, memoryview)):
                if refused := await self._send_data(request, memoryview(data).cast("B")):
                    return refused
            else:
                await self._send(request.head("Transfer-Encoding: chunked"))
                with suppress(BrokenPipeError, ConnectionResetError):  # it listens no more, and its reply says why
                    await self._send_chunks(data)
            return await self._head()
        except OSError as error:
            raise self._unreachable(error) from error
        except SourceFailed as failed:
            raise failed.error from None

    async def _send_data(self, request: Request, data: memoryview) -> ReplyHead | None:
        length = f"Content-Length: {len(data)}"
        if len(data) < EXPECT_BYTES:
            await self._send(request.head(length))
        else:
            await self._send(request.head(length, "Expect: 100-continue"))
            head = await self._head()
            if head.status != 100:
                return head
        with suppress(BrokenPipeError, ConnectionResetError):
            for at in range(0, len(data), _READ_BYTES):
                await self._send(data[at : at + _READ_BYTES])
        return None

    async def _send_chunks(self, data: AsyncIterable[Data]) -> None:
        async for piece in _pieces(data):
            if piece:
                await self._send(b"%x\r\n" % len(piece))
                await self._send(piece)
                await self._send(b"\r\n")
        await self._send(b"0\r\n\r\n")

    async def _head(self) -> ReplyHead:
        while (head := read_reply_head(self._received)) is None:
            data = await self._receive()
            if not data or len(self._received) > HEAD_BYTES_MAX:
                raise ConnectionResetError("no whole reply came")
            self._received += data
        self._received = self._received[head.end :]
        return head

    async def _body(self) -> bytes:
        pieces = []
        while self._left:
            pieces.append(await self._some())
        return b"".join(pieces)

    async def _some(self) -> bytes:
        """A piece of the body of the reply under way."""
        try:
            data, self._received = self._received or await self._receive(), b""
        except OSError as error:
            raise self._unreachable(error) from error
        if not data:
            raise Unavailable(f"the daemon broke off {self._left} bytes before the end", hint="its log says why")
        data, self._received = data[: self._left], data[self._left :]
        self._left -= len(data)
        return data

    # The socket

    async def _connect(self) -> None:
        self._close_unless_fresh()
        if self._sock is not None:
            return None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        async with asyncio.timeout(self._timeout_s):
            while True:
                try:
                    return await asyncio.get_running_loop().sock_connect(self._sock, self._path)
                except BlockingIOError:  # the daemon has not yet accepted those who came before
                    await asyncio.sleep(0.01)

    async def _send(self, data: Data) -> None:
        assert self._sock is not None
        async with asyncio.timeout(self._timeout_s):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def _receive(self) -> bytes:
        assert self._sock is not None
        async with asyncio.timeout(self._silent_s):
            return await asyncio.get_running_loop().sock_recv(self._sock, _READ_BYTES)


async def _pieces(data: AsyncIterable[Data]) -> AsyncIterator[Data]:
    pieces = aiter(data)
    while True:
        try:
            piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except OSError as error:
            raise SourceFailed(error) from None
        yield piece
