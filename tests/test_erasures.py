"""Erasures: blocks that are held back for who reads them are erased afterwards, and no reader holds up the store."""

from __future__ import annotations

import random

import pytest

from rustord.change import Delete
from rustord.extent import block_count
from rustord.objectstore import ObjectStore
from tests.simulation import Simulation, check_sound, free_count, run

BLOCK = 4096
DATA = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def store(simulation: Simulation) -> ObjectStore:
    return simulation.open()


def test_a_reader_is_not_cut_off_by_who_replaces_the_name(store: ObjectStore) -> None:
    record = store.stat(store.put(DATA, name="name").uuid)
    free = free_count(store)
    store.pin(record)
    store.pin(record)
    new = store.put(b"new", name="name")
    run(store)
    assert store.read(record, 0, record.size) == DATA
    store.unpin(record)
    assert not store.idle_work()
    assert store.read(record, 0, record.size) == DATA
    store.unpin(record)
    assert store.idle_work()
    run(store)
    assert free_count(store) == free + block_count(record.extents) - 1
    assert store.get(new.uuid) == b"new"
    check_sound(store)


def test_who_deletes_does_not_wait(store: ObjectStore) -> None:
    key = store.put(b"x")
    record = store.stat(key.uuid)
    store.pin(record)
    store.delete(key.uuid)
    store.unpin(record)
    check_sound(store)


@pytest.mark.parametrize("how", ["copied", "given up"])
def test_who_deletes_waits_for_the_copy_of_a_move(simulation: Simulation, store: ObjectStore, how: str) -> None:
    record = store.stat(store.put(DATA[: 5 * BLOCK]).uuid)
    move = store.relocations.prepare(record, record.extents)
    new = list(move.source.new)
    if how == "given up":
        move.source.abort()
    assert simulation.read(0, new[0].block, 5) == DATA[: 5 * BLOCK]
    cycle = store.cycle([Delete(record.uuid)])
    assert not cycle.outcomes
    cycle = store.cycle(cycle.following)
    assert len(cycle.outcomes) == 1
    assert not any(simulation.read(0, new[0].block, 5))
    run(store, *cycle.following)
    check_sound(store)


def test_what_is_held_at_the_end_is_erased_at_the_next_start(simulation: Simulation) -> None:
    store = simulation.open()
    record = store.stat(store.put(DATA[:BLOCK], name="name").uuid)
    store.pin(record)
    store.put(b"new", name="name")
    simulation.close()
    store = simulation.open()
    assert simulation.read(0, record.extents[0].block, 2) == bytes(2 * BLOCK)
    check_sound(store)


def test_a_reader_that_never_ends_does_not_fill_the_journal(store: ObjectStore) -> None:
    record = store.stat(store.put(b"read", name="name").uuid)
    store.pin(record)
    for number in range(1200):
        store.put(bytes([number % 256]), name="name")
    store.unpin(record)
    run(store)
    check_sound(store)
