"""What may be asked of a store, before anything is done."""

from __future__ import annotations

import pytest

from rustord.change import (
    ATTRIBUTE_BYTES_MAX,
    ATTRIBUTE_COUNT_MAX,
    CONTENT_TYPE_BYTES_MAX,
    Put,
    check_match,
    check_name,
)
from rustord.errors import InvalidRequest, PreconditionFailed, TooLarge
from rustord.extent import Extent
from rustord.objkey import ObjKey
from rustord.record import Metadata, Record, encode_record


def record() -> Record:
    key = ObjKey(bytes(16), "sha256", b"\x12\x34", 0)
    return Record(encode_record(key, 1, 0, [[Extent(0, 1280, 1)]], b"", b"contiguous", b"", b""))


@pytest.mark.parametrize(
    "name",
    ["a", "a/b/../c", "/", "...", "päth/ü", "日本語", "emoji 🦀", "x" * 1024, "é" * 512, " ", "a\u200db", "\u00a0"],
)
def test_names_that_can_be_stored(name: str) -> None:
    check_name(name)
    assert Put(b"", Metadata(name)).name_bytes == name.encode()


@pytest.mark.parametrize(
    "name",
    ["", "x" * 1025, "é" * 513, "a\0b", "a\nb", "\x1b[31m", "\x7f", "\x80", "\x9f", "lone \udc80", "\t"],
)
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_no_name_is_fine() -> None:
    assert Put(b"", Metadata()).name == ""


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata(content_type="x" * (CONTENT_TYPE_BYTES_MAX + 1)),
        Metadata(content_type="text/plain\r\nX: y"),
        Metadata(content_type="\udcff"),
        Metadata(attributes={"\udcff": ""}),
        Metadata(attributes={"key": "\udcff"}),
        Metadata("lone \ud800"),
    ],
)
def test_metadata_that_cannot_be_stored(metadata: Metadata) -> None:
    with pytest.raises(InvalidRequest):
        Put(b"", metadata)


@pytest.mark.parametrize(
    "attributes",
    [
        {str(number): "" for number in range(ATTRIBUTE_COUNT_MAX + 1)},
        {"key": "x" * (ATTRIBUTE_BYTES_MAX - 2)},
        {"key": "é" * (ATTRIBUTE_BYTES_MAX // 2)},
    ],
)
def test_too_many_attributes(attributes: dict[str, str]) -> None:
    with pytest.raises(TooLarge):
        Put(b"", Metadata(attributes=attributes))


def test_as_many_attributes_as_are_allowed() -> None:
    value = "x" * (ATTRIBUTE_BYTES_MAX // ATTRIBUTE_COUNT_MAX - 2)
    Put(b"", Metadata(attributes={f"{number:02}": value for number in range(ATTRIBUTE_COUNT_MAX)}))


def test_an_entity_tag_is_the_hash_of_the_data() -> None:
    assert record().etag == "sha256:1234"


@pytest.mark.parametrize("tags", [None, ["*"], ["sha256:1234"], ["sha256:00", "sha256:1234"]])
def test_a_match_allows_the_change(tags: list[str] | None) -> None:
    check_match(record(), tags, "the name")


@pytest.mark.parametrize("tags", [[], ["sha256:00"], ["1234"], ["xxh3-128:1234"]])
def test_a_mismatch_refuses_it(tags: list[str]) -> None:
    with pytest.raises(PreconditionFailed, match="the name is not what If-Match asks for"):
        check_match(record(), tags, "the name")


def test_nothing_matches_an_object_that_is_not_there() -> None:
    check_match(None, None, "the name")
    with pytest.raises(PreconditionFailed):
        check_match(None, ["*"], "the name")
