"""The ring of one journal: what was appended is replayed, in order, whatever else the region holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rustord.blockdevice import BlockDevice, open_device
from rustord.journal import Batch, Kind, delete_entry
from rustord.keystore.ring import POSITION, Ring, RingFull, lost_batches
from rustord.label import Geometry

MIB = 1 << 20
UUID = b"d" * 16
SECRET = bytes(32)
GEOMETRY = Geometry(16 * MIB // 4096, 4096)
RING_BLOCKS = 4 * MIB // 4096


@pytest.fixture
def device(make_image: Callable[[int], Path]) -> Iterator[BlockDevice]:
    device = open_device(make_image(16 * MIB))
    yield device
    device.close()


def make(device: BlockDevice) -> Ring:
    return Ring(device, UUID, GEOMETRY, SECRET)


def entry(sequence: int, blocks: int = 1) -> bytes:
    """An entry that makes a batch of so many blocks."""
    raw = delete_entry(sequence, bytes(16))
    length = blocks * 4096 - 100 - len(raw) if blocks > 1 else 0
    return (len(raw) - 16 + length).to_bytes(4, "little") + raw[4:] + bytes(length)


def append(ring: Ring, sequence: int, blocks: int = 1) -> None:
    ring.append([entry(sequence, blocks)], sequence - 1, sequence)


def sequences(batches: list[Batch]) -> list[int]:
    return [entry.sequence for batch in batches for entry in batch.entries]


def test_an_empty_journal_replays_nothing(device: BlockDevice) -> None:
    ring = make(device)
    assert ring.replay(None) == []
    assert (ring.number, ring.block, ring.used) == (1, 0, 0.0)


def test_what_was_appended_is_replayed(device: BlockDevice) -> None:
    ring = make(device)
    for sequence in range(1, 6):
        append(ring, sequence, blocks=sequence)
    replayed = make(device).replay(None)
    assert [batch.number for batch in replayed] == [1, 2, 3, 4, 5]
    assert [batch.durable for batch in replayed] == [0, 1, 2, 3, 4]
    assert sequences(replayed) == [1, 2, 3, 4, 5]
    assert all(entry.kind is Kind.DELETE for batch in replayed for entry in batch.entries)


def test_a_replay_begins_at_the_position(device: BlockDevice) -> None:
    ring = make(device)
    append(ring, 1)
    append(ring, 2)
    position = ring.position
    append(ring, 3)
    append(ring, 4)
    again = make(device)
    assert sequences(again.replay(position)) == [3, 4]
    append(again, 5)
    assert sequences(make(device).replay(position)) == [3, 4, 5]


def test_a_batch_that_does_not_fit_before_the_end_begins_at_the_start(device: BlockDevice) -> None:
    ring = make(device)
    append(ring, 1, blocks=500)
    append(ring, 2, blocks=500)
    ring.release(3, 2)
    position = ring.position
    append(ring, 3, blocks=30)  # 24 are left
    assert ring.block == 30
    append(ring, 4)
    assert sequences(make(device).replay(position)) == [3, 4]


def test_a_position_at_the_very_end_leads_to_the_start(device: BlockDevice) -> None:
    ring = make(device)
    append(ring, 1, blocks=512)
    append(ring, 2, blocks=512)
    ring.release(3, 2)
    assert POSITION.unpack(ring.position) == (3, RING_BLOCKS)
    position = ring.position
    append(ring, 3)
    assert ring.block == 1
    assert sequences(make(device).replay(position)) == [3]


def test_a_live_batch_is_never_overwritten(device: BlockDevice) -> None:
    ring = make(device)
    for sequence in range(1, RING_BLOCKS + 1):
        append(ring, sequence)
    assert ring.used == 1.0
    with pytest.raises(RingFull):
        append(ring, RING_BLOCKS + 1)
    assert sequences(make(device).replay(None)) == list(range(1, RING_BLOCKS + 1))
    ring.release(11, 10)
    for sequence in range(RING_BLOCKS + 1, RING_BLOCKS + 11):
        append(ring, sequence)
    with pytest.raises(RingFull):
        append(ring, RING_BLOCKS + 11)


def test_what_is_released_is_known_to_the_index_and_has_nothing_newer(device: BlockDevice) -> None:
    ring = make(device)
    for sequence in range(1, 11):
        append(ring, sequence)
    ring.release(4, 100)  # the index knows batches 1 to 3
    assert ring.used == 7 / RING_BLOCKS
    ring.release(11, 5)  # the tombstone of change 6 is still needed
    assert ring.used == 5 / RING_BLOCKS


def test_the_longest_batch_fits_once_all_others_are_gone(device: BlockDevice) -> None:
    ring = make(device)
    for sequence, blocks in enumerate([512, 300, 512, 1, 512, 511], 1):
        append(ring, sequence, blocks)
        ring.release(sequence + 1, sequence)
    assert ring.batch_bytes_max == 512 * 4096


def test_only_a_good_part_of_the_ring_is_worth_carrying(device: BlockDevice) -> None:
    ring = make(device)
    append(ring, 5, blocks=200)
    assert not ring.is_held_by(1)
    append(ring, 6, blocks=100)
    assert ring.is_held_by(5)
    assert not ring.is_held_by(6)  # the next release lets go of what is before it
    assert ring.is_held_by(5, 40 * 4096)
    assert not ring.is_held_by(5, 48 * 4096)  # to write that once more would gain too little
    ring.release(3, 6)
    assert not ring.is_held_by(0)


@pytest.mark.parametrize("with_position", [True, False], ids=["with the index", "without"])
def test_a_torn_batch_ends_the_replay(device: BlockDevice, with_position: bool, seed: int) -> None:
    chance = random.Random(seed)
    ring = make(device)
    start = ring.position
    for sequence in range(1, 5):
        append(ring, sequence, blocks=3)
    at = MIB + 9 * 4096 + chance.randrange(2 * 4096)
    byte = bytearray(1)
    device.read(at, [byte])
    device.write(at, [bytes([byte[0] ^ 1])])
    again = make(device)
    assert sequences(again.replay(start if with_position else None)) == [1, 2, 3]
    append(again, 99)
    assert sequences(make(device).replay(start)) == [1, 2, 3, 99]


def test_without_the_index_the_run_that_ends_with_the_newest_is_found(device: BlockDevice, seed: int) -> None:
    chance = random.Random(seed)
    ring = make(device)
    last = 0
    for sequence in range(1, 600):
        append(ring, sequence, chance.choice([1, 1, 2, 5, 20]))
        ring.release(sequence + 1, sequence)
        last = sequence
    batches = make(device).replay(None)
    numbers = [batch.number for batch in batches]
    assert numbers[-1] == last
    assert numbers == list(range(numbers[0], last + 1))
    assert numbers[0] > 1


@pytest.mark.parametrize("count", [2, 400, 1100, 1500])
def test_a_position_that_is_too_old_is_noticed(device: BlockDevice, count: int) -> None:
    """As long as the ring has not come around to it, the batches from there on are replayed; then it is broken."""
    ring = make(device)
    append(ring, 1)
    position = ring.position
    for sequence in range(2, count + 2):
        append(ring, sequence)
        ring.release(sequence + 1, sequence)
    again = make(device)
    replayed = again.replay(position)
    assert again.is_broken() == (len(replayed) != count)
    assert not ring.is_broken()


@pytest.mark.parametrize("offset", [3, 60, 5000])
def test_a_damaged_batch_with_others_behind_it_is_noticed(device: BlockDevice, offset: int) -> None:
    ring = make(device)
    position = ring.position
    for sequence in range(1, 4):
        append(ring, sequence, blocks=2)
    device.write(MIB + 2 * 4096 + offset, [b"?"])
    again = make(device)
    assert sequences(again.replay(position)) == [1]
    assert again.is_broken()


@pytest.mark.parametrize("offset", [3, 60, 5000])
def test_a_batch_that_is_missing_between_others_was_damaged(device: BlockDevice, offset: int) -> None:
    ring = make(device)
    for sequence in range(1, 5):
        append(ring, sequence, blocks=2)
    assert list(lost_batches(make(device).batches(), 4096, RING_BLOCKS)) == []
    device.write(MIB + 2 * 4096 + offset, [b"?"])
    assert list(lost_batches(make(device).batches(), 4096, RING_BLOCKS)) == [2]


def test_what_a_ring_has_overwritten_is_not_taken_for_damage(device: BlockDevice, seed: int) -> None:
    chance = random.Random(seed)
    ring = make(device)
    for sequence in range(1, 120):
        append(ring, sequence, blocks=chance.choice([1, 2, 30, 100, 200]))
        ring.release(sequence + 1, sequence)
        if sequence % 3 == 0:
            assert list(lost_batches(make(device).batches(), 4096, RING_BLOCKS)) == []


def test_what_a_torn_batch_has_hit_is_not_taken_for_damage(device: BlockDevice) -> None:
    """Of the batch that is written over the oldest ones, the power failed before its first sector was there."""
    ring = make(device)
    for sequence in range(1, RING_BLOCKS // 2 + 2):  # the last one is at the start again
        append(ring, sequence, blocks=2)
        ring.release(sequence + 1, sequence)
    second, third = ring.block, ring.block + 2
    assert list(lost_batches(make(device).batches(), 4096, RING_BLOCKS)) == []
    device.write(MIB + third * 4096, [b"?" * 512])  # the one at ``second`` is as it was
    assert second in [block for block, _ in make(device).batches()]
    assert list(lost_batches(make(device).batches(), 4096, RING_BLOCKS)) == []


def test_a_batch_that_was_begun_is_told_from_none(device: BlockDevice) -> None:
    ring = make(device)
    append(ring, 1, blocks=2)
    assert not ring.is_torn(2, 2)
    append(ring, 2, blocks=2)
    device.write(MIB + 3 * 4096 + 9, [b"?"])
    assert ring.is_torn(2, 2)
    assert not ring.is_torn(3, 2)


def test_batches_of_another_device_or_pool_are_nothing(device: BlockDevice) -> None:
    append(make(device), 1)
    assert Ring(device, b"e" * 16, GEOMETRY, SECRET).replay(None) == []
    assert Ring(device, UUID, GEOMETRY, b"s" * 32).replay(None) == []


@pytest.mark.parametrize("length", [0, 71, 72, 1 << 31, (1 << 32) - 1])
def test_a_header_with_any_length_is_survived(device: BlockDevice, length: int) -> None:
    for block in (0, RING_BLOCKS - 1):
        device.write(MIB + block * 4096, [b"rustjrnl" + bytes(48) + length.to_bytes(4, "little") + bytes(4)])
        assert make(device).replay(None) == []
        assert make(device).replay(POSITION.pack(1, block)) == []


def test_random_content_replays_nothing(device: BlockDevice, seed: int) -> None:
    device.write(MIB, [random.Random(seed).randbytes(4 * MIB)])
    assert make(device).replay(None) == []
    assert make(device).replay(POSITION.pack(7, 1000)) == []
    assert make(device).replay(POSITION.pack(7, 1 << 60)) == []
