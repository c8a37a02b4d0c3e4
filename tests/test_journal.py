"""Batches of the journal: what is encoded comes back; what is torn, foreign or random is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import FormatError
from rustord.extent import Extent
from rustord.footer import sign
from rustord.journal import (
    BATCH,
    ENTRY,
    MAGIC,
    NOTHING,
    Entry,
    Kind,
    batch_length,
    decode_batch,
    decode_grave,
    decode_record_ids,
    delete_entry,
    encode_batch,
    encode_entry,
    erased_entry,
    grave_entry,
    put_entry,
    undo_entry,
    unerased_entry,
)
from rustord.record import RECORD_ID, Grave, RecordId

SECRET = bytes(range(32))
DEVICE = b"d" * 16
uuids = st.binary(min_size=16, max_size=16)
sequences = st.integers(1, 2**64 - 1)
ids = st.builds(RecordId, uuids, sequences)
extents = st.builds(Extent, st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
graves = st.builds(Grave, ids, st.lists(extents))


def packed(ids: list[RecordId]) -> bytes:
    return b"".join(RECORD_ID.pack(*id) for id in ids)


entries = st.one_of(
    st.builds(
        lambda sequence, replaced, record: (
            put_entry(sequence, replaced, record),
            Entry(Kind.PUT, sequence, replaced + record),
        ),
        sequences,
        uuids,
        st.binary(max_size=300),
    ),
    st.builds(lambda number, uuid: (delete_entry(number, uuid), Entry(Kind.DELETE, number, uuid)), sequences, uuids),
    st.builds(lambda number, id: (undo_entry(number, id), Entry(Kind.UNDO, number, packed([id]))), sequences, ids),
    st.builds(lambda grave: (encode_entry(grave_entry(grave)), grave_entry(grave)), graves),
    st.builds(lambda gone: (erased_entry(gone), Entry(Kind.ERASED, 0, packed(gone))), st.lists(ids)),
    st.builds(lambda gone: (unerased_entry(gone), Entry(Kind.UNERASED, 0, packed(gone))), st.lists(ids)),
)


def batch() -> bytes:
    changes = [
        put_entry(8, NOTHING, b"a record" * 9),
        delete_entry(9, b"u" * 16),
        erased_entry([RecordId(b"v" * 16, 3)]),
    ]
    return encode_batch(changes, DEVICE, 5, 7, SECRET)


def signed(entry_count: int, body: bytes) -> bytes:
    """A batch that is rightly signed, whatever its body says."""
    head = BATCH.pack(MAGIC, b"", DEVICE, 1, 0, BATCH.size + len(body), entry_count)
    return MAGIC + sign(SECRET, head[24:], body) + head[24:] + body


@given(st.lists(entries, max_size=5), st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=50))
def test_what_is_encoded_comes_back(
    changes: list[tuple[bytes, Entry]], number: int, durable: int, padding: bytes
) -> None:
    data = encode_batch([raw for raw, _ in changes], DEVICE, number, durable, SECRET)
    decoded = decode_batch(data + padding, DEVICE, SECRET)
    assert decoded == (number, durable, len(data), [entry for _, entry in changes])
    assert batch_length(data) == len(data)


def test_every_truncation_is_no_batch() -> None:
    data = batch()
    for length in range(len(data)):
        assert decode_batch(data[:length], DEVICE, SECRET) is None


def test_every_flipped_bit_makes_it_none() -> None:
    data = bytearray(batch())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert decode_batch(memoryview(data), DEVICE, SECRET) is None
            data[at] ^= 1 << bit


def test_another_device_s_batch_is_none() -> None:
    assert decode_batch(batch(), b"e" * 16, SECRET) is None


def test_another_pool_s_batch_is_none() -> None:
    assert decode_batch(batch(), DEVICE, bytes(32)) is None


@given(st.binary(max_size=3 * BATCH.size), st.booleans())
def test_garbage_is_none(data: bytes, magic: bool) -> None:
    assert decode_batch(MAGIC + data if magic else data, DEVICE, SECRET) is None


@given(st.binary(max_size=100), st.integers(0, 2**32 - 1))
def test_a_signed_body_is_decoded_or_refused(body: bytes, entry_count: int) -> None:
    try:
        decoded = decode_batch(signed(entry_count, body), DEVICE, SECRET)
    except FormatError:
        return
    assert decoded is not None
    assert len(decoded.entries) == entry_count


def test_an_unknown_kind_is_refused() -> None:
    unknown = max(Kind) + 1
    with pytest.raises(FormatError, match=f"kind {unknown}"):
        decode_batch(signed(1, ENTRY.pack(0, unknown, 0, 0, 1)), DEVICE, SECRET)


def test_no_length_is_believed_that_is_shorter_than_a_header() -> None:
    head = BATCH.pack(MAGIC, b"", DEVICE, 1, 0, BATCH.size - 1, 0)
    assert batch_length(head) is None
    assert batch_length(bytes(BATCH.size)) is None


@given(st.lists(ids, max_size=4), st.integers(1, 23))
def test_the_ids_of_records_come_back(gone: list[RecordId], excess: int) -> None:
    assert decode_record_ids(packed(gone)) == gone
    with pytest.raises(FormatError, match="no list of records"):
        decode_record_ids(packed(gone) + bytes(excess))


@given(graves)
def test_a_grave_comes_back(grave: Grave) -> None:
    assert decode_grave(grave_entry(grave).payload) == grave


@pytest.mark.parametrize("length", [0, 23, 25, 41])
def test_a_grave_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        decode_grave(bytes(length))
