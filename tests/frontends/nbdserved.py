"""A store on an image file, served over NBD by a thread of the test's own process, and a client that does as told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import rustord
from rustord.frontends.exports import Exports
from rustord.frontends.handover import Handover
from rustord.frontends.nbd import Left, NbdServer
from rustord.frontends.peer import Peer
from rustord.frontends.workers import Workers
from rustord.volumes import Volumes
from rustord.wire.api import Role
from rustord.wire.limits import NbdLimits
from rustord.writer import Writer
from tests.daemon import make_pool
from tests.frontends.served import SECONDS_MAX
from tests.wire.peer import Chunk, OptionReply, info_request, option, option_replies, replies, request

GO = 7


class NbdPeer:
    """A raw connection. It has been greeted, and has said its flags, unless told otherwise."""

    def __init__(self, path: Path, *, flags: int | None = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.settimeout(SECONDS_MAX)
            self.sock.connect(str(path))
            if flags is not None:
                assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
                self.send(struct.pack(">I", flags))
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> NbdPeer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            assert part, f"the connection ended after {data[:100]!r}"
            data += part
        return data

    def is_ended(self) -> bool:
        """Whether the server closes the connection, whatever it has sent before."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass
        return True

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """The replies to an option."""
        self.send(option(number, data))
        said = b""
        while True:
            head = self.receive(20)
            said += head + self.receive(int.from_bytes(head[16:], "big"))
            if (last := option_replies(said)[-1]).kind == 1 or last.kind >> 31:
                return option_replies(said)

    def go(self, name: str = "disk") -> NbdPeer:
        """Choose an export."""
        assert self.ask(GO, info_request(name))[-1].kind == 1
        return self

    def read(self, offset: int, length: int) -> Chunk:
        """One READ, with a simple reply."""
        self.send(request(0, offset, length, cookie=1))
        head = self.receive(16)
        error = int.from_bytes(head[4:8], "big")
        (reply,) = replies(head + (b"" if error else self.receive(length)), {1: length})
        return reply

    def one(self, command: int, offset: int = 0, length: int = 0, *, payload: bytes = b"") -> Chunk:
        """One request that has no data in its reply."""
        self.send(request(command, offset, length, cookie=1) + payload)
        (reply,) = replies(self.receive(16))
        return reply


class NbdServed:
    """A server with its store; ``path`` is its socket. It has an Object "disk" with ``data``, and nothing else."""

    def __init__(
        self,
        image: Path,
        path: Path,
        limits: NbdLimits,
        roles: Callable[[Peer], Role] | None,
        tcp_role: Role = Role.READER,
        *,
        data_blocks: int = 2048,
        with_workers: bool = True,
    ) -> None:
        make_pool(image)
        self.tcp_role = tcp_role
        self.with_workers = with_workers
        self.path = path
        self.limits = limits
        self.roles = roles
        self.store = rustord.open(image, directory=path.with_suffix(".index"))
        self.data = b"".join(bytes((number % 251,)) * 4096 for number in range(data_blocks))
        self.store.put(self.data, name="disk")
        self.writer = Writer(self.store)
        self.volumes = Volumes(self.store, self.writer)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="served")
        self._thread.start()
        assert self._started.wait(SECONDS_MAX)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self._start()
        self._started.set()
        await self._stop.wait()
        await self.server.close(2.0)

    async def _start(self) -> None:
        exports = Exports(self.store, self.writer, self.volumes)
        workers = Workers() if self.with_workers else None
        self.server = NbdServer(exports, self.roles, self.limits, self.tcp_role, workers)
        listener = socket.socket(socket.AF_UNIX)
        self.path.unlink(missing_ok=True)
        listener.bind(str(self.path))
        listener.listen(1024)
        await self.server.serve(listener)

    def restart(self) -> int:
        """Let another server take up the connections of this one; how many there are."""
        return asyncio.run_coroutine_threadsafe(self._restart(), self._loop).result(SECONDS_MAX)

    async def _restart(self) -> int:
        left = await self.server.close(2.0, leave=True)
        await self._start()
        return await self._resume(left)

    async def _resume(self, left: Sequence[Left]) -> int:
        # The manager that keeps them in between knows no more of them than a name.
        known = [(Handover.named(handover.name), sock) for handover, sock in left]
        await asyncio.to_thread(self.server.resume, [(handover, sock) for handover, sock in known if handover])
        return len(known)

    def restart_at_once(self, before: Callable[[], object], after: Callable[[], object]) -> None:
        """Let a server take up the connections of this one, and leave them at once for a third.

        Only the server in between is there from ``before`` to ``after``.
        """
        restarting = self._restart_at_once(before, after)
        asyncio.run_coroutine_threadsafe(restarting, self._loop).result(SECONDS_MAX)

    async def _restart_at_once(self, before: Callable[[], object], after: Callable[[], object]) -> None:
        left = await self.server.close(2.0, leave=True)
        await asyncio.to_thread(before)
        await self._start()
        await self._resume(left)
        left = await self.server.close(2.0, leave=True)
        await asyncio.to_thread(after)
        await self._start()
        await self._resume(left)

    def listen(self, tls: ssl.SSLContext | None) -> int:
        """Serve on the loopback's TCP, too; the port."""
        listener = socket.create_server(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        asyncio.run_coroutine_threadsafe(self.server.serve(listener, tls), self._loop).result(SECONDS_MAX)
        return port

    def connect(self, *, flags: int | None = 3) -> NbdPeer:
        return NbdPeer(self.path, flags=flags)

    def works(self) -> bool:
        """Whether a good client is served."""
        with self.connect() as peer:
            return peer.go().read(4096, 4096).data == self.data[4096:8192]

    def stop(self) -> None:
        """Stops the server, and closes the store."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive()
        if self.writer.is_alive():
            assert self.writer.close(SECONDS_MAX)
            self.store.close()
