"""Survey: what a pool holds, told from its devices alone: their labels, journals and footers, without the index.

It changes nothing, and comes to what an index would say that had never been lost. Each Record that left a trace is, in
this order:

- *gone* if any journal says so: its Object was deleted or replaced, or it was undone, or its blocks have been erased;
- *committed* if its PUT is in a journal and was flushed, or is whole on the devices (as at each opening of a pool);
- *void* if it bears a sequence that was never committed: that of a void in the label, or one that the journals of all
  of its devices reach back to and do not have;
- *committed* otherwise: its PUT has been overwritten in the journal, which happens to what is in the index only.

Of the committed Records of one Object the newest counts: it has been moved. Where two Objects have one name or one
block, the newer one counts: the older one was deleted before.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise

from rustord.blockstore import BlockStore, Slot, read_label
from rustord.errors import DeviceError, FormatError
from rustord.extent import Extent, without
from rustord.footer import MAGIC, Piece, decode_piece
from rustord.journal import NOTHING, Batch, Kind, decode_grave, decode_record_ids
from rustord.keystore.ring import POSITION, Ring, lost_batches, newest_run
from rustord.label import Label, State
from rustord.notes import Notes
from rustord.objkey import ObjectId, uuid_text
from rustord.page import MAGIC as PAGE_MAGIC
from rustord.page import (
    Page,
    decode_head,
    decode_slot,
    slots_at,
)
from rustord.record import Grave, Record, RecordId
from rustord.replay import VOID_LENGTH, copy_is_whole, has_footer, was_flushed

log = logging.getLogger(__name__)

SCAN_BYTES = 4 << 20
"""How much of a device is read at once."""

_ZEROS = bytes(SCAN_BYTES)
_UUID = slice(8, 24)
_SEQUENCE = slice(24, 32)
"""Where these stand in a record: most of them need not be decoded any further."""

Progress = Callable[[int], object]
"""Is told of each further number of bytes that has been read; from several threads."""


@dataclass
class Survey:
    """What was found. Everything in it is as it would be in the index.

    Everything up to ``sequence`` is in it; from ``positions`` on (by device uuid, as in the index) the journals have
    changes whose copies an opening has yet to compare.
    """

    label: Label
    live: dict[ObjectId, bytes] = field(default_factory=dict)
    """The Records of the Objects."""
    gone: dict[RecordId, bytes] = field(default_factory=dict)
    """Records that do not count any more, whose blocks are not known to be erased."""
    void: dict[RecordId, bytes] = field(default_factory=dict)
    """Records that were never committed, and left their footers behind."""
    sequence: int = 0
    pages: dict[tuple[bytes, int], Page] = field(default_factory=dict)
    """The pages of all Layers, by Layer and number."""
    left: dict[RecordId, set[Extent]] = field(default_factory=dict)
    """Slots with pages of Layers that are gone, or that have other slots now."""
    noted: list[Grave] = field(default_factory=list)
    """Graves that the journals tell of: copies that were cut short, and what Layers have left."""
    positions: dict[bytes, bytes] = field(default_factory=dict)
    footers: dict[int, array[int]] = field(default_factory=dict)
    """The blocks of each device that end with the last piece of a good footer, ascending."""
    written: list[Extent] = field(default_factory=list)
    """Where anything is that is not zero, in pieces of up to `SCAN_BYTES`."""
    damaged: list[Extent] = field(default_factory=list)
    """Blocks with a footer that does not match its signature, or whose other pieces are not there: damage, or what a
    write leaves that was cut short."""
    unreadable: list[Extent] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    """Where Objects contradicted one another, and how that was decided."""
    torn: list[str] = field(default_factory=list)
    """What a crash left unfinished at the end of a journal; if it is damage, something that counted."""
    holes: list[str] = field(default_factory=list)
    """Batches that are missing in the midst of a journal."""

    def bases(self) -> dict[ObjectId, bytes]:
        """The Records of deleted Objects on which Layers build."""
        wanted = {decode_head(page.content).base for (_, number), page in self.pages.items() if number == 0}
        found: dict[ObjectId, bytes] = {}
        for id, raw in sorted(self.gone.items(), key=lambda item: item[0].sequence):
            if id.uuid in wanted and id.uuid not in self.live:
                found[id.uuid] = raw
        return found

    def graves(self) -> Iterator[Grave]:
        """What has yet to be erased: blocks that none but a Record that is gone has."""
        yield from (Grave(id, sorted(slots)) for id, slots in self.left.items())
        yield from self.noted
        kept = self.bases()
        for id, raw in self.gone.items():
            live = self.live.get(id.uuid) or kept.get(id.uuid)
            if live == raw:
                continue
            extents = Record(raw).extents
            yield Grave(id, without(extents, Record(live).extents) if live else extents)

    def unknown(self, blocks: Iterable[Extent]) -> list[Extent]:
        """Those of ``blocks`` that belong to no Object that is known, live or deleted, nor were to be one's."""
        left = set(blocks)
        if left:
            records = (Record(raw).extents for raw in chain(self.live.values(), self.gone.values()))
            for extents in chain(records, (grave.extents for grave in self.noted)):
                for extent in extents:
                    left -= {one for one in left if _has(extent, one)}
        return sorted(left)


