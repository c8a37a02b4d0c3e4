from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rustord.client import Client
from rustord.client.aio import AsyncClient
from rustord.errors import (
    InvalidRequest,
    NoSpace,
    NotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    RustordError,
    Unavailable,
    Unreachable,
)
from tests.client.liar import Liar
from tests.daemon import Daemon, make_pool

MIB = 1 << 20


@pytest.fixture
def daemon(image: Path, make_daemon: Callable[..., Daemon]) -> Daemon:
    make_pool(image)
    daemon = make_daemon(image)
    daemon.start()
    return daemon


async def parts(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    yield b""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def test_objects_are_stored_listed_read_and_deleted(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.wire.request._PAGE", 3)

    async def main() -> None:
        async with AsyncClient(daemon.socket) as client:
            stored = await client.put(b"hello", name="a/ü", content_type="a/b", attributes={"k": "ä"})
            assert await client.get("a/ü") == await client.get(stored.uuid) == b"hello"
            assert await client.get("a/ü", start=1, end=3) == b"el"
            info = await client.stat("a/ü")
            assert (info.uuid, info.name, info.size, info.attributes) == (stored.uuid, "a/ü", 5, {"k": "ä"})
            assert (await client.manifest(stored.uuid))["size"] == 5
            for index in range(7):
                await client.put(b"", name=f"b/{index}")
            assert [entry.name async for entry in client.names("b/")] == [f"b/{index}" for index in range(7)]
            assert len([entry async for entry in client.objects()]) == 8
            assert [entry.name async for entry in client.names(after="b/1", limit=4)] == ["b/2", "b/3", "b/4", "b/5"]
            with pytest.raises(PreconditionFailed):
                await client.put(b"", name="b/0", replace=False)
            with pytest.raises(RangeNotSatisfiable):
                await client.get("a/ü", start=5)
            await client.delete("a/ü", if_match=stored.etag)
            for call in (client.get, client.stat, client.delete):
                with pytest.raises(NotFound):
                    await call("a/ü")

    asyncio.run(main())


def test_whatever_the_blocking_client_can_do_is_done_in_a_thread(daemon: Daemon) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.socket) as client:
            await client.call(Client.create_volume, "disk", size=MIB)
            pool, volumes = await asyncio.gather(client.call(Client.pool), client.call(Client.volumes))
            assert (pool["state"], [volume["name"] for volume in volumes]) == ("ok", ["disk"])
            with pytest.raises(PreconditionFailed, match="disk already"):
                await client.call(Client.create_volume, "disk", MIB)

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1, 262145, MIB, 5 * MIB + 3])
def test_data_may_come_whole_or_piece_by_piece(daemon: Daemon, size: int) -> None:
    async def main() -> None:
        data = os.urandom(size)
        async with AsyncClient(daemon.socket) as client:
            for source in (data, bytearray(data), parts(data)):
                assert (await client.put(source, name="n")).size == size
                assert await client.get("n") == data
                assert b"".join([piece async for piece in client.pieces("n")]) == data

    asyncio.run(main())


def test_tasks_take_turns_on_one_connection(daemon: Daemon) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.socket) as client:

            async def use(number: int) -> None:
                data = b"%d" % number * 100_000
                await client.put(data, name=f"{number}")
                assert await client.get(f"{number}") == data

            async with asyncio.TaskGroup() as group:
                for number in range(10):
                    group.create_task(use(number))

    asyncio.run(main())


def test_what_is_broken_off_leaves_nothing_behind(daemon: Daemon) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(300_000)
            await asyncio.sleep(0.01)

    async def failing(error: Exception) -> AsyncIterator[bytes]:
        yield bytes(300_000)
        raise error

    async def main() -> None:
        data = os.urandom(4 * MIB)
        async with AsyncClient(daemon.socket) as client:
            await client.put(data, name="n")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.put(endless(), name="m")
            for error in (ZeroDivisionError(), ConnectionResetError(), TimeoutError()):
                with pytest.raises(type(error)) as caught:
                    await client.put(failing(error), name="m")
                assert caught.value is error
            async for piece in client.pieces("n"):
                assert data.startswith(piece)
                break
            assert await client.get("n") == data
            assert [entry.name async for entry in client.names()] == ["n"]

    asyncio.run(main())


def test_refusals_arrive_whatever_was_being_sent(daemon: Daemon) -> None:
    async def main() -> None:
        data = bytes(100 * MIB)
        async with AsyncClient(daemon.socket) as client:
            for source in (data, parts(data, MIB)):
                with pytest.raises(NoSpace):
                    await client.put(source, name="n")
            with pytest.raises(InvalidRequest):
                await client.put(b"", name="\x01")
            assert [entry async for entry in client.objects()] == []

    asyncio.run(main())


def test_a_connection_that_was_lost_is_made_again(daemon: Daemon) -> None:
    async def main() -> None:
        async with AsyncClient(daemon.socket) as client:
            await client.put(b"data", name="n")
            daemon.stop()
            with pytest.raises(Unreachable):
                await client.get("n")
            daemon.start()
            assert await client.get("n") == b"data"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Unreachable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123456789", Unavailable),
        (b"SSH-2.0-OpenSSH\r\n\r\n", RustordError),
        (b"X" * 100_000, RustordError),
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes, error: type[RustordError]) -> None:
    async def main(path: Path) -> None:
        async with AsyncClient(path) as client:
            with pytest.raises(error):
                await client.get("n")

    with Liar(tmp_path / "s", answer) as liar:
        asyncio.run(main(liar.path))


def test_a_silent_daemon_is_given_up(tmp_path: Path) -> None:
    async def main(path: Path) -> None:
        async with AsyncClient(path, timeout_s=0.1) as client:
            with pytest.raises(Unreachable, match="silent"):
                await client.stat("x")

    with Liar(tmp_path / "s", None) as liar:
        asyncio.run(main(liar.path))
