"""Upload: the data of one Object on its way to the devices, before a cycle makes it one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

from rustord.allocator import Allocator
from rustord.blockdevice import BlockDevice
from rustord.blockstore import BlockStore, chunk_sums
from rustord.errors import InvalidRequest, NoSpace
from rustord.extent import Extent, block_count, extend
from rustord.keygen import Hasher
from rustord.manifest import CHUNK_BYTES, Data

PIECE_BYTES_MIN = 1 << 20
PIECE_BYTES_MAX = 64 << 20
"""An Upload of unknown size is given space in pieces as long as what it has taken in, within these bounds."""


class Upload:
    """Takes in data in order, hashes and sums it, and writes it; used by one thread at a time.

    What has been written is nobody's until a `Put` of the Upload is durable; `abort` hands the blocks back. ``rest``
    is what is not written yet: less than a chunk, which the cycle writes together with the footer.
    """

    def __init__(
        self,
        allocator: Allocator,
        blocks: BlockStore,
        hasher: Hasher,
        size: int | None,
        block_count_needed: int,
        abandon: Callable[[list[Extent], list[Extent]], None],
    ) -> None:
        """``size`` in bytes if it is known; then ``block_count_needed`` blocks are set aside. Raises NoSpace."""
        self._allocator = allocator
        self._blocks = blocks
        self._abandon = abandon
        self.hasher = hasher
        self.declared_size = size
        self.sums = bytearray()
        self.rest = bytearray()
        self._devices: dict[int, BlockDevice] = {}
        self._written = 0
        self._touched = 0  # as far as a write got that failed, these blocks are not clean any more
        self.copies: list[list[Extent]] = [[] for _ in range(allocator.placer.copies)]
        if block_count_needed:
            self.copies = allocator.place(block_count_needed)

    @property
    def size(self) -> int:
        """Bytes taken in so far."""
        return self._written + len(self.rest)

    @property
    def written_block_count(self) -> int:
        """How many blocks of each copy have been written."""
        return self._written // self._blocks.block_size

    def write(self, data: Data) -> None:
        """Take in more data. Raises NoSpace, DeviceError, or InvalidRequest if it exceeds the declared size.

        After an error the Upload can only be aborted.
        """
        view = memoryview(data)
        if self.declared_size is not None and self.size + len(view) > self.declared_size:
            raise InvalidRequest(
                f"more data than the {self.declared_size} bytes that were declared", hint="declare the right size"
            )
        if self.rest:
            missing = CHUNK_BYTES - len(self.rest)
            self.rest += view[:missing]
            view = view[missing:]
            if len(self.rest) < CHUNK_BYTES:
                return
            self._write_chunks(memoryview(self.rest))
            self.rest = bytearray()
        whole = len(view) // CHUNK_BYTES * CHUNK_BYTES
        if whole:
            self._write_chunks(view[:whole])
        self.rest += view[whole:]

    def _write_chunks(self, view: memoryview) -> None:
        self.hasher.update(view)
        self.sums += chunk_sums(view)
        self._make_room(len(view) // self._blocks.block_size)
        self._touched = self._written + len(view)
        for copy in self.copies:
            self.write_copy(copy, view)
        self._written += len(view)

    def _make_room(self, count: int) -> None:
        block_size = self._blocks.block_size
        missing = self._written // block_size + count - block_count(self.copies[0])
        if missing <= 0:
            return
        piece = min(max(self._written, PIECE_BYTES_MIN), PIECE_BYTES_MAX) // block_size
        try:
            placed = self._allocator.place(max(piece, missing))
        except NoSpace:
            placed = self._allocator.place(missing)
        for copy, more in zip(self.copies, placed, strict=True):
            extend(copy, more)

    def write_copy(self, copy: list[Extent], view: memoryview) -> None:
        """Write ``view`` to one copy, behind what was written before, and let the device begin with it at once."""
        block_size = self._blocks.block_size
        starts = list(accumulate((extent.count for extent in copy), initial=0))
        at = self._written // block_size
        while view:
            number = bisect_right(starts, at) - 1
            device, block, count = copy[number]
            skip = at - starts[number]
            take = min(len(view), (count - skip) * block_size)
            extent = Extent(device, block + skip, count - skip)
            self._devices.setdefault(device, self._blocks.writable(device))
            self._blocks.write(extent, (view[:take],))
            self._blocks.start_writeback(extent, take)
            view = view[take:]
            at += -(-take // block_size)

    def finish(self) -> None:
        """Hash and sum the rest; the size is known now. Raises InvalidRequest if it is not the declared one.

        Raises DeviceError if a device that was written to has gone: one that is back in its place has lost what was not
        flushed, and the flush of the cycle would not tell.
        """
        self._blocks.check_unchanged(self._devices)
        if self.declared_size is not None and self.size != self.declared_size:
            raise InvalidRequest(
                f"{self.size} bytes instead of the {self.declared_size} that were declared",
                hint="send as many bytes as you declare",
            )
        if self.rest:
            self.hasher.update(self.rest)
            self.sums += chunk_sums(self.rest)

    def abort(self) -> None:
        """Give everything back; fine at any time, and more than once."""
        if self.copies:
            copies, self.copies = self.copies, []
            written = self._touched // self._blocks.block_size
            used: list[Extent] = []
            unused: list[Extent] = []
            for copy in copies:
                left = written
                for device, block, count in copy:
                    take = min(count, left)
                    left -= take
                    if take:
                        used.append(Extent(device, block, take))
                    if take < count:
                        unused.append(Extent(device, block + take, count - take))
            self._abandon(used, unused)
