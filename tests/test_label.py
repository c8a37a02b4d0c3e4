"""Labels: what they say comes back; damaged, foreign and newer ones are told apart; and where everything lies."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from rustord.errors import DeviceError, FormatError
from rustord.label import (
    BLOCK_SIZES,
    DEVICE_BYTES_MIN,
    HEAD,
    LABEL_BYTES,
    MEMBER_COUNT_MAX,
    TABLES_AT,
    VOID_COUNT_MAX,
    Geometry,
    Label,
    Member,
    State,
    choose_label,
    decode_label,
    label_offsets,
    merge_voids,
)

MIB = 1 << 20
GIB = 1 << 30
uuids = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, 2**64 - 1)
labels = st.builds(
    Label,
    pool_uuid=uuids,
    pool_name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=16),
    device_uuid=uuids,
    device_index=st.integers(0, 2**16 - 1),
    block_size=st.sampled_from(BLOCK_SIZES),
    block_count=numbers,
    secret=st.binary(min_size=32, max_size=32),
    created_ns=numbers,
    generation=numbers,
    state=st.sampled_from(State),
    members=st.lists(st.builds(Member, uuids, st.integers(0, 2**16 - 1), numbers, numbers), max_size=5).map(tuple),
    voids=st.lists(st.tuples(numbers, numbers), max_size=5).map(tuple),
)
LABEL = Label(
    pool_uuid=b"p" * 16,
    pool_name="photos",
    device_uuid=b"a" * 16,
    device_index=0,
    block_size=4096,
    block_count=4096,
    secret=bytes(range(32)),
    created_ns=1_700_000_000_000_000_000,
    generation=7,
    members=(Member(b"a" * 16, 0, 4096, 7), Member(b"b" * 16, 1, 8192, 6)),
    voids=((5, 9), (20, 30)),
)


def decode(data: bytes | bytearray) -> Label | None:
    return decode_label(memoryview(data))


def copy(label: Label = LABEL) -> bytearray:
    return bytearray(label.encode().ljust(LABEL_BYTES, b"\0"))


def changed(at: int, value: bytes) -> bytearray:
    """A label with other bytes at an offset, and the right checksum."""
    data = copy()
    data[at : at + len(value)] = value
    length = int.from_bytes(data[24:28], "little")
    data[16:24] = xxh3_64_digest(memoryview(data)[24:length])
    return data


@given(labels)
def test_what_is_encoded_comes_back(label: Label) -> None:
    data = label.encode()
    assert len(data) % 4096 == 0
    assert decode(data.ljust(LABEL_BYTES, b"\0")) == label


def test_the_longest_label_has_room() -> None:
    label = replace(LABEL, members=LABEL.members[:1] * MEMBER_COUNT_MAX, voids=((1, 2),) * VOID_COUNT_MAX)
    assert len(label.encode()) <= LABEL_BYTES
    assert decode(copy(label)) == label


def test_the_secret_is_not_printed() -> None:
    assert "secret" not in repr(LABEL)


def test_the_first_sectors_look_like_nothing_else() -> None:
    data = LABEL.encode()
    assert data[510:512] == b"\0\0"  # no partition table
    assert not any(data[HEAD.size : TABLES_AT])


@pytest.mark.parametrize(
    "content", [bytes(LABEL_BYTES), b"\xff" * LABEL_BYTES, random.Random(1).randbytes(LABEL_BYTES)]
)
def test_what_does_not_bear_the_magic_is_no_label(content: bytes) -> None:
    assert decode(content) is None


def test_every_flipped_byte_is_noticed() -> None:
    data = copy()
    length = int.from_bytes(data[24:28], "little")
    for at in range(length):
        data[at] ^= 0x10
        if at < 16:
            assert decode(data) is None
        else:
            with pytest.raises(FormatError):
                decode(data)
        data[at] ^= 0x10
    data[length] ^= 0x10
    assert decode(data) == LABEL


def test_every_truncation_is_noticed() -> None:
    data = copy()
    length = int.from_bytes(data[24:28], "little")
    for end in range(HEAD.size, length):
        with pytest.raises(FormatError):
            decode(data[:end])


@given(st.binary(min_size=HEAD.size - 16, max_size=HEAD.size + 100))
def test_garbage_behind_the_magic_is_a_damaged_label(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        decode(copy()[:16] + garbage)


@given(st.dictionaries(st.integers(30, HEAD.size - 1), st.integers(0, 255), max_size=9))
def test_anything_with_the_right_checksum_is_a_label_or_refused(changes: dict[int, int]) -> None:
    data = copy()
    for at, value in changes.items():
        data[at] = value
    with suppress(FormatError):
        assert isinstance(decode(changed(30, bytes(data[30 : HEAD.size]))), Label)


@pytest.mark.parametrize(
    ("at", "value"),
    [(28, b"\2\0"), (28, b"\0\0"), (48, b"\2"), (55, b"\x80")],
    ids=["version 2", "version 0", "incompatible 2", "incompatible 2**63"],
)
def test_a_newer_format_is_refused_and_says_so(at: int, value: bytes) -> None:
    with pytest.raises(FormatError, match=r"version|incompatible") as caught:
        decode(changed(at, value))
    assert "newer" in caught.value.hint


def test_compatible_features_are_not_our_business() -> None:
    assert decode(changed(32, b"\xff")) == LABEL


@pytest.mark.parametrize(
    ("at", "value"),
    [(30, b"\7"), (90, b"\xff\xff"), (92, b"\xff"), (96, b"\1\0\0\0")],
    ids=["state", "more members than there are", "more voids than there are", "block size 1"],
)
def test_a_label_that_contradicts_itself_is_refused(at: int, value: bytes) -> None:
    with pytest.raises(FormatError, match="contradicts"):
        decode(changed(at, value))


class TestChoosing:
    def test_any_good_copy_will_do(self) -> None:
        bad = FormatError("damaged")
        assert choose_label([bad, None, LABEL]) == LABEL
        assert choose_label([None, LABEL, bad]) == LABEL

    def test_the_newest_copy_wins(self) -> None:
        newer = replace(LABEL, generation=8)
        assert choose_label([LABEL, newer, LABEL]) == newer

    def test_no_label_is_none(self) -> None:
        assert choose_label([None, None, None]) is None

    def test_damage_is_not_absence(self) -> None:
        with pytest.raises(FormatError):
            choose_label([None, FormatError("damaged"), None])

    def test_copies_of_two_devices_are_refused(self) -> None:
        foreign = replace(LABEL, device_uuid=b"x" * 16, pool_uuid=b"q" * 16, generation=1)
        with pytest.raises(FormatError, match="different devices or pools"):
            choose_label([LABEL, foreign, LABEL])


class TestGeometry:
    sizes = st.one_of(
        st.integers(DEVICE_BYTES_MIN, 64 * MIB),
        st.integers(DEVICE_BYTES_MIN, 1 << 52),
        st.integers(16, 1 << 12).map(lambda mib: mib * MIB),
    )

    @given(sizes, st.sampled_from(BLOCK_SIZES))
    def test_nothing_overlaps_and_little_is_wasted(self, size: int, block_size: int) -> None:
        geometry = Geometry.of_device(size, block_size)
        head, middle, tail = geometry.label_offsets
        (first, first_count), (second, second_count) = geometry.data_runs
        assert head == 0
        assert geometry.journal_offset == MIB >= LABEL_BYTES
        assert first * block_size == geometry.journal_offset + geometry.journal_length
        assert (first + first_count) * block_size == middle
        assert second * block_size == middle + LABEL_BYTES
        assert (second + second_count) * block_size == tail
        assert tail + LABEL_BYTES <= tail + MIB <= geometry.size <= size < geometry.size + block_size
        assert first_count > 0
        assert second_count > 0
        assert geometry.data_block_count == first_count + second_count

    @given(sizes, st.sampled_from(BLOCK_SIZES))
    def test_labels_are_found_by_the_size_of_the_device_alone(self, size: int, block_size: int) -> None:
        assert label_offsets(size) == Geometry.of_device(size, block_size).label_offsets

    @pytest.mark.parametrize(
        ("size", "length"),
        [
            (16 * MIB, 4 * MIB),
            (GIB, 4 * MIB),
            (GIB + 256 * MIB, 5 * MIB),
            (256 * GIB, GIB),
            (1 << 52, GIB),
        ],
    )
    def test_the_journal_grows_with_the_device(self, size: int, length: int) -> None:
        assert Geometry.of_device(size, 4096).journal_length == length

    def test_a_small_device_is_refused(self) -> None:
        with pytest.raises(DeviceError, match="too small"):
            Geometry.of_device(DEVICE_BYTES_MIN - 1, 4096)

    @pytest.mark.parametrize("size", [0, 512, LABEL_BYTES, MIB - 512, MIB, MIB + 512])
    def test_no_label_lies_before_a_tiny_device(self, size: int) -> None:
        assert min(label_offsets(size)) >= 0


class TestVoids:
    def test_adjoining_voids_are_one(self) -> None:
        assert merge_voids([(20, 30), (1, 5), (5, 9), (8, 10), (22, 25)]) == ((1, 10), (20, 30))

    @given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda void: (void[0], sum(void)))))
    def test_merging_keeps_every_number(self, voids: list[tuple[int, int]]) -> None:
        merged = merge_voids(voids)
        covered = {number for first, end in voids for number in range(first, end)}
        assert {number for first, end in merged for number in range(first, end)} == covered
        assert all(end < first for (_, end), (first, _) in pairwise(merged))


def test_a_label_for_another_member_differs_in_what_is_that_member_s() -> None:
    other = LABEL.for_member(LABEL.members[1])
    assert (other.device_uuid, other.device_index, other.block_count) == (b"b" * 16, 1, 8192)
    assert other.members == LABEL.members
    assert other.geometry == Geometry(8192, 4096)
