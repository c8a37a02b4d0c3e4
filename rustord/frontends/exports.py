"""Exports: the names under which a client finds volumes and Objects as block devices.

A volume goes before an Object of its name; an Object's uuid always means the Object, unless it is some name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from rustord.errors import Forbidden, NotFound, Unavailable
from rustord.export import Kind, Run, Shape
from rustord.lease import Grantor, OpenExport
from rustord.objectexport import ObjectExport
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId, is_uuid, parse_uuid
from rustord.page import CHUNK_BYTES
from rustord.quantity import human_size
from rustord.record import Record
from rustord.volumes import Volumes
from rustord.wire.api import Role
from rustord.writer import Writer

NAME_COUNT_MAX = 1000
"""As many names as a client is told that asks for a list."""
OPEN_S = 20.0
"""How long a client waits for the pool to let it open an Object."""


class Outline(NamedTuple):
    """The `rustord.export.Shape` of a volume that is not open."""

    key: str
    size: int
    read_only: bool
    rotational: bool
    block_size: int = CHUNK_BYTES


class ReadOnly:
    """A volume for one who may not write to it; see `rustord.export.Export`."""

    kind = Kind.VOLUME
    read_only = True

    def __init__(self, export: OpenExport) -> None:
        self.key = export.key
        self.size = export.size
        self.rotational = export.rotational
        self.block_size = export.block_size
        self._export = export

    @property
    def grantor(self) -> Grantor:
        return self._export.grantor

    def read(self, offset: int, buffer: memoryview) -> None:
        self._export.read(offset, buffer)

    def runs(self, offset: int, length: int) -> Iterable[Run]:
        return self._export.runs(offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        raise self._refusal()

    def trim(self, offset: int, length: int) -> None:
        raise self._refusal()

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        raise self._refusal()

    def flush(self) -> None:
        """Others may have written, but that is for them to flush."""

    def close(self) -> None:
        self._export.close()

    @staticmethod
    def _refusal() -> Forbidden:
        return Forbidden("your user may not write", hint="see [roles] in rustord.toml")


class Exports:
    """All that can be opened, and the Objects that are open."""

    def __init__(self, store: ObjectStore, writer: Writer, volumes: Volumes) -> None:
        self._store = store
        self._writer = writer
        self._volumes = volumes
        self._open: set[ObjectExport] = set()

    def names(self) -> Iterator[tuple[str, str]]:
        """Names with descriptions: volumes first, up to `NAME_COUNT_MAX` of each kind."""
        volumes = list(islice(self._volumes.names(), NAME_COUNT_MAX))
        for name in volumes:
            try:
                yield name, _volume_text(self._volumes.size(name))
            except NotFound:
                continue  # it has just gone
        for name, uuid in self._store.names(limit=NAME_COUNT_MAX):
            record = self._store.keystore.get(uuid)
            if record is not None and name not in volumes:
                yield name, _object_text(record)

    def look(self, name: str, role: Role) -> tuple[Shape, str]:
        """What can be told of an export, and its description. Raises NotFound."""
        if name in self._volumes.names():
            size = self._volumes.size(name)
            disks = [slot.device for slot in self._store.blocks.slots.values()]
            rotational = any(disk is not None and disk.rotational for disk in disks)
            return Outline(name, size, role < Role.WRITER, rotational), _volume_text(size)
        record = self._store.stat(self._uuid(name))
        return ObjectExport(self._store, record), _object_text(record)

    def open(self, name: str, role: Role) -> tuple[OpenExport, str]:
        """The export itself, and its description. Raises NotFound, Unavailable, DeviceBusy or DeviceError."""
        if name in self._volumes.names():
            return self._open_volume(name, role)
        return self._open_object(self._uuid(name))

    def open_again(self, key: str, role: Role) -> OpenExport:
        """What had this `Export.key` in another process. Raises as `open` does."""
        return (self._open_object(parse_uuid(key)) if is_uuid(key) else self._open_volume(key, role))[0]

    def _open_volume(self, name: str, role: Role) -> tuple[OpenExport, str]:
        volume = self._volumes.open(name)
        return (volume if role >= Role.WRITER else ReadOnly(volume)), _volume_text(volume.size)

    def _open_object(self, uuid: ObjectId) -> tuple[OpenExport, str]:
        try:
            record = self._writer.call(lambda: self._store.pins.begin_export(uuid), OPEN_S)
        except TimeoutError:
            raise Unavailable("the pool is busy", hint="try again later") from None
        export = ObjectExport(self._store, record, self._open.discard)
        self._open.add(export)
        return export, _object_text(record)

    def follow(self) -> None:
        """Let go of blocks that Objects had before they were moved. To be called every few seconds."""
        for export in list(self._open):
            export.follow()

    def _uuid(self, name: str) -> ObjectId:
        uuid = self._store.resolve(name) if name else None
        if uuid is None and is_uuid(name):
            uuid = parse_uuid(name)
        if uuid is None:
            raise NotFound(f"there is no volume and no Object named {name[:80]!r}", hint="'rustorctl ls' lists Objects")
        return uuid


class Offered:
    """The same for a client with a role; implements `rustord.wire.negotiation.Directory`."""

    def __init__(self, exports: Exports, role: Role) -> None:
        self._exports = exports
        self._role = role

    def names(self) -> Iterable[tuple[str, str]]:
        self._check_role()
        return self._exports.names()

    def look(self, name: str) -> tuple[Shape, str]:
        self._check_role()
        return self._exports.look(name, self._role)

    def open(self, name: str) -> tuple[OpenExport, str]:
        self._check_role()
        return self._exports.open(name, self._role)

    def open_again(self, key: str) -> OpenExport:
        """See `Exports.open_again`."""
        self._check_role()
        return self._exports.open_again(key, self._role)

    def _check_role(self) -> None:
        if self._role < Role.READER:
            raise Forbidden("your user may not read Objects", hint="see [roles] in rustord.toml")


def _object_text(record: Record) -> str:
    return f"Object, {human_size(record.size)}"


def _volume_text(size: int) -> str:
    return f"Volume, {human_size(size)}"
