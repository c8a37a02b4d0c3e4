"""Contents: all that an index holds, read at once to be looked through, or put in its place when it is made anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from rustord.errors import FormatError
from rustord.keystore.backend import Backend
from rustord.keystore.keys import (
    BASE,
    GRAVE,
    NAME,
    OBJECT,
    PAGE,
    POSITION,
    UNKEPT,
    decode_grave_entry,
    name_key,
    page_key,
)
from rustord.keystore.state import REBUILDING_KEY, STATE_KEY, IndexState, Tally, state_of
from rustord.objkey import ObjectId
from rustord.page import Page, decode_page
from rustord.record import RECORD_ID, Grave, Record, encode_extents

_BATCH = 50_000
"""Entries in one commit of a rebuild: about 20 MiB."""


@dataclass
class Contents:
    """All that an index holds, whether it makes sense or not. ``strange`` says what cannot be decoded.

    ``unkept``: some device has not taken all pages, which the next opening writes to their slots once more.
    """

    positions: dict[bytes, bytes] = field(default_factory=dict)
    objects: dict[ObjectId, Record] = field(default_factory=dict)
    names: dict[str, ObjectId] = field(default_factory=dict)
    graves: list[Grave] = field(default_factory=list)
    bases: dict[ObjectId, Record] = field(default_factory=dict)
    pages: dict[tuple[bytes, int], Page] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    unkept: bool = False


def read_contents(backend: Backend) -> Contents:
    """What an opened ``backend`` holds. Raises Damaged or DeviceError if it cannot be read."""
    contents = Contents()
    for key, value in backend.scan(b"", b"\xff"):
        kind, rest = key[:1], key[1:]
        try:
            if kind == OBJECT:
                contents.objects[rest] = Record(value)
            elif kind == GRAVE:
                contents.graves.append(decode_grave_entry(key, value))
            elif kind == BASE:
                contents.bases[rest] = Record(value)
            elif kind == PAGE:
                page = decode_page(value)
                contents.pages[page.layer, page.number] = page
            elif kind == NAME:
                contents.names[(value[16:] or rest).decode()] = value[:16]
            elif kind == POSITION:
                contents.positions[rest] = value
            elif kind == UNKEPT:
                contents.unkept = True
        except (FormatError, UnicodeDecodeError) as error:
            contents.strange.append(f"the entry {key[:40]!r} of the index cannot be decoded: {error}")
    return contents


def replace_index(
    backend: Backend,
    state: tuple[int, int, bytes],
    positions: Mapping[bytes, bytes],
    objects: Iterable[Record],
    graves: Iterable[Grave],
    bases: Iterable[Record] = (),
    pages: Iterable[Page] = (),
) -> None:
    """Put these into an opened ``backend`` in place of all that it holds; ``state`` is that of `IndexState`.

    It is done in many commits, and the last one makes an index of it: a crash before leaves one that is refused.
    """
    backend.commit({REBUILDING_KEY: state[2]}, (STATE_KEY,))
    while keys := [key for key, _ in islice(backend.scan(b"", REBUILDING_KEY), _BATCH)]:
        backend.commit({}, keys)
    tally = Tally()
    batch: dict[bytes, bytes] = {}
    for record in objects:
        batch[OBJECT + record.uuid] = record.raw
        if name := record.name:
            key, tail = name_key(name)
            batch[key] = record.uuid + tail
        if len(batch) >= _BATCH:
            tally = tally.after(backend, batch, ())
            backend.commit(batch, ())
            batch = {}
    batch |= {GRAVE + RECORD_ID.pack(*grave.id): encode_extents(grave.extents) for grave in graves}
    batch |= {BASE + record.uuid: record.raw for record in bases}
    batch[UNKEPT] = b""
    batch |= {page_key(page.layer, page.number): page.encode() for page in pages}
    batch |= {POSITION + device_uuid: position for device_uuid, position in positions.items()}
    tally = tally.after(backend, batch, ())
    backend.commit(batch | {STATE_KEY: IndexState(*state, tally).encode()}, (REBUILDING_KEY,))


def owner_of(backend: Backend) -> tuple[bytes, bool]:
    """The uuid of the pool whose index an opened ``backend`` holds, empty if none; and whether that index is whole."""
    if state := state_of(backend):
        return state.pool_uuid, True
    return backend.get(REBUILDING_KEY) or b"", False
