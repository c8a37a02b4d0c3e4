"""Uploads: data that comes in pieces of any size lies on the devices as if it had come at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustord.allocator import Allocator
from rustord.blockdevice import open_device
from rustord.blockstore import BlockStore, Slot, chunk_sums
from rustord.errors import DeviceError, InvalidRequest, NoSpace
from rustord.extent import Extent, block_count
from rustord.freelist import FreeList
from rustord.keygen import find_hash
from rustord.label import Geometry
from rustord.placer import Contiguous, Mirrored, Placer, Striped
from rustord.upload import Upload
from tests.simulation import VolatileDevice

MIB = 1 << 20
BLOCK = 4096
DATA = random.Random(20).randbytes(5 * MIB)


class Rig:
    """Two devices, and the Uploads to them; what they abandon is kept in ``used`` and ``unused``."""

    def __init__(self, paths: Sequence[Path], placer: Placer, blocks: int = 3000) -> None:
        self.devices = [VolatileDevice(open_device(path)) for path in paths]
        geometry = Geometry(16 * MIB // BLOCK, BLOCK)
        self.blocks = BlockStore(
            BLOCK, [Slot(index, bytes(16), geometry, device) for index, device in enumerate(self.devices)]
        )
        self.allocator = Allocator(placer, self.blocks.writable_indices)
        for index in range(len(paths)):
            self.allocator.add(index, FreeList([(100, blocks)]), blocks)
        self.used: list[Extent] = []
        self.unused: list[Extent] = []

    def upload(self, size: int | None = None, count: int = 0) -> Upload:
        return Upload(self.allocator, self.blocks, find_hash("sha256")(), size, count, self._abandon)

    def _abandon(self, used: list[Extent], unused: list[Extent]) -> None:
        self.used += used
        self.unused += unused

    def free(self) -> int:
        return sum(self.allocator.free_count(index) for index in range(len(self.devices)))


@pytest.fixture
def make_rig(make_image: Callable[[int], Path]) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(placer: Placer | None = None, blocks: int = 3000) -> Rig:
        made.append(Rig([make_image(16 * MIB) for _ in range(2)], placer or Contiguous(), blocks))
        return made[-1]

    yield make
    for rig in made:
        rig.blocks.close()


def taken_in(rig: Rig, upload: Upload, data: bytes) -> None:
    """Assert that every copy, with the rest that is not written yet, holds ``data``, and that the sums are right."""
    upload.finish()
    assert upload.size == len(data)
    assert upload.hasher.digest() == sha256(data).digest()
    assert upload.sums == chunk_sums(data)
    assert len(upload.rest) < 65536
    for copy in upload.copies:
        written = upload.written_block_count * BLOCK
        assert rig.blocks.read_copy(tuple(copy), 0, written).tobytes() + upload.rest == data


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(0, 300_000), st.sampled_from([65535, 65536, 65537, 131072])), max_size=12))
def test_pieces_of_any_size(make_rig: Callable[..., Rig], lengths: list[int]) -> None:
    rig = make_rig()
    upload = rig.upload()
    at = 0
    for length in lengths:
        upload.write(memoryview(DATA)[at : at + length])
        at += length
    taken_in(rig, upload, DATA[:at])
    rig.blocks.close()


@pytest.mark.parametrize("placer", [Contiguous(), Striped(32), Mirrored(2)], ids=lambda placer: placer.name)
@pytest.mark.parametrize("known", [True, False], ids=["known size", "unknown size"])
def test_every_layout(make_rig: Callable[..., Rig], placer: Placer, known: bool) -> None:
    rig = make_rig(placer)
    data = DATA[: 3 * MIB + 12345]
    upload = rig.upload(len(data), 800) if known else rig.upload()
    for at in range(0, len(data), 700_000):
        upload.write(data[at : at + 700_000])
    assert len(upload.copies) == placer.copies
    taken_in(rig, upload, data)


def test_fragmented_space_of_an_unknown_size(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    for device in range(2):
        for block in range(100, 3100, 20):
            rig.allocator._free[device].take(block, 1)
    upload = rig.upload()
    for at in range(0, len(DATA), 100_001):
        upload.write(DATA[at : at + 100_001])
    assert len(upload.copies[0]) > 20
    taken_in(rig, upload, DATA)


def test_the_longer_it_gets_the_more_is_set_aside(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    upload = rig.upload()
    set_aside = []
    for at in range(0, 4 * MIB, 65536):
        upload.write(DATA[at : at + 65536])
        set_aside.append(block_count(upload.copies[0]) * BLOCK // MIB)
    assert sorted(set(set_aside)) == [1, 2, 4]


def test_more_than_was_declared_is_refused_at_once(make_rig: Callable[..., Rig]) -> None:
    upload = make_rig().upload(1000, 1)
    upload.write(bytes(1000))
    with pytest.raises(InvalidRequest, match="1000 bytes that were declared"):
        upload.write(b"x")


def test_less_than_was_declared_is_refused_at_the_end(make_rig: Callable[..., Rig]) -> None:
    upload = make_rig().upload(1000, 1)
    upload.write(bytes(999))
    with pytest.raises(InvalidRequest, match="999 bytes instead of the 1000"):
        upload.finish()


def test_a_pool_that_gets_full_in_the_middle(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(blocks=400)
    upload = rig.upload()
    for at in range(0, 3 * MIB, 65536):
        upload.write(DATA[at : at + 65536])
    with pytest.raises(NoSpace):
        upload.write(DATA[: MIB // 2])
    upload.abort()
    assert block_count(rig.used) + block_count(rig.unused) + rig.free() == 800


def test_nothing_is_set_aside_when_there_is_not_enough(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(blocks=400)
    with pytest.raises(NoSpace):
        rig.upload(4 * MIB, 1025)
    assert rig.free() == 800


class TestAbort:
    def test_it_tells_what_was_written_from_what_was_not(self, make_rig: Callable[..., Rig]) -> None:
        rig = make_rig(Mirrored(2))
        upload = rig.upload(2 * MIB, 513)
        upload.write(DATA[: MIB + 10])
        upload.abort()
        assert block_count(rig.used) == 2 * 256
        assert block_count(rig.unused) == 2 * (513 - 256)
        assert block_count(rig.used) + block_count(rig.unused) + rig.free() == 6000

    def test_it_is_fine_twice_and_before_any_data(self, make_rig: Callable[..., Rig]) -> None:
        rig = make_rig()
        rig.upload().abort()
        upload = rig.upload(10, 1)
        upload.abort()
        upload.abort()
        assert (rig.used, block_count(rig.unused)) == ([], 1)

    def test_what_a_failed_write_may_have_left_counts_as_written(self, make_rig: Callable[..., Rig]) -> None:
        rig = make_rig(Mirrored(2))
        upload = rig.upload(2 * MIB, 513)
        upload.write(DATA[:MIB])
        rig.devices[1].fail_writes = True
        with pytest.raises(DeviceError):
            upload.write(DATA[MIB : MIB + 65536])
        upload.abort()
        assert block_count(rig.used) == 2 * (256 + 16)
