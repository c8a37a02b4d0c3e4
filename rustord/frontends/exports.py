"""Exports: the names under which one client finds Objects and volumes as block devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rustord.errors import Forbidden, NotFound, Unavailable
from rustord.export import Export
from rustord.objectexport import ObjectExport
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId, is_uuid, parse_uuid
from rustord.quantity import human_size
from rustord.record import Record
from rustord.wire.api import Role
from rustord.writer import Writer

NAME_COUNT_MAX = 1000
"""As many names as a client is told that asks for a list."""


OPEN_S = 20.0
"""How long a client waits for the pool to let it open an Object."""


class Exports:
    """All that can be opened, and what is open."""

    def __init__(self, store: ObjectStore, writer: Writer) -> None:
        self._store = store
        self._writer = writer
        self._open: set[ObjectExport] = set()

    def names(self) -> Iterator[tuple[str, str]]:
        """Names with descriptions, up to `NAME_COUNT_MAX`."""
        for name, uuid in self._store.names(limit=NAME_COUNT_MAX):
            record = self._store.keystore.get(uuid)
            if record is not None:
                yield name, _description(record)

    def look(self, name: str) -> tuple[Export, str]:
        """See `rustord.wire.negotiation.Directory`."""
        record = self._store.stat(self._uuid(name))
        return ObjectExport(self._store, record), _description(record)

    def open(self, name: str) -> tuple[Export, str]:
        """See `rustord.wire.negotiation.Directory`."""
        uuid = self._uuid(name)
        try:
            record = self._writer.call(lambda: self._store.begin_export(uuid), OPEN_S)
        except TimeoutError:
            raise Unavailable("the pool is busy", hint="try again later") from None
        export = ObjectExport(self._store, record, self._open.discard)
        self._open.add(export)
        return export, _description(record)

    def follow(self) -> None:
        """Let go of blocks that Objects had before they were moved. To be called every few seconds."""
        for export in list(self._open):
            export.follow()

    def _uuid(self, name: str) -> ObjectId:
        uuid = self._store.resolve(name) if name else None
        if uuid is None and is_uuid(name):
            uuid = parse_uuid(name)
        if uuid is None:
            raise NotFound(f"there is no Object named {name[:80]!r}", hint="'rustorctl ls' lists the names")
        return uuid


class Offered:
    """The same for a client with a role; implements `rustord.wire.negotiation.Directory`."""

    def __init__(self, exports: Exports, role: Role) -> None:
        self._exports = exports
        self._role = role

    def names(self) -> Iterable[tuple[str, str]]:
        self._check_role()
        return self._exports.names()

    def look(self, name: str) -> tuple[Export, str]:
        self._check_role()
        return self._exports.look(name)

    def open(self, name: str) -> tuple[Export, str]:
        self._check_role()
        return self._exports.open(name)

    def _check_role(self) -> None:
        if self._role < Role.READER:
            raise Forbidden("your user may not read Objects", hint="see [roles] in rustord.toml")


def _description(record: Record) -> str:
    return f"Object, {human_size(record.size)}"
