"""The object API: its routes, its requests and its replies as values. No I/O.

``rustord/frontends/openapi.json`` describes the same to users; a test holds one against the other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from enum import Enum, IntEnum, auto
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from rustord.errors import InvalidRequest, NotFound, PreconditionFailed, RangeNotSatisfiable, TooLarge
from rustord.extent import LAYER_SHIFT, LAYERS
from rustord.manifest import Data
from rustord.objkey import ObjectId, parse_uuid, uuid_text
from rustord.record import Metadata, Record
from rustord.wire.http1 import (
    JSON,
    Fields,
    LengthRequired,
    MethodNotAllowed,
    Reply,
    RequestHead,
    http_date,
    parse_fields,
)
from rustord.wire.limits import Limits

_NO_NAME = '""'
NDJSON = "application/x-ndjson"
BINARY = "application/octet-stream"
MAP_CELL_COUNT_MAX = 65536

_ATTRIBUTE = "rustor-meta-"
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ENTITY_TAG = re.compile(r'[, \t]*(W/)?"([!#-~\x80-\xff]*)"[, \t]*')
_RANGE = re.compile(r"bytes=[\t ]*([0-9]{0,999})-([0-9]{0,999})[\t ]*", re.IGNORECASE)


# Routes


class Role(IntEnum):
    """What a peer may do; each one may do what those before it may."""

    NOBODY = 0
    READER = 1
    """Read and list Objects, and look at the daemon."""
    WRITER = 2
    """Store and delete Objects."""
    ADMIN = 3
    """Change the pool's devices."""


class Body(Enum):
    """What a request carries."""

    NOTHING = auto()
    JSON = auto()
    DATA = auto()
    """The data of an Object."""


class Operation(NamedTuple):
    """``id`` names it here, in the frontend (its handler), in the OpenAPI document and in metrics."""

    id: str
    role: Role
    body: Body = Body.NOTHING
    changes: bool = False
    """It is nothing but a change of the store, whose order the writer keeps: it need not wait for those before it."""
    query: frozenset[str] = frozenset()
    """The query parameters that it takes."""


_PAGE = frozenset(("after", "limit"))

ROUTES: Mapping[str, Mapping[str, Operation]] = {
    "/v1/objects": {
        "GET": Operation("list_objects", Role.READER, query=_PAGE),
        "POST": Operation("store_object", Role.WRITER, Body.DATA, changes=True),
    },
    "/v1/objects/{uuid}": {
        "GET": Operation("get_object", Role.READER),
        "HEAD": Operation("head_object", Role.READER),
        "DELETE": Operation("delete_object", Role.WRITER, changes=True),
    },
    "/v1/objects/{uuid}/manifest": {"GET": Operation("get_manifest", Role.READER)},
    "/v1/names": {"GET": Operation("list_names", Role.READER, query=_PAGE | {"prefix"})},
    "/v1/names/{name}": {
        "GET": Operation("get_named", Role.READER),
        "HEAD": Operation("head_named", Role.READER),
        "PUT": Operation("store_named", Role.WRITER, Body.DATA, changes=True),
        "DELETE": Operation("delete_named", Role.WRITER),
    },
    "/v1/pool": {"GET": Operation("get_pool", Role.READER)},
    "/v1/volumes": {
        "GET": Operation("list_volumes", Role.READER),
        "POST": Operation("create_volume", Role.WRITER, Body.JSON),
    },
    "/v1/volumes/{volume}": {
        "GET": Operation("get_volume", Role.READER),
        "PATCH": Operation("resize_volume", Role.WRITER, Body.JSON),
        "DELETE": Operation("delete_volume", Role.WRITER),
    },
    "/v1/volumes/{volume}/freeze": {"POST": Operation("freeze_volume", Role.WRITER, Body.JSON)},
    "/v1/volumes/{volume}/snapshot": {"POST": Operation("snapshot_volume", Role.WRITER, Body.JSON)},
    "/v1/devices": {
        "GET": Operation("list_devices", Role.READER),
        "POST": Operation("add_device", Role.ADMIN, Body.JSON),
    },
    "/v1/devices/{device}": {"DELETE": Operation("remove_device", Role.ADMIN, query=frozenset(("give-up",)))},
    "/v1/devices/{device}/keep": {"POST": Operation("keep_device", Role.ADMIN)},
    "/v1/devices/{device}/map": {"GET": Operation("map_device", Role.READER, query=frozenset(("cells",)))},
    "/v1/mover": {
        "GET": Operation("get_mover", Role.READER),
        "POST": Operation("start_mover", Role.ADMIN, query=frozenset(("work",))),
        "DELETE": Operation("stop_mover", Role.ADMIN),
    },
    "/v1/slow-requests": {"GET": Operation("list_slow_requests", Role.READER)},
    "/v1/scrub": {
        "GET": Operation("get_scrub", Role.READER),
        "POST": Operation("start_scrub", Role.ADMIN, query=frozenset(("again",))),
        "DELETE": Operation("stop_scrub", Role.ADMIN),
    },
    "/v1/check": {"POST": Operation("check_pool", Role.ADMIN)},
    "/v1/exports": {"GET": Operation("list_exports", Role.READER)},
    "/v1/plugins": {"GET": Operation("list_plugins", Role.READER)},
    "/v1/openapi.json": {"GET": Operation("get_openapi", Role.READER)},
    "/metrics": {"GET": Operation("get_metrics", Role.READER)},
}

