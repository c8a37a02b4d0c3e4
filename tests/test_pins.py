"""Pins: blocks that are held back for who reads them are erased afterwards, and no reader holds up the store."""

from __future__ import annotations

import random

import pytest

from rustord.extent import block_count
from rustord.objectstore import ObjectStore
from tests.simulation import Simulation, check_sound, free_count, run

DATA = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def store(simulation: Simulation) -> ObjectStore:
    return simulation.open()


def test_a_reader_is_not_cut_off_by_who_replaces_the_name(store: ObjectStore) -> None:
    record = store.stat(store.put(DATA, name="name").uuid)
    free = free_count(store)
    store.pins.add(record)
    store.pins.add(record)
    new = store.put(b"new", name="name")
    run(store)
    assert store.read(record, 0, record.size) == DATA
    store.pins.remove(record)
    assert not store.idle_work()
    assert store.read(record, 0, record.size) == DATA
    store.pins.remove(record)
    assert store.idle_work()
    run(store)
    assert free_count(store) == free + block_count(record.extents) - 1
    assert store.get(new.uuid) == b"new"
    check_sound(store)


def test_who_deletes_does_not_wait(store: ObjectStore) -> None:
    key = store.put(b"x")
    record = store.stat(key.uuid)
    store.pins.add(record)
    store.delete(key.uuid)
    store.pins.remove(record)
    check_sound(store)


def test_a_reader_that_never_ends_does_not_fill_the_journal(store: ObjectStore) -> None:
    record = store.stat(store.put(b"read", name="name").uuid)
    store.pins.add(record)
    for number in range(1200):
        store.put(bytes([number % 256]), name="name")
    store.pins.remove(record)
    run(store)
    check_sound(store)
