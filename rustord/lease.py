"""Lease: what another process may read and write of an export by itself, until it is told to stop.

As NFS does with layouts (RFC 8881, chapter 12): who has the map *grants* places of chunks, and *recalls* them before
it changes what they say. Who holds them never waits for the grantor while it uses one, so that a recall waits for no
more than what is under way on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from rustord.blockdevice import BlockDevice
from rustord.export import Export
from rustord.gate import Gate


class Place(NamedTuple):
    """Where a chunk is: at byte ``offset`` of the device in ``slot``, or nowhere, and then it is zeros.

    With a ``checksum`` it is to be read from the page cache, and compared with that before it is relied on, as
    `rustord.objectreader` does. What is ``writable`` may be written in place.
    """

    slot: int = 0
    device: BlockDevice | None = None
    offset: int = 0
    checksum: bytes = b""
    writable: bool = False


class Grantor(Protocol):
    """What an export is served from by another process; the connections of it may share one."""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """What was granted holds until one of them is shut, or recalls it: all, or groups of chunks (of as many as a
        `rustord.page.Page` has), which are numbered from 0 on."""

    def grant(self, first: int, end: int) -> Sequence[Place | None]:
        """The places of the chunks from ``first`` to before ``end``; None for those that have to be asked for.

        Raises RustordError.
        """

    def dirtied(self, devices: Iterable[tuple[int, BlockDevice]]) -> None:
        """These devices, by index, have been written to and not been flushed."""

    def flushed(self, slot: int, taken_s: float) -> None:
        """The device in ``slot`` has been flushed, for the statistics."""


class OpenExport(Export, Protocol):
    """An export that another process may serve."""

    @property
    def grantor(self) -> Grantor: ...
