from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import InvalidRequest, NotFound, PreconditionFailed, RangeNotSatisfiable, RustordError, TooLarge
from rustord.extent import Extent
from rustord.objkey import ObjKey
from rustord.record import Metadata, Record, encode_metadata, encode_record
from rustord.wire import api
from rustord.wire.api import Body, NewDevice, Role
from rustord.wire.http1 import Fields, LengthRequired, MethodNotAllowed, RequestHead, parse_fields, read_request_head
from rustord.wire.limits import Limits

LIMITS = Limits()
UUID = "0190a5b4-7d3c-7000-8000-0123456789ab"


def head(method: str, target: str, *lines: str) -> RequestHead:
    data = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: a", *lines, "", ""]).encode("latin-1")
    found = read_request_head(data, 0, LIMITS)
    assert found is not None
    return found


def fields(**by_name: str) -> Fields:
    return parse_fields("\r\n".join(f"{name.replace('_', '-')}: {value}" for name, value in by_name.items()))


def record(size: int = 100, metadata: Metadata | None = None) -> Record:
    metadata = metadata or Metadata()
    key = ObjKey(bytes.fromhex(UUID.replace("-", "")), "xxh3-128", b"\xab" * 16, size)
    raw = encode_record(
        key,
        7,
        1_700_000_000_123_456_789,
        [[Extent(3, 4, 5)], [Extent(1, 2, 5)]],
        bytes(8 * -(-size // 65536)),
        b"mirrored",
        metadata.name.encode(),
        encode_metadata(metadata),
    )
    return Record(raw)


# Routes


@pytest.mark.parametrize(
    ("method", "target", "operation", "argument"),
    [
        ("POST", "/v1/objects", "store_object", ""),
        ("GET", "/v1/objects?limit=5", "list_objects", ""),
        ("GET", f"/v1/objects/{UUID}", "get_object", UUID),
        ("HEAD", f"/v1/objects/{UUID}", "head_object", UUID),
        ("DELETE", f"/v1/objects/{UUID}", "delete_object", UUID),
        ("GET", f"/v1/objects/{UUID}/manifest", "get_manifest", UUID),
        ("GET", "/v1/names?prefix=a%2Fb", "list_names", ""),
        ("PUT", "/v1/names/a/b/c", "store_named", "a/b/c"),
        ("PUT", "/v1/names/a%2Fb%20%C3%BC/", "store_named", "a/b ü/"),
        ("GET", "/v1/names/../a//b", "get_named", "../a//b"),
        ("HEAD", "/v1/names/a+b", "head_named", "a+b"),
        ("DELETE", "/v1/names/%25", "delete_named", "%"),
        ("DELETE", "/v1/devices/%2Fdev%2Fsdb", "remove_device", "/dev/sdb"),
        ("GET", "/metrics", "get_metrics", ""),
    ],
)
def test_a_request_finds_its_operation(method: str, target: str, operation: str, argument: str) -> None:
    found = api.read_request(head(method, target))
    assert (found.operation.id, found.argument) == (operation, argument)


@pytest.mark.parametrize(
    "target",
    ["/", "/v1", "/v1/", "/v1/objects/", "/v1/objects/a/b", "/v2/objects", "/v1/devices/", "/v1/devices/a/b", "*"],
)
def test_there_is_nothing_elsewhere(target: str) -> None:
    with pytest.raises(NotFound):
        api.read_request(head("GET", target))


def test_a_method_that_is_not_taken_is_told_those_that_are() -> None:
    with pytest.raises(MethodNotAllowed) as refused:
        api.read_request(head("BREW", "/v1/names/pot"))
    assert refused.value.allowed == ("GET", "HEAD", "PUT", "DELETE")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/names/%",
        "/v1/names/%zz",
        "/v1/names/%ff",
        "/v1/names/%c3",
        "/v1/names/%ED%A0%80",
        "/v1/names?prefix",
        "/v1/names?prefix=%ff",
        "/v1/names?colour=blue",
        "/v1/names?limit=1&limit=2",
        "/v1/names?" + "&".join(f"a{i}=1" for i in range(9)),
        "/v1/pool?x=1",
    ],
)
def test_a_target_that_cannot_be_understood_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequest):
        api.read_request(head("GET", target))


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_any_target_is_understood_or_refused(target: str) -> None:
    for candidate in (target, "/v1/names/" + target, "/v1/objects/" + target, "/v1/names?" + target):
        try:
            api.read_request(head("GET", candidate))
        except (InvalidRequest, NotFound):
            continue