_OBJECT, _MANIFEST = ROUTES["/v1/objects/{uuid}"], ROUTES["/v1/objects/{uuid}/manifest"]
_NAMED = ROUTES["/v1/names/{name}"]
_DEVICE, _MAP = ROUTES["/v1/devices/{device}"], ROUTES["/v1/devices/{device}/map"]
_KEEP = ROUTES["/v1/devices/{device}/keep"]


class Request(NamedTuple):
    """What is asked: ``argument`` is the path's variable part, percent-decoded."""

    operation: Operation
    argument: str
    query: Mapping[str, str]


_NO_QUERY: Mapping[str, str] = {}


_PLAIN_REQUESTS = {
    (method, path): Request(operation, "", _NO_QUERY)
    for path, operations in ROUTES.items()
    for method, operation in operations.items()
    if "{" not in path
}
"""Those whose target has nothing variable, such as the storing of an Object, need no closer look."""


def read_request(head: RequestHead) -> Request:
    """What ``head`` asks for. Raises NotFound, MethodNotAllowed or InvalidRequest."""
    if plain := _PLAIN_REQUESTS.get((head.method, head.target)):
        return plain
    path, _, query = head.target.partition("?")
    operations, argument = _find_route(path)
    operation = operations.get(head.method)
    if operation is None:
        allowed = tuple(operations)
        raise MethodNotAllowed(
            f"{head.method[:20]} is not a method of {path[:200]}", allowed=allowed, hint="use " + " or ".join(allowed)
        )
    return Request(operation, argument, _read_query(query, operation.query) if query else _NO_QUERY)


class PlainGet(NamedTuple):
    """A GET of a whole Object that asks for nothing special: its uuid's text, and where the head ends."""

    uuid: bytes
    end: int


_PLAIN_GET = re.compile(rb"GET /v1/objects/([0-9a-f-]{36}) HTTP/1\.1\r\n((?:[^\r\n]+\r\n)+)\r\n")


def read_plain_get(data: bytes, start: int, limits: Limits) -> PlainGet | None:
    """The request that begins at ``start``, if it is a plain GET.

    Half of all requests are, and telling them at one look takes a third of the time of reading them like others.
    """
    match = _PLAIN_GET.match(data, start)
    if match is None or match.end() - start > limits.head_bytes or not _asks_nothing(match[2]):
        return None
    return PlainGet(match[1], match.end())


@lru_cache(maxsize=64)
def _asks_nothing(block: bytes) -> bool:
    try:
        fields = parse_fields(str(block[:-2], "latin-1"))
    except InvalidRequest:
        return False
    special = fields.closes or fields.chunked or fields.content_length is not None or fields.conditional
    return "host" in fields.by_name and not special and not fields.expects_continue


