"""Request: what a client of the object API sends, and what it reads out of the reply. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from rustord.errors import Forbidden, InvalidRequest, NotFound, RustordError, Unavailable
from rustord.objkey import is_uuid
from rustord.wire.http1 import ReplyHead

_PAGE = 1000
_ATTRIBUTE = "rustor-meta-"

_REFUSALS: Mapping[int, tuple[type[RustordError], str, str]] = {
    400: (InvalidRequest, "it is no name", "a name has 1 to 1024 bytes in UTF-8, and no control characters"),
    403: (Forbidden, "your role does not allow it", "[roles] in the configuration says who may do what"),
    503: (Unavailable, "the daemon is starting, stopping or overloaded", "try again later"),
}
"""What the status alone says, where the reply has no body to say more."""


class Stored(NamedTuple):
    """What the daemon says of an Object that it has stored, or lists."""

    uuid: str
    name: str
    size: int
    algorithm: str
    digest: str
    content_type: str = ""
    created: str = ""
    """RFC 3339; empty in the answer to a PUT."""

    @property
    def etag(self) -> str:
        """The entity tag, for ``if_match``."""
        return f"{self.algorithm}:{self.digest}"


class Info(NamedTuple):
    """An Object's metadata. ``size`` is that of the whole Object, in bytes."""

    uuid: str
    name: str
    size: int
    etag: str
    content_type: str
    modified: str
    """When it was stored, as an HTTP date."""
    attributes: Mapping[str, str]


class Request(NamedTuple):
    """A request without its body; ``fields`` are lines without their ends."""

    method: str
    target: str
    fields: tuple[str, ...] = ()
    takes_long: bool = False
    """The answer may come after hours: all that is asked about is read or overwritten first."""

    def head(self, *more: str) -> bytes:
        """The head's bytes, with ``more`` fields."""
        lines = [f"{self.method} {self.target} HTTP/1.1", "Host: rustord", *self.fields, *more, "", ""]
        return "\r\n".join(lines).encode("ascii")


# Objects


def store(name: str, content_type: str, attributes: Mapping[str, str], replace: bool, if_match: str) -> Request:
    """Store an Object, under a name unless that is empty. Raises InvalidRequest."""
    keys: dict[str, str] = {}
    fields = []
    for key, value in attributes.items():
        field = f"Rustor-Meta-{quote(key, safe='')}"
        if (other := keys.setdefault(field.lower(), key)) != key:
            raise InvalidRequest(f"the attributes {other!r} and {key!r} are the same", hint="case makes no difference")
        fields.append(f"{field}: {quote(value)}")
    if content_type:
        fields.append(f"Content-Type: {_plain(content_type)}")
    if not replace:
        fields.append("If-None-Match: *")
    fields += _if_match(if_match)
    if name:
        return Request("PUT", f"/v1/names/{quote(name)}", tuple(fields))
    return Request("POST", "/v1/objects", tuple(fields))


def fetch(key: str, start: int, end: int | None) -> Request:
    """Read an Object from ``start`` to before ``end``; a negative ``start`` counts from its end.

    Raises InvalidRequest for a range with nothing in it.
    """
    if start == 0 and end is None:
        return Request("GET", _path(key))
    if end is not None and not 0 <= start < end:
        raise InvalidRequest(f"there is nothing from {start} to {end}", hint="end must be greater than start")
    span = str(start) if start < 0 else f"{start}-{'' if end is None else end - 1}"
    return Request("GET", _path(key), (f"Range: bytes={span}",))


def look(key: str) -> Request:
    """Read an Object's metadata."""
    return Request("HEAD", _path(key))


def delete(key: str, if_match: str) -> Request:
    """Delete an Object. Raises InvalidRequest."""
    return Request("DELETE", _path(key), _if_match(if_match), takes_long=True)


def manifest(uuid: str) -> Request:
    """Read an Object's manifest."""
    return Request("GET", f"/v1/objects/{quote(uuid, safe='')}/manifest")


def _path(key: str) -> str:
    return f"/v1/objects/{key}" if is_uuid(key) else f"/v1/names/{quote(key)}"


def _if_match(tag: str) -> tuple[str, ...]:
    return (f'If-Match: "{_plain(tag)}"',) if tag else ()


def _plain(value: str) -> str:
    if not (value.isascii() and value.isprintable()) or '"' in value:
        raise InvalidRequest(f"{value[:80]!r} cannot be sent", hint="use printable ASCII characters")
    return value


def read_info(head: ReplyHead) -> Info:
    """The metadata in the head of the reply to `fetch` or `look`. Raises InvalidRequest if it has none."""
    fields = head.fields.by_name
    whole = fields.get("content-range", "").rpartition("/")[2]
    if whole and not (whole.isascii() and whole.isdigit() and len(whole) < 20):
        raise InvalidRequest(f"{whole[:80]!r} is not the size of an Object")
    return Info(
        uuid=fields.get("rustor-uuid", ""),
        name=unquote(fields.get("rustor-name", "")),
        size=int(whole) if whole else head.fields.content_length or 0,
        etag=fields.get("etag", "").strip('"'),
        content_type=fields.get("content-type", ""),
        modified=fields.get("last-modified", ""),
        attributes={
            unquote(name[len(_ATTRIBUTE) :]): unquote(value)
            for name, value in fields.items()
            if name.startswith(_ATTRIBUTE)
        },
    )


