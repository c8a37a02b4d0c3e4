"""What is found in a pool that is open; and that work beside it is never taken for damage."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rustord.audit import Finding
from rustord.change import Put
from rustord.inspection import inspect
from rustord.record import Metadata, Record, encode_record
from rustord.writer import Writer
from tests.simulation import MIB, Simulation, live


def at_once(look: Callable[[], list[Finding]]) -> list[Finding]:
    return look()


@pytest.fixture
def pool(disk_path: Path) -> Simulation:
    pool = Simulation(disk_path)
    store = pool.open()
    for number in range(30):
        store.put(bytes(3000), name=f"name {number}")
    pool.close()
    return pool


def found(pool: Simulation) -> list[tuple[str, str]]:
    findings = inspect(pool.open(), at_once)
    pool.close()
    return [(finding.kind, finding.what) for finding in findings]


def records(pool: Simulation) -> list[Record]:
    found = live(pool.open())
    pool.close()
    return found


def test_a_pool_that_is_well(pool: Simulation) -> None:
    assert found(pool) == []


def test_a_label_that_is_damaged(pool: Simulation) -> None:
    store = pool.open()
    with pool.paths[0].open("r+b") as file:
        file.seek(8 * MIB + 100)
        file.write(b"damage")
    (finding,) = inspect(store, at_once)
    assert finding.kind == "label"
    assert "byte 8388608 of device 0 is damaged" in finding.what
    pool.close()


def test_names_that_lead_astray(pool: Simulation) -> None:
    one, other, *_ = records(pool)
    pool.change_index({b"nnobody": bytes(16), b"n" + one.name.encode(): other.uuid})
    assert [kind for kind, _ in found(pool)] == ["name"] * 3
    pool.change_index({b"n" + one.name.encode(): one.uuid}, (b"nnobody", b"n" + other.name.encode()))
    ((kind, what),) = found(pool)
    assert kind == "name"
    assert f"the name {other.name!r} is that of Object" in what


def test_a_block_of_two_objects(pool: Simulation) -> None:
    record = records(pool)[0]
    key = record.key._replace(uuid=bytes(15) + b"\1")
    raw = encode_record(key, record.sequence, 0, record.copies, record.sums(0, 1), b"contiguous", b"", b"")
    pool.change_index({b"o" + key.uuid: raw})
    ((kind, what),) = found(pool)
    assert kind == "blocks"
    assert "have a block in common" in what


def test_work_beside_it_is_no_damage(pool: Simulation, seed: int) -> None:
    rng = random.Random(seed)
    store = pool.open()
    writer = Writer(store)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            name = f"name {rng.randrange(40)}"
            writer.call(lambda: None)
            writer.submit([Put(bytes(rng.randrange(9000)), Metadata(name))], lambda outcomes: None)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            assert inspect(store, writer.call) == []
    finally:
        done.set()
        worker.join()
        assert writer.close(60)
        pool._store = None