def check_body(head: RequestHead, body: Body, limits: Limits) -> None:
    """Raise InvalidRequest or TooLarge unless the request may have the body that its head announces."""
    if body is Body.NOTHING and head.fields.has_body:
        raise InvalidRequest(f"{head.method[:20]} takes no body here", hint="send none")
    if body is Body.JSON and (head.fields.chunked or (head.fields.content_length or 0) > limits.json_bytes):
        raise TooLarge(f"this request takes at most {limits.json_bytes} bytes, with a Content-Length")
    if body is Body.DATA and not head.fields.chunked and head.fields.content_length is None:
        raise LengthRequired("neither Content-Length nor a chunked body is given", hint="an empty Object has length 0")


def _find_route(path: str) -> tuple[Mapping[str, Operation], str]:
    if path.startswith("/v1/objects/"):
        rest = path[12:]
        if rest.endswith("/manifest"):
            return _MANIFEST, rest[:-9]
        if rest and "/" not in rest:
            return _OBJECT, rest
    elif path.startswith("/v1/names/"):
        return _NAMED, percent_decoded(path[10:])
    elif path.startswith("/v1/volumes/"):
        name, slash, deed = path[12:].partition("/")
        operations = ROUTES.get(f"/v1/volumes/{{volume}}{slash}{deed}")
        if name and operations:
            return operations, percent_decoded(name)
    elif path.startswith("/v1/devices/"):
        rest = path[12:]
        if rest.endswith("/map"):
            return _MAP, percent_decoded(rest[:-4])
        if rest.endswith("/keep"):
            return _KEEP, percent_decoded(rest[:-5])
        if rest and "/" not in rest:
            return _DEVICE, percent_decoded(rest)
    elif path in ROUTES:
        return ROUTES[path], ""
    raise NotFound(f"there is nothing at {path[:200]}", hint="the API is described at /v1/openapi.json")


def percent_decoded(text: str) -> str:
    """``text`` as it came in a head. Raises InvalidRequest unless it is percent-encoded (or plain) UTF-8."""
    if "%" not in text and text.isascii():
        return text
    if _BAD_PERCENT.search(text):
        raise InvalidRequest(f"{text[:80]!r} is not percent-encoded", hint="write a percent sign as %25")
    try:
        return unquote_to_bytes(text.encode("latin-1")).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{text[:80]!r} is not UTF-8", hint="percent-encode the UTF-8 form of the text") from None


def _read_query(query: str, known: frozenset[str]) -> Mapping[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=8)
    except ValueError:
        raise InvalidRequest(f"{query[:80]!r} is not a query", hint="write it as name=value&name=value") from None
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise InvalidRequest("a parameter is given twice")
    for name in parameters:
        if name not in known:
            raise InvalidRequest(
                f"there is no parameter {name[:80]!r} here", hint="known are: " + (", ".join(sorted(known)) or "none")
            )
    return parameters


def map_cells(query: Mapping[str, str]) -> int:
    """In how many cells a device is to be shown, 1,024 by default. Raises InvalidRequest."""
    return _number(query.get("cells", "1024"), "number of cells", MAP_CELL_COUNT_MAX)