def read_looked(head: ReplyHead, key: str) -> Info:
    """The metadata in the reply to `look`, which has no body to say more. Raises NotFound, ..."""
    if head.status == 404:
        raise NotFound(f"there is no Object {key[:80]!r}", hint="'rustorctl ls' lists what there is")
    if head.status != 200:
        other = RustordError, f"the daemon answered {head.status}", "its log says why"
        kind, why, hint = _REFUSALS.get(head.status, other)
        raise kind(f"{key[:80]!r} cannot be looked at: {why}", hint=hint)
    return read_info(head)


def read_stored(body: bytes) -> Stored:
    """The reply to `store`, or a line of a listing. Raises InvalidRequest if it is neither."""
    try:
        told: dict[str, Any] = json.loads(body)
        return Stored(**{name: told[name] for name in Stored._fields if name in told})
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest("what answers is no rustord: it says nothing of what is stored") from error


class Listing:
    """A listing on its way, page by page: ask for `request`, feed the reply, until ``done``."""

    def __init__(self, path: str, parameters: Mapping[str, str], limit: int | None) -> None:
        self.done = limit is not None and limit <= 0
        self._path = path
        self._query = {name: quote(value, safe="") for name, value in parameters.items() if value}
        self._left = limit

    @property
    def request(self) -> Request:
        """What to ask for next."""
        self._query["limit"] = str(_PAGE if self._left is None else min(self._left, _PAGE))
        return Request("GET", f"{self._path}?{'&'.join(f'{name}={value}' for name, value in self._query.items())}")

    def feed(self, head: ReplyHead, body: bytes) -> list[Stored]:
        """What is on the page."""
        page = [read_stored(line) for line in body.splitlines()]
        if self._left is not None:
            self._left -= len(page)
        after = head.fields.by_name.get("rustor-next")
        self.done = after is None or self._left == 0
        self._query["after"] = after or ""
        return page


# The daemon


def add_device(path: str, force: bool, dry_run: bool, replaces: str) -> tuple[Request, bytes]:
    """Claim a device: the request, and its body."""
    body = json.dumps({"path": path, "force": force, "dry_run": dry_run, "replaces": replaces}).encode()
    return Request("POST", "/v1/devices", ("Content-Type: application/json",)), body


def remove_device(device: str, give_up: bool) -> Request:
    """Take a device out of the pool."""
    return Request("DELETE", f"/v1/devices/{quote(device, safe='')}{'?give-up=1' if give_up else ''}")


def keep_device(device: str) -> Request:
    """Keep a device that was to leave."""
    return Request("POST", f"/v1/devices/{quote(device, safe='')}/keep")


def start_mover(work: str) -> Request:
    """Begin to heal or to rebalance."""
    return Request("POST", f"/v1/mover?work={quote(work, safe='')}")


def map_device(device: str, cells: int) -> Request:
    """How full each part of a device is."""
    return Request("GET", f"/v1/devices/{quote(device, safe='')}/map?cells={cells}")


def create_volume(name: str, size: int) -> tuple[Request, bytes]:
    """Make an empty volume."""
    return _json_request("POST", "/v1/volumes", {"name": name, "size": size})


def clone_volume(source: str, name: str) -> tuple[Request, bytes]:
    """Make a volume of what an Object has."""
    return _json_request("POST", "/v1/volumes", {"name": name, "source": source})


def resize_volume(name: str, size: int) -> tuple[Request, bytes]:
    """Give a volume another size."""
    return _json_request("PATCH", _volume_path(name), {"size": size})


def freeze_volume(name: str, object_name: str) -> tuple[Request, bytes]:
    """Make a volume an Object."""
    return _to_object(name, "freeze", object_name)


def snapshot_volume(name: str, object_name: str) -> tuple[Request, bytes]:
    """Make an Object of what a volume has."""
    return _to_object(name, "snapshot", object_name)


def _to_object(name: str, deed: str, object_name: str) -> tuple[Request, bytes]:
    request, body = _json_request("POST", f"{_volume_path(name)}/{deed}", {"name": object_name} if object_name else {})
    return request._replace(takes_long=True), body


def get_volume(name: str) -> Request:
    """Ask for one volume."""
    return Request("GET", _volume_path(name))


def delete_volume(name: str) -> Request:
    """Delete a volume."""
    return Request("DELETE", _volume_path(name), takes_long=True)


def _volume_path(name: str) -> str:
    return f"/v1/volumes/{quote(name, safe='')}"


def _json_request(method: str, target: str, body: Mapping[str, object]) -> tuple[Request, bytes]:
    return Request(method, target, ("Content-Type: application/json",)), json.dumps(body, ensure_ascii=False).encode()


def start_scrub(again: bool) -> Request:
    """Begin a scrub, or go on with it."""
    return Request("POST", "/v1/scrub" + ("?again=true" if again else ""))


POOL = Request("GET", "/v1/pool")
CHECK = Request("POST", "/v1/check", takes_long=True)
VOLUMES = Request("GET", "/v1/volumes")
SCRUB = Request("GET", "/v1/scrub")
STOP_SCRUB = Request("DELETE", "/v1/scrub")
DEVICES = Request("GET", "/v1/devices")
EXPORTS = Request("GET", "/v1/exports")
MOVER = Request("GET", "/v1/mover")
STOP_MOVER = Request("DELETE", "/v1/mover")
PLUGINS = Request("GET", "/v1/plugins")
SLOW_REQUESTS = Request("GET", "/v1/slow-requests")
METRICS = Request("GET", "/metrics")
