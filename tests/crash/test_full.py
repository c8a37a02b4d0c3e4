"""A pool that is filled, crashes, is emptied and filled again, for many rounds: no block is lost, none is refused
that is there, and DELETE always works."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rustord.change import Delete, Put
from rustord.errors import NoSpace
from rustord.objkey import ObjectId
from rustord.placer import Contiguous, FirstFit, Mirrored, Placer, Striped
from rustord.record import EXTENT, Metadata, Record
from tests.simulation import MIB, Simulation, check_sound, free_count, live, run, stored, upload

BLOCK = 4096
DATA = random.Random(8).randbytes(3 * MIB)
SIZES = (0, 1, 100, BLOCK - 1, BLOCK, 20_000, 65_537, 300_000, 2 * MIB)
LAYOUTS: list[tuple[Placer, int]] = [
    (Contiguous(), 1),
    (FirstFit(), 2),
    (Striped(4), 3),
    (Mirrored(2), 2),
    (Mirrored(2), 3),
]


class Tide:
    """A pool on small devices that is filled and emptied, and what it must hold."""

    def __init__(self, simulation: Simulation, seed: str) -> None:
        self.simulation = simulation
        self.source = random.Random(seed)
        self.store = simulation.open()
        self.free = free_count(self.store)
        self.stored: dict[ObjectId, bytes] = {}
        self.names: dict[str, ObjectId] = {}
        self.refused = 0

    def fill(self) -> None:
        """Store Objects of all sizes until not even an empty one finds room."""
        smallest = len(SIZES)
        while smallest:
            number = self.source.randrange(smallest)
            if not self.put(SIZES[number]):
                smallest = number

    def put(self, size: int) -> bool:
        """Store an Object, sometimes under a name that is taken; whether it had room."""
        at = self.source.randrange(1000)
        data = DATA[at : at + size]
        name = f"name{self.source.randrange(20)}" if self.source.random() < 0.2 else ""
        put = Put(data, Metadata(name))
        try:
            if size > BLOCK and self.source.random() < 0.5:
                record = upload(self.store, data, put, declare=self.source.random() < 0.5)
            else:
                record = stored(run(self.store, put)[0])
        except NoSpace:
            self.refused += 1
            self.check_refusal(size)
            return False
        if name:
            self.stored.pop(self.names.get(name, b""), None)
            self.names[name] = record.uuid
        self.stored[record.uuid] = data
        return True

    def check_refusal(self, size: int) -> None:
        """No room: then there is not, on as many devices as there are copies, room for the data and its footer."""
        allocator = self.store.allocator
        free = sorted(map(allocator.free_count, self.store.blocks.slots))
        copies = allocator.placer.copies
        extents = allocator.fragments()
        footer = 3 + extents * EXTENT.size // BLOCK
        need = -(-size // BLOCK) + footer
        have = free[-copies] if copies > 1 else sum(free)
        assert have < need, f"{size} bytes were refused, and {free} blocks are free"

    def empty(self, part: float) -> None:
        """Delete a part of the Objects, each of which gives its blocks back."""
        for uuid in self.source.sample(sorted(self.stored), int(len(self.stored) * part)):
            before = free_count(self.store)
            record = self.store.stat(uuid)
            assert isinstance(run(self.store, Delete(uuid))[0], Record)
            assert free_count(self.store) == before + sum(extent.count for extent in record.extents)
            del self.stored[uuid]

    def crash(self) -> None:
        """Cut the power, in the middle of a change or between two; of what was not flushed, anything may stay."""
        keep = random.Random(self.source.random())
        before = dict(self.stored)
        if self.source.random() < 0.5:
            changes = [Delete(uuid) for uuid in self.source.sample(sorted(self.stored), min(5, len(self.stored)))]
            self.store.cycle(changes)  # they are gone, and not erased
            for change in changes:
                del self.stored[change.uuid]
        self.simulation.cut_power(lambda offset: keep.random() < 0.5)
        self.store = self.simulation.open()
        there = {record.uuid for record in live(self.store)}
        assert there == set(self.stored), f"{len(before)} Objects before"

    def check(self) -> None:
        for uuid, data in self.stored.items():
            assert self.store.get(uuid) == data
        check_sound(self.store)
        named = {name: uuid for name, uuid in self.names.items() if uuid in self.stored}
        assert dict(self.store.names()) == named


@pytest.mark.parametrize("rounds", [2, pytest.param(400, marks=[pytest.mark.long, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize(("placer", "devices"), LAYOUTS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_pool_that_is_filled_again_and_again(
    simulate: Callable[..., Simulation], placer: Placer, devices: int, rounds: int, seed: int
) -> None:
    tide = Tide(simulate(*[16 * MIB] * devices, placer=placer), f"{seed} {placer.name} {devices}")
    for _ in range(rounds):
        tide.fill()
        assert tide.refused
        tide.check()
        tide.empty(tide.source.choice((0.05, 0.3, 0.9)))
        tide.crash()
        tide.check()
    tide.empty(1.0)
    assert free_count(tide.store) == tide.free, "blocks were lost"