def take_survey(
    label: Label, blocks: BlockStore, progress: Progress = lambda size: None, known: Collection[int] = ()
) -> Survey:
    """Look at all devices that are there, from end to end. ``label`` is the pool's newest. Raises FormatError.

    ``known`` are the sequences of Records that an index has as live: they were committed, whatever is damaged since.
    """
    survey = Survey(label)
    journals = _Journals(label, blocks)
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="scan") as pool:
        scans = [_Scan(slot, label, blocks) for slot in blocks.slots.values() if slot.device is not None]
        for _ in pool.map(lambda scan: scan.run(progress), scans):
            pass
    verdict = _Verdict(survey, journals, blocks, known)
    verdict.judge(scans)
    found = [page for scan in scans for page in scan.pages]
    survey.pages = journals.layers(found)
    for page in found:
        current = survey.pages.get((page.layer, page.number))
        if current is None or current.address != page.address:
            survey.left.setdefault(RecordId(page.layer, page.sequence), set()).update(slots_at(page.address))
    survey.noted = journals.graves_left()
    survey.sequence = journals.settled(survey.live.values(), survey.pages.values())
    survey.positions = journals.positions()
    survey.torn, survey.holes = [*journals.torn, *verdict.torn], journals.holes
    for scan in scans:
        survey.footers[scan.index] = scan.footers
        survey.written += scan.written
        survey.damaged += scan.damaged
        survey.unreadable += scan.unreadable
    return survey


