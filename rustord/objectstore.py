"""ObjectStore: PUT, GET and DELETE; the only one that knows the order in which the others are asked.

All changes go through `ObjectStore.cycle`, a batch of them and one flush per device::

    place and write data and footers -> journal -> flush = the commit point -> learn -> answer

A crash before the flush has returned leaves each Object of the batch whole or absent: the journal's entry and the data
verify, or they do not. A failure before it gives the blocks back. A DELETE takes two cycles: in the first its tombstone
is made durable (the commit point: readers no longer find the Object), in the second its blocks are erased, footer and
all; then they are free and it is answered. So a free block is never named by a live Record, and never holds
what was deleted.

A Move is copied beside the cycles; see `rustord.relocations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

from rustord.allocator import Allocator
from rustord.blockstore import BlockStore
from rustord.change import Change, Delete, Erase, Move, Put, Undo, check_match
from rustord.distribution import Distribution
from rustord.erasures import Erasures
from rustord.errors import DeviceError, PreconditionFailed, ReadOnly, RustordError
from rustord.extent import Extent
from rustord.journals import Journals
from rustord.keygen import KeyGen
from rustord.keystore.store import KeyStore
from rustord.label import Label
from rustord.layer import Frozen, Layers
from rustord.manifest import Data, chunk_count
from rustord.objkey import ObjectId, ObjKey, uuid_text
from rustord.pins import Pins
from rustord.placement import Placement, Placements, writes
from rustord.record import Grave, Metadata, Record, RecordId
from rustord.relocation import Relocation
from rustord.relocations import Relocations
from rustord.stock import Stock
from rustord.upload import Upload

_PLAIN_BYTES = 256
"""What a Put takes in the journal beside its name, its metadata and its checksums, as a rule."""
ERASE_BYTES_MAX = 1 << 20
"""Longer erasures are done beside the cycles, so that they hold up nobody; a cycle then only flushes them."""


class Cycle(NamedTuple):
    """What came of a batch: the outcome of every change that is finished, and what the next cycle has to do."""

    outcomes: list[tuple[Change, Record | RustordError]]
    following: list[Change]


@dataclass(slots=True)
class _Batch:
    """A cycle in the making. ``plain`` has the Puts that are not placed yet, with what each replaces."""

    plain: list[tuple[Put, Data, Record | None]] = field(default_factory=list)
    puts: list[Placement] = field(default_factory=list)
    moves: list[tuple[Placement, RecordId]] = field(default_factory=list)  # those of them, with the GRAVE of each
    deletes: list[tuple[Delete, Record, int]] = field(default_factory=list)
    undos: list[tuple[Undo, int]] = field(default_factory=list)
    erases: list[Erase] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    gone: set[ObjectId] = field(default_factory=set)
    length: int = 0
    plain_length: int = 0
    """About how long the journal's entries will be, in bytes: of what is placed, and of what is ``plain``."""
    outcomes: list[tuple[Change, Record | RustordError]] = field(default_factory=list)
    following: list[Change] = field(default_factory=list)


