"""Operations: what the API's requests make the store and the daemon do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import resources
from typing import Protocol
from urllib.parse import quote

from rustord.change import Change, Delete, Put, check_match, check_name
from rustord.errors import NotFound, RustordError
from rustord.frontends.exchange import Exchange, Handler
from rustord.frontends.traffic import SlowRequest
from rustord.manifest import Data
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId, parse_uuid, uuid_text
from rustord.record import Record
from rustord.volumes import Info, Volumes
from rustord.wire.api import (
    NDJSON,
    ROUTES,
    NewDevice,
    check_whole,
    created_text,
    if_match,
    if_none_match_any,
    is_asked,
    is_not_modified,
    json_lines,
    manifest_json,
    map_cells,
    object_fields,
    object_json,
    page_after,
    page_limit,
    read_metadata,
    read_new_device,
    read_new_volume,
    read_object_name,
    read_volume_size,
    requested_range,
    stored,
)
from rustord.wire.http1 import JSON, Reply, content, json_reply
from rustord.wire.limits import Limits

METRICS = "text/plain; version=0.0.4; charset=utf-8"
_ATTEMPTS = 8
"""A name can be given to another Object between two looks; that it happens so often in a row is another fault."""

Background = Callable[[Callable[[], Reply], Callable[[Reply | BaseException], None]], None]
"""Calls the first function in a thread, then the second one with what it returned or raised on the event loop."""


class Admin(Protocol):
    """What the API asks of the daemon. Called in threads, several at a time; may block; raises RustordErrors.

    The dicts are answered as JSON, as they are.
    """

    @property
    def volumes(self) -> Volumes:
        """The volumes of the pool."""

    def pool(self) -> Mapping[str, object]:
        """The pool's name, uuid, state, sizes and problems."""

    def devices(self) -> Iterable[Mapping[str, object]]:
        """The pool's devices."""

    def add_device(self, device: NewDevice) -> Mapping[str, object]:
        """Claim a device, or only say what that would do. Raises ClaimRefused."""

    def remove_device(self, device: str, *, give_up: bool = False) -> Mapping[str, object]:
        """Let go of a device, once it is empty. Raises NotFound, DeviceError, NoSpace."""

    def keep_device(self, device: str) -> Mapping[str, object]:
        """Keep a device that was to leave. Raises NotFound, DeviceError."""

    def mover(self) -> Mapping[str, object]:
        """What is being moved, and how far that is."""

    def start_mover(self, work: str) -> Mapping[str, object]:
        """Begin to move. Raises InvalidRequest."""

    def stop_mover(self) -> Mapping[str, object]:
        """Move nothing any more."""

    def map_device(self, device: str, cell_count: int) -> Mapping[str, object]:
        """How full each part of the device with that uuid or index is. Raises NotFound."""

    def scrub(self) -> Mapping[str, object]:
        """How far the scrub is, and what it has found."""

    def start_scrub(self, again: bool) -> Mapping[str, object]:
        """Begin a scrub, or go on with it; what it is like then."""

    def stop_scrub(self) -> Mapping[str, object]:
        """End the scrub; what it is like then."""

    def check(self) -> Iterable[Mapping[str, object]]:
        """What is not as it has to be, as far as that can be told of a pool at work."""

    def exports(self) -> Iterable[Mapping[str, object]]:
        """What is open as a block device, with an entry for each connection."""

    def plugins(self) -> Iterable[Mapping[str, object]]:
        """The plugins that are loaded."""

    def metrics(self) -> bytes:
        """All metrics in the text format of Prometheus."""


Done = Callable[[Record | RustordError], None]
"""Is told what came of a change."""


class Submit(Protocol):
    """What is needed of a `rustord.writer.Writer`."""

    def submit(
        self, changes: Sequence[Change], deliver: Callable[[Sequence[tuple[Change, Record | RustordError]]], None]
    ) -> None:
        """Make the changes in the next cycles; calls ``deliver`` on the writer's thread with each cycle's outcomes."""


