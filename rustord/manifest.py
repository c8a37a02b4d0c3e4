"""Manifest: the extents (and copies) that hold an Object, with the checksums of its data."""

from __future__ import annotations

from typing import NamedTuple

from rustord.extent import Extent

Data = bytes | bytearray | memoryview
"""Bytes as callers may hand them over; a memoryview has one dimension of single bytes."""

CHUNK_BYTES = 65536
"""Data is summed in chunks of this many bytes (the last one may be shorter), so that a range can be verified."""

Copy = tuple[Extent, ...]
"""One whole copy of the data, its extents in the order of the data, followed in the same extents by the footer."""


class Manifest(NamedTuple):
    """``layout`` names the Placer that chose, ``copies`` holds one or more `Copy`, ``sums`` the checksums.

    The data of a copy begins at the first byte of its first extent and runs through its extents in order; one extent's
    last byte is followed by the next one's first. Block counts of two copies may differ, since their footers may.

    ``sums`` is the xxh3-64 of each chunk of `CHUNK_BYTES` in order, each as the 8 bytes of its canonical (big-endian)
    form; empty for no data.
    """

    layout: str
    copies: tuple[Copy, ...]
    sums: bytes


def chunk_count(size: int) -> int:
    """How many chunks ``size`` bytes of data make."""
    return (size + CHUNK_BYTES - 1) // CHUNK_BYTES
