"""What the journals say between cycles: it is durable, and said no more often than it has to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Delete
from rustord.extent import Extent
from rustord.page import CHUNK_BYTES
from tests.simulation import MIB, Simulation, check_sound
from tests.test_layermover import remains


def test_a_grave_of_blocks_that_were_given_back_is_nobodys(disk_path: Path, seed: int) -> None:
    """Who announced them may have waited no longer while the writer was at it: others may have them by then."""
    data = random.Random(seed).randbytes(3 * CHUNK_BYTES)
    simulation = Simulation(disk_path, (16 * MIB,))
    store = simulation.open()
    uuid = store.put(data).uuid
    part = store.stat(uuid).extents[0]._replace(count=3)
    store.journals.announce([(b"somebody's uuid.", [part])])
    simulation.cut_power()
    store = simulation.open()
    assert store.get(uuid) == data
    store.journals.announce([(b"somebody's uuid.", [part])])
    store.cycle([Delete(uuid)])
    simulation.cut_power()
    store = simulation.open()
    assert not remains(simulation, data)
    check_sound(store)
    simulation.close()


def test_what_waits_to_be_erased_is_not_said_again_with_each_change(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate(16 * MIB, 1024 * MIB)
    store = simulation.open()
    for first in range(100_000, 260_000, 40_000):
        store.journals.announce([(bytes(16), [Extent(1, block, 1) for block in range(first, first + 40_000, 2)])])
    lengths = []
    append = store.keystore._append

    def spy(ring: Any, entries: Sequence[bytes], *rest: int) -> None:
        lengths.append(sum(map(len, entries)))
        append(ring, entries, *rest)

    monkeypatch.setattr(store.keystore, "_append", spy)
    for _ in range(60):
        store.put(b"x")
        store.keystore.checkpoint()
    assert sum(length > MIB for length in lengths) <= 4
