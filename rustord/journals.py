"""Journals: what a pool says in the journals of its devices, in the order of sequences, and up to where it is durable.

A cycle says which Objects it has put, moved and deleted, and flushes that itself. All else is said between cycles, and
is durable when a method here returns: changes of Layers, and which blocks are about to be filled with a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rustord.blockstore import BlockStore
from rustord.change import Erase
from rustord.erasures import Erasures
from rustord.errors import DeviceError, RustordError
from rustord.extent import Extent, extend
from rustord.journal import Entry, Kind, grave_entry
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjectId
from rustord.page import LayerEntry, MapEntry
from rustord.record import Grave, Record, RecordId


class Journals:
    """For the thread that changes the pool. ``sequence`` is that of the newest change."""

    def __init__(
        self,
        keystore: KeyStore,
        blocks: BlockStore,
        erasures: Erasures,
        sequence: int,
        check_changeable: Callable[[], None],
    ) -> None:
        """``check_changeable`` raises ReadOnly if the pool takes no changes."""
        self.sequence = self._durable = sequence
        self.check_changeable = check_changeable
        self._keystore = keystore
        self._blocks = blocks
        self._erasures = erasures
        self._all_flushed = True
        self._erased: dict[int, list[RecordId]] = {}  # erased on that device, and its journal does not say so yet

    # Between cycles

    def announce(self, copies: Sequence[tuple[bytes, Sequence[Extent]]]) -> list[RecordId]:
        """Say, durably, which blocks are about to be filled with what an Object or Layer has.

        From then on they are graves, which an opening erases: after a crash nobody else would know what is on them. In
        this life they end when they become the Object's own, in one batch of the journal with the change that says so
        (`note`, `Move`), or by an `Erase` with the id that is returned for each.

        Raises ReadOnly or DeviceError; nothing may be written to the blocks then. The journals may name them all the
        same, which does no harm: an opening erases no block that somebody has by then.
        """
        self.check_changeable()
        if not copies:
            return []
        graves = self._graves(copies)
        devices = {device for grave in graves for device in grave.devices}
        for device in devices:
            self._blocks.writable(device)
        entries = list(map(grave_entry, graves))
        _, failed = self._note(entries, devices, ())
        for error in failed.values():
            raise error
        self._learn(entries, ())
        return [grave.id for grave in graves]

    @contextmanager
    def note(
        self,
        notes: Sequence[LayerEntry | MapEntry],
        copied: Sequence[RecordId] = (),
        left: Sequence[Extent] = (),
    ) -> Iterator[list[RecordId]]:
        """Make changes of Layers durable and known; within, have the Layers in memory be so, too.

        A MAP is in the journals of the Layer's home and of all devices that it speaks of then, so that a
        replay can tell one that was cut short. A LAYER goes to all journals: who has a MAP has to know whose it is.
        With it, the blocks of the graves ``copied`` become the Layer's, and those that are ``left`` a grave, to be
        erased, whose id is yielded.

        Raises ReadOnly, DeviceError or Unavailable before anything has changed. If a device fails in the midst of it,
        some journal may have the change, and nobody can take it back there: so it has happened, for the index and for
        what is done within, and the error is raised in the end. What it leaves, the next opening erases: as long as the
        Layer's pages are not in their slots, the devices may tell of it as it was before.
        """
        self.check_changeable()
        writable = self._blocks.writable_indices()
        if not writable:
            raise DeviceError("no device of the pool takes writes", hint="'rustorctl device list' shows why")
        entries = []
        devices = {extent.device for extent in left}
        for note in notes:
            if isinstance(note, LayerEntry):
                devices.update(writable)
            else:
                concerned = {self._keystore.home_of(note.layer), *(extent.device for extent in note.extents(1))}
                devices |= {index for index in concerned if index is not None and self._blocks.writable(index)}
            self.sequence += 1
            kind = Kind.LAYER if isinstance(note, LayerEntry) else Kind.MAP
            entries.append(Entry(kind, self.sequence, note.encode()))
        runs: list[Extent] = []
        extend(runs, sorted(left))  # a trim may leave many chunks, most of them in a row
        graves = self._graves([(notes[0].layer, runs)] if left else [])
        entries += map(grave_entry, graves)
        written, failed = self._note(entries, devices, copied)
        if failed and not written and not any(isinstance(error, DeviceError) for error in failed.values()):
            raise next(iter(failed.values()))  # no journal had room for it, so that none can have it
        slots = self._learn(entries, copied)
        if failed:
            with suppress(RustordError):  # then the next commit has it
                self._keystore.checkpoint()
        else:
            for grave in slots:  # the new ones are not written yet
                self._erasures.add(Erase(grave.extents, (grave.id,), after=grave.id.sequence))
        yield [grave.id for grave in graves]
        for error in failed.values():
            raise error

    def _graves(self, places: Iterable[tuple[bytes, Sequence[Extent]]]) -> list[Grave]:
        """Graves of blocks that an Object or Layer is going to have, or has left, with new ids."""
        graves = []
        for uuid, extents in places:
            self.sequence += 1
            graves.append(Grave(RecordId(uuid, self.sequence), extents))
        return graves

    def _note(
        self, entries: Sequence[Entry], devices: Iterable[int], copied: Sequence[RecordId]
    ) -> tuple[set[int], dict[int, RustordError]]:
        """Returns the devices whose journals were written, and those that failed, in that or in the flush."""
        writable = self._blocks.writable_indices()
        ended = {device: [*self._erased.get(device, ()), *copied] for device in set(devices) & set(writable)}
        written, failed = self._keystore.journal_notes(
            entries, ended.keys(), ended, self._durable, self.sequence, writable
        )
        failed |= self._blocks.flush(written)
        self.flushed(written - failed.keys())
        if failed:
            self._all_flushed = False
        return written, failed

    def _learn(self, entries: Sequence[Entry], copied: Sequence[RecordId]) -> list[Grave]:
        """Have the KeyStore learn what was noted. Returns the slots that pages have left."""
        left = self._keystore.learn_notes(entries, copied, self.sequence)
        if self._all_flushed:
            self._durable = self.sequence
        return left

    # In a cycle

    def append(
        self,
        puts: Iterable[tuple[Record, ObjectId]],
        deletes: Iterable[tuple[Record, int]],
        undone: Iterable[tuple[Record, int]],
        copied: Mapping[int, Sequence[RecordId]],
    ) -> tuple[set[int], dict[int, RustordError]]:
        """Append what a cycle changes, and say as ERASED what has been erased, and the GRAVEs of moves on each device.

        Those, ``copied``, are in one batch with their PUTs. So wherever a journal has the one, it has the other: the
        blocks are the Object's, or the PUT's grave. See `KeyStore.journal` for the rest; the caller flushes.
        """
        erased = self._erased
        if copied:
            erased = {device: [*ids] for device, ids in erased.items()}
            for device, ids in copied.items():
                erased.setdefault(device, []).extend(ids)
        return self._keystore.journal(puts, deletes, undone, erased, self._durable, self._blocks.writable_indices())

    def flushed(self, devices: Iterable[int]) -> None:
        """What was last appended to the journals of ``devices`` is durable: so they say what has been erased."""
        for device in devices:
            self._erased.pop(device, None)

    def remember_erased(self, extents: Iterable[Extent], gone: Iterable[RecordId]) -> None:
        """Have the next batch of each journal say that the blocks of ``gone`` have been erased."""
        for device in {extent.device for extent in extents}:
            self._erased.setdefault(device, []).extend(gone)

    def learn(
        self,
        puts: Sequence[tuple[Record, ObjectId]],
        deletes: Sequence[tuple[Record, int]],
        undone: Sequence[tuple[Grave, int]],
        gone: Sequence[RecordId],
        *,
        lost: bool,
    ) -> None:
        """Have the KeyStore learn what came of a cycle; ``lost`` if a device has not got all of it. See its `learn`."""
        self._keystore.learn(puts, deletes, undone, gone, self.sequence)
        if lost:
            self._all_flushed = False  # what a device lost may be in its journal all the same: a replay has to look
        elif self._all_flushed:
            self._durable = self.sequence
