"""Journal: what changed, in order, as batches in a ring on each device. FORMAT.md has the tables.

A batch begins on a block and holds the entries of one cycle that concern its device. Its header says up to which
``sequence`` everything was known to be durable when it was written; so after a crash only the entries of the last
batch need their data verified.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rustord.errors import FormatError
from rustord.footer import sign
from rustord.objkey import ObjectId
from rustord.record import RECORD_ID, Grave, RecordId, decode_extents, encode_extents

BATCH = struct.Struct("<8s16s16sQQII")
"""magic, signature, device_uuid, number, durable, length, entry_count"""
ENTRY = struct.Struct("<IBBHQ")
"""length, kind, reserved, reserved, sequence"""
MAGIC = b"rustjrnl"
_SIGNED_FROM = 24


class Kind(enum.IntEnum):
    PUT = 1
    """payload: uuid of the Object that this one replaces (or zeros), then the Record; an Object that replaces itself
    has been moved to other blocks"""
    DELETE = 2
    """payload: uuid"""
    ERASED = 3
    """payload: ids of Records that are gone and whose blocks have been erased; sequence is 0"""
    UNDO = 4
    """payload: id of a Record that did not reach all of its devices: neither its Object nor what that replaced has
    changed"""
    UNERASED = 5
    """payload: ids of Records that are gone and whose blocks have not been erased yet, so that older batches need not
    be kept for their tombstones; sequence is 0"""

    LAYER = 6
    """payload: `rustord.page.LayerEntry`, the head of a Layer, new or changed"""
    MAP = 7
    """payload: `rustord.page.MapEntry`, what has changed in the map of a Layer"""

    GRAVE = 8
    """payload: id of a grave, then its extents: blocks that are being filled with what an Object or Layer has, or that
    a Layer has left; an ERASED says that they are its own now, or erased; sequence is 0"""


class Entry(NamedTuple):
    kind: Kind
    sequence: int
    payload: bytes


class Batch(NamedTuple):
    """``number`` counts the batches of a device, from 1; ``length`` is in bytes, without the padding to a block."""

    number: int
    durable: int
    length: int
    entries: Sequence[Entry]


NOTHING: ObjectId = bytes(16)


def put_entry(sequence: int, replaced: ObjectId, record: bytes) -> bytes:
    return b"".join((ENTRY.pack(16 + len(record), Kind.PUT, 0, 0, sequence), replaced, record))


def delete_entry(sequence: int, uuid: ObjectId) -> bytes:
    return ENTRY.pack(16, Kind.DELETE, 0, 0, sequence) + uuid


def undo_entry(sequence: int, record: RecordId) -> bytes:
    return ENTRY.pack(RECORD_ID.size, Kind.UNDO, 0, 0, sequence) + RECORD_ID.pack(*record)


def erased_entry(records: Iterable[RecordId]) -> bytes:
    return _list_entry(Kind.ERASED, records)


def unerased_entry(records: Iterable[RecordId]) -> bytes:
    return _list_entry(Kind.UNERASED, records)


def _list_entry(kind: Kind, records: Iterable[RecordId]) -> bytes:
    payload = b"".join([RECORD_ID.pack(*record) for record in records])
    return ENTRY.pack(len(payload), kind, 0, 0, 0) + payload


def decode_record_ids(payload: bytes) -> list[RecordId]:
    """What an UNDO, ERASED or UNERASED names. Raises FormatError."""
    if len(payload) % RECORD_ID.size:
        raise FormatError(f"{len(payload)} bytes in a journal batch are no list of records")
    return [RecordId(*fields) for fields in RECORD_ID.iter_unpack(payload)]


def grave_entry(grave: Grave) -> Entry:
    return Entry(Kind.GRAVE, 0, RECORD_ID.pack(*grave.id) + encode_extents(grave.extents))


def decode_grave(payload: bytes) -> Grave:
    """What a GRAVE says. Raises FormatError."""
    if len(payload) < RECORD_ID.size:
        raise FormatError(f"{len(payload)} bytes in a journal batch are no grave")
    return Grave(RecordId(*RECORD_ID.unpack_from(payload)), decode_extents(payload[RECORD_ID.size :]))


def encode_entry(entry: Entry) -> bytes:
    return ENTRY.pack(len(entry.payload), entry.kind, 0, 0, entry.sequence) + entry.payload


def encode_batch(entries: Sequence[bytes], device_uuid: bytes, number: int, durable: int, secret: bytes) -> bytes:
    """The batch of ``entries`` (encoded), without the padding."""
    body = b"".join(entries)
    head = BATCH.pack(MAGIC, b"", device_uuid, number, durable, BATCH.size + len(body), len(entries))
    signature = sign(secret, head[_SIGNED_FROM:], body)
    return b"".join((MAGIC, signature, head[_SIGNED_FROM:], body))


def batch_length(data: bytes | memoryview) -> int | None:
    """Length in bytes of the batch that begins ``data``, which holds at least a header; None if none does."""
    magic, _, _, _, _, length, _ = BATCH.unpack_from(data)
    return length if magic == MAGIC and length >= BATCH.size else None


def decode_batch(data: bytes | memoryview, device_uuid: bytes, secret: bytes) -> Batch | None:
    """The batch that begins ``data``; None if none does, if it is another device's, or torn."""
    view = memoryview(data)
    if len(view) < BATCH.size:
        return None
    magic, signature, owner, number, durable, length, entry_count = BATCH.unpack_from(view)
    if magic != MAGIC or owner != device_uuid or not BATCH.size <= length <= len(view):
        return None
    if sign(secret, view[_SIGNED_FROM:length]) != signature:
        return None
    return Batch(number, durable, length, _decode_entries(view[BATCH.size : length], entry_count))


def _decode_entries(body: memoryview, entry_count: int) -> list[Entry]:
    entries = []
    at = 0
    for _ in range(entry_count):
        if at + ENTRY.size > len(body):
            raise FormatError("a journal batch is shorter than its entries")
        length, kind, _, _, sequence = ENTRY.unpack_from(body, at)
        at += ENTRY.size
        if at + length > len(body) or kind not in list(Kind):
            raise FormatError(f"a journal batch holds an entry of kind {kind} and {length} bytes, which is unknown")
        entries.append(Entry(Kind(kind), sequence, bytes(body[at : at + length])))
        at += length
    return entries
