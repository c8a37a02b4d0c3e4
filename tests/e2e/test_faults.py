"""A real device that fails under a daemon that serves: on read, on write, on flush, and for good.

What was acknowledged is never lost, what was not is whole or absent, the pool says what is wrong and why, and the
other devices go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rustord.client import Client
from rustord.errors import DeviceError, RustordError
from tests.conftest import FaultyLoop, LoopDevices
from tests.daemon import MIB, Daemon, make_pool

pytestmark = pytest.mark.root

MakeDaemon = Callable[..., Daemon]

CONTIGUOUS = ""
MIRRORED = "[placer]\npolicy = 'mirrored'\n"


class Pool:
    """A daemon over a device that fails on demand, which is device 0, and good ones; and what it has acknowledged."""

    def __init__(self, faulty: FaultyLoop, others: list[Path], make_daemon: MakeDaemon, config: str) -> None:
        self.faulty = faulty
        self.devices = [faulty.path, *others]
        make_pool(*self.devices)
        self.daemon = make_daemon(*self.devices, config=config).start()
        self.stored: dict[str, bytes] = {}

    def put(self, count: int, size: int = 20_000) -> list[RustordError]:
        """Store Objects one by one; how those failed that did."""
        errors: list[RustordError] = []
        with Client(self.daemon.socket) as client:
            for _ in range(count):
                data = os.urandom(size)
                try:
                    self.stored[client.put(data).uuid] = data
                except RustordError as error:
                    errors.append(error)
        return errors

    def check(self) -> None:
        """All that was acknowledged is there, and whatever else is there is whole."""
        with Client(self.daemon.socket) as client:
            there = {found.uuid: client.get(found.uuid) for found in client.objects()}
        assert {uuid: there.get(uuid) for uuid in self.stored} == self.stored

    def delete_all(self) -> None:
        with Client(self.daemon.socket) as client:
            for found in list(client.objects()):
                client.delete(found.uuid)
        self.stored.clear()

    def states(self) -> list[str]:
        return [device["state"] for device in self.daemon.devices()]

    def problems(self) -> str:
        return " ".join(self.daemon.pool()["problems"])


@pytest.fixture
def pool(
    faulty_loop: FaultyLoop, make_loop: LoopDevices, make_daemon: MakeDaemon, request: pytest.FixtureRequest
) -> Pool:
    """A pool of three devices, of which the first can fail; a parameter says how it places what is stored."""
    config = getattr(request, "param", CONTIGUOUS)
    return Pool(faulty_loop, [make_loop(16 * MIB) for _ in range(2)], make_daemon, config)


@pytest.mark.parametrize(
    ("pool", "operations"),
    [
        pytest.param(CONTIGUOUS, ("flush",), id="contiguous-flush"),
        pytest.param(MIRRORED, ("write",), id="mirrored-write"),
        pytest.param(CONTIGUOUS, ("write",), id="contiguous-write", marks=pytest.mark.long),
        pytest.param(MIRRORED, ("flush",), id="mirrored-flush", marks=pytest.mark.long),
        pytest.param(MIRRORED, ("write", "flush"), id="mirrored-both", marks=pytest.mark.long),
    ],
    indirect=["pool"],
)
def test_a_device_that_cannot_keep_what_is_written(pool: Pool, operations: tuple[str, ...]) -> None:
    assert pool.put(12) == []
    with pool.faulty.failing(*operations):
        (error,) = pool.put(12)
    assert isinstance(error, DeviceError)
    assert f"{pool.faulty.path}: flushing failed: Input/output error" in error.message
    # The fault is over, and the next flush of the device would succeed; but what the last one lost stays lost.
    assert pool.put(12) == []
    assert pool.states() == ["failed", "online", "online"]
    assert "device 0 is failed: flushing failed: Input/output error" in pool.problems()
    pool.faulty.forget()
    pool.check()

    assert pool.daemon.stop() == 0
    pool.daemon.start()
    assert pool.states() == ["online"] * 3
    pool.check()
    assert pool.put(12) == []
    free = sum(device["free_bytes"] for device in pool.daemon.devices())
    pool.delete_all()
    assert pool.daemon.pool()["free_bytes"] > free


@pytest.mark.parametrize("pool", [CONTIGUOUS, MIRRORED], indirect=True, ids=["contiguous", "mirrored"])
def test_a_device_that_cannot_be_read(pool: Pool) -> None:
    assert pool.put(12) == []
    pool.faulty.forget()
    mirrored = "mirrored" in pool.daemon.directory.joinpath("conf.d/test.toml").read_text()
    lost: dict[str, str] = {}
    with pool.faulty.failing("read"), Client(pool.daemon.socket) as client:
        for uuid, data in pool.stored.items():
            try:
                assert client.get(uuid) == data
            except DeviceError as error:
                lost[uuid] = error.message
        assert pool.put(12) == []
    assert bool(lost) != mirrored
    for uuid, said in lost.items():
        assert f"Object {uuid}, bytes 0 to 19999, cannot be read: {pool.faulty.path}: reading" in said
    pool.check()
    pool.daemon.restart()
    pool.check()


@pytest.mark.parametrize("pool", [MIRRORED], indirect=True, ids=["mirrored"])
def test_a_device_that_dies(pool: Pool) -> None:
    assert pool.put(12) == []
    pool.faulty.forget()
    pool.faulty.die()
    assert len(pool.put(12)) == 1
    assert pool.put(12) == []
    assert pool.states() == ["failed", "online", "online"]
    assert "device 0 is failed: flushing failed: " in pool.problems()
    pool.check()
    assert pool.daemon.stop() == 0
    pool.daemon.start()
    assert pool.states() == ["missing", "online", "online"]
    assert f"{pool.faulty.path} is left out: " in pool.daemon.log
    assert pool.put(12) == []
    pool.check()