def test_every_operation_has_an_id_of_its_own_and_a_role() -> None:
    operations = [operation for methods in api.ROUTES.values() for operation in methods.values()]
    assert len({operation.id for operation in operations}) == len(operations)
    assert all(operation.role > Role.NOBODY for operation in operations)
    for methods in api.ROUTES.values():
        for method, operation in methods.items():
            assert (operation.role is Role.READER) == (method in ("GET", "HEAD"))


@pytest.mark.parametrize("limit", ["0", "-1", "x", "", "1.0", "10001", "9" * 20, "²"])
def test_a_limit_out_of_bounds_is_refused(limit: str) -> None:
    with pytest.raises(InvalidRequest):
        api.page_limit({"limit": limit}, LIMITS)


def test_a_limit_within_bounds_is_taken() -> None:
    assert api.page_limit({}, LIMITS) == 1000
    assert api.page_limit({"limit": "10000"}, LIMITS) == 10000


def test_only_what_takes_a_body_may_have_one() -> None:
    api.check_body(head("PUT", "/", "Content-Length: 0"), Body.DATA, LIMITS)
    api.check_body(head("PUT", "/", "Transfer-Encoding: chunked"), Body.DATA, LIMITS)
    api.check_body(head("GET", "/", "Content-Length: 0"), Body.NOTHING, LIMITS)
    with pytest.raises(InvalidRequest):
        api.check_body(head("GET", "/", "Content-Length: 1"), Body.NOTHING, LIMITS)
    with pytest.raises(LengthRequired):
        api.check_body(head("PUT", "/"), Body.DATA, LIMITS)
    for field in (f"Content-Length: {LIMITS.json_bytes + 1}", "Transfer-Encoding: chunked"):
        with pytest.raises(TooLarge):
            api.check_body(head("POST", "/", field), Body.JSON, LIMITS)


# Metadata

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_metadata_comes_from_the_fields() -> None:
    found = api.read_metadata("n", {"content-type": "text/plain", "rustor-meta-a%20b": "%C3%BC", "accept": "x"})
    assert found == Metadata("n", "text/plain", {"a b": "ü"})
    assert api.read_metadata("", {"rustor-meta-raw": "ü".encode().decode("latin-1")}).attributes == {"raw": "ü"}


