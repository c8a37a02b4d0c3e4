"""Records: what is encoded comes back, and a record of which any byte is wrong is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import FormatError
from rustord.extent import LAYERS, Extent
from rustord.manifest import CHUNK_BYTES, chunk_count
from rustord.objkey import ObjKey
from rustord.record import RECORD, Metadata, Record, encode_metadata, encode_record, record_length

extents = st.builds(Extent, st.integers(0, LAYERS - 1), st.integers(0, 2**40), st.integers(1, 2**32 - 1))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
metadata = st.builds(Metadata, texts, texts, st.dictionaries(texts, texts, max_size=4))
keys = st.builds(
    ObjKey,
    st.binary(min_size=16, max_size=16),
    st.text("abcxyz0123456789-", min_size=1, max_size=32),
    st.binary(min_size=1, max_size=64),
    st.integers(0, 5 * CHUNK_BYTES),
)


def encoded(
    *,
    size: int = 3 * CHUNK_BYTES + 5,
    copies: list[list[Extent]] | None = None,
    metadata: Metadata = Metadata("a/name", "text/plain", {"colour": "blue"}),  # noqa: B008
) -> bytes:
    key = ObjKey(bytes(range(16)), "xxh3-128", bytes(range(16, 32)), size)
    sums = random.Random(1).randbytes(8 * chunk_count(size))
    copies = copies or [[Extent(0, 1280, 40), Extent(1, 7, 9)], [Extent(2, 1 << 33, 49)]]
    return encode_record(
        key, 77, 1_700_000_000_123_456_789, copies, sums, b"mirrored", metadata.name.encode(), encode_metadata(metadata)
    )


@given(keys, st.lists(st.lists(extents, min_size=1, max_size=4), min_size=1, max_size=3), metadata, st.data())
def test_what_is_encoded_comes_back(
    key: ObjKey, copies: list[list[Extent]], metadata: Metadata, data: st.DataObject
) -> None:
    sequence, created_ns = data.draw(st.integers(1, 2**63)), data.draw(st.integers(0, 2**63))
    sums = data.draw(st.binary(min_size=8 * chunk_count(key.size), max_size=8 * chunk_count(key.size)))
    name, more = metadata.name.encode(), encode_metadata(metadata)
    raw = encode_record(key, sequence, created_ns, copies, sums, b"striped", name, more)
    record = Record(raw)
    assert (record.key, record.sequence, record.created_ns) == (key, sequence, created_ns)
    assert record.metadata == metadata
    assert (record.name, record.content_type, record.attributes) == metadata
    assert record.manifest == ("striped", tuple(map(tuple, copies)), sums)
    assert record.extents == [extent for copy in copies for extent in copy]
    assert record.devices == {extent.device for extent in record.extents}
    count = sum(map(len, copies))
    assert len(raw) == record_length(key, b"striped", name, more, len(copies), count)


def test_checksums_are_found_by_chunk() -> None:
    record = Record(encoded())
    sums = record.manifest.sums
    assert len(sums) == 32
    assert record.sums(0, 4) == sums
    assert record.sums(2, 3) == sums[16:24]
    assert record.sums(1, 1) == b""


def test_what_is_not_said_is_empty() -> None:
    record = Record(encoded(size=0, metadata=Metadata()))
    assert record.metadata == Metadata("", "", {})
    assert record.manifest.sums == b""


def test_every_truncation_is_refused() -> None:
    raw = encoded()
    for length in range(len(raw)):
        with pytest.raises(FormatError):
            Record(raw[:length])


def test_every_flipped_bit_is_refused() -> None:
    raw = bytearray(encoded())
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            with pytest.raises(FormatError):
                Record(bytes(raw))
            raw[at] ^= 1 << bit


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(FormatError):
        Record(encoded() + b"\0")


@given(st.binary(max_size=3 * RECORD.size))
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Record(raw)


def test_a_record_of_other_blocks_says_the_same_of_the_object() -> None:
    record = Record(encoded())
    copies = [[Extent(3, 4, 5)], [Extent(4, 5, 6), Extent(5, 6, 7)]]
    moved = Record(record.moved(99, copies))
    assert moved.id == (record.uuid, 99)
    assert moved.copies == tuple(map(tuple, copies))
    assert (moved.key, moved.metadata, moved.created_ns) == (record.key, record.metadata, record.created_ns)
    assert (moved.layout, moved.manifest.sums) == (record.layout, record.manifest.sums)
    assert len(moved.raw) == record.moved_length(3)
