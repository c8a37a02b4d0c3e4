"""What the guards let through, and what not; `tests/e2e/test_hostile.py` has the whole of it, in a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rustord.errors import NoSpace, PluginError
from rustord.extent import Extent
from rustord.guard import GuardedBackend, GuardedKeyGen, GuardedPlacer
from rustord.keygen import HashKeyGen
from rustord.keystore.sqlite import SqliteBackend
from rustord.placer import Contiguous, Mirrored
from rustord.testing import KeyGenContract, KeyStoreContract, PlacerContract
from tests.simulation import Simulation

FAR = "'far' (of rustord-far 1.2)"


class TestKeyGen(KeyGenContract):
    """A guard takes nothing from what is right."""

    factory = staticmethod(lambda options: GuardedKeyGen(HashKeyGen("sha256"), FAR))


class TestPlacer(PlacerContract):
    factory = staticmethod(lambda options: GuardedPlacer(Contiguous(), FAR))


class TestKeyStore(KeyStoreContract):
    factory = staticmethod(lambda options: GuardedBackend(SqliteBackend(), FAR))


@pytest.mark.parametrize("algorithm", ["", "x" * 33, "größe", "a\nb", "a:b", None, 7])
def test_a_keygen_whose_algorithm_cannot_be_recorded(algorithm: Any) -> None:
    with pytest.raises(PluginError, match="the keygen of plugin 'far'"):
        GuardedKeyGen(HashKeyGen(algorithm, hashlib.sha256), FAR)


@pytest.mark.parametrize(("name", "copies"), [("", 1), ("x" * 33, 1), ("x", 0), ("x", 17), ("x", None), ("x", 1.0)])
def test_a_placer_that_cannot_be_used(name: str, copies: Any) -> None:
    placer = Contiguous()
    placer.name, placer.copies = name, copies
    with pytest.raises(PluginError, match="the placer of plugin 'far'"):
        GuardedPlacer(placer, FAR)


def test_a_uuid_that_an_object_has_is_refused(simulation: Simulation) -> None:
    given: Iterator[bytes] = iter(())
    keygen = GuardedKeyGen(HashKeyGen("sha256", uuid=lambda: next(given)), FAR)
    store = simulation.open(keygen=keygen)
    uuids = [bytes([number]) * 16 for number in range(1, 6)]
    given = iter(uuids)
    for _ in uuids:
        store.put(b"data")
    simulation.close()

    store = simulation.open(keygen=GuardedKeyGen(HashKeyGen("sha256", uuid=lambda: next(given)), FAR))
    given = iter([*uuids, b"x" * 16])
    for uuid in uuids:
        with pytest.raises(PluginError, match=r"gave the uuid .* a second time"):
            store.put(b"other")
        assert store.get(uuid) == b"data"
    assert store.put(b"other").uuid == b"x" * 16
    assert not store.read_only


def test_errors_of_the_contract_pass(tmp_path: Path) -> None:
    class Full(SqliteBackend):
        def commit(self, puts: object, deletes: object) -> None:
            raise NoSpace("the disk is full")

    with closing(GuardedBackend(Full(), FAR)) as backend:
        backend.open(tmp_path)
        with pytest.raises(NoSpace, match="the disk is full"):
            backend.commit({b"key": b"value"}, ())


def test_a_delete_that_was_left_out_is_noticed(tmp_path: Path) -> None:
    class Keeps(SqliteBackend):
        def commit(self, puts: Any, deletes: object) -> None:
            super().commit(puts, ())

    with closing(GuardedBackend(Keeps(), FAR)) as backend:
        backend.open(tmp_path)
        backend.commit({b"key": b"value"}, ())
        with pytest.raises(PluginError, match="says that it has committed"):
            backend.commit({}, [b"key"])


def test_two_copies_on_one_device_are_refused(simulate: Callable[..., Simulation]) -> None:
    class SameDevice(Mirrored):
        def place(self, count: int, free: Any) -> list[list[Extent]]:
            block = free.best_fit(0, 2 * count)
            return [[Extent(0, block, count)], [Extent(0, block + count, count)]]

    simulation = simulate(16 << 20, 16 << 20, placer=SameDevice())
    with pytest.raises(PluginError, match="two copies on device 0"):
        simulation.open().put(b"data")
