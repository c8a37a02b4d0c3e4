"""Record: all that the store knows of one Object, as the bytes that the journal, the index and the footers share.

An Object's Record is encoded once, when the Object is stored, and the same bytes then go to three places: behind the
data (``rustord.footer``), into the journal (``rustord.journal``) and into the index (``rustord.keystore``). FORMAT.md
has the table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import msgpack
from xxhash import xxh3_64_digest

from rustord.errors import FormatError
from rustord.extent import LAYER_SHIFT, LAYERS, Extent
from rustord.manifest import Copy, Data, Manifest, chunk_count
from rustord.objkey import ObjectId, ObjKey, uuid_text

RECORD = struct.Struct("<8s16sQQQIIHHBBBB")
"""checksum, uuid, sequence, size, created_ns, length, metadata_length, name_length, reserved, copy_count,
algorithm_length, digest_length, layout_length"""
EXTENT_COUNT = struct.Struct("<I")
EXTENT = struct.Struct("<QIHH")
"""block, count, device, reserved"""

RECORD_ID = struct.Struct("<16sQ")
"""uuid, sequence"""

_CHECKSUM_BYTES = 8
_ONE_EXTENT = EXTENT_COUNT.pack(1)
_NO_ATTRIBUTES: Mapping[str, str] = {}


class Metadata(NamedTuple):
    """What a user may say of an Object: ``name`` ("" for none), ``content_type`` ("" for none) and attributes."""

    name: str = ""
    content_type: str = ""
    attributes: Mapping[str, str] = _NO_ATTRIBUTES


_NO_METADATA = Metadata()


class RecordId(NamedTuple):
    """Names one Record: an Object has another one, of a higher sequence, after each move to other blocks."""

    uuid: ObjectId
    sequence: int


class Grave(NamedTuple):
    """What a Record that is gone leaves to be erased: its blocks, but for those that its successor goes on using."""

    id: RecordId
    extents: Sequence[Extent]

    @property
    def devices(self) -> set[int]:
        """The indices of the devices that hold any of the blocks."""
        return {extent.device for extent in self.extents}


class Record:
    """One stored Object: its ObjKey, Manifest and Metadata; decoded piece by piece, as they are asked for.

    ``raw`` holds the encoded bytes. ``sequence`` numbers the change that stored the Object (1 for the first one of the
    pool), ``size`` is in bytes, ``created_ns`` in nanoseconds since 1970-01-01 UTC (for people: nothing is decided
    by it).
    """

    __slots__ = (
        "_algorithm_length",
        "_copies",
        "_copy_count",
        "_digest_length",
        "_layout_length",
        "_metadata_length",
        "_name_length",
        "_sums_at",
        "created_ns",
        "raw",
        "sequence",
        "size",
        "uuid",
    )

    def __init__(self, raw: bytes) -> None:
        """Decode ``raw``, whose length is the record's. Raises FormatError unless its checksum is right."""
        if len(raw) < RECORD.size:
            raise FormatError(f"a record of {len(raw)} bytes is too short to be one")
        (
            checksum,
            self.uuid,
            self.sequence,
            self.size,
            self.created_ns,
            length,
            self._metadata_length,
            self._name_length,
            _,
            self._copy_count,
            self._algorithm_length,
            self._digest_length,
            self._layout_length,
        ) = RECORD.unpack_from(raw)
        if length != len(raw) or xxh3_64_digest(memoryview(raw)[_CHECKSUM_BYTES:]) != checksum:
            raise FormatError(f"the record of Object {uuid_text(self.uuid)} does not match its checksum")
        self.raw: bytes = raw
        self._copies: tuple[Copy, ...] = ()  # decoded when they are asked for: a scan of the whole index does not
        self._sums_at = 0

    @property
    def id(self) -> RecordId:
        return RecordId(self.uuid, self.sequence)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """The Manifest's copies."""
        if not self._sums_at:
            self._decode_copies()
        return self._copies

    def _decode_copies(self) -> None:
        raw, copy_count = self.raw, self._copy_count
        at = RECORD.size + EXTENT_COUNT.size * copy_count
        if copy_count == 1 and raw.startswith(_ONE_EXTENT, RECORD.size):  # as nearly every small Object
            block, count, device, _ = EXTENT.unpack_from(raw, at)
            self._copies = ((Extent(device, block, count),),)
            self._sums_at = at + EXTENT.size
            return
        counts = struct.unpack_from(f"<{copy_count}I", raw, RECORD.size)
        end = at + EXTENT.size * sum(counts)
        extents = decode_extents(memoryview(raw)[at:end])
        self._copies = tuple(tuple(extents[first:end]) for first, end in pairwise(accumulate(counts, initial=0)))
        self._sums_at = end

    @property
    def extents(self) -> list[Extent]:
        """The extents of all copies; what a Layer has is the Layer's."""
        return [extent for copy in self.copies for extent in copy if extent.device != LAYERS]

    @property
    def devices(self) -> set[int]:
        """The indices of the devices that hold any part of the Object."""
        return {device for copy in self.copies for device, _, _ in copy if device != LAYERS}

    @property
    def layer(self) -> int:
        """The number of the Layer that has the data; 0 if it is in the Object's own extents."""
        device, block, _ = self.copies[0][0]
        return block >> LAYER_SHIFT if device == LAYERS else 0

    def sums(self, first: int, end: int) -> bytes:
        """The checksums of the chunks from ``first`` to before ``end``, 8 bytes each."""
        if not self._sums_at:
            self._decode_copies()
        at = self._sums_at
        return self.raw[at + 8 * first : at + 8 * end]

    @property
    def _texts_at(self) -> int:
        if not self._sums_at:
            self._decode_copies()
        return self._sums_at + 8 * chunk_count(self.size)

    @property
    def digest(self) -> bytes:
        at = self._texts_at
        return self.raw[at : at + self._digest_length]

    @property
    def algorithm(self) -> str:
        at = self._texts_at + self._digest_length
        return self.raw[at : at + self._algorithm_length].decode("ascii")

    @property
    def etag(self) -> str:
        """The entity tag of the data: its hash, as "algorithm:hexadecimal digits"."""
        raw, at = self.raw, self._texts_at
        end = at + self._digest_length
        return f"{raw[end : end + self._algorithm_length].decode('ascii')}:{raw[at:end].hex()}"

    @property
    def layout(self) -> str:
        at = self._texts_at + self._digest_length + self._algorithm_length
        return self.raw[at : at + self._layout_length].decode("ascii")

    @property
    def name(self) -> str:
        if not self._name_length:
            return ""
        at = len(self.raw) - self._metadata_length - self._name_length
        return self.raw[at : at + self._name_length].decode()

    @property
    def _metadata(self) -> Mapping[str, object]:
        if not self._metadata_length:
            return {}
        metadata: Mapping[str, object] = msgpack.unpackb(self.raw[-self._metadata_length :])
        return metadata

    @property
    def metadata(self) -> Metadata:
        if not self._name_length and not self._metadata_length:
            return _NO_METADATA
        more = self._metadata
        content_type, attributes = more.get("type", ""), more.get("attributes", _NO_ATTRIBUTES)
        assert isinstance(content_type, str)
        assert isinstance(attributes, dict) or attributes is _NO_ATTRIBUTES
        return Metadata(self.name, content_type, attributes)

    @property
    def content_type(self) -> str:
        return self.metadata.content_type

    @property
    def attributes(self) -> Mapping[str, str]:
        return self.metadata.attributes

    @property
    def key(self) -> ObjKey:
        return ObjKey(self.uuid, self.algorithm, self.digest, self.size)

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.layout, self.copies, self.sums(0, chunk_count(self.size)))

    def moved_length(self, extent_count: int) -> int:
        """Length in bytes of this Record with as many extents, in all copies together."""
        return len(self.raw) + EXTENT.size * (extent_count - sum(map(len, self.copies)))

    def moved(self, sequence: int, copies: Sequence[Sequence[Extent]]) -> bytes:
        """The bytes of the Record of the same Object on other blocks."""
        metadata_at = len(self.raw) - self._metadata_length
        name = self.raw[metadata_at - self._name_length : metadata_at]
        sums = self.sums(0, chunk_count(self.size))
        layout = self.layout.encode("ascii")
        return encode_record(self.key, sequence, self.created_ns, copies, sums, layout, name, self.raw[metadata_at:])