class _Journals:
    """What the journals say. All whole batches count, also those that were let go and not overwritten yet."""

    def __init__(self, label: Label, blocks: BlockStore) -> None:
        self.puts: dict[int, tuple[ObjectId, bytes]] = {}
        """By sequence: what each PUT replaces, and its record."""
        self.ended: dict[ObjectId, int] = {}
        """The newest change that says that an Object was there before: it was deleted, replaced, or moved."""
        self.deleted: set[ObjectId] = set()
        self.undone: set[RecordId] = set()
        self.erased: set[RecordId] = set()
        self.unerased: set[RecordId] = set()
        self.graves: dict[RecordId, Grave] = {}
        self.reach: dict[int, tuple[int, int]] = {}
        """The sequences that the journal of a device has, all of them, of changes that concern it; half-open."""
        self.torn: list[str] = []
        self.holes: list[str] = []
        self._label = label
        self._block_size = label.block_size
        self._notes = Notes()
        self._newest = 0
        self._durable: set[int] = set()
        self._runs: dict[bytes, list[tuple[int, Batch]]] = {}
        self._sequences: dict[tuple[bytes, int], list[int]] = {}  # of the changes in each batch
        self._there = {slot.index for slot in blocks.slots.values() if slot.device is not None}
        for slot in blocks.slots.values():
            if slot.device is not None:
                self._read(slot, Ring(slot.device, slot.uuid, slot.geometry, label.secret))
        self._closed_from, self._decided_before = self._openings(blocks)
        self._flushed = sorted(self._durable)

    def _openings(self, blocks: BlockStore) -> tuple[int, int]:
        """The sequence from which on all PUTs are known to be durable, if all devices took part in an orderly close.

        And the one up to which an opening with all devices has gone through them, after a crash, and has finished.
        """
        own = [read_label(slot.device) if slot.device else None for slot in blocks.slots.values()]
        together = all(label and label.generation == self._label.generation for label in own)
        closed = together and self._label.state is not State.OPEN
        end = self._label.voids[-1][1] if self._label.voids else 0
        has_finished = closed or (together and max(self._durable, default=0) >= end - 1)
        return end if closed else 1 << 64, end if has_finished else 0

    def _read(self, slot: Slot, ring: Ring) -> None:
        batches = []
        for block, batch in ring.batches():
            self._absorb(batch)
            self._notes.add(slot.index, batch)
            batches.append((block, batch._replace(entries=())))
            self._sequences[slot.uuid, batch.number] = [entry.sequence for entry in batch.entries if entry.sequence]
        run = newest_run(batches)
        self._runs[slot.uuid] = run
        self._look_for_damage(slot, ring, batches)
        sequences = [sequence for _, batch in run for sequence in self._sequences[slot.uuid, batch.number]]
        if sequences:
            first = 0 if run[0][1].number == 1 else min(sequences)
            self.reach[slot.index] = (first, max(sequences) + 1)

    def _look_for_damage(self, slot: Slot, ring: Ring, batches: Sequence[tuple[int, Batch]]) -> None:
        for number in lost_batches(batches, self._block_size, slot.geometry.journal_length // self._block_size):
            self.holes.append(
                f"batch {number} in the journal of device {slot.index} is damaged: what was deleted by it may be back, "
                "and what was written to volumes may be as it was before"
            )
        if batches:
            block, last = max(batches, key=lambda item: item[1].number)
            end = block + -(-last.length // self._block_size)
            if ring.is_torn(last.number + 1, end):
                self.torn.append(
                    f"batch {last.number + 1}, the last in the journal of device {slot.index}, is not whole: it was "
                    "never acknowledged if the power failed then; or it is damaged, and what was done last is lost"
                )

    def _absorb(self, batch: Batch) -> None:
        self._durable.add(batch.durable)
        for kind, sequence, payload in batch.entries:
            self._newest = max(self._newest, sequence)
            if kind is Kind.PUT or kind is Kind.DELETE:
                self.ended[payload[:16]] = max(sequence, self.ended.get(payload[:16], 0))
            if kind is Kind.PUT:
                self.puts[sequence] = payload[:16], payload[16:]
            elif kind is Kind.DELETE:
                self.deleted.add(payload)
            elif kind is Kind.GRAVE:
                grave = decode_grave(payload)
                self.graves[grave.id] = grave
                self._newest = max(self._newest, grave.id.sequence)
            elif kind not in (Kind.LAYER, Kind.MAP):
                ids = {Kind.UNDO: self.undone, Kind.ERASED: self.erased, Kind.UNERASED: self.unerased}[kind]
                ids.update(decode_record_ids(payload))

    def layers(self, found: Iterable[Page]) -> dict[tuple[bytes, int], Page]:
        """The pages of the Layers that are left: those in the slots, with what the journals have changed since."""
        pages: dict[tuple[bytes, int], Page] = {}
        for page in sorted(found, key=lambda page: page.generation):
            pages[page.layer, page.number] = page
        homes = {page.layer: page.device for page in pages.values() if not page.number}
        uncounted = self._notes.uncounted(homes.get, self._there, self._label, reaches=self._reaches)
        for sequence, note in sorted(self._notes.changes.items()):
            for change in note.changes() if sequence not in uncounted else ():
                key = change.layer, change.number
                changed = change.apply(pages.get(key), sequence)
                if changed is not None:
                    pages[key] = changed
        self.graves |= {grave.id: grave for grave in self._notes.graves(uncounted, self._block_size)}
        gone = {id.uuid for id in self.erased | self.unerased if not id.sequence}
        return {
            key: page for key, page in pages.items() if page.address and (key[0], 0) in pages and key[0] not in gone
        }

    def _reaches(self, device: int, sequence: int) -> bool:
        """Whether the journal of a device has all changes that concern it from a sequence on."""
        reach = self.reach.get(device)
        return reach is not None and reach[0] <= sequence

    def graves_left(self) -> list[Grave]:
        """Those of the GRAVEs that nothing says are over. An opening drops those whose blocks are somebody's by now.

        None if a device is missing: their blocks may be those of an Object that only the missing device knows. What
        they have on one that was removed is forgotten with it.
        """
        if len(self._runs) < len(self._label.members):
            return []
        there = {member.device_index for member in self._label.members}
        left = [grave for id, grave in self.graves.items() if id not in self.erased]
        known = [Grave(id, [extent for extent in extents if extent.device in there]) for id, extents in left]
        return [grave for grave in known if grave.extents]

    def was_flushed(self, sequence: int) -> bool:
        """Whether a PUT is known to have been durable: by a later batch, or because the pool was closed in order."""
        return sequence >= self._closed_from or was_flushed(sequence, self._flushed, self._label)

    def was_decided(self, sequence: int) -> bool:
        """Whether an opening has decided of a PUT, and has not put it into a void."""
        return sequence < self._decided_before and not self._label.is_void(sequence)

    def settled(self, live: Iterable[bytes], pages: Iterable[Page]) -> int:
        """The sequence up to which everything is known.

        After a crash that is no later than the last cycle but one: the next opening then looks at what came after it,
        and notes as void what it does not find.
        """
        if self._label.state is State.OPEN and len(self._runs) == len(self._label.members):
            older = (sequence for sequence in map(_sequence, live) if sequence not in self.puts)
            return max([*self._flushed, *older], default=0)
        return max([self._newest, *map(_sequence, live), *(page.sequence for page in pages)])

    def positions(self) -> dict[bytes, bytes]:
        """Where in each journal the changes begin that an opening should go through once more; its end if none should.

        They begin with the first PUT that nothing says was flushed, the same in all journals: a part of what happened
        to a name would leave that name wrong.
        """
        unsure = [sequence for sequence in self.puts if not self.was_flushed(sequence)]
        start = min(unsure, default=self._newest + 1)
        found = {}
        for uuid, run in self._runs.items():
            number, block = 1, 0
            for at, batch in run:
                number, block = batch.number, at
                if max(self._sequences[uuid, number], default=0) >= start:
                    break
                number, block = number + 1, at + -(-batch.length // self._block_size)
            found[uuid] = POSITION.pack(number, block)
        return found


class _Scan:
    """Reads one device from end to end, and finds the footers that end in its blocks."""

    def __init__(self, slot: Slot, label: Label, blocks: BlockStore) -> None:
        self.index = slot.index
        self.records: list[bytes] = []
        self.pages: list[Page] = []
        self.footers: array[int] = array("Q")
        self.written: list[Extent] = []
        self.damaged: list[Extent] = []
        self.unreadable: list[Extent] = []
        self._slot = slot
        self._blocks = blocks
        self._secret = label.secret
        self._block_size = label.block_size

    def run(self, progress: Progress) -> None:
        step = SCAN_BYTES // self._block_size
        memory = bytearray(SCAN_BYTES)
        buffer = memoryview(memory)
        for first, count in self._slot.geometry.data_runs:
            for block in range(first, first + count, step):
                piece = min(step, first + count - block)
                data = buffer[: piece * self._block_size]
                self._read(block, piece, data)
                if memory.startswith(_ZEROS[: len(data)]):
                    progress(len(data))
                    continue
                self.written.append(Extent(self.index, block, piece))
                for at in trailers(data, self._block_size, MAGIC):
                    self._look(block + at, data[at * self._block_size : (at + 1) * self._block_size])
                for at in trailers(data, self._block_size, PAGE_MAGIC):
                    self._look_for_page(block + at, data[at * self._block_size : (at + 1) * self._block_size])
                progress(len(data))

    def _read(self, block: int, count: int, data: memoryview) -> None:
        """Fill ``data``; blocks that cannot be read are noted, and are zeros."""
        device = self._blocks.device(self.index)
        size = self._block_size
        try:
            device.read(block * size, (data,))
            return
        except DeviceError:
            pass  # each for itself: the others can be read
        for at in range(count):
            piece = data[at * size : (at + 1) * size]
            try:
                device.read((block + at) * size, (piece,))
            except DeviceError:
                piece[:] = bytes(size)
                self.unreadable.append(Extent(self.index, block + at, 1))

    def _look(self, block: int, data: memoryview) -> None:
        """Note the record whose footer ends in ``block``, if one does."""
        if any(run.dead for run in self._slot.bad.within(block, 1)):
            return
        try:
            piece = decode_piece(data, self._slot.uuid, block, self._secret)
            if piece is None or piece.number + 1 != piece.piece_count:
                return
            raw = self._joined(piece)
            copies = Record(raw).copies
            if all((copy[-1].device, copy[-1].end - 1) != (self.index, block) for copy in copies if copy):
                raise FormatError(f"the footer in block {block} says that it is elsewhere")
        except (FormatError, DeviceError) as error:
            log.info("device %d: %s", self.index, error)
            self.damaged.append(Extent(self.index, block, 1))
            return
        self.records.append(raw)
        self.footers.append(block)

    def _look_for_page(self, block: int, data: memoryview) -> None:
        """Note the page in ``block``, if there is one. One that is torn is no loss: its other slot has the rest."""
        try:
            page = decode_slot(data, self._slot.uuid, block, self._secret)
        except FormatError as error:
            log.info("device %d: %s", self.index, error)
            return
        if page is not None:
            self.pages.append(page)

    def _joined(self, last: Piece) -> bytes:
        """The record that ends with the piece ``last``."""
        pieces = [last]
        while (piece := pieces[-1]).number:
            index, block = piece.previous
            uuid = self._blocks.device_uuids.get(index, b"")
            data = memoryview(bytearray(self._block_size))
            self._blocks.device(index).read(block * self._block_size, (data,))
            before = decode_piece(data, uuid, block, self._secret)
            if before is None or (before.number, before.piece_count) != (piece.number - 1, piece.piece_count):
                raise FormatError(f"the footer's piece {piece.number - 1} is not in block {block} of device {index}")
            pieces.append(before)
        return b"".join([piece.data for piece in reversed(pieces)])


def trailers(data: memoryview, block_size: int, magic: bytes) -> Iterator[int]:
    """The numbers of the blocks of ``data`` that end with a trailer's ``magic``. No loop over all blocks."""
    words = block_size // len(magic)
    ends = bytes(data.cast("Q")[words - 1 :: words])
    at = ends.find(magic)
    while at >= 0:
        if at % len(magic) == 0:
            yield at // len(magic)
        at = ends.find(magic, at + 1)


class _Verdict:
    """Decides what became of each Object that left a trace."""

    def __init__(self, survey: Survey, journals: _Journals, blocks: BlockStore, known: Collection[int]) -> None:
        self._survey = survey
        self._known = known
        self._journals = journals
        self._blocks = blocks
        self._label = survey.label
        self.torn: list[str] = []
        self._missing = {index for index, slot in blocks.slots.items() if slot.device is None}

    def judge(self, scans: Sequence[_Scan]) -> None:
        ended = self._judge_journals(scans)
        for scan in scans:
            for raw in scan.records:
                self._judge_footer(Record(raw), ended)
            scan.records = []
        self._settle_names()
        self._settle_blocks()

    def _judge_journals(self, scans: Sequence[_Scan]) -> set[ObjectId]:
        """The PUTs in the journals, as an opening of the pool would. Returns the Objects that are gone."""
        journals = self._journals
        moved = {raw[_UUID] for replaced, raw in journals.puts.values() if replaced == raw[_UUID]}
        footers = [raw for scan in scans for raw in scan.records if raw[_UUID] in moved] if moved else []
        ended = set(journals.deleted)
        committed = []
        for sequence, (replaced, raw) in sorted(journals.puts.items()):
            record = Record(raw)
            if not self._is_on(record):
                continue  # the device was empty when it was removed
            stays = replaced == record.uuid and any(
                raw[_UUID] == record.uuid and _sequence(raw) < sequence for raw in footers
            )
            if record.id not in journals.undone and (
                sequence in self._known
                or journals.was_flushed(sequence)
                or journals.ended.get(record.uuid, 0) > sequence
                or self._was_kept(record)
                or self._may_be_whole(record, unless=stays)
            ):
                committed.append(record)
                if replaced not in (NOTHING, record.uuid):
                    ended.add(replaced)
            else:
                self._bury(record)
        for record in committed:
            self._commit(record, ended)
        return ended

    def _commit(self, record: Record, ended: set[ObjectId]) -> None:
        """A Record that was committed counts, unless something says that it is gone."""
        live = self._survey.live.get(record.uuid)
        if record.uuid in ended or record.id in self._journals.unerased or record.id in self._journals.erased:
            self._bury(record)
        elif live is None or Record(live).sequence < record.sequence:
            self._survey.live[record.uuid] = record.raw
            if live is not None:
                self._bury(Record(live))
        elif live != record.raw:
            self._bury(record)

    def _bury(self, record: Record, *, has_footer: bool = False) -> None:
        """A Record is gone. Its blocks are to be erased, unless they have been: the footer would not be there then.

        A Record that is known from its journal alone is left alone if a device is missing: its blocks may be those of
        an Object by now that only the missing device knows.
        """
        if has_footer or (record.id not in self._journals.erased and not self._missing):
            self._survey.gone[record.id] = record.raw

    def _is_on(self, record: Record) -> bool:
        """Whether the Object is on devices of the pool; not if one has been removed since."""
        return record.devices <= self._blocks.slots.keys()

    def _may_be_whole(self, record: Record, *, unless: bool = False) -> bool:
        """Whether a copy of an Object is whole; if that cannot be asked, yes ``unless`` told otherwise."""
        try:
            if any(copy_is_whole(record, number, self._blocks, self._label) for number in range(len(record.copies))):
                return True
        except DeviceError as error:
            log.info("Object %s cannot be verified: %s", uuid_text(record.uuid), error)
            return not unless
        return False

    def _was_kept(self, record: Record) -> bool:
        """Whether an opening has let a Record count, be it damaged since: the others it erases, with their footers."""
        return self._journals.was_decided(record.sequence) and has_footer(record, self._blocks, self._label)

    def _judge_footer(self, record: Record, ended: set[ObjectId]) -> None:
        survey, journals = self._survey, self._journals
        if record.uuid in ended or record.id in journals.unerased or record.id in journals.undone:
            self._bury(record, has_footer=True)
        elif record.sequence in journals.puts:
            if survey.live.get(record.uuid) != record.raw:
                self._bury(record, has_footer=True)
        elif self._is_void(record) or (self._is_unsure(record) and not self._may_be_whole(record)):
            survey.void[record.id] = record.raw
            self._note_if_torn(record)
        else:
            self._commit(record, ended)

    def _note_if_torn(self, record: Record) -> None:
        """A void that is whole, and behind the end of its journals, never counted if only the power failed."""
        reaches = [self._journals.reach.get(device) for device in record.devices]
        is_last = self._label.state is State.OPEN and all(reach and reach[1] <= record.sequence for reach in reaches)
        if is_last and self._is_on(record) and self._may_be_whole(record):
            name = f" ({record.name!r})" if record.name else ""
            self.torn.append(
                f"Object {uuid_text(record.uuid)}{name} is whole, and in no journal: it is left out, as what was never "
                "acknowledged when the power failed; or the end of a journal is damaged, and it is lost"
            )

    def _is_void(self, record: Record) -> bool:
        """Whether the Record was certainly never committed, or was on a device that has been removed."""
        if not self._is_on(record):
            return True
        sequence = record.sequence
        if self._label.is_void(sequence):
            return True
        reaches = [self._journals.reach.get(device) for device in record.devices]
        if not all(reach is not None and reach[0] <= sequence for reach in reaches):
            return False
        # Behind the end of a journal there was one more cycle, when the power failed.
        return self._label.state is State.OPEN or any(reach is not None and sequence < reach[1] for reach in reaches)

    def _is_unsure(self, record: Record) -> bool:
        """Whether no journal that is there can tell if the Object was committed, so that its data has to."""
        reaches = [self._journals.reach.get(device) for device in record.devices]
        return all(reach is None or reach[0] <= record.sequence for reach in reaches)

    def _settle_names(self) -> None:
        """Where two Objects have one name, the newer one has replaced the older one, if it is whole."""
        live = self._survey.live
        owners: dict[str, Record] = {}
        for record in sorted(filter(_is_named, map(Record, live.values())), key=lambda record: record.sequence):
            older = owners.setdefault(record.name, record)
            if older is not record:
                loser, winner = (older, record) if self._may_be_whole(record) else (record, older)
                owners[record.name] = winner
                self._lose(loser, winner, f"the name {record.name!r}")
                self._survey.gone[loser.id] = loser.raw

    def _settle_blocks(self) -> None:
        """Where two Objects have one block, the newer one counts, if it is whole: no block is given out twice."""
        for record, other in self._contested():
            if record.uuid in self._survey.live and other.uuid in self._survey.live:
                older, newer = sorted((record, other), key=lambda record: record.sequence)
                loser, winner = (older, newer) if self._may_be_whole(newer) else (newer, older)
                self._lose(loser, winner, "a block")

    def _lose(self, loser: Record, winner: Record, what: str) -> None:
        del self._survey.live[loser.uuid]
        self._survey.doubtful.append(
            f"Objects {uuid_text(winner.uuid)} and {uuid_text(loser.uuid)} both have {what}: the latter is gone"
        )

    def _contested(self) -> list[tuple[Record, Record]]:
        """The pairs of live Objects that have a block in common."""
        runs: dict[int, list[int]] = {index: [] for index in self._blocks.slots}
        for raw in self._survey.live.values():
            for device, block, count in Record(raw).extents:
                runs[device].append(block << 32 | count)
        contested = set()
        for index, values in runs.items():
            values.sort()
            for one, other in pairwise(values):
                if (one >> 32) + (one & 0xFFFFFFFF) > other >> 32:
                    contested.add(Extent(index, other >> 32, 1))
        if not contested:
            return []
        return self._owners(contested)

    def _owners(self, contested: set[Extent]) -> list[tuple[Record, Record]]:
        owners: dict[Extent, list[Record]] = {}
        for raw in self._survey.live.values():
            record = Record(raw)
            for point in contested:
                if any(_has(extent, point) for extent in record.extents):
                    owners.setdefault(point, []).append(record)
        return [(one, other) for found in owners.values() for other in found for one in found if one is not other]


def _sequence(raw: bytes) -> int:
    return int.from_bytes(raw[_SEQUENCE], "little")


def _has(extent: Extent, point: Extent) -> bool:
    """Whether the first block of ``point`` is in ``extent``."""
    return extent.device == point.device and extent.block <= point.block < extent.end


def _is_named(record: Record) -> bool:
    return bool(record.name)


def skip_behind(survey: Survey) -> int:
    """Sequences to leave out because of devices that are missing: they may hold changes that nobody knows of."""
    members = {member.device_uuid for member in survey.label.members}
    return VOID_LENGTH if members - survey.positions.keys() else 0