class ObjectStore:
    """A pool that is open. Reads may come from any thread; changes from one thread at a time."""

    def __init__(
        self,
        label: Label,
        blocks: BlockStore,
        allocator: Allocator,
        keystore: KeyStore,
        keygen: KeyGen,
        layers: Layers,
        stock: Stock,
        sequence: int,
        on_close: Callable[[ObjectStore], None],
        read_only: str = "",
    ) -> None:
        """Made by `rustord.pool.open_pool`. ``read_only`` says why the pool takes no changes; "" if it does."""
        self.label = label
        self.blocks = blocks
        self.allocator = allocator
        self.keystore = keystore
        self.keygen = keygen
        self.layers = layers
        self.stock = stock
        self.phase_s = {phase: Distribution() for phase in ("place", "write", "journal", "flush", "settle")}
        """How long each phase of the cycles took, in seconds, in the order of the phases."""
        self.last_phase_s = [0.0] * len(self.phase_s)
        """How long each phase of the last cycle took, in seconds."""
        self.read_only = read_only
        self.pins = Pins(keystore)
        self.erasures = Erasures(keystore, self.pins)
        self.journals = Journals(keystore, blocks, self.erasures, sequence, self.check_changeable)
        self.relocations = Relocations(allocator, blocks, keystore, self.journals, self.erasures)
        self._placements = Placements(label.secret, blocks, allocator, keygen, layers)
        self._on_close = on_close
        blocks.is_gone = self._is_gone

    # The library's calls; the daemon's Writer makes cycles itself

    def __enter__(self) -> ObjectStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, data: Data, *, name: str = "", content_type: str = "", **attributes: str) -> ObjKey:
        """Store an Object; it is durable on return. An Object of that name is replaced."""
        return self._change(Put(data, Metadata(name, content_type, attributes))).key

    def get(self, uuid: ObjectId) -> bytes:
        """The whole data of an Object, verified. Raises NotFound, Damaged or DeviceError."""
        record = self.stat(uuid)
        return bytes(self.read(record, 0, record.size))

    def delete(self, uuid: ObjectId) -> None:
        """Delete an Object; on return its blocks have been erased. Raises NotFound."""
        self._change(Delete(uuid))

    def _change(self, change: Change) -> Record:
        """Run ``change`` and all that follows from it."""
        answer: Record | RustordError | None = None
        changes: Sequence[Change] = [change]
        while changes:
            cycle = self.cycle(changes)
            answer = next((outcome for done, outcome in cycle.outcomes if done is change), answer)
            changes = cycle.following
        assert answer is not None
        if isinstance(answer, RustordError):
            raise answer
        return answer

    # Reading

    def stat(self, uuid: ObjectId) -> Record:
        """What is known of an Object. Raises NotFound."""
        return self.keystore.stat(uuid)

    def resolve(self, name: str) -> ObjectId | None:
        """The uuid of the Object of that name, or None."""
        return self.keystore.resolve(name)

    def names(self, prefix: str = "", after: str = "", limit: int = 1000) -> list[tuple[str, ObjectId]]:
        """A page of names and their uuids; see `KeyStore.names`."""
        return self.keystore.names(prefix, after, limit)

    def objects(self, after: ObjectId = b"", limit: int = 1000) -> list[Record]:
        """A page of Objects by uuid; see `KeyStore.objects`."""
        return self.keystore.objects(after, limit)

    def read(self, record: Record, offset: int, length: int, room: memoryview | None = None) -> memoryview:
        """Bytes of an Object, verified; may wait for a device. Raises NotFound, Damaged or DeviceError.

        ``record`` may be an old one: an Object that has been moved is read where it is now. With ``room`` for all
        chunks (of 64 KiB) that are touched, what is returned is part of that.
        """
        while True:
            record = self.keystore.get(record.uuid) or record
            try:
                data = self.blocks.read(record, offset, length, room=room)
            except RustordError:
                if self.stat(record.uuid).id == record.id:  # not deleted or moved meanwhile: these blocks hold anything
                    raise
            else:
                assert data is not None
                return data

    def _is_gone(self, record: Record) -> bool:
        current = self.keystore.base(record.uuid)
        return current is None or current.id != record.id

    def read_now(self, record: Record, offset: int, length: int) -> memoryview | None:
        """Bytes of an Object, verified; None if that would mean to wait, or if they are damaged (then use `read`)."""
        return self.blocks.read(record, offset, length, wait=False)

    # Changing

    def check_changeable(self) -> None:
        """Raise ReadOnly, which says why, if the pool takes no changes."""
        if self.read_only:
            raise ReadOnly(f"the pool is read-only: {self.read_only}", hint="see 'rustorctl status'")

    def upload(self, put: Put, size: int | None) -> Upload:
        """Take in the data of ``put`` piece by piece, before a cycle commits it; ``size`` in bytes, None if unknown.

        Raises what would make the Put fail in the end: PreconditionFailed, NoSpace if the size is known, ReadOnly.
        """
        self.check_changeable()
        self._check_name(put)
        put.source = upload = self._placements.upload(put, size, self._abandon)
        return upload

    def _abandon(self, used: list[Extent], unused: list[Extent]) -> None:
        self.allocator.release(unused)
        if used:
            self.erasures.add(Erase(used))

    def idle_work(self) -> bool:
        """Whether an empty cycle would have something to do."""
        return self.erasures.are_due()

    def cycle(self, changes: Iterable[Change]) -> Cycle:
        """Make a batch of changes and all that they need durable with one flush per device; see the module.

        An error concerns one change and is its outcome; nothing of that change is left behind.
        """
        times = [perf_counter()]
        batch = self._place_all(changes)
        times.append(perf_counter())
        failed = self._write(batch)
        erased = self._erase(batch)
        times.append(perf_counter())
        committed, refused = self._journal(batch, failed)
        times.append(perf_counter())
        failed |= self.blocks.flush((committed | erased) - failed.keys())
        times.append(perf_counter())
        cycle = self._settle(batch, failed, refused, committed)
        times.append(perf_counter())
        self.last_phase_s = [ended - began for began, ended in pairwise(times)]
        for phase, seconds in zip(self.phase_s.values(), self.last_phase_s, strict=True):
            phase.observe(seconds)
        return cycle

    def _place_all(self, changes: Iterable[Change]) -> _Batch:
        batch = _Batch(following=self.erasures.take())
        refusal = self._refusal()
        for change in changes:
            try:
                if refusal is not None and isinstance(change, Put | Delete | Move):
                    raise refusal
                self._stage(change, batch)
            except RustordError as error:
                batch.outcomes.append((change, error))
                if isinstance(change, Put | Move) and isinstance(change.source, Upload | Relocation):
                    change.source.abort()
        if batch.plain:
            self._place_plain(batch)
        return batch

    def _stage(self, change: Change, batch: _Batch) -> None:
        """Decide what the change comes to; nothing is written yet."""
        if batch.length + batch.plain_length > self.keystore.batch_bytes_max // 2 and not isinstance(change, Erase):
            batch.following.append(change)  # the journal takes no more at once
        elif isinstance(change, Put):
            if change.name and change.name in batch.names:
                batch.following.append(change)  # it will see what the other one stored
            else:
                self._stage_put(change, batch)
        elif isinstance(change, Delete):
            self._stage_delete(change, batch)
        elif isinstance(change, Move):
            self._stage_move(change, batch)
        elif isinstance(change, Undo):
            self.journals.sequence += 1
            batch.undos.append((change, self.journals.sequence))
            batch.length += 40
        elif self.erasures.hold(change):
            pass
        elif self._has_lost(change):
            change.erased = False
            batch.following.append(change)
        else:
            batch.erases.append(change)

    def _has_lost(self, erase: Erase) -> bool:
        """Whether what was written over beside the cycles may never become durable: the flush would not tell."""
        try:
            self.blocks.check_unchanged(erase.devices)
        except DeviceError:
            return erase.erased
        return False

    def _stage_put(self, put: Put, batch: _Batch) -> None:
        replaced = self._check_name(put)
        if replaced is not None:
            if replaced.uuid in batch.gone:
                batch.following.append(put)  # it will see that the name is free
                return
            self._check_erasable(replaced)
        source = put.source
        if isinstance(source, Upload | Frozen):
            placed = self._placements.put(put, source, self.journals.sequence + 1, self.keystore.batch_bytes_max // 2)
            placed.replaced = replaced
            self._add(placed, batch)
        else:
            batch.plain.append((put, source, replaced))
            batch.plain_length += 8 * chunk_count(len(source)) + len(put.name_bytes) + len(put.metadata) + _PLAIN_BYTES
        if put.name:
            batch.names.add(put.name)
        if replaced is not None:
            batch.gone.add(replaced.uuid)

    def _place_plain(self, batch: _Batch) -> None:
        length_max = self.keystore.batch_bytes_max // 2
        plain = [(put, data) for put, data, _ in batch.plain]
        placements = self._placements.put_each(plain, self.journals.sequence + 1, length_max)
        late: list[Change] = []
        for put, _, replaced in batch.plain:
            placed = placements[put]
            if isinstance(placed, RustordError):
                batch.outcomes.append((put, placed))
            elif batch.length > length_max:  # they have more extents than was to be expected
                self._placements.take_back(placed)
                late.append(put)
            else:
                placed.replaced = replaced
                self._add(placed, batch)
        batch.following[:0] = late  # before all that came later and waits for one of them

    def _stage_move(self, move: Move, batch: _Batch) -> None:
        source = move.source
        old = self.stat(source.record.uuid)
        if old.uuid in batch.gone:
            batch.following.append(move)  # it will be told that the Object is gone, or elsewhere
            return
        if old.id != source.record.id:
            raise PreconditionFailed(
                f"Object {uuid_text(old.uuid)} has been moved meanwhile", hint="move it from where it is now"
            )
        placed = self._placements.move(move, old, self.journals.sequence + 1, self.keystore.batch_bytes_max // 2)
        self.relocations.forget(source)
        self._add(placed, batch)
        assert source.id is not None
        batch.moves.append((placed, source.id))
        batch.gone.add(old.uuid)

    def _add(self, placed: Placement, batch: _Batch) -> None:
        self.journals.sequence = placed.record.sequence
        batch.puts.append(placed)
        batch.length += len(placed.record.raw) + 64

    def _stage_delete(self, delete: Delete, batch: _Batch) -> None:
        record = self.stat(delete.uuid)
        if delete.uuid in batch.gone:
            batch.following.append(delete)  # it will be told that the Object is gone
            return
        check_match(record, delete.if_match, f"Object {uuid_text(delete.uuid)}")
        self.pins.check_deletable(delete.uuid)
        self._check_erasable(record)
        self.journals.sequence += 1
        delete.record = record
        batch.deletes.append((delete, record, self.journals.sequence))
        batch.gone.add(delete.uuid)
        batch.length += 32

    def _refusal(self) -> RustordError | None:
        """Why the pool takes no changes now; None if it does. Waits for the index if that lags far behind."""
        try:
            self.check_changeable()
            self.keystore.make_room()
        except RustordError as error:
            return error
        return None

    def _check_name(self, put: Put) -> Record | None:
        """The Object that ``put`` replaces, or None. Raises PreconditionFailed."""
        if not put.name and put.if_match is None:
            return None
        uuid = self.resolve(put.name) if put.name else None
        record = None if uuid is None else self.keystore.get(uuid)
        if record is not None and put.if_none_match:
            raise PreconditionFailed(
                f"the name {put.name!r} is taken by Object {uuid_text(record.uuid)}",
                hint="choose another name, or allow that it is replaced",
            )
        check_match(record, put.if_match, f"the name {put.name!r}")
        return record

    def _check_erasable(self, record: Record) -> None:
        """Raise DeviceError unless every block of the Object can be erased: DELETE promises that.

        What is on a device that has been given up is out of anybody's reach.
        """
        for device in record.devices:
            if not self.blocks.is_given_up(device):
                self.blocks.writable(device)

    def _write(self, batch: _Batch) -> dict[int, RustordError]:
        """Write data and footers, adjoining ones in one call. Returns the devices that failed."""
        failed: dict[int, RustordError] = {}
        for extent, buffers in writes(batch.puts, self.label.block_size):
            if extent.device not in failed:
                try:
                    self.blocks.write(extent, buffers)
                except DeviceError as error:
                    failed[extent.device] = error
        return failed

    def _erase(self, batch: _Batch) -> set[int]:
        """Erase what earlier cycles deleted. Returns the devices that need a flush for it."""
        waiting = [erase for erase in batch.erases if not erase.erased]
        for erase in waiting:
            self.layers.leave(erase.ids)
            erase.error = None  # of another try
        try:
            self.blocks.erase(extent for erase in waiting for extent in erase.extents)
            for erase in waiting:
                erase.erased = True
        except DeviceError:
            for erase in waiting:  # each for itself: the error is that of some
                self.erase(erase)
        devices = {extent.device for erase in batch.erases for extent in erase.extents}
        return devices & set(self.blocks.writable_indices())

    def erase(self, erase: Erase) -> None:
        """Write over the blocks; a cycle makes it durable. What a device cannot do now is put off."""
        self.layers.leave(erase.ids)
        erase.devices = self.blocks.writers({extent.device for extent in erase.extents})
        try:
            self.blocks.erase(erase.extents)
            erase.erased = True
        except DeviceError as error:
            erase.error = error

    def _journal(self, batch: _Batch, failed: dict[int, RustordError]) -> tuple[set[int], dict[int, RustordError]]:
        """Append the batch to the journals. Returns the devices that need a flush for it, and those that refused it."""
        puts = [(placed.record, placed.replaced_uuid) for placed in batch.puts if not placed.failure(failed)]
        deletes = [(record, sequence) for _, record, sequence in batch.deletes]
        undone = [(undo.record, sequence) for undo, sequence in batch.undos]
        copied: dict[int, list[RecordId]] = {}
        for placed, copy in batch.moves:
            for device in placed.record.devices if not placed.failure(failed) else ():
                copied.setdefault(device, []).append(copy)
        return self.journals.append(puts, deletes, undone, copied)

    def _settle(
        self, batch: _Batch, failed: dict[int, RustordError], refused: dict[int, RustordError], committed: set[int]
    ) -> Cycle:
        """After the flush of those devices that have ``committed``: free what is erased, and answer.

        What has been erased needs no journal: a device whose journal is full has not failed.
        """
        durable = committed - failed.keys()
        perhaps = committed | (refused.keys() - set(self.blocks.writable_indices()))
        self.journals.flushed(durable)
        missing = refused | failed if refused else failed
        puts = self._settle_puts(batch, missing)
        deletes = self._settle_deletes(batch, missing, durable, perhaps)
        undone = self._settle_undos(batch)
        gone = [id for erase in batch.erases for id in self._bury(erase, failed, batch)]
        gone += [copy for placed, copy in batch.moves if not placed.failure(missing)]
        self.journals.learn(puts, deletes, undone, gone, lost=bool(missing))
        # From here on nobody finds what is to be erased, and begins to read it.
        following = [c for c in batch.following if not (isinstance(c, Erase) and self.erasures.hold(c))]
        return Cycle(batch.outcomes, following)

    def _settle_puts(self, batch: _Batch, failed: dict[int, RustordError]) -> list[tuple[Record, ObjectId]]:
        puts = []
        for placed in batch.puts:
            record, replaced = placed.record, placed.replaced
            if error := placed.failure(failed):
                batch.outcomes.append((placed.put, error))
                ids = [record.id, *(copy for move, copy in batch.moves if move is placed)]
                batch.following.append(Undo(record, placed.remains(record, replaced), ids))
                continue
            puts.append((record, placed.replaced_uuid))
            batch.outcomes.append((placed.put, record))
            self.stock.add(record)
            is_move = not isinstance(placed.put, Put)
            if record.layer and not is_move:
                self.layers.use(record.layer)
            if replaced is not None:
                self.stock.remove(replaced)
                after = record.sequence
                if isinstance(placed.put, Put):
                    placed.put.replaced, after = True, 0
                    for copy in self.relocations.take_back(replaced.uuid):
                        self.erasures.add(copy)
                    if replaced.uuid in self.layers.users:  # a Layer builds on it: it is erased with the last one
                        continue
                layer = 0 if is_move else replaced.layer  # a moved Object needs its Layer as before
                erase = Erase(placed.remains(replaced, record), (replaced.id,), after=after, layer=layer)
                batch.following.append(erase)
        return puts

    def _settle_deletes(
        self, batch: _Batch, failed: dict[int, RustordError], durable: set[int], perhaps: set[int]
    ) -> list[tuple[Record, int]]:
        """A tombstone that is ``perhaps`` in a journal counts as well, though it is answered with an error.

        Nobody can take it back there, and who has lost the index would believe it.
        """
        deletes = []
        for change, record, sequence in batch.deletes:
            cause: Delete | None = change
            if not self._has_tombstone(record, durable):
                device = min(record.devices)
                lost = failed.get(device) or DeviceError(f"device {device} did not take the tombstone")
                batch.outcomes.append((change, lost))
                if not self._has_tombstone(record, perhaps):
                    continue
                cause = None
            self.stock.remove(record)
            if record.uuid in self.layers.users:  # a Layer builds on it: it is erased with the last one
                if cause is not None:
                    batch.outcomes.append((cause, record))
            else:
                copies = self.relocations.take_back(record.uuid)
                left = copies + self.erasures.take_left_behind(record.uuid)
                extents = [*record.extents, *(extent for erase in left for extent in erase.extents)]
                ids = (record.id, *(id for erase in left for id in erase.ids))
                batch.following.append(Erase(extents, ids, cause, layer=record.layer))
            deletes.append((record, sequence))
        return deletes

    def _has_tombstone(self, record: Record, devices: set[int]) -> bool:
        """Whether the tombstone of an Object is in a journal of ``devices``."""
        if record.devices & devices:
            return True
        return bool(devices) and all(map(self.blocks.is_given_up, record.devices))

    def _settle_undos(self, batch: _Batch) -> list[tuple[Grave, int]]:
        batch.following += [Erase(undo.extents, undo.ids) for undo, _ in batch.undos]
        return [(Grave(undo.record.id, undo.extents), sequence) for undo, sequence in batch.undos]

    def _bury(self, erase: Erase, failed: dict[int, RustordError], batch: _Batch) -> list[RecordId]:
        """Give back erased blocks, if that is durable, and answer the DELETE; otherwise they are erased another time.

        Returns what is gone now.
        """
        error = erase.error or next((failed[e.device] for e in erase.extents if e.device in failed), None)
        gone: list[RecordId] = []
        if error is None:
            self.allocator.release(erase.extents)
            gone = [*(layer.id for layer in erase.layers), *erase.ids]
            self.journals.remember_erased(erase.extents, gone)
            try:
                needless = self._needed_no_more(erase)
            except RustordError as problem:  # of the index, or of a commit that does not end
                error, needless = problem, []
            # Whoever deletes a volume does not wait for readers of an Object that was deleted or replaced before.
            if following := [after for after in needless if not self.erasures.hold(after)]:
                following[-1].cause, following[-1].finished = erase.cause, erase.finished
                batch.following += following
                return gone
        elif not (erase.layer or erase.layers):  # which the next start sees to
            self.erasures.put_off(erase.extents, erase.ids)
        if erase.cause is not None:
            assert erase.cause.record is not None
            batch.outcomes.append((erase.cause, error or erase.cause.record))
        if erase.finished is not None:
            erase.finished(error)
        return gone

    def _needed_no_more(self, erase: Erase) -> list[Erase]:
        """The erasure of what only that needed which has been erased: of Layers, or of deleted Objects below them."""
        if erase.layer:
            self.layers.let_go(self.layers.numbered(erase.layer).uuid)
            return self._sweep()
        erases = []
        for base in self.layers.bases(erase.layers):
            self.layers.let_go(base)
            if base not in self.layers.users and (record := self.keystore.kept(base)):
                erases.append(Erase(record.extents, (record.id,), layer=record.layer))
        return erases

    def _sweep(self) -> list[Erase]:
        """The erasure, all in one, of the Layers that nobody needs.

        Raises what the index raises, or Unavailable, and leaves them to the next.
        """
        layers = self.layers.needless()
        if not layers:
            return []
        with self.keystore.one_commit():
            for layer in layers:
                self.keystore.retire(layer.id, self.journals.sequence)
            self.layers.forget(layers)
        extents = [extent for layer in layers for extent in layer.extents(self.layers.chunk_blocks)]
        return [Erase(extents, layers=layers)]

    # Between cycles

    def sweep(self, finished: Callable[[RustordError | None], None] | None = None) -> None:
        """Erase the Layers that nobody needs, in later cycles; ``finished`` is told then. Called between cycles.

        Raises what the index raises, or Unavailable, and leaves them to the next who calls it.
        """
        erases = self._sweep()
        for erase in erases:
            erase.finished = finished
            self.erasures.add(erase)
        if finished is not None and not erases:
            finished(None)

    def sweep_base(self, record: Record) -> None:
        """Erase a deleted Object on which nothing builds any more, in later cycles. Called between cycles."""
        self.erasures.add(Erase(record.extents, (record.id,), layer=record.layer))

    def erase_again(self) -> None:
        """Erase in later cycles what could not be, once a device is back or is given up. Called between cycles."""
        self.erasures.try_again(self.blocks.can_erase)

    def condemn(self, extents: Sequence[Extent]) -> None:
        """Never use these blocks again, in this life or another; what is on them stays there. Called between cycles.

        Raises ReadOnly, or DeviceError if a device cannot note it durably.
        """
        self.check_changeable()
        self.allocator.condemn(extents)
        self.blocks.condemn(extents)

    def close(self) -> None:
        """Put everything in order and let go of the devices."""
        self._on_close(self)
