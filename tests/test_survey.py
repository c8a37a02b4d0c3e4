"""How a survey finds footers; what it makes of them is tested with the rebuild."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rustord.blockdevice import Buffer, open_device
from rustord.errors import DeviceError
from rustord.extent import Extent
from rustord.footer import MAGIC
from rustord.keygen import HashKeyGen
from rustord.pool import assemble, create_pool
from rustord.survey import SCAN_BYTES, take_survey, trailers
from tests.simulation import Simulation, live


@pytest.mark.parametrize("block_size", [4096, 65536])
def test_trailers_are_found_at_the_ends_of_blocks_only(block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(64 * block_size)
    expected = sorted(rng.sample(range(64), 9))
    for block in expected:
        data[(block + 1) * block_size - 8 : (block + 1) * block_size] = MAGIC
    for _ in range(200):
        at = rng.randrange(len(data) - 8)
        if at % block_size < block_size - 16:
            data[at : at + 8] = MAGIC
    assert list(trailers(memoryview(data), block_size, MAGIC)) == expected
    assert list(trailers(memoryview(bytes(len(data))), block_size, MAGIC)) == []


def test_a_magic_across_two_ends_is_none() -> None:
    data = bytearray(4 * 4096)
    data[4092:4096], data[8184:8188] = MAGIC[:4], MAGIC[4:]
    assert list(trailers(memoryview(data), 4096, MAGIC)) == []


def test_blocks_that_cannot_be_read_are_told_and_the_others_are_read(disk_path: Path) -> None:
    pool = Simulation(disk_path)
    store = pool.open()
    for number in range(10):
        store.put(bytes(3000), name=str(number))
    bad, *_ = (record.extents[0].block for record in live(store)[5:])
    pool.close()

    class Unreadable:
        def __init__(self) -> None:
            self._below = open_device(pool.paths[0], read_only=True)

        def __getattr__(self, name: str) -> object:
            return getattr(self._below, name)

        def read(self, offset: int, buffers: list[Buffer]) -> None:
            if offset <= bad * 4096 < offset + sum(map(len, buffers)):
                raise DeviceError("as it was told to")
            self._below.read(offset, buffers)

    label, blocks = assemble([Unreadable()], "none")  # type: ignore[list-item]
    read = []
    survey = take_survey(label, blocks, read.append)
    blocks.close()
    assert survey.unreadable == [Extent(0, bad, 1)]
    assert len(survey.live) == 10  # the journal has the Object
    assert len(survey.footers[0]) == 9
    assert sum(read) == sum(slot.geometry.data_block_count for slot in blocks.slots.values()) * 4096
    assert max(read) == SCAN_BYTES


def test_a_new_pool_holds_nothing(image: Path) -> None:
    create_pool([device := open_device(image)], HashKeyGen("xxh3-128"))
    label, blocks = assemble([device], "none")
    survey = take_survey(label, blocks)
    blocks.close()
    assert (survey.live, survey.gone, survey.void, survey.sequence) == ({}, {}, {}, 0)
