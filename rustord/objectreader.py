"""ObjectReader: ranges of an Object out of the page cache, whose chunks are compared with their checksums once.

Of each chunk (64 KiB) it is remembered that it has been compared, as long as it stays in the page cache. When a piece
of it is found to have left that, it is compared again, and so are its neighbours, for the kernel reads ahead. So a
small read costs no more than it does without checksums. (One way past that is left: a page that the kernel reads ahead,
of a chunk that was compared before and has left the cache without anybody noticing.)
"""

from __future__ import annotations

from threading import Lock

from rustord.blockstore import BlockStore
from rustord.lease import Place
from rustord.manifest import CHUNK_BYTES, chunk_count
from rustord.record import Record

AROUND_CHUNKS = 64
"""When a chunk has left the page cache, so many on either side are compared again."""


class ObjectReader:
    """Reads what a Record names; whoever uses it sees to it that those blocks are still the Object's.

    Any thread may call it. It takes a byte for each chunk.
    """

    __slots__ = ("_blocks", "_copy", "_lock", "_verified", "record")

    def __init__(self, blocks: BlockStore, record: Record) -> None:
        self.record = record
        self._blocks = blocks
        self._copy = blocks.preferred(record)
        self._verified = bytearray(chunk_count(record.size))
        """Whether each chunk has been compared, on this copy."""
        self._lock = Lock()

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer``, which is not empty, from within the Object; False if the right bytes are not in the cache.

        Then `BlockStore.read` has them from the device or another copy, or says what is wrong.
        """
        first, end = offset // CHUNK_BYTES, (offset + len(buffer) - 1) // CHUNK_BYTES + 1
        with self._lock:
            if self._verified.find(0, first, end) < 0:
                if self._blocks.read_copy_now(self.record, self._copy, offset, buffer):
                    return True
                around = slice(max(first - AROUND_CHUNKS, 0), min(end + AROUND_CHUNKS, len(self._verified)))
                self._verified[around] = bytes(around.stop - around.start)
            return self._compare(first, end, offset, buffer)

    def _compare(self, first: int, end: int, offset: int, buffer: memoryview) -> bool:
        """The same by whole chunks; remembers which match."""
        start = first * CHUNK_BYTES
        length = min(end * CHUNK_BYTES, self.record.size) - start
        chunks = buffer if length == len(buffer) else memoryview(bytearray(length))
        if not self._blocks.read_copy_now(self.record, self._copy, start, chunks, verify=True):
            return False
        self._verified[first:end] = bytes((1,)) * (end - first)
        if chunks is not buffer:
            buffer[:] = chunks[offset - start : offset - start + len(buffer)]
        return True

    def places(self, first: int, end: int) -> list[Place | None]:
        """Where the chunks from ``first`` to before ``end`` are, for who compares them himself; None for one that is
        not whole, or not in one place."""
        whole_end = max(first, min(end, self.record.size // CHUNK_BYTES))
        sums = self.record.sums(first, whole_end)
        places: list[Place | None] = [
            place and place._replace(checksum=sums[8 * number : 8 * number + 8])
            for number, place in enumerate(self._blocks.places(self.record.copies[self._copy], first, whole_end))
        ]
        return places + [None] * (end - whole_end)