def is_asked(query: Mapping[str, str], name: str) -> bool:
    """Whether a parameter says true; it need not be given. Raises InvalidRequest."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise InvalidRequest(f"{text[:80]!r} is neither true nor false", hint=f"write {name}=true")
    return text == "true"


def page_limit(query: Mapping[str, str], limits: Limits) -> int:
    """How many lines of a listing are asked for, 1,000 by default. Raises InvalidRequest."""
    return _number(query.get("limit", "1000"), "limit", limits.page_items)


def _number(text: str, what: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise InvalidRequest(f"{text[:80]!r} is not a {what}", hint=f"it is a number from 1 to {most}")
    return int(text)


def page_after(query: Mapping[str, str]) -> ObjectId:
    """The uuid behind which a listing of Objects goes on; empty for its beginning. Raises InvalidRequest."""
    return parse_uuid(query["after"]) if "after" in query else b""


# Objects


def check_whole(fields: Fields) -> None:
    """Raise InvalidRequest if an upload is a part of something, as of who goes on with one that was broken off."""
    if "content-range" in fields.by_name:
        raise InvalidRequest("a part of an Object cannot be stored", hint="send all of its data, without Content-Range")


def read_metadata(name: str, by_name: Mapping[str, str]) -> Metadata:
    """What the header fields of an upload say about the Object. Raises InvalidRequest."""
    content_type = by_name.get("content-type", "")
    if not content_type.isascii():
        raise InvalidRequest("the Content-Type is not ASCII")
    attributes = {
        percent_decoded(field[len(_ATTRIBUTE) :]): percent_decoded(value)
        for field, value in by_name.items()
        if field.startswith(_ATTRIBUTE)
    }
    return Metadata(name, content_type, attributes)


def object_fields(record: Record) -> bytes:
    """The header fields that go with an Object, whether its data is sent or not."""
    name, content_type, attributes = record.metadata
    more = f"Rustor-Name: {quote(name)}\r\n" if name else ""
    if attributes:
        for key, value in attributes.items():
            more += f"Rustor-Meta-{quote(key, safe='')}: {quote(value, safe='/:;,=+@()<>')}\r\n"
    return (
        f'Content-Type: {content_type or BINARY}\r\nETag: "{record.etag}"\r\n'
        f"Last-Modified: {http_date(record.created_ns // 1_000_000_000)}\r\n"
        f"Accept-Ranges: bytes\r\nRustor-Uuid: {uuid_text(record.uuid)}\r\n{more}"
    ).encode("ascii")


def created_text(created_ns: int) -> str:
    """Nanoseconds since 1970-01-01 UTC as a timestamp of RFC 3339, to the microsecond."""
    seconds, nanoseconds = divmod(created_ns, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06}Z"


def object_json(record: Record) -> dict[str, object]:
    """An Object as listings show it."""
    return {
        "name": record.name,
        "uuid": uuid_text(record.uuid),
        "size": record.size,
        "content_type": record.content_type,
        "created": created_text(record.created_ns),
        "algorithm": record.algorithm,
        "digest": record.digest.hex(),
    }


def manifest_json(record: Record, devices: Mapping[int, str]) -> dict[str, object]:
    """All that is known of an Object; ``devices`` has the uuid of each device of the pool by its index."""
    copies = [
        [
            {"layer": block >> LAYER_SHIFT, "block": block & (1 << LAYER_SHIFT) - 1, "count": count}
            if index == LAYERS
            else {"device": devices.get(index, ""), "index": index, "block": block, "count": count}
            for index, block, count in copy
        ]
        for copy in record.copies
    ]
    return {
        **object_json(record),
        "attributes": dict(record.attributes),
        "sequence": record.sequence,
        "layout": record.layout,
        "copies": copies,
    }


def json_lines(values: Iterable[object]) -> bytes:
    """NDJSON."""
    return "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values).encode()


# Conditions and ranges (RFC 9110, 13 and 14)


def entity_tags(value: str, *, weakly: bool) -> tuple[str, ...]:
    """The tags of If-Match or If-None-Match without quotes; ``("*",)`` for any. Raises InvalidRequest.

    Weak tags never match in a strong comparison, so they are left out unless ``weakly``.
    """
    if value == "*":
        return ("*",)
    tags: list[str] = []
    at = 0
    while match := _ENTITY_TAG.match(value, at):
        if (weakly or not match[1]) and match[2] != "*":
            tags.append(match[2])
        at = match.end()
    if at < len(value):
        raise InvalidRequest(f"{value[at : at + 80]!r} is not an entity tag", hint="write it in double quotes, or *")
    return tuple(tags)


def if_match(fields: Fields) -> tuple[str, ...] | None:
    """The tags of which one must be the Object's; None if any will do. Raises InvalidRequest."""
    value = fields.by_name.get("if-match")
    return None if value is None else entity_tags(value, weakly=False)


def if_none_match_any(fields: Fields) -> bool:
    """Whether a name must be new, for an upload. Raises InvalidRequest for anything but ``*``."""
    value = fields.by_name.get("if-none-match")
    if value is not None and value != "*":
        raise InvalidRequest("an upload takes If-None-Match with * only", hint="use If-Match to replace a known Object")
    return value is not None


def is_not_modified(fields: Fields, tag: str) -> bool:
    """Whether the peer has the data with entity tag ``tag`` already. Raises PreconditionFailed, InvalidRequest."""
    wanted = if_match(fields)
    if wanted is not None and wanted != ("*",) and tag not in wanted:
        raise PreconditionFailed("the Object is not what If-Match asks for", hint="read its entity tag again")
    value = fields.by_name.get("if-none-match")
    if value is None:
        return False
    known = entity_tags(value, weakly=True)
    return known == ("*",) or tag in known


