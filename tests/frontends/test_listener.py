"""The Listener: everybody who connects is admitted, also after the process was out of file descriptors."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rustord.frontends import listener as module
from rustord.frontends.listener import Listener

SECONDS_MAX = 20


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen(200)
        yield sock


class Scarce:
    """A listening socket whose process has no file descriptor left, ``times`` times."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self._sock, self.times = sock, times

    def accept(self) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._sock.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), SECONDS_MAX))  # type: ignore[arg-type]


async def connect(path: str, count: int) -> list[socket.socket]:
    peers = []
    for _ in range(count):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(path)
        peers.append(peer)
    return peers


async def until(count: int, admitted: list[socket.socket]) -> None:
    while len(admitted) < count:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("count", [1, 150])
def test_everybody_is_admitted(listening: socket.socket, count: int) -> None:
    async def work() -> None:
        admitted: list[socket.socket] = []
        listener = Listener(listening, admitted.append)
        peers = await connect(listening.getsockname(), count)
        await until(count, admitted)
        listener.close()
        for sock in (*peers, *admitted):
            sock.close()

    run(work)


def test_it_goes_on_when_there_are_file_descriptors_again(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.001)

    async def work() -> None:
        admitted: list[socket.socket] = []
        scarce = Scarce(listening, 3)
        listener = Listener(scarce, admitted.append)  # type: ignore[arg-type]
        peers = await connect(listening.getsockname(), 1)
        await until(1, admitted)
        assert scarce.times == 0
        listener.close()
        for sock in (*peers, *admitted):
            sock.close()

    run(work)


def test_nobody_is_admitted_after_the_end(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.001)

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        path = listening.getsockname()
        scarce = Scarce(listening, 1)
        listener = Listener(scarce, lambda sock: sock.close())  # type: ignore[arg-type]
        with closing((await connect(path, 1))[0]):
            while scarce.times:
                await asyncio.sleep(0)
            listener.close()
            turned = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, turned.set)
            await turned.wait()  # behind the moment at which it would have listened again
        with socket.socket(socket.AF_UNIX) as peer, pytest.raises(ConnectionRefusedError):
            peer.connect(path)

    faults: list[dict[str, Any]] = []
    run(work)
    assert faults == []