class Operations:
    """One method for each operation of `rustord.wire.api.ROUTES`; they run on the event loop and never wait there."""

    def __init__(
        self,
        store: ObjectStore,
        submit: Callable[[Put | Delete, Done], None],
        admin: Admin,
        limits: Limits,
        in_thread: Background,
        in_admin_thread: Background,
        failure: Callable[[Exchange, BaseException], Reply],
        slow: Iterable[SlowRequest],
    ) -> None:
        """``submit`` hands a change to the writer and calls back on the event loop."""
        self._store = store
        self._submit = submit
        self._admin = admin
        self._limits = limits
        self._in_thread = in_thread
        self._in_admin_thread = in_admin_thread
        self._failure = failure
        self._slow = slow

    def handlers(self) -> dict[str, Handler]:
        """The handler of each operation by its id."""
        ids = (operation.id for operations in ROUTES.values() for operation in operations.values())
        return {id_: getattr(self, id_) for id_ in ids}

    # Objects

    def get_object(self, exchange: Exchange) -> Reply | None:
        return self._get(exchange, self._store.stat(parse_uuid(exchange.request.argument)))

    def plain_gets(self, uuids: Iterable[bytes]) -> list[tuple[bytes, Data] | None]:
        """The header fields and the whole data of each Object; None if anything keeps it from being sent now."""
        records = [self._find(uuid) for uuid in uuids]
        read, most = self._store.read_now, self._limits.download_piece_bytes
        found = [
            (record, data)
            if record is not None and 0 < record.size <= most and (data := read(record, 0, record.size)) is not None
            else None
            for record in records
        ]
        return [None if one is None else (object_fields(one[0]), one[1]) for one in found]

    def _find(self, uuid: bytes) -> Record | None:
        try:
            return self._store.keystore.get(bytes.fromhex(str(uuid, "ascii").replace("-", "")))
        except (ValueError, RustordError):
            return None  # whoever looks again is told what is wrong

    def head_object(self, exchange: Exchange) -> Reply | None:
        return self._head(exchange, self._store.stat(parse_uuid(exchange.request.argument)))

    def get_named(self, exchange: Exchange) -> Reply | None:
        for _ in range(_ATTEMPTS):
            record = self._named(exchange.request.argument)
            with suppress(NotFound):  # replaced in this moment
                return self._get(exchange, record)
        raise _no_name(exchange.request.argument)

    def head_named(self, exchange: Exchange) -> Reply | None:
        return self._head(exchange, self._named(exchange.request.argument))

    def _named(self, name: str) -> Record:
        check_name(name)
        for _ in range(_ATTEMPTS):
            uuid = self._store.resolve(name)
            if uuid is None:
                break
            try:
                return self._store.stat(uuid)
            except NotFound:
                continue  # replaced in this moment
        raise _no_name(name)

    def _head(self, exchange: Exchange, record: Record) -> Reply:
        if exchange.head.fields.conditional:
            reply, _, _ = self._selected(exchange, record)
            return reply
        return Reply(200, object_fields(record), length=record.size)

    def _get(self, exchange: Exchange, record: Record) -> Reply | None:
        if exchange.head.fields.conditional:
            reply, start, end = self._selected(exchange, record)
        else:
            reply, start, end = Reply(200, object_fields(record), length=record.size), 0, record.size
        if start == end:
            return reply
        if end - start <= self._limits.download_piece_bytes:
            data = self._store.read_now(record, start, end - start)
            if data is not None:
                return reply._replace(body=data)
        record = self._store.pins.add_current(record.uuid)
        if end - start > self._limits.download_piece_bytes:
            exchange.connection.send_object(exchange, reply, record, start, end)
        else:
            self._read_later(exchange, reply, record, start, end)
        return None

    def _selected(self, exchange: Exchange, record: Record) -> tuple[Reply, int, int]:
        """The head of the reply, and the half-open range of the data that belongs to it."""
        fields, tag = exchange.head.fields, record.etag
        if is_not_modified(fields, tag):
            return Reply(304, object_fields(record)), 0, 0
        # To any other method a range means nothing (RFC 9110, 14.2).
        part = requested_range(fields, tag, record.size) if exchange.head.method == "GET" else None
        if part is None:
            return Reply(200, object_fields(record), length=record.size), 0, record.size
        start, end = part
        content_range = f"Content-Range: bytes {start}-{end - 1}/{record.size}\r\n".encode("ascii")
        return Reply(206, object_fields(record) + content_range, length=end - start), start, end

    def _read_later(self, exchange: Exchange, reply: Reply, record: Record, start: int, end: int) -> None:
        def read() -> Reply:
            try:
                return reply._replace(body=self._store.read(record, start, end - start))
            finally:
                self._store.pins.remove(record)

        self._later(exchange, read)

    def put_of(self, exchange: Exchange) -> Put:
        """The change that an upload asks for, without its data. Raises InvalidRequest, TooLarge."""
        return self._put(exchange)

    def _put(self, exchange: Exchange) -> Put:
        fields, name = exchange.head.fields, exchange.request.argument
        if exchange.request.operation.id == "store_named":
            check_name(name)
        check_whole(fields)
        put = Put(exchange.body, read_metadata(name, fields.by_name))
        if fields.conditional:
            put.if_none_match, put.if_match = if_none_match_any(fields), if_match(fields)
        return put

    def store_object(self, exchange: Exchange) -> Reply | None:
        self.submit(exchange, self._put(exchange))
        return None

    store_named = store_object

    def submit(self, exchange: Exchange, put: Put) -> None:
        """Hand over an upload whose data has arrived, and answer when it is stored."""

        def done(outcome: Record | RustordError) -> None:
            if isinstance(outcome, RustordError):
                exchange.answer(self._failure(exchange, outcome))
            else:
                exchange.answer(stored(outcome, 200 if put.replaced else 201))

        self._submit(put, done)

    def delete_object(self, exchange: Exchange) -> Reply | None:
        self._delete(exchange, parse_uuid(exchange.request.argument))
        return None

    def _delete(self, exchange: Exchange, uuid: ObjectId) -> None:
        def done(outcome: Record | RustordError) -> None:
            if isinstance(outcome, RustordError):
                exchange.answer(self._failure(exchange, outcome))
            else:
                exchange.answer(Reply(204))

        self._submit(Delete(uuid, if_match=if_match(exchange.head.fields)), done)

    def delete_named(self, exchange: Exchange) -> Reply | None:
        self._delete_named(exchange, _ATTEMPTS)
        return None

    def _delete_named(self, exchange: Exchange, attempts: int) -> None:
        record = self._named(exchange.request.argument)
        wanted = if_match(exchange.head.fields)
        check_match(record, wanted, f"the name {record.name!r}")

        def done(outcome: Record | RustordError) -> None:
            if isinstance(outcome, NotFound) and attempts:
                try:
                    self._delete_named(exchange, attempts - 1)  # unless the name is gone, too, it was replaced
                except RustordError as error:
                    exchange.answer(self._failure(exchange, error))
            elif isinstance(outcome, RustordError):
                exchange.answer(self._failure(exchange, outcome))
            else:
                exchange.answer(Reply(204))

        self._submit(Delete(record.uuid, if_match=wanted), done)

    # Listings

    def list_objects(self, exchange: Exchange) -> Reply | None:
        query = exchange.request.query
        limit, after = page_limit(query, self._limits), page_after(query)

        def page() -> Reply:
            records = self._store.objects(after, limit + 1)
            more = f"Rustor-Next: {uuid_text(records[limit - 1].uuid)}\r\n" if len(records) > limit else ""
            return content(NDJSON, json_lines(map(object_json, records[:limit])), more)

        self._later(exchange, page)
        return None

    def list_names(self, exchange: Exchange) -> Reply | None:
        query = exchange.request.query
        limit, prefix, after = page_limit(query, self._limits), query.get("prefix", ""), query.get("after", "")

        def page() -> Reply:
            names = self._store.names(prefix, after, limit + 1)
            more = f"Rustor-Next: {quote(names[limit - 1][0], safe='')}\r\n" if len(names) > limit else ""
            return content(NDJSON, json_lines(self._objects_of(names[:limit])), more)

        self._later(exchange, page)
        return None

    def _objects_of(self, names: list[tuple[str, ObjectId]]) -> Iterator[dict[str, object]]:
        for _, uuid in names:
            try:
                yield object_json(self._store.stat(uuid))
            except NotFound:
                continue  # replaced or deleted since

    def get_manifest(self, exchange: Exchange) -> Reply | None:
        record = self._store.stat(parse_uuid(exchange.request.argument))
        devices = {index: uuid_text(uuid) for index, uuid in self._store.blocks.device_uuids.items()}
        return json_reply(manifest_json(record, devices))

    # Volumes

    def list_volumes(self, exchange: Exchange) -> Reply | None:
        volumes = self._admin.volumes
        self._ask(exchange, lambda: json_reply([_volume_json(info) for info in volumes.list()]))
        return None

    def create_volume(self, exchange: Exchange) -> Reply | None:
        new, volumes = read_new_volume(exchange.body), self._admin.volumes

        def create() -> Reply:
            info = volumes.clone(new.source, new.name) if new.source is not None else volumes.create(new.name, new.size)
            return json_reply(_volume_json(info), 201)

        self._ask(exchange, create)
        return None

    def get_volume(self, exchange: Exchange) -> Reply | None:
        name, volumes = exchange.request.argument, self._admin.volumes
        self._ask(exchange, lambda: json_reply(_volume_json(volumes.stat(name))))
        return None

    def resize_volume(self, exchange: Exchange) -> Reply | None:
        name, volumes, size = exchange.request.argument, self._admin.volumes, read_volume_size(exchange.body)
        self._ask(exchange, lambda: json_reply(_volume_json(volumes.resize(name, size))))
        return None

    def delete_volume(self, exchange: Exchange) -> Reply | None:
        name, volumes = exchange.request.argument, self._admin.volumes

        def delete() -> Reply:
            volumes.delete(name)
            return Reply(204)

        self._ask(exchange, delete)
        return None

    def freeze_volume(self, exchange: Exchange) -> Reply | None:
        name, volumes, as_name = exchange.request.argument, self._admin.volumes, read_object_name(exchange.body)
        self._ask(exchange, lambda: json_reply(object_json(volumes.freeze(name, as_name)), 201))
        return None

    def snapshot_volume(self, exchange: Exchange) -> Reply | None:
        name, volumes, as_name = exchange.request.argument, self._admin.volumes, read_object_name(exchange.body)
        self._ask(exchange, lambda: json_reply(object_json(volumes.snapshot(name, as_name)), 201))
        return None

    # The daemon

    def get_pool(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.pool()))
        return None

    def list_devices(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(list(self._admin.devices())))
        return None

    def add_device(self, exchange: Exchange) -> Reply | None:
        device = read_new_device(exchange.body)
        status = 200 if device.dry_run else 201
        self._ask(exchange, lambda: json_reply(self._admin.add_device(device), status))
        return None

    def map_device(self, exchange: Exchange) -> Reply | None:
        cells = map_cells(exchange.request.query)
        self._ask(exchange, lambda: json_reply(self._admin.map_device(exchange.request.argument, cells)))
        return None

    def remove_device(self, exchange: Exchange) -> Reply | None:
        device, give_up = exchange.request.argument, "give-up" in exchange.request.query

        def remove() -> Reply:
            entry = self._admin.remove_device(device, give_up=give_up)
            return json_reply(entry, 200 if entry["standing"] == "removed" else 202)

        self._ask(exchange, remove)
        return None

    def keep_device(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.keep_device(exchange.request.argument)))
        return None

    def get_mover(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.mover()))
        return None

    def start_mover(self, exchange: Exchange) -> Reply | None:
        work = exchange.request.query.get("work", "")
        self._ask(exchange, lambda: json_reply(self._admin.start_mover(work), 202))
        return None

    def stop_mover(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.stop_mover()))
        return None

    def get_scrub(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.scrub()))
        return None

    def start_scrub(self, exchange: Exchange) -> Reply | None:
        again = is_asked(exchange.request.query, "again")
        self._ask(exchange, lambda: json_reply(self._admin.start_scrub(again), 202))
        return None

    def stop_scrub(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(self._admin.stop_scrub()))
        return None

    def check_pool(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(list(self._admin.check())))
        return None

    def list_exports(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(list(self._admin.exports())))
        return None

    def list_plugins(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: json_reply(list(self._admin.plugins())))
        return None

    def list_slow_requests(self, exchange: Exchange) -> Reply | None:
        return json_reply([slow._asdict() for slow in self._slow])

    def get_metrics(self, exchange: Exchange) -> Reply | None:
        self._ask(exchange, lambda: content(METRICS, self._admin.metrics()))
        return None

    def get_openapi(self, exchange: Exchange) -> Reply | None:
        return content(JSON, openapi())

    # Threads

    def _ask(self, exchange: Exchange, question: Callable[[], Reply]) -> None:
        self._in_admin_thread(question, lambda outcome: self._answer(exchange, outcome))

    def _later(self, exchange: Exchange, work: Callable[[], Reply]) -> None:
        self._in_thread(work, lambda outcome: self._answer(exchange, outcome))

    def _answer(self, exchange: Exchange, outcome: Reply | BaseException) -> None:
        exchange.answer(outcome if isinstance(outcome, Reply) else self._failure(exchange, outcome))


def _no_name(name: str) -> NotFound:
    return NotFound(f"there is no Object named {name[:80]!r}", hint="'rustorctl ls' lists the names")


def _volume_json(info: Info) -> dict[str, object]:
    return {
        "name": info.name,
        "size": info.size,
        "own_bytes": info.own_bytes,
        "shared_bytes": info.shared_bytes,
        "created": created_text(info.created_ns),
        "layers": info.layer_count,
        "open": info.open_count,
    }


@lru_cache(maxsize=1)
def openapi() -> bytes:
    """The OpenAPI document."""
    return resources.files("rustord.frontends").joinpath("openapi.json").read_bytes()
