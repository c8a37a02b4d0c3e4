from __future__ import annotations

import json
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import InvalidRequest
from rustord.wire import api, request
from rustord.wire.api import NewDevice
from rustord.wire.http1 import ReplyHead, parse_fields, read_request_head
from rustord.wire.limits import Limits
from rustord.wire.request import Listing, Request

LIMITS = Limits()
UUID = "0190a5b4-7d3c-7000-8000-0123456789ab"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def understood(asked: Request, *more: str) -> tuple[str, str, dict[str, str]]:
    """What the server makes of it: operation, argument and fields."""
    head = read_request_head(asked.head(*more), 0, LIMITS)
    assert head is not None
    found = api.read_request(head)
    return found.operation.id, found.argument, head.fields.by_name


@given(TEXT, st.dictionaries(TEXT, TEXT, max_size=3))
def test_the_server_understands_what_is_to_be_stored(name: str, attributes: dict[str, str]) -> None:
    attributes = {key.lower(): value for key, value in attributes.items()}
    operation, argument, fields = understood(request.store(name, "a/b", attributes, True, ""), "Content-Length: 1")
    assert (operation, argument) == ("store_named" if name else "store_object", name)
    metadata = api.read_metadata("", fields)
    assert metadata.content_type == "a/b"
    assert {key.lower(): value for key, value in metadata.attributes.items()} == attributes


def test_conditions_are_sent() -> None:
    assert understood(request.store("n", "", {}, False, ""))[2]["if-none-match"] == "*"
    assert understood(request.store("n", "", {}, True, "a:1"))[2]["if-match"] == '"a:1"'
    assert understood(request.delete(UUID, "a:1")) == ("delete_object", UUID, {"host": "rustord", "if-match": '"a:1"'})


@pytest.mark.parametrize("bad", ["a\r\nX: y", 'a"b', "ü", "\x7f"])
def test_fields_cannot_be_smuggled_in(bad: str) -> None:
    for call in (
        lambda: request.store("", bad, {}, True, ""),
        lambda: request.store("", "", {}, True, bad),
        lambda: request.delete(UUID, bad),
    ):
        with pytest.raises(InvalidRequest):
            call()


def test_a_key_is_a_uuid_or_a_name() -> None:
    assert understood(request.fetch(UUID, 0, None))[:2] == ("get_object", UUID)
    assert understood(request.look("a/ü ?"))[:2] == ("head_named", "a/ü ?")
    assert understood(request.manifest(UUID))[:2] == ("get_manifest", UUID)
    assert understood(request.remove_device("/dev/sdb", True))[:2] == ("remove_device", "/dev/sdb")
    assert understood(request.keep_device("/dev/sdb"))[:2] == ("keep_device", "/dev/sdb")
    assert understood(request.start_mover("heal"))[0] == "start_mover"


@pytest.mark.parametrize(
    ("start", "end", "value"),
    [(0, None, None), (0, 1, "bytes=0-0"), (5, None, "bytes=5-"), (5, 9, "bytes=5-8"), (-7, None, "bytes=-7")],
)
def test_a_range_is_that_of_a_slice(start: int, end: int | None, value: str | None) -> None:
    assert understood(request.fetch("n", start, end))[2].get("range") == value


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (3, 2), (-3, 2), (0, -1)])
def test_a_range_with_nothing_in_it_is_refused(start: int, end: int) -> None:
    with pytest.raises(InvalidRequest):
        request.fetch("n", start, end)


def test_a_device_is_described() -> None:
    asked, body = request.add_device("/dev/ü", True, False, "1")
    assert understood(asked)[0] == "add_device"
    assert api.read_new_device(body) == NewDevice("/dev/ü", True, False, "1")


def page(names: list[str], after: str = "") -> tuple[ReplyHead, bytes]:
    entry = {"uuid": UUID, "size": 1, "content_type": "", "created": "", "algorithm": "a", "digest": "d"}
    body = "".join(json.dumps({"name": name, **entry}) + "\n" for name in names).encode()
    return ReplyHead(200, parse_fields(f"Rustor-Next: {after}" if after else ""), 0), body


def test_a_listing_goes_on_where_the_page_ends() -> None:
    listing = Listing("/v1/names", {"prefix": "ü&=", "after": ""}, 1500)
    assert understood(listing.request)[0] == "list_names"
    assert "limit=1000" in listing.request.target
    assert "after" not in listing.request.target
    assert [stored.name for stored in listing.feed(*page(["a"] * 1000, "a%20%26"))] == ["a"] * 1000
    assert not listing.done
    assert unquote(listing.request.target).endswith("&limit=500&after=a &")
    listing.feed(*page(["b"] * 500, "b"))
    assert listing.done


def test_a_listing_ends_with_its_last_page_or_its_limit() -> None:
    listing = Listing("/v1/objects", {}, None)
    listing.feed(*page(["a"]))
    assert listing.done
    assert Listing("/v1/objects", {}, 0).done