def encode_metadata(metadata: Metadata) -> bytes:
    """The metadata except for the name, as a msgpack map; empty if there is none."""
    fields: dict[str, object] = {}
    if metadata.content_type:
        fields["type"] = metadata.content_type
    if metadata.attributes:
        fields["attributes"] = dict(metadata.attributes)
    return msgpack.packb(fields) if fields else b""


def encode_extents(extents: Iterable[Extent]) -> bytes:
    """The extents as a table of `EXTENT`."""
    return b"".join([EXTENT.pack(block, count, device, 0) for device, block, count in extents])


def decode_extents(table: bytes | memoryview) -> list[Extent]:
    """The reverse of `encode_extents`. Raises FormatError."""
    if len(table) % EXTENT.size:
        raise FormatError(f"a table of extents of {len(table)} bytes is cut off")
    return [Extent(device, block, count) for block, count, device, _ in EXTENT.iter_unpack(table)]


def record_length(key: ObjKey, layout: bytes, name: bytes, metadata: bytes, copy_count: int, extent_count: int) -> int:
    """Length in bytes of the record of such an Object."""
    return (
        RECORD.size
        + EXTENT_COUNT.size * copy_count
        + EXTENT.size * extent_count
        + 8 * chunk_count(key.size)
        + len(key.digest)
        + len(key.algorithm)
        + len(layout)
        + len(name)
        + len(metadata)
    )


def encode_record(
    key: ObjKey,
    sequence: int,
    created_ns: int,
    copies: Sequence[Sequence[Extent]],
    sums: Data,
    layout: bytes,
    name: bytes,
    metadata: bytes,
) -> bytes:
    """The bytes that `Record` decodes."""
    algorithm = key.algorithm.encode("ascii")
    counts = b"".join([EXTENT_COUNT.pack(len(copy)) for copy in copies])
    extents = b"".join([EXTENT.pack(block, count, device, 0) for copy in copies for device, block, count in copy])
    body = b"".join((counts, extents, sums, key.digest, algorithm, layout, name, metadata))
    head = RECORD.pack(
        b"",
        key.uuid,
        sequence,
        key.size,
        created_ns,
        RECORD.size + len(body),
        len(metadata),
        len(name),
        0,
        len(copies),
        len(algorithm),
        len(key.digest),
        len(layout),
    )
    rest = head[_CHECKSUM_BYTES:] + body
    return xxh3_64_digest(rest) + rest