@pytest.mark.parametrize("by_name", [{"rustor-meta-a": "%ff"}, {"rustor-meta-%": "x"}, {"content-type": "\xff"}])
def test_metadata_that_is_no_text_is_refused(by_name: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        api.read_metadata("", by_name)


@given(TEXT, st.dictionaries(TEXT, TEXT, max_size=3))
def test_metadata_survives_the_way_there_and_back(name: str, attributes: dict[str, str]) -> None:
    attributes = {key.lower(): value for key, value in attributes.items()}
    lines = api.object_fields(record(metadata=Metadata(name, "a/b", attributes))).decode("ascii")
    parsed = parse_fields(lines.removesuffix("\r\n"))
    assert api.percent_decoded(parsed.by_name.get("rustor-name", "")) == name
    found = api.read_metadata("", parsed.by_name)
    assert {key.lower(): value for key, value in found.attributes.items()} == attributes


def test_an_object_is_described_by_fields_and_json() -> None:
    stored = record(metadata=Metadata('a"b', "", {"k": "v"}))
    lines = api.object_fields(stored).decode().split("\r\n")
    assert f'ETag: "xxh3-128:{"ab" * 16}"' in lines
    assert "Content-Type: application/octet-stream" in lines
    assert "Last-Modified: Tue, 14 Nov 2023 22:13:20 GMT" in lines
    assert f"Rustor-Uuid: {UUID}" in lines
    reply = api.stored(stored, 201)
    told = {"uuid": UUID, "name": 'a"b', "size": 100, "algorithm": "xxh3-128", "digest": "ab" * 16}
    assert json.loads(bytes(reply.body)) == told
    entry = {**told, "content_type": "", "created": "2023-11-14T22:13:20.123456Z"}
    assert json.loads(api.json_lines([api.object_json(stored)])) == entry
    assert api.manifest_json(stored, {3: "three"}) == {
        **entry,
        "attributes": {"k": "v"},
        "sequence": 7,
        "layout": "mirrored",
        "copies": [
            [{"device": "three", "index": 3, "block": 4, "count": 5}],
            [{"device": "", "index": 1, "block": 2, "count": 5}],
        ],
    }


# Conditions and ranges


@pytest.mark.parametrize(
    ("value", "strong", "weak"),
    [
        ("*", ("*",), ("*",)),
        ('"a"', ("a",), ("a",)),
        ('"a", W/"b" ,"c"', ("a", "c"), ("a", "b", "c")),
        ('"*"', (), ()),
        ("", (), ()),
    ],
)
def test_entity_tags(value: str, strong: tuple[str, ...], weak: tuple[str, ...]) -> None:
    assert api.entity_tags(value, weakly=False) == strong
    assert api.entity_tags(value, weakly=True) == weak


@pytest.mark.parametrize("value", ["a", '"a', 'a"', '"a" b', "*, *", 'w/"a"'])
def test_what_is_no_entity_tag_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        api.entity_tags(value, weakly=True)


def test_conditions_of_a_read() -> None:
    assert not api.is_not_modified(fields(), "t")
    assert api.is_not_modified(fields(if_none_match='W/"t"'), "t")
    assert api.is_not_modified(fields(if_none_match="*"), "t")
    assert not api.is_not_modified(fields(if_none_match='"u"'), "t")
    assert not api.is_not_modified(fields(if_match="*"), "t")
    assert not api.is_not_modified(fields(if_match='"u", "t"'), "t")
    for refused in ('"u"', 'W/"t"', ""):
        with pytest.raises(PreconditionFailed):
            api.is_not_modified(fields(if_match=refused), "t")


def test_conditions_of_an_upload() -> None:
    assert api.if_match(fields()) is None
    assert api.if_match(fields(if_match='"a"')) == ("a",)
    assert not api.if_none_match_any(fields())
    assert api.if_none_match_any(fields(if_none_match="*"))
    with pytest.raises(InvalidRequest):
        api.if_none_match_any(fields(if_none_match='"a"'))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=10-1000", (10, 100)),
        ("bytes=99-", (99, 100)),
        ("Bytes= 5-6 ", (5, 7)),
        ("bytes=-1", (99, 100)),
        ("bytes=-1000", (0, 100)),
        (f"bytes=90-{2**63 - 1}", (90, 100)),
        (f"bytes=90-{10**500}", (90, 100)),
        (f"bytes=-{10**500}", (0, 100)),
        ("bytes=90-" + "9" * 5000, None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes", None),
    ],
)
def test_a_range_is_cut_to_the_object_or_ignored(value: str, expected: tuple[int, int] | None) -> None:
    assert api.requested_range(fields(range=value), "t", 100) == expected


@pytest.mark.parametrize(
    ("value", "size"), [("bytes=100-", 100), ("bytes=100-200", 100), ("bytes=-0", 100), (f"bytes={2**64}-", 100)]
)
def test_a_range_beyond_the_end_is_refused(value: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as refused:
        api.requested_range(fields(range=value), "t", size)
    assert refused.value.size == size


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_an_empty_object_has_no_ranges(value: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        api.requested_range(fields(range=value), "t", 0)


def test_if_range_makes_the_range_count_for_that_object_alone() -> None:
    assert api.requested_range(fields(range="bytes=0-0", if_range='"t"'), "t", 100) == (0, 1)
    for other in ('"u"', 'W/"t"', "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert api.requested_range(fields(range="bytes=0-0", if_range=other), "t", 100) is None


@given(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=40), st.integers(0, 1 << 40))
def test_any_range_lies_within_the_object_or_is_refused(value: str, size: int) -> None:
    for candidate in (value, "bytes=" + value):
        found = Fields({"range": candidate}, None, False, False, False, False, True, False)
        try:
            part = api.requested_range(found, "t", size)
        except RangeNotSatisfiable:
            continue
        assert part is None or 0 <= part[0] < part[1] <= size


# Devices


def test_a_new_device_is_read() -> None:
    assert api.read_new_device(b'{"path": "/dev/sdb"}') == NewDevice("/dev/sdb", False, False)
    assert api.read_new_device(b'{"path": "/dev/sdb", "force": true, "dry_run": true}') == NewDevice(
        "/dev/sdb", True, True
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"path"',
        b'{"path": 1}',
        b'{"path": "a", "force": 1}',
        b'{"path": "a", "dry_run": null}',
        b'{"path": "a", "colour": "blue"}',
        b"\xff",
        b"[" * 60000,
    ],
)
def test_what_is_no_device_is_refused(body: bytes) -> None:
    with pytest.raises(RustordError) as refused:
        api.read_new_device(body)
    assert refused.value.http_status == 400
