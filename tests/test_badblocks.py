"""BadBlocks: against a model, and the table as it stands on a device, whole or damaged."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.badblocks import (
    RUN_COUNT_MAX,
    TABLE,
    TABLE_BYTES,
    BadBlocks,
    BadRun,
    choose_bad_blocks,
    decode_bad_blocks,
)
from rustord.errors import FormatError

DEVICE = bytes(range(16))
SOME = BadBlocks((BadRun(5, 3), BadRun(100, 1, True), BadRun(2**39, 2**31)), 7)


def padded(table: bytes) -> bytes:
    return table + bytes(TABLE_BYTES - len(table))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans())))
def test_adding_is_as_adding_to_a_set(runs: list[tuple[int, int, bool]]) -> None:
    bad, model = BadBlocks(), dict[int, bool]()
    for block, count, dead in runs:
        bad = bad.adding(block, count, dead=dead)
        model.update({b: model.get(b, False) or dead for b in range(block, block + count)})
    assert {b: run.dead for run in bad.runs for b in range(run.block, run.end)} == model
    assert bad.block_count == len(model)
    ends = [(run.end, run.dead) for run in bad.runs]
    assert all(end[0] < run.block or end != (run.block, run.dead) for end, run in zip(ends, bad.runs[1:], strict=False))
    within = {b for run in bad.within(10, 30) for b in range(run.block, run.end)}
    assert within == {b for b in model if 10 <= b < 40}
    without = {b for block, count in bad.without(10, 30) for b in range(block, block + count)}
    assert without == set(range(10, 40)) - within


def test_a_table_is_read_as_it_was_written() -> None:
    table = SOME.encode(DEVICE)
    assert len(table) % 4096 == 0
    assert decode_bad_blocks(padded(table), DEVICE) == SOME


def test_a_full_table_fits() -> None:
    full = BadBlocks(tuple(BadRun(2 * number, 1) for number in range(RUN_COUNT_MAX)), 1)
    assert len(full.encode(DEVICE)) == TABLE_BYTES
    assert decode_bad_blocks(full.encode(DEVICE), DEVICE) == full


def test_zeros_and_the_table_of_another_device_are_none() -> None:
    assert decode_bad_blocks(bytes(TABLE_BYTES), DEVICE) is None
    assert decode_bad_blocks(padded(SOME.encode(bytes(16))), DEVICE) is None


def test_every_flipped_byte_is_found() -> None:
    table = bytearray(padded(SOME.encode(DEVICE)))
    for at in range(TABLE.size + 16 * len(SOME.runs)):
        table[at] ^= 0xFF
        with pytest.raises(FormatError, match="bad blocks"):
            decode_bad_blocks(table, DEVICE)
        table[at] ^= 0xFF


def test_garbage_is_none_or_an_error(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        garbage = bytearray(chance.randbytes(TABLE_BYTES))
        garbage[: chance.randrange(40)] = padded(SOME.encode(DEVICE))[: chance.randrange(40)]
        garbage = bytearray(padded(bytes(garbage[:TABLE_BYTES])))
        with pytest.raises(FormatError):
            decode_bad_blocks(garbage, DEVICE)


def test_the_newest_good_copy_counts() -> None:
    older, damaged = BadBlocks((BadRun(1, 1),), 6), FormatError("damaged")
    assert choose_bad_blocks([older, SOME]) == SOME
    assert choose_bad_blocks([SOME, damaged]) == choose_bad_blocks([None, SOME]) == SOME
    assert choose_bad_blocks([None, None]) == BadBlocks()
    for copies in ([damaged, damaged], [None, damaged]):
        with pytest.raises(FormatError):
            choose_bad_blocks(copies)
