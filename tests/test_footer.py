"""Footers: they are found again on the bare device, and nothing else passes for one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import FormatError
from rustord.extent import Extent, block_count
from rustord.footer import MAGIC, TRAILER, Piece, decode_piece, encode_footer, footer_blocks, sign

BLOCK = 4096
SECRET = bytes(range(32))
UUIDS = {index: bytes([index]) * 16 for index in range(4)}
ROOM = BLOCK - TRAILER.size


def on_device(size: int, record: bytes, copy: Sequence[Extent]) -> dict[tuple[int, int], bytes]:
    """What each block of a copy holds, by (device, block); its data is all 0xEE."""
    content = b"\xee" * size + encode_footer(record, size, copy, UUIDS, SECRET, BLOCK)
    assert len(content) == block_count(copy) * BLOCK
    addresses = [(device, block + at) for device, block, count in copy for at in range(count)]
    return {address: content[at * BLOCK : (at + 1) * BLOCK] for at, address in enumerate(addresses)}


def found(blocks: dict[tuple[int, int], bytes], copy: Sequence[Extent]) -> bytes:
    """The record behind a copy, read as a reader of the bare devices does: from the last piece to the first."""
    address = (copy[-1].device, copy[-1].end - 1)
    pieces: list[Piece] = []
    while True:
        device, block = address
        piece = decode_piece(blocks[address], UUIDS[device], block, SECRET)
        assert piece is not None
        pieces.append(piece)
        if piece.number == 0:
            assert [piece.number for piece in reversed(pieces)] == list(range(piece.piece_count))
            return b"".join(piece.data for piece in reversed(pieces))
        address = piece.previous


def one_block(content: bytes = b"record" * 30) -> bytes:
    return encode_footer(content, 0, [Extent(1, 77, 1)], UUIDS, SECRET, BLOCK)


@pytest.mark.parametrize("length", [100, ROOM - 1, ROOM, ROOM + 1, 2 * ROOM, 2 * ROOM + 1, 5 * ROOM + 17])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 300, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - ROOM])
def test_a_footer_is_found_at_the_end_of_the_last_block(size: int, length: int) -> None:
    record = random.Random(length).randbytes(length)
    count = -(-size // BLOCK) + footer_blocks(size, length, BLOCK)
    copy = [Extent(0, 1280, count)]
    assert found(on_device(size, record, copy), copy) == record


@given(st.data())
def test_a_footer_may_lie_in_many_extents_on_many_devices(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 5 * BLOCK))
    record = data.draw(st.randoms(use_true_random=False)).randbytes(data.draw(st.integers(100, 6 * ROOM)))
    count = -(-size // BLOCK) + footer_blocks(size, len(record), BLOCK)
    copy: list[Extent] = []
    while count:
        length = data.draw(st.integers(1, count))
        copy.append(Extent(data.draw(st.integers(0, 3)), 100 * (len(copy) + 1), length))
        count -= length
    assert found(on_device(size, record, copy), copy) == record


@given(st.integers(0, 4 * BLOCK), st.integers(100, 20 * BLOCK))
def test_as_few_blocks_as_can_hold_it(size: int, length: int) -> None:
    count = footer_blocks(size, length, BLOCK)
    slack = -size % BLOCK
    if count == 0:
        assert length + TRAILER.size <= slack
    else:
        assert length + TRAILER.size > slack
        assert (count - 1) * ROOM < length <= count * ROOM


def test_a_block_without_a_footer_has_none() -> None:
    for content in (bytes(BLOCK), b"\xff" * BLOCK, random.Random(1).randbytes(BLOCK)):
        assert decode_piece(memoryview(content), UUIDS[1], 77, SECRET) is None


@pytest.mark.parametrize(("device", "block"), [(1, 78), (0, 77), (2, 76)])
def test_a_footer_that_was_copied_elsewhere_is_content(device: int, block: int) -> None:
    assert decode_piece(one_block(), UUIDS[device], block, SECRET) is None


def test_a_footer_of_another_pool_is_refused() -> None:
    with pytest.raises(FormatError, match="block 77"):
        decode_piece(one_block(), UUIDS[1], 77, bytes(32))


def test_every_flipped_byte_is_noticed() -> None:
    content = bytearray(one_block())
    good = decode_piece(memoryview(content), UUIDS[1], 77, SECRET)
    assert good is not None
    first = BLOCK - TRAILER.size - len(good.data)
    for at in range(BLOCK):
        content[at] ^= 0x40
        try:
            piece = decode_piece(memoryview(content), UUIDS[1], 77, SECRET)
        except FormatError:
            assert at >= first
        else:
            # Before the record lies what no signature covers; without magic or address it is no footer.
            assert piece == good if at < first else piece is None
        content[at] ^= 0x40


@given(st.binary(min_size=TRAILER.size - len(MAGIC), max_size=TRAILER.size - len(MAGIC)))
def test_garbage_before_the_magic_is_no_footer(garbage: bytes) -> None:
    content = bytes(BLOCK - TRAILER.size) + garbage + MAGIC
    assert decode_piece(memoryview(content), UUIDS[1], 77, SECRET) is None


@given(st.integers(0, 2**32 - 1))
def test_no_length_leads_out_of_the_block(length: int) -> None:
    trailer = TRAILER.pack(bytes(16), UUIDS[1], 77, 0, 0, 0, 0, 1, length, MAGIC)
    try:
        assert decode_piece(bytes(BLOCK - TRAILER.size) + trailer, UUIDS[1], 77, SECRET) is None
        assert length > ROOM
    except FormatError:
        assert length <= ROOM


def test_a_signature_needs_the_secret_and_every_byte() -> None:
    assert sign(SECRET, b"ab", b"c") == sign(SECRET, b"abc")
    assert len({sign(SECRET, b"abc"), sign(SECRET, b"abd"), sign(bytes(32), b"abc"), sign(SECRET)}) == 4
