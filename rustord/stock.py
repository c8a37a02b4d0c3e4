"""Stock: what a pool holds, taken from its index when it is opened: free is what nobody names."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rustord.allocator import Allocator
from rustord.blockstore import BlockStore
from rustord.extent import Extent
from rustord.freelist import FreeList
from rustord.keystore.store import KeyStore
from rustord.layer import Layers
from rustord.record import Grave, Record, RecordId

_NO_RUN = 1 << 62


@dataclass(slots=True)
class Stock:
    """What the pool holds: ``count`` Objects of ``size`` bytes of data."""

    count: int = 0
    size: int = 0

    def add(self, record: Record) -> None:
        self.count += 1
        self.size += record.size

    def remove(self, record: Record) -> None:
        self.count -= 1
        self.size -= record.size


def take_stock(
    allocator: Allocator, blocks: BlockStore, keystore: KeyStore, layers: Layers, progress: Callable[[str], None]
) -> tuple[Stock, list[Grave], list[RecordId], str]:
    """Fill the FreeLists: free is what no Record and no Layer names.

    Returns also the graves, which others are none any more, and why the pool takes no changes; "" if it does.
    """
    used: dict[int, list[int]] = {index: [] for index in blocks.slots}
    stock = Stock()
    has_layers = bool(layers.by_uuid)
    for record in keystore.indexed():
        stock.add(record)
        for device, block, count in record.extents:
            used[device].append(block << 32 | count)
        if has_layers and record.layer:
            layers.use(record.layer)
        if stock.count % 500_000 == 0:
            progress(f"reading the index: {stock.count} Objects")
    graves = keystore.graves() + _add_layers(keystore, layers, used)
    for runs in used.values():
        runs.sort()
    graves, stale = _add_graves(graves, used)
    problem = ""
    for index, slot in blocks.slots.items():
        free, overlap = _gaps(slot.geometry.data_runs, used.pop(index))
        if overlap:
            problem = f"two Objects claim block {overlap} of device {index}"
        allocator.add(index, FreeList(free), slot.geometry.data_block_count)
        allocator.condemn(Extent(index, run.block, run.count) for run in slot.bad.runs)
    return stock, graves, stale, problem


def _add_layers(keystore: KeyStore, layers: Layers, used: Mapping[int, list[int]]) -> list[Grave]:
    """Add the blocks of Layers, and of the deleted Objects below them, to ``used``; returns what nobody needs."""
    needless = layers.needless()
    layers.forget(needless)
    layers.part(needless)
    for base in layers.bases(needless):
        layers.let_go(base)
    graves = [Grave(layer.id, layer.extents(layers.chunk_blocks)) for layer in needless]
    bases = keystore.bases()
    graves += [Grave(record.id, record.extents) for record in bases if record.uuid not in layers.users]
    kept = [record for record in bases if record.uuid in layers.users]
    keystore.hold((record.id for record in kept), keystore.indexed_sequence)
    extents = [extent for layer in layers.by_uuid.values() for extent in layer.extents(layers.chunk_blocks)]
    for device, block, count in extents + [extent for record in kept for extent in record.extents]:
        used[device].append(block << 32 | count)
    return graves


def _add_graves(graves: Iterable[Grave], used: Mapping[int, list[int]]) -> tuple[list[Grave], list[RecordId]]:
    """Add the blocks of ``graves`` to ``used``, which is sorted, but for those of somebody else, or of a younger one.

    A block is given to nobody before it is erased, so these are erased. The journal may not say so: if the index, which
    knew, is lost, the journal's tombstones make them graves again. To erase them now would destroy the other's data.
    Returns the graves without them, and those of which nothing is left.
    """
    buried: dict[int, list[int]] = {index: [] for index in used}
    kept, stale = [], []
    for grave in sorted(graves, key=lambda grave: grave.id.sequence, reverse=True):
        left: list[Extent] = []
        for extent in grave.extents if grave.devices <= used.keys() else ():
            taken = buried[extent.device]
            for part in _not_in(used[extent.device], extent):
                for one in [*_not_in(taken, part)]:
                    insort(taken, one.block << 32 | one.count)
                    left.append(one)
        if left:
            kept.append(Grave(grave.id, left))
        else:
            stale.append(grave.id)
    for index, runs in buried.items():
        used[index].extend(runs)
    return kept, stale


def _not_in(taken: Sequence[int], extent: Extent) -> Iterator[Extent]:
    """What the sorted runs (block << 32 | count) leave of ``extent``."""
    device, block, _ = extent
    at = max(bisect_right(taken, block << 32 | 0xFFFFFFFF) - 1, 0)
    while at < len(taken) and (first := taken[at] >> 32) < extent.end:
        if first > block:
            yield Extent(device, block, first - block)
        block = max(block, first + (taken[at] & 0xFFFFFFFF))
        at += 1
    if block < extent.end:
        yield Extent(device, block, extent.end - block)


def _gaps(data_runs: Iterable[tuple[int, int]], used: list[int]) -> tuple[list[tuple[int, int]], int]:
    """The runs (block, count) of ``data_runs`` that ``used`` (block << 32 | count) leaves, and a block used twice."""
    used.sort()
    gaps: list[tuple[int, int]] = []
    overlap = 0
    runs = iter(data_runs)
    free, free_end = _run(runs)
    for value in used:
        block = value >> 32
        while block >= free_end:
            if free < free_end:
                gaps.append((free, free_end - free))
            free, free_end = _run(runs)
        if block > free:
            gaps.append((free, block - free))
        elif block < free:
            overlap = block
        free = max(free, block + (value & 0xFFFFFFFF))
    while free_end != _NO_RUN:
        if free < free_end:
            gaps.append((free, free_end - free))
        free, free_end = _run(runs)
    return gaps, overlap


def _run(runs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    block, count = next(iter(runs), (_NO_RUN, 0))
    return block, block + count
