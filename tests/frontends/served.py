"""A store on an image file, served over HTTP by a thread of the test's own process; and what its replies say."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rustord
from rustord.admin import Admin
from rustord.frontends.http import HttpServer
from rustord.frontends.operations import openapi
from rustord.frontends.peer import Peer
from rustord.plugins import PluginManager
from rustord.repair import Repairer
from rustord.scrub import Scrub
from rustord.volumes import Volumes
from rustord.wire.api import Role
from rustord.wire.http1 import read_reply_head
from rustord.wire.limits import Limits
from rustord.writer import Writer

SECONDS_MAX = 20
"""What takes longer than this has failed."""


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the problem that it tells of."""
        assert self.headers["content-type"] == "application/problem+json", self
        return str(self.json()["code"])


class Peering:
    """A raw connection to the server: sends bytes as they are, and reads replies one by one."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(SECONDS_MAX)
        self._received = b""

    def __enter__(self) -> Peering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, data: bytes, *, head: bool = False) -> Reply:
        """Sends a request, and reads its reply."""
        self.send(data)
        return self.reply(head=head)

    def reply(self, *, head: bool = False) -> Reply:
        """The next reply; ``head``: it answers HEAD, so there is no body whatever its length."""
        while (parsed := read_reply_head(self._received)) is None:
            data = self.sock.recv(1 << 16)
            assert data, f"the connection ended after {self._received!r}"
            self._received += data
        self._received = self._received[parsed.end :]
        length = 0 if head or parsed.status in (100, 204, 304) else parsed.fields.content_length
        assert length is not None
        while len(self._received) < length:
            data = self.sock.recv(1 << 20)
            assert data, f"the connection ended {length - len(self._received)} bytes before its time"
            self._received += data
        body, self._received = self._received[:length], self._received[length:]
        return Reply(parsed.status, parsed.fields.by_name, body)

    def is_ended(self) -> bool:
        """Whether the server closes the connection, and has sent nothing more before."""
        return not self._received and not self.rest()

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        received, self._received = self._received, b""
        try:
            while data := self.sock.recv(1 << 20):
                received += data
        except ConnectionResetError:
            pass
        return received


class Served:
    """A server with its store; ``path`` is its socket."""

    def __init__(
        self, image: Path, path: Path, limits: Limits, roles: Callable[[Peer], Role] | None, slow_request_s: float
    ) -> None:
        self.path = path
        self.limits = limits
        self.store = rustord.open(image)
        self.writer = Writer(self.store)
        self.plugins = PluginManager()
        self.scrub = Scrub(self.store, Repairer(self.store, self.writer), path.with_suffix(".scrub"))
        self.volumes = Volumes(self.store, self.writer)
        self._roles = roles
        self._slow_request_s = slow_request_s
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="served")
        self._thread.start()
        assert self._started.wait(SECONDS_MAX)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.grace_s = 5.0
        self.server = HttpServer(
            self.store,
            self.writer,
            Admin(self.store, self.writer, self.plugins, self.scrub, self.volumes, lambda: b"rustord_up 1\n"),
            limits=self.limits,
            roles=self._roles,
            slow_request_s=self._slow_request_s,
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen(64)
        await self.server.serve(listener)
        self._started.set()
        await self._stop.wait()
        await self.server.close(self.grace_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """Stops the server, and closes the store."""
        self.drain(grace_s)
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive()
        if self.writer.is_alive():
            self.scrub.close()
            assert self.writer.close(SECONDS_MAX)
            self.store.close()

    def drain(self, grace_s: float) -> None:
        """Begins to stop the server."""
        self.grace_s = grace_s
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    def has_ended(self) -> bool:
        """Whether the server and its event loop have."""
        return not self._thread.is_alive()

    def connect(self) -> Peering:
        return Peering(self.path)

    def ask(self, method: str, target: str, body: bytes | None = None, **fields: str) -> Reply:
        """One request on a connection of its own; its reply must be one that the API's document knows."""
        with self.connect() as peer:
            reply = peer.ask(request(method, target, body, **fields), head=method == "HEAD")
        check_documented(method, target, reply)
        return reply

    def is_busy(self) -> bool:
        """Whether anything large is under way."""
        return bool(self.server.traffic.uploads or self.server.traffic.downloads)

    def free_blocks(self) -> int:
        return self.store.allocator.free_count(0)


def request(method: str, target: str, body: bytes | None = None, **fields: str) -> bytes:
    """A request's bytes; underscores in the names of ``fields`` are hyphens."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def check_documented(method: str, target: str, reply: Reply) -> None:
    """The OpenAPI document must list this status for this request, or every error (`default`)."""
    path = target.partition("?")[0]
    for template, item in json.loads(openapi())["paths"].items():
        fixed, brace, variable = template.partition("{")
        rest = variable.partition("}")[2]
        if path == template or (brace and path.startswith(fixed) and path.endswith(rest) and method.lower() in item):
            operation = item.get(method.lower())
            if operation is None:
                assert reply.status == 405
                return
            responses = operation["responses"]
            assert str(reply.status) in responses or reply.status >= 400, (template, method, reply)


@contextmanager
def no_more_threads(name: str = "") -> Iterator[None]:
    """As long as this goes on, the system has none; or none of that name."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if name in ("", thread.name):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def until(met: Callable[[], object], what: str) -> None:
    """Waits until it is so, which must be soon."""
    deadline = time.monotonic() + SECONDS_MAX
    while not met():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)
