"""Page: a piece of the map of a Layer, as the bytes that the index and the pool share. FORMAT.md has the tables.

A Layer is written by pages. Page 0 is its head: size, name, and what it builds on. Each later page has the addresses of
`PAGE_CHUNKS` chunks. A page has two slots on the Layer's first device, neighbouring blocks that are written in turn, so
that one of them is always whole; each ends with a trailer as that of a footer, by which it is found without the index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from xxhash import xxh3_64_digest

from rustord.errors import FormatError
from rustord.extent import Extent
from rustord.footer import TRAILER, sign
from rustord.journal import Entry, Kind
from rustord.objkey import ObjectId

PAGE = struct.Struct("<8s16sQQQII")
"""checksum, layer, generation, sequence, address, number, length"""
HEAD = struct.Struct("<QQ16sIHH")
"""size, created_ns, base, number, name_length, reserved"""
LAYER_ENTRY = struct.Struct("<16sQ")
"""layer, address"""
MAP_ENTRY = struct.Struct("<16sII")
"""layer, page_count, chunk_count"""
PLACE = struct.Struct("<QQ")
"""number, address"""

MAGIC = b"rustmap\0"
CHUNK_BYTES = 65536
"""A Layer is allocated, shared and given back in chunks of this many bytes."""
PAGE_CHUNKS = 256
"""A page has the addresses of this many chunks."""
ADDRESS_BYTES = 8
SLOT_COUNT = 2
BASE = 0
"""In place of an address: what the base has there; zeros if there is none."""
ZEROS = 1
"""In place of an address: zeros, whatever the base has."""

_CHECKSUM_BYTES = 8
_SIGNATURE_BYTES = 16
_DEVICE_SHIFT = 48


def address_of(extent: Extent) -> int:
    """Where an extent begins, as one number."""
    return extent.device << _DEVICE_SHIFT | extent.block


def device_of(address: int) -> int:
    """The device of an address."""
    return address >> _DEVICE_SHIFT


def place_at(address: int) -> tuple[int, int]:
    """The device and the block of an address."""
    return divmod(address, 1 << _DEVICE_SHIFT)


def extent_at(address: int, count: int) -> Extent:
    """The ``count`` blocks from ``address`` on."""
    return Extent(*place_at(address), count)


class Page(NamedTuple):
    """``number`` of the map of ``layer``.

    ``generation`` counts how often it was written to its slots, ``sequence`` is that of the newest change in it, and
    ``address`` is where its slots are. ``content`` is the `Head`, or up to `PAGE_CHUNKS` addresses of 8 bytes.
    """

    layer: bytes
    generation: int
    sequence: int
    address: int
    number: int
    content: bytes

    @property
    def device(self) -> int:
        """Where its slots are."""
        return device_of(self.address)

    def encode(self) -> bytes:
        head = PAGE.pack(b"", self.layer, self.generation, self.sequence, self.address, self.number, len(self.content))
        rest = head[_CHECKSUM_BYTES:] + self.content
        return xxh3_64_digest(rest) + rest


def decode_page(raw: bytes) -> Page:
    """Raises FormatError unless ``raw`` is a page, and whole."""
    if len(raw) < PAGE.size or xxh3_64_digest(raw[_CHECKSUM_BYTES:]) != raw[:_CHECKSUM_BYTES]:
        raise FormatError("a page of the map of a volume does not match its checksum")
    _, layer, generation, sequence, address, number, length = PAGE.unpack_from(raw)
    if PAGE.size + length != len(raw):
        raise FormatError("a page of the map of a volume contradicts itself")
    return Page(layer, generation, sequence, address, number, raw[PAGE.size :])


def slots_at(address: int) -> list[Extent]:
    """Both slots of a page, each by itself: who erases the last block of each extent alone leaves no page behind."""
    return [extent_at(address + number, 1) for number in range(SLOT_COUNT)]


def slot_of(page: Page) -> Extent:
    """The block that this generation of the page is written to."""
    extent = extent_at(page.address, 1)
    return extent._replace(block=extent.block + page.generation % SLOT_COUNT)


def encode_slot(raw: bytes, device_uuid: bytes, block: int, secret: bytes, block_size: int) -> bytes:
    """The block that holds an encoded page."""
    trailer = TRAILER.pack(b"", device_uuid, block, 0, 0, 0, 0, 1, len(raw), MAGIC)[_SIGNATURE_BYTES:]
    return b"".join((bytes(block_size - TRAILER.size - len(raw)), raw, sign(secret, raw, trailer), trailer))


def decode_slot(block_data: bytes | memoryview, device_uuid: bytes, block: int, secret: bytes) -> Page | None:
    """The page in a block; None if there is none. Raises FormatError if there is one that is damaged."""
    view = memoryview(block_data)
    if view[-len(MAGIC) :] != MAGIC:
        return None
    end = len(view) - TRAILER.size
    signature, owner, address, _, _, _, _, _, length, _ = TRAILER.unpack_from(view, end)
    if owner != device_uuid or address != block or length > end:
        return None  # the content of an Object or of a volume
    if sign(secret, view[end - length : end], view[end + _SIGNATURE_BYTES :]) != signature:
        raise FormatError(f"the page of a volume's map in block {block} does not match its signature")
    return decode_page(bytes(view[end - length : end]))


def decode_addresses(content: bytes) -> Sequence[int]:
    """The addresses in a page other than the head."""
    return struct.unpack(f"<{len(content) // ADDRESS_BYTES}Q", content)


def with_addresses(addresses: Iterable[tuple[int, int]], content: bytes) -> bytes:
    """The content of a page with other addresses for some chunks, which are numbered within the page."""
    page = bytearray(content or bytes(ADDRESS_BYTES * PAGE_CHUNKS))
    for chunk, address in addresses:
        page[ADDRESS_BYTES * chunk : ADDRESS_BYTES * (chunk + 1)] = address.to_bytes(ADDRESS_BYTES, "little")
    return bytes(page)


def page_of(chunk: int) -> int:
    """The number of the page that has the address of the chunk."""
    return chunk // PAGE_CHUNKS + 1


class Head(NamedTuple):
    """What page 0 says of a Layer.

    ``size`` is in bytes; ``base`` is the uuid of the Object or Layer that it builds on, or zeros; ``number`` is by what
    Objects name it; ``name`` is that of the volume whose top it is, "" for a Layer that is not written any more.
    """

    size: int
    created_ns: int
    base: ObjectId
    number: int
    name: str

    def encode(self) -> bytes:
        name = self.name.encode()
        return HEAD.pack(self.size, self.created_ns, self.base, self.number, len(name), 0) + name


def decode_head(content: bytes) -> Head:
    """Raises FormatError if there is none."""
    if len(content) < HEAD.size:
        raise FormatError("the head of a volume is cut off")
    size, created_ns, base, number, name_length, _ = HEAD.unpack_from(content)
    name = content[HEAD.size : HEAD.size + name_length]
    if len(name) < name_length:
        raise FormatError("the head of a volume is cut off")
    try:
        return Head(size, created_ns, base, number, name.decode())
    except UnicodeDecodeError as error:
        raise FormatError("the name in the head of a volume is no UTF-8") from error


class PageChange(NamedTuple):
    """What an entry of the journal changes in one page; ``address`` is that of its slots if these are new, or 0."""

    layer: bytes
    number: int
    address: int
    content: Callable[[bytes], bytes]
    """Makes the new content from the old one, which is empty for a new page."""

    def apply(self, page: Page | None, sequence: int) -> Page | None:
        """The page as it is then, of the same generation; None if it has a newer change already."""
        if page is None:
            page = Page(self.layer, 0, 0, self.address, self.number, b"")
        if sequence <= page.sequence:
            return None
        return page._replace(
            sequence=sequence, address=self.address or page.address, content=self.content(page.content)
        )


class LayerEntry(NamedTuple):
    """A journal entry: the head of a Layer, new or changed, and where its slots are from now on."""

    layer: bytes
    address: int
    content: bytes

    def encode(self) -> bytes:
        return LAYER_ENTRY.pack(self.layer, self.address) + self.content

    @property
    def home(self) -> int:
        """The device of the head, and of the journal that says what the Layer's map is."""
        return device_of(self.address)

    def changes(self) -> list[PageChange]:
        """What it changes in the Layer's pages."""
        return [PageChange(self.layer, 0, self.address, lambda _: self.content)]


