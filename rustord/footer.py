"""Footer: what stands behind the data of each copy, so that the devices alone are enough to find every Object.

A footer is the Object's Record cut into pieces, each with a trailer in the last bytes of its block. The trailer names
the block that it was written to and is signed with the pool's secret: nothing that an Object contains, not even an
image of this very pool, can pass for one. A reader of the bare device looks at the end of every block, and follows
``previous`` from a last piece to the first. FORMAT.md has the table.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from rustord.errors import FormatError
from rustord.extent import Extent

TRAILER = struct.Struct("<16s16sQQHHIII8s")
"""signature, device_uuid, block, previous_block, previous_device, reserved, piece, piece_count, length, magic"""
MAGIC = b"rustobj\0"
_SIGNATURE_BYTES = 16


def sign(secret: bytes, *parts: bytes | memoryview) -> bytes:
    """16 bytes that only who knows the pool's ``secret`` can make: keyed BLAKE2b (RFC 7693)."""
    return blake2b(b"".join(parts), digest_size=_SIGNATURE_BYTES, key=secret).digest()


def footer_blocks(size: int, length: int, block_size: int) -> int:
    """How many blocks a record of ``length`` bytes adds behind ``size`` bytes of data: 0 if the slack holds it."""
    if length + TRAILER.size <= -size % block_size:
        return 0
    return -(-length // (block_size - TRAILER.size))


def encode_footer(
    record: bytes, size: int, copy: Sequence[Extent], device_uuids: Mapping[int, bytes], secret: bytes, block_size: int
) -> bytes:
    """Everything behind the last byte of ``size`` bytes of data, up to the end of the last block of ``copy``.

    ``device_uuids`` is by device index. Zeros fill what the record does not need.
    """
    slack = -size % block_size
    room = block_size - TRAILER.size
    if len(record) <= room:
        device, block, count = copy[-1]
        length = slack if len(record) + TRAILER.size <= slack else slack + block_size
        return _piece(record, length, device_uuids[device], block + count - 1, (0, 0), 0, 1, secret)
    pieces = [record[at : at + room] for at in range(0, len(record), room)]
    addresses = _last_blocks(copy, len(pieces))
    encoded = [bytes(slack)]
    previous = (0, 0)
    for number, (piece, (device, block)) in enumerate(zip(pieces, addresses, strict=True)):
        encoded.append(_piece(piece, block_size, device_uuids[device], block, previous, number, len(pieces), secret))
        previous = (device, block)
    return b"".join(encoded)


def _last_blocks(copy: Sequence[Extent], count: int) -> list[tuple[int, int]]:
    """(device, block) of the last ``count`` blocks of ``copy``, in order."""
    blocks: list[tuple[int, int]] = []
    for device, first, length in reversed(copy):
        take = min(length, count - len(blocks))
        blocks.extend((device, first + length - 1 - back) for back in range(take))
        if len(blocks) == count:
            break
    blocks.reverse()
    return blocks


def _piece(
    piece: bytes,
    length: int,
    device_uuid: bytes,
    block: int,
    previous: tuple[int, int],
    number: int,
    piece_count: int,
    secret: bytes,
) -> bytes:
    """``piece`` and its trailer in the last bytes of ``length``."""
    trailer = TRAILER.pack(
        b"", device_uuid, block, previous[1], previous[0], 0, number, piece_count, len(piece), MAGIC
    )[_SIGNATURE_BYTES:]
    signature = sign(secret, piece, trailer)
    return b"".join((bytes(length - TRAILER.size - len(piece)), piece, signature, trailer))


class Piece(NamedTuple):
    """One piece of a footer: ``data``, its number of how many, and (device, block) of the piece before it."""

    data: bytes
    number: int
    piece_count: int
    previous: tuple[int, int]


def decode_piece(block_data: bytes | memoryview, device_uuid: bytes, block: int, secret: bytes) -> Piece | None:
    """The piece that ends ``block_data``, the content of block ``block``; None if none does.

    Raises FormatError if there is one whose signature is wrong.
    """
    view = memoryview(block_data)
    if view[-len(MAGIC) :] != MAGIC:
        return None
    signature, owner, address, previous_block, previous_device, _, number, piece_count, length, _ = TRAILER.unpack_from(
        view, len(view) - TRAILER.size
    )
    if owner != device_uuid or address != block or length > len(view) - TRAILER.size:
        return None  # the content of an Object: an image of a pool, perhaps
    data = view[len(view) - TRAILER.size - length : len(view) - TRAILER.size]
    if sign(secret, data, view[len(view) - TRAILER.size + _SIGNATURE_BYTES :]) != signature:
        raise FormatError(f"the footer in block {block} does not match its signature")
    return Piece(bytes(data), number, piece_count, (previous_device, previous_block))
