"""Erasures: what is held back is erased all the same, in the end."""

from __future__ import annotations

import random

import pytest

from rustord.change import Delete, Erase
from rustord.objectstore import ObjectStore
from tests.simulation import Simulation, check_sound, run

BLOCK = 4096
DATA = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def store(simulation: Simulation) -> ObjectStore:
    return simulation.open()


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
    store.pins.add(record)
    store.put(b"new", name="name")
    simulation.close()
    store = simulation.open()
    assert simulation.read(0, record.extents[0].block, 2) == bytes(2 * BLOCK)
    check_sound(store)


def test_what_is_read_is_not_given_out_to_be_erased(store: ObjectStore) -> None:
    record = store.stat(store.put(DATA).uuid)
    store.pins.add(record)
    erase = Erase(record.extents, (record.id,))
    store.erasures.add(erase)
    assert store.erasures.are_due()
    assert store.erasures.take() == []
    assert not store.erasures.are_due()
    store.pins.remove(record)
    assert store.erasures.are_due()
    assert store.erasures.take() == [erase]
