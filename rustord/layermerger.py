"""LayerMerger: puts a Layer that only the one above needs into that, so that snapshots may come and go for years.

No data is moved::

    the upper Layer takes over the chunks of the lower one, in its map, as far as it has none of its own
    the upper Layer's head names what the lower one builds on = the commit point
    the lower Layer is erased, with the chunks that it has left

Before the commit point chunks are named by both. Nobody writes there, nor moves or erases them, as long as that is so.
A crash leaves both; the next opening takes it that the chunks are the upper one's, and the merger goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice

from rustord.errors import NoSpace, ReadOnly, RustordError, Unavailable
from rustord.event import FAULT
from rustord.extent import Extent
from rustord.journal import NOTHING
from rustord.layer import Layer
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import BASE, SLOT_COUNT, ZEROS, LayerEntry, MapEntry, address_of, extent_at, page_of
from rustord.record import RecordId
from rustord.volumes import Volumes

log = logging.getLogger(__name__)

_BATCH_CHUNKS = 4096
"""Chunks in one entry of the journal."""
_CLOSE_S = 60.0
_AGAIN_S = 60.0
"""How long after a merge that failed it is tried again: there may be room by then, or the device is back."""


class LayerMerger:
    """`run` merges what there is now; `start` has it done whenever there is something, on a thread of its own."""

    def __init__(self, store: ObjectStore, volumes: Volumes) -> None:
        self._store = store
        self._layers = store.layers
        self._volumes = volumes
        self._due = threading.Event()
        self._closing = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="merger", daemon=True)

    def start(self) -> None:
        """Merge what there is, before anybody opens a volume, and whatever there will be."""
        self._layers.on_less_used = self._due.set
        self._try()
        self._thread.start()

    def close(self) -> None:
        """End; what is half done is gone on with at the next start."""
        self._closing = True
        self._due.set()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while not self._closing:
            self._due.wait(_AGAIN_S if self._has_failed else None)
            self._due.clear()
            self._try()

    def _try(self) -> None:
        self._has_failed = False
        try:
            self.run()
        except RustordError as error:
            self._has_failed = True
            log.error("Layers of volumes could not be merged, which is tried again later: %s", error)
        except Exception:
            log.exception("Layers of volumes could not be merged", extra=FAULT())

    def run(self) -> int:
        """Merge all that can be; returns how many Layers are gone.

        Raises NoSpace or DeviceError if some cannot be, once the others are.
        """
        count = 0
        while not (self._closing or self._store.read_only) and (pairs := self._layers.mergeable()):
            merged, failures = 0, []
            for pair in pairs:
                try:
                    merged += self._merge(*pair)
                except RustordError as error:
                    failures.append(error)
            count += merged
            if failures and not merged:
                raise failures[0]
            if not merged:
                break
        return count

    def _merge(self, upper: Layer, lower: Layer) -> bool:
        with self._volumes.reshaping:
            volume = self._volumes.writer_of(upper)
            with volume.still() if volume else nullcontext():
                if volume is not None and volume.layer is not upper:
                    return False
                merged = self._merge_still(upper, lower, is_written=volume is not None)
        if merged:
            log.info("layer %s has become part of %s", uuid_text(lower.uuid), uuid_text(upper.uuid))
        return merged

    def _merge_still(self, upper: Layer, lower: Layer, *, is_written: bool) -> bool:
        """The upper Layer is not changed meanwhile."""
        for layer in (upper, lower):
            self._store.blocks.writable(layer.home)
        numbers = {page_of(chunk) for chunk, _ in _wanted(upper, lower)}
        try:
            self._volumes.call(lambda: self._place(upper, lower, numbers))
        except NoSpace:
            self._give_back(upper, lower, is_written=is_written)
            raise
        left = _wanted(upper, lower)
        while batch := list(islice(left, _BATCH_CHUNKS)):
            if not self._volumes.call(lambda batch=batch: self._take_over(upper, lower, batch)):  # type: ignore[misc]
                return False
        with nullcontext() if is_written else self._layers.still():
            return self._volumes.call(lambda: self._finish(upper, lower))

    def _place(self, upper: Layer, lower: Layer, numbers: Collection[int]) -> None:
        """See to it that the upper Layer has slots for all pages that get a chunk. Called between cycles.

        That is before any chunk is taken over: from then on nobody can open the volume until the last one is.
        """
        if not self._layers.is_mergeable(upper, lower):
            return
        pages = self._take_slots(upper, {*numbers} - upper.places.keys())
        left = iter(sorted(pages.items()))
        try:
            while batch := list(islice(left, _BATCH_CHUNKS)):
                with self._store.journals.note([MapEntry(upper.uuid, batch, ())]):
                    upper.places.update(batch)
        except RustordError:  # no journal has those that the Layer does not have
            rest = pages.keys() - upper.places.keys()
            self._store.allocator.release([extent_at(pages[number], SLOT_COUNT) for number in rest])
            raise

    def _give_back(self, upper: Layer, lower: Layer, *, is_written: bool) -> None:
        """Erase what the lower Layer has and nobody can see: next time there may be room for the merge."""
        hidden = ((chunk, address) for chunk, address in lower.chunks() if address > ZEROS and upper.get(chunk) != BASE)
        while batch := dict(islice(hidden, _BATCH_CHUNKS)):
            left, graves = self._volumes.call(lambda batch=batch: self._leave(upper, lower, batch))  # type: ignore[misc]
            if not is_written:
                self._layers.drain()
            self._volumes.free(left, ids=graves)

    def _leave(self, upper: Layer, lower: Layer, chunks: dict[int, int]) -> tuple[Sequence[Extent], Sequence[RecordId]]:
        """Have the lower Layer without these chunks. Returns what it has left, a grave. Called between cycles."""
        if not self._layers.is_mergeable(upper, lower):
            return (), ()
        left = [extent_at(address, self._layers.chunk_blocks) for address in chunks.values()]
        with self._store.journals.note([MapEntry(lower.uuid, (), [(c, BASE) for c in chunks])], (), left) as graves:
            lower.drop(chunks)
        return left, graves

    def _take_slots(self, upper: Layer, numbers: Iterable[int]) -> dict[int, int]:
        """Slots for pages; all of them, or NoSpace."""
        taken: dict[int, Extent] = {}
        try:
            for number in numbers:
                taken[number] = self._store.allocator.run(SLOT_COUNT, upper.home)
        except NoSpace:
            self._store.allocator.release(taken.values())
            raise
        return {number: address_of(extent) for number, extent in taken.items()}

    def _take_over(self, upper: Layer, lower: Layer, chunks: list[tuple[int, int]]) -> bool:
        """Say in the journal that chunks are the upper Layer's. Called between cycles."""
        if not self._layers.is_mergeable(upper, lower):
            return False
        was_torn = lower.uuid in self._layers.torn
        self._layers.torn.add(lower.uuid)
        has_begun = False
        try:
            with self._store.journals.note([MapEntry(upper.uuid, (), chunks)]):
                has_begun = True
        except (ReadOnly, Unavailable):
            if not (has_begun or was_torn):  # no journal has it
                self._layers.torn.discard(lower.uuid)
            raise
        return True

    def _finish(self, upper: Layer, lower: Layer) -> bool:
        """Have the upper Layer without the lower one. Called between cycles, and nobody reads."""
        if not self._layers.is_mergeable(upper, lower):
            return False
        head = upper.head._replace(base=lower.head.base)
        with self._store.journals.note([LayerEntry(upper.uuid, upper.address, head.encode())]):
            self._layers.users[lower.uuid] += 1  # it stays, if it is in doubt that it may go
            upper.take_over(lower, _least(lower))
            self._layers.torn.discard(lower.uuid)
            self._layers.rebase(upper, head)
        self._layers.let_go(lower.uuid)
        self._store.sweep()
        return True


def _least(lower: Layer) -> int:
    """What need not be said of a chunk is up to this: zeros, if there is nothing below them."""
    return BASE if lower.head.base != NOTHING else ZEROS


def _wanted(upper: Layer, lower: Layer) -> Iterator[tuple[int, int]]:
    """What the upper Layer is to take over: (chunk, address). There may be millions."""
    least = _least(lower)
    return ((chunk, address) for chunk, address in lower.chunks() if address > least and upper.get(chunk) == BASE)
