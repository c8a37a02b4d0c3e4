"""The text form of uuids."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import InvalidRequest
from rustord.objkey import ObjKey, is_uuid, parse_uuid, uuid_text


@given(st.binary(min_size=16, max_size=16))
def test_text_and_back(value: bytes) -> None:
    text = uuid_text(value)
    assert text == str(uuid.UUID(bytes=value))
    assert parse_uuid(text) == parse_uuid(text.upper()) == parse_uuid(text.replace("-", "")) == value


@pytest.mark.parametrize(
    "text",
    ["", "greeting", "0" * 31, "0" * 33, "g" * 32, "{" + "0" * 32 + "}", "urn:uuid:" + "0" * 32, "0" * 32 + "\n"],
)
def test_what_is_no_uuid_is_refused(text: str) -> None:
    assert not is_uuid(text)
    with pytest.raises(InvalidRequest):
        parse_uuid(text)


def test_a_refusal_quotes_no_more_than_a_line() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_uuid("x" * 100_000)
    assert len(caught.value.message) < 120


def test_an_objkey_prints_as_its_uuid() -> None:
    assert str(ObjKey(bytes(16), "xxh3-128", b"", 0)) == "00000000-0000-0000-0000-000000000000"
