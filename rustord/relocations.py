"""Relocations: the Objects that are being copied to other blocks, until a cycle makes these their own.

They are copied beside the cycles, to blocks of which the journals have said before, durably, that they are being
filled: until the cycle that makes them the Object's own, the next opening erases them. So no crash leaves a copy that
nobody knows of, and that would outlive its Object.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from rustord.allocator import Allocator
from rustord.blockstore import BlockStore
from rustord.change import Erase, Move
from rustord.erasures import Erasures
from rustord.extent import Extent
from rustord.journals import Journals
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjectId
from rustord.placement import too_long
from rustord.record import Record
from rustord.relocation import Relocation


class Relocations:
    """Those that have taken blocks which are not the Object's yet. Any thread may call any method but `announce`.

    `prepare` does all that comes before the cycle. `place`, `announce` and `copy` are the steps of it, for who moves
    many Objects at once: they share the flush of the second one.
    """

    def __init__(
        self, allocator: Allocator, blocks: BlockStore, keystore: KeyStore, journals: Journals, erasures: Erasures
    ) -> None:
        self._allocator = allocator
        self._blocks = blocks
        self._keystore = keystore
        self._journals = journals
        self._erasures = erasures
        self._by_uuid: dict[ObjectId, list[Relocation]] = {}
        self._lock = threading.Lock()

    def prepare(
        self,
        record: Record,
        leave: Sequence[Extent],
        avoid: Collection[int] = (),
        *,
        salvage: bool = False,
        pace: Callable[[int], None] = lambda length: None,
        call: Callable[[Callable[[], None]], None] = lambda function: function(),
    ) -> Move:
        """Copy what an Object has on the blocks ``leave`` to others; a cycle has to make the Move that is returned.

        ``call`` runs a function between cycles; this takes as long as copying does. See `Relocation` for the rest.
        Raises ReadOnly, NoSpace, DeviceError or NotFound; nothing is left then.
        """
        relocation = self.place(record, leave, avoid, salvage=salvage)
        try:
            call(lambda: self.announce([relocation]))
        except BaseException:
            relocation.abort()
            raise
        return self.copy(relocation, pace)

    def place(
        self, record: Record, leave: Sequence[Extent], avoid: Collection[int] = (), *, salvage: bool = False
    ) -> Relocation:
        """Take new blocks for what an Object has on the blocks ``leave``. Raises ReadOnly, NoSpace or NotFound."""
        self._journals.check_changeable()
        relocation = Relocation(record, self._allocator, self._blocks, self._give_up, salvage=salvage)
        with self._lock:
            self._by_uuid.setdefault(record.uuid, []).append(relocation)
        try:
            relocation.place(leave, avoid)
            extent_count = sum(map(len, relocation.copies))
            if record.moved_length(extent_count) > self._keystore.batch_bytes_max // 2:
                raise too_long(record.size, extent_count)
        except BaseException:
            relocation.abort()
            self.forget(relocation)  # it may have got no block that would have to be given up
            self._keystore.stat(record.uuid)  # if it was deleted meanwhile, that is why
            raise
        return relocation

    def announce(self, relocations: Sequence[Relocation]) -> None:
        """Say in the journals, durably, which blocks are about to be filled. Called between cycles.

        Those whose Objects are gone, or elsewhere, get no ``id``, and are aborted. Raises ReadOnly, DeviceError or what
        the index raises; the caller has to abort all of them then.
        """
        there = []
        for relocation in relocations:
            record = self._keystore.get(relocation.record.uuid)
            if record is not None and record.id == relocation.record.id:
                there.append(relocation)
            else:
                relocation.abort()
        if any(relocation.record.sequence > self._keystore.indexed_sequence for relocation in there):
            # What becomes of them is in the journals of other devices from now on: one that is away at the next opening
            # must not tell later of where they were before, when nobody knows any more that they are gone.
            self._keystore.checkpoint()
        ids = self._journals.announce([(relocation.record.uuid, relocation.new) for relocation in there])
        for relocation, id in zip(there, ids, strict=True):
            relocation.id = id

    def copy(self, relocation: Relocation, pace: Callable[[int], None] = lambda length: None) -> Move:
        """Copy what has been announced. Raises DeviceError, NotFound or what ``pace`` raises; nothing is left then."""
        try:
            relocation.copy(pace)
        except BaseException:
            relocation.abort()
            self._keystore.stat(relocation.record.uuid)
            raise
        return Move(relocation)

    def _give_up(self, relocation: Relocation, new: list[Extent]) -> None:
        self.forget(relocation)
        if relocation.id is None:
            self._allocator.release(new)  # nothing has been written to them
        else:
            self._erasures.add(Erase(new, [relocation.id]))

    def forget(self, relocation: Relocation) -> None:
        """Its blocks are the Object's own from now on."""
        uuid = relocation.record.uuid
        with self._lock:
            left = [other for other in self._by_uuid.get(uuid, ()) if other is not relocation]
            self._by_uuid.pop(uuid, None)
            if left:
                self._by_uuid[uuid] = left

    def take_back(self, uuid: ObjectId) -> list[Erase]:
        """What is being copied, or was, of an Object that has been deleted; nothing more is."""
        with self._lock:
            relocations = self._by_uuid.pop(uuid, ())
        return [Erase(relocation.take_back(), [relocation.id] if relocation.id else ()) for relocation in relocations]
