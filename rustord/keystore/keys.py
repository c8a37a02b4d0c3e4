"""Keys: what the index holds under which bytes.

FORMAT.md has the same table:

==========================  ===========================================================================
``o`` uuid                  the Record of a live Object
``g`` uuid, sequence        the extents of a Record that is gone and whose blocks are not erased yet (a grave)
``b`` uuid                  the Record of a deleted Object on which a Layer builds
``l`` layer, page number    a page of the map of a Layer
``k``                       the slots of pages may have older ones than the index
``n`` name                  uuid; a name of more than 480 bytes is cut there and its BLAKE2b-128 added, and
                            the whole name follows the uuid
``p`` device uuid           where the index's knowledge of that device's journal ends
``r``                       the pool's uuid; only while a rebuild is putting an index together
``s``                       the newest sequence that the index knows, the label's generation, the pool's uuid, and
                            how many other entries there are, with a sum of them (`rustord.keystore.state`)
==========================  ===========================================================================
"""

from __future__ import annotations

from hashlib import blake2b

from rustord.errors import FormatError
from rustord.record import EXTENT, RECORD_ID, Grave, RecordId, decode_extents

OBJECT, GRAVE, BASE, PAGE, UNKEPT, NAME, POSITION = b"o", b"g", b"b", b"l", b"k", b"n", b"p"
NAME_KEY_BYTES = 480


def page_key(layer: bytes, number: int) -> bytes:
    return PAGE + layer + number.to_bytes(4, "little")


def name_key(name: str) -> tuple[bytes, bytes]:
    """The index's key for a name, and what follows the uuid in its value."""
    encoded = name.encode()
    if len(encoded) <= NAME_KEY_BYTES:
        return NAME + encoded, b""
    return NAME + encoded[:NAME_KEY_BYTES] + blake2b(encoded, digest_size=16).digest(), encoded


def successor(prefix: bytes) -> bytes:
    """The first key behind all that begin with ``prefix``; which never consists of 0xFF bytes alone."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])


def decode_name(key: bytes, value: bytes) -> str:
    try:
        return (value[16:] or key[1:]).decode()
    except UnicodeDecodeError as error:
        hint = "put back the index, or rebuild it from the devices"
        raise FormatError("a name in the index is damaged", hint=hint) from error


def decode_grave_entry(key: bytes, table: bytes) -> Grave:
    if len(key) != 1 + RECORD_ID.size or len(table) % EXTENT.size:
        raise FormatError("a grave in the index is damaged", hint="put back the index, or rebuild it from the devices")
    return Grave(RecordId(*RECORD_ID.unpack_from(key, 1)), decode_extents(table))