def decode_layer_entry(payload: bytes) -> LayerEntry:
    """Raises FormatError if the entry is too short."""
    if len(payload) < LAYER_ENTRY.size:
        raise FormatError("a change of the head of a volume is cut off")
    layer, address = LAYER_ENTRY.unpack_from(payload)
    return LayerEntry(layer, address, payload[LAYER_ENTRY.size :])


class MapEntry(NamedTuple):
    """A journal entry: what has changed in the map of a Layer.

    ``pages`` are (number, address of the slots) of pages that are new, or get other slots; ``chunks`` are (chunk,
    address, `BASE` or `ZEROS`).
    """

    layer: bytes
    pages: Sequence[tuple[int, int]]
    chunks: Sequence[tuple[int, int]]

    def encode(self) -> bytes:
        places: Iterable[tuple[int, int]] = (*self.pages, *self.chunks)
        head = MAP_ENTRY.pack(self.layer, len(self.pages), len(self.chunks))
        return head + b"".join([PLACE.pack(*place) for place in places])

    def extents(self, chunk_blocks: int) -> list[Extent]:
        """The blocks that it adds to the Layer: slots, and chunks of ``chunk_blocks``."""
        slots = [slot for _, address in self.pages for slot in slots_at(address)]
        return slots + [extent_at(address, chunk_blocks) for _, address in self.chunks if address > ZEROS]

    def changes(self) -> list[PageChange]:
        """What it changes in the Layer's pages."""
        changed: dict[int, list[tuple[int, int]]] = {number: [] for number, _ in self.pages}
        for chunk, address in self.chunks:
            changed.setdefault(page_of(chunk), []).append((chunk % PAGE_CHUNKS, address))
        slots = dict(self.pages)
        return [
            PageChange(self.layer, number, slots.get(number, 0), partial(with_addresses, addresses))
            for number, addresses in changed.items()
        ]


def decode_map_entry(payload: bytes) -> MapEntry:
    """Raises FormatError if the entry is not as long as it says."""
    layer, page_count, chunk_count = MAP_ENTRY.unpack_from(payload) if len(payload) >= MAP_ENTRY.size else (b"", 0, 0)
    if len(payload) != MAP_ENTRY.size + PLACE.size * (page_count + chunk_count):
        raise FormatError("a change of the map of a volume contradicts itself")
    places = list(PLACE.iter_unpack(memoryview(payload)[MAP_ENTRY.size :]))
    return MapEntry(layer, places[:page_count], places[page_count:])


def decode_note(entry: Entry) -> LayerEntry | MapEntry:
    """A LAYER or MAP of the journal. Raises FormatError as these do."""
    decode = decode_layer_entry if entry.kind is Kind.LAYER else decode_map_entry
    return decode(entry.payload)
