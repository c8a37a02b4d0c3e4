"""FreeList: which blocks of one device are free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import islice

from BTrees.LLBTree import LLBTree, LLTreeSet

from rustord.badblocks import BadBlocks

BLOCKS_MAX = 2**40
"""A device has at most this many blocks (4 PiB of 4 KiB)."""

# An entry of the index by length is `count << _BLOCK_BITS | block`, so that entries sort by length, then by place.
_BLOCK_BITS = 40
_BLOCK_MASK = BLOCKS_MAX - 1

# A B-tree of signed 64-bit integers leaves 23 bits for the length. Entries of runs of 2**23 blocks (32 GiB of 4 KiB)
# and more do not fit. There can only be few of them, so they are kept in a plain sorted list.
_LONG_ENTRY = 1 << 63

# The last entry that fits is always in the tree, so that a search ends there and need not raise. It stands for no run:
# one of 2**23 - 1 blocks would have to begin at the last possible block.
_NO_ENTRY = _LONG_ENTRY - 1

# How many runs first_fit looks at by place before it looks by length.
_FIRST_RUNS = 16


class FreeList:
    """The free blocks of one device, as runs: extents as long as can be, so that no two of them touch.

    Every run is held twice, by place (first block and count) and by length, in B-trees of plain integers: 24 bytes a
    run, and about 50 with what is unused in the trees' nodes. Blocks are numbers below `BLOCKS_MAX`, counts are in
    blocks; ``free_count`` is the sum of all counts, ``lost_count`` how many blocks are bad and would be free otherwise.
    Not thread-safe.
    """

    __slots__ = ("_bad", "_by_length", "_counts", "_long", "free_count", "lost_count")

    def __init__(self, extents: Iterable[tuple[int, int]] = ()) -> None:
        """``extents`` are (block, count), ascending; raises ValueError if they are not, or overlap."""
        self._counts = LLBTree()
        for block, count in _joined(extents):
            self._counts[block] = count
        entries = sorted([count << _BLOCK_BITS | block for block, count in self._counts.items()])
        short_count = bisect_left(entries, _LONG_ENTRY)
        self._long: list[int] = entries[short_count:]
        del entries[short_count:]
        self._by_length = LLTreeSet(entries)
        self._by_length.insert(_NO_ENTRY)
        self.free_count: int = sum(self._counts.values())
        self.lost_count = 0
        self._bad = BadBlocks()

    def __len__(self) -> int:
        """How many runs there are. Walks over the leaves: well under a millisecond for a million runs."""
        return len(self._counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The runs as (block, count), by block. The FreeList must not change in the meantime."""
        return iter(self._counts.items())

    def largest(self) -> int:
        """The count of the longest run, 0 if nothing is free."""
        return next((count for _, count in self.longest_first()), 0)

    def best_fit(self, count: int) -> int | None:
        """First block of the shortest run of at least ``count`` blocks (of the first such run, among equals).

        None if no run is long enough. Nothing is taken.
        """
        entry = self._next_entry(count << _BLOCK_BITS)
        return None if entry is None else entry & _BLOCK_MASK

    def first_fit(self, count: int) -> int | None:
        """Lowest block from which on ``count`` blocks are free; None if no run is long enough. Nothing is taken."""
        for block, run_count in islice(self._counts.items(), _FIRST_RUNS):
            if run_count >= count:
                return int(block)
        # A million runs may be too short, but few lengths are in use: runs of n different lengths cover n * n / 2
        # blocks. The first entry of each length is its lowest run.
        lowest = None
        entry = self._next_entry(count << _BLOCK_BITS)
        while entry is not None:
            block = entry & _BLOCK_MASK
            if lowest is None or block < lowest:
                lowest = block
            entry = self._next_entry((entry | _BLOCK_MASK) + 1)
        return lowest

    def longest_first(self) -> Iterator[tuple[int, int]]:
        """The runs as (block, count), the longest first. The FreeList must not change in the meantime."""
        for entry in reversed(self._long):
            yield entry & _BLOCK_MASK, entry >> _BLOCK_BITS
        entry = _NO_ENTRY
        while True:
            try:
                entry = self._by_length.maxKey(entry - 1)
            except ValueError:
                return
            yield entry & _BLOCK_MASK, entry >> _BLOCK_BITS

    def contains(self, block: int, count: int) -> bool:
        """Whether the ``count`` blocks from ``block`` on are all free. False also for blocks that no device has."""
        run_block, run_count = self._run_before(block)
        return 0 < count <= run_block + run_count - block

    def take(self, block: int, count: int) -> None:
        """The ``count`` blocks from ``block`` on are not free any more.

        Raises ValueError unless all of them were; then nothing has changed.
        """
        counts = self._counts
        run_block = block
        if block in counts:
            run_count = counts[block]
        else:
            run_block, run_count = self._run_before(block)
        head_count = block - run_block
        tail_count = run_count - head_count - count
        if count < 1 or tail_count < 0:
            raise ValueError(f"blocks {block} to {block + count - 1} are not all free")
        self._remove_run(run_block, run_count)
        if head_count:
            self._add_run(run_block, head_count)
        if tail_count:
            self._add_run(block + count, tail_count)
        self.free_count -= count

    def release(self, block: int, count: int) -> None:
        """The ``count`` blocks from ``block`` on are free again; they are joined with the runs that they touch.

        Raises ValueError if one of them was free already, or is no block of any device; then nothing has changed.
        """
        if self._bad.runs and self._bad.within(block, count):
            self._release_good(block, count)
            return
        end = block + count
        if not 0 <= block < end <= BLOCKS_MAX:
            raise ValueError(f"{count} blocks from {block} on are on no device")
        counts = self._counts
        run_block, run_count = block, count
        try:
            previous = counts.maxKey(end - 1)
        except ValueError:
            pass
        else:
            previous_count = counts[previous]
            if previous + previous_count > block:
                raise ValueError(f"blocks {block} to {end - 1} are free already, some of them at least")
            if previous + previous_count == block:
                self._remove_run(previous, previous_count)
                run_block, run_count = previous, previous_count + count
        if end in counts:
            next_count = counts[end]
            self._remove_run(end, next_count)
            run_count += next_count
        self._add_run(run_block, run_count)
        self.free_count += count

    def _release_good(self, block: int, count: int) -> None:
        good = self._bad.without(block, count)
        for run in good:
            self.release(*run)
        self.lost_count += count - sum(good_count for _, good_count in good)

    def condemn(self, block: int, count: int) -> None:
        """The ``count`` blocks from ``block`` on are never free again: at once those that are, the others from the
        moment that they would be."""
        end = block + count
        run_block, run_count = self._run_before(block)
        runs = [(run_block, run_count), *self._counts.items(block + 1, end)] if count else []
        for run_block, run_count in runs:
            first, last = max(run_block, block), min(run_block + run_count, end)
            if first < last:
                self.take(first, last - first)
                self.lost_count += last - first
        self._bad = self._bad.adding(block, count)

    def _run_before(self, block: int) -> tuple[int, int]:
        """The last run that does not begin behind ``block``; an empty one at ``block`` if there is none."""
        if not 0 <= block < BLOCKS_MAX:
            return block, 0
        try:
            run_block = self._counts.maxKey(block)
        except ValueError:
            return block, 0
        return run_block, self._counts[run_block]

    def _next_entry(self, entry: int) -> int | None:
        """The lowest entry by length from ``entry`` on; None if there is none."""
        if entry < _LONG_ENTRY:
            next_entry: int = self._by_length.minKey(entry)
            if next_entry != _NO_ENTRY:
                return next_entry
        index = bisect_left(self._long, entry)
        return self._long[index] if index < len(self._long) else None

    def _add_run(self, block: int, count: int) -> None:
        self._counts[block] = count
        entry = count << _BLOCK_BITS | block
        if entry < _LONG_ENTRY:
            self._by_length.insert(entry)
        else:
            insort(self._long, entry)

    def _remove_run(self, block: int, count: int) -> None:
        del self._counts[block]
        entry = count << _BLOCK_BITS | block
        if entry < _LONG_ENTRY:
            self._by_length.remove(entry)
        else:
            del self._long[bisect_left(self._long, entry)]


def _joined(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """``extents``, those that touch made one. Raises ValueError unless they ascend and do not overlap."""
    run_block = end = 0
    for block, count in extents:
        if block < end or count < 1:
            raise ValueError(f"free extent ({block}, {count}) does not lie behind block {end}")
        if block > end:
            if end > run_block:
                yield run_block, end - run_block
            run_block = block
        end = block + count
    if end > BLOCKS_MAX:
        raise ValueError(f"a free extent ends at block {end}, but a device has at most {BLOCKS_MAX}")
    if end > run_block:
        yield run_block, end - run_block