def requested_range(fields: Fields, tag: str, size: int) -> tuple[int, int] | None:
    """The half-open range of ``size`` bytes that is asked for; None for all of them.

    Several ranges, other units and what is no range at all are ignored, as the RFC wants. Raises RangeNotSatisfiable.
    """
    value = fields.by_name.get("range")
    if value is None or fields.by_name.get("if-range", f'"{tag}"') != f'"{tag}"':
        return None
    match = _RANGE.fullmatch(value)
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        first, end = int(match[1]), int(match[2]) + 1 if match[2] else size
        if match[2] and first >= end:
            return None
    else:
        first, end = max(0, size - int(match[2])), size
    if first >= size:
        raise RangeNotSatisfiable(
            f"the range {value[:80]!r} begins beyond the end", size=size, hint=f"ask within 0-{size}"
        )
    return first, min(end, size)


# Replies


def stored(record: Record, status: int) -> Reply:
    """An Object has been stored."""
    uuid, tag, name = uuid_text(record.uuid), record.etag, record.name
    algorithm, _, digest = tag.partition(":")
    fields = f'Content-Type: {JSON}\r\nLocation: /v1/objects/{uuid}\r\nETag: "{tag}"\r\n'
    body = (
        f'{{"uuid":"{uuid}","name":{json.dumps(name) if name else _NO_NAME},"size":{record.size},'
        f'"algorithm":"{algorithm}","digest":"{digest}"}}\n'
    )
    return Reply(status, fields.encode("ascii"), body.encode())


# Devices


class NewDevice(NamedTuple):
    """A device to claim; ``replaces`` names one that is to leave then, its index, uuid or path."""

    path: str
    force: bool = False
    dry_run: bool = False
    replaces: str = ""


class NewVolume(NamedTuple):
    """A volume to make: an empty one of ``size`` bytes, or a clone of the Object ``source`` (its uuid or name)."""

    name: str
    size: int
    source: str | None


def read_new_volume(body: Data) -> NewVolume:
    """Raises InvalidRequest."""
    hint = 'send {"name": "...", "size": 1073741824}, or "source" with a uuid or name in place of "size"'
    given = _read_fields(body, {"name": str, "size": int, "source": str}, hint)
    if "name" not in given or ("size" in given) == ("source" in given):
        raise InvalidRequest("a volume needs a name, and a size or a source", hint=hint)
    return NewVolume(given["name"], given.get("size", 0), given.get("source"))


def read_volume_size(body: Data) -> int:
    """The size that a volume is to have. Raises InvalidRequest."""
    hint = 'send {"size": 1073741824}'
    given = _read_fields(body, {"size": int}, hint)
    if "size" not in given:
        raise InvalidRequest("the size is missing", hint=hint)
    return int(given["size"])


def read_object_name(body: Data) -> str:
    """What a new Object is to be named, "" if nothing is said. Raises InvalidRequest."""
    return str(_read_fields(body, {"name": str}, 'send {"name": "..."}, or {}').get("name", ""))


def _read_fields(body: Data, kinds: Mapping[str, type], hint: str) -> dict[str, Any]:
    """A JSON object with fields of these kinds, all of which may be missing. Raises InvalidRequest."""
    try:
        given = json.loads(bytes(body))
        json.dumps(given, ensure_ascii=False).encode()  # it may have half a character in it, as an escape
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON in UTF-8", hint=hint) from None
    if not isinstance(given, dict) or any(type(value) is not kinds.get(name) for name, value in given.items()):
        raise InvalidRequest("the body does not have the right fields", hint=hint)
    return given


def read_new_device(body: Data) -> NewDevice:
    """Raises InvalidRequest."""
    try:
        given = json.loads(bytes(body))
        device = NewDevice(**given)
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequest("the body does not describe a device", hint='send {"path": "/dev/..."}') from None
    texts, flags = (device.path, device.replaces), (device.force, device.dry_run)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(flag, bool) for flag in flags):
        raise InvalidRequest("path and replaces must be strings, force and dry_run true or false")
    return device
