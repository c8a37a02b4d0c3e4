"""KeyStore: stores and retrieves Records by uuid, and names; a journal on the devices and an index database.

A change is in the journal first, made durable there by the cycle's flush, then in memory (`learn`), and now and then,
in the background, in the index (`checkpoint`), one atomic batch at a time with the place in the journal up to which the
index knows everything. What is not in the index yet is served from memory. So a slow index slows no PUT, and after a
crash only the journal's tail is replayed.

The index is an ordered store of byte keys (`rustord.keystore.backend`, `rustord.keystore.keys`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import merge
from itertools import islice
from pathlib import Path
from time import monotonic

from rustord.errors import FormatError, NotFound, PoolError, RustordError, Unavailable
from rustord.extent import Extent, without
from rustord.journal import (
    NOTHING,
    Batch,
    Entry,
    Kind,
    decode_grave,
    decode_record_ids,
    delete_entry,
    encode_entry,
    erased_entry,
    grave_entry,
    put_entry,
    undo_entry,
    unerased_entry,
)
from rustord.keystore.backend import Backend
from rustord.keystore.keys import (
    BASE,
    GRAVE,
    NAME,
    NAME_KEY_BYTES,
    OBJECT,
    PAGE,
    POSITION,
    UNKEPT,
    decode_grave_entry,
    decode_name,
    name_key,
    page_key,
    successor,
)
from rustord.keystore.overlay import Overlay
from rustord.keystore.ring import Ring, RingFull
from rustord.keystore.state import REBUILDING_KEY, IndexState, commit, state_of, verify
from rustord.objkey import ObjectId, uuid_text
from rustord.page import (
    LayerEntry,
    Page,
    PageChange,
    decode_head,
    decode_note,
    decode_page,
    slots_at,
)
from rustord.record import RECORD_ID, Grave, Record, RecordId, encode_extents
from rustord.whereabouts import whereabouts

log = logging.getLogger(__name__)

COMMIT_S_MAX = 30.0
"""How long the index may take for a commit until nobody waits for it any more, and changes are refused."""
_TROUBLE_HINT = "see rustord's log, and the database of the index; what has been acknowledged is in the journal"
_OVERLAY_MAX = 50_000
"""Changes that wait in memory before a cycle waits for the index: about 20 MiB."""


class KeyStore:
    """Reads may come from any thread; all changes from one at a time, and `checkpoint` from another beside it."""

    def __init__(
        self,
        backend: Backend,
        pool_uuid: bytes,
        directory: Path,
        progress: Callable[[int], object] = lambda entry_count: None,
    ) -> None:
        """Over a ``backend`` that is opened in ``directory``; every entry is read.

        Raises PoolError if it belongs to another pool, or is half a rebuilt one, and Damaged if it has not what was put
        into it.
        """
        self._backend = backend
        self._pool_uuid = pool_uuid
        self._directory = directory
        self.verify(progress)
        self._rings: Mapping[int, Ring] = {}  # never changed but replaced: a commit may go through it
        self._overlays = Overlay(), Overlay()  # what was learnt last, and what a commit is about to put into the index
        self._expected: dict[bytes, bytes | None] = {}  # what the index has, or is about to have, and learning will ask
        self._learning = threading.Lock()  # held while the overlay changes hands, and for each `learn`
        self._checkpointing = threading.Lock()
        self._commit_since = 0.0  # monotonic time, 0 if none is under way
        self._committer = 0
        self._commit_error = ""  # of the last one
        self._unerased: dict[RecordId, int] = {}  # sequence of each tombstone whose blocks are not erased yet
        self._noted: dict[RecordId, Entry] = {}  # those of them that no footer and no other entry tells of
        self._bases = {page.layer: decode_head(page.content).base for page in self.pages() if not page.number}
        """What each Layer builds on."""
        self._kept = {record.id for record in self.bases()}
        self._retired: dict[bytes, set[bytes]] = {}  # Layers that are being erased, and the keys of their pages
        self._carry_due = False
        self._keep_pages: Callable[[list[Page]], bool] | None = None
        self.indexed_sequence = 0
        """Every change up to this one is in the index."""
        self.is_behind = False
        """Whether a batch may be in the journals that was never learnt: the next opening has to find it there."""
        self.batch_bytes_max = 0
        """The longest batch that every journal can take, in bytes."""
        self.generation = 0
        """The label's generation when the index was last opened for writing; 0 for a new index."""
        if backend.get(REBUILDING_KEY):
            raise PoolError("a rebuild of the index was cut short", hint="run 'rustorctl pool rebuild' once more")
        if state := state_of(backend):
            self.indexed_sequence, self.generation, owner, _ = state
            if owner != pool_uuid:
                raise PoolError(
                    f"the index belongs to pool {uuid_text(owner)}, not to {uuid_text(pool_uuid)}",
                    hint="give each pool a directory of its own",
                )

    @property
    def _fresh(self) -> Overlay:
        return self._overlays[0]

    @property
    def _draining(self) -> Overlay:
        return self._overlays[1]

    # Opening

    def add_ring(self, device: int, ring: Ring) -> list[Batch]:
        """Take the journal of a device; returns its batches that the index does not know.

        Raises PoolError if batches are missing between the index and the journal.
        """
        position = self._backend.get(POSITION + ring.device_uuid)
        batches = ring.replay(position)
        if position is None and batches and batches[0].number != 1:
            raise PoolError(
                f"the index has no knowledge of device {uuid_text(ring.device_uuid)}, and its journal does not reach "
                "back to the beginning",
                hint="put back the index directory that belongs to this pool; if it is lost, 'rustorctl pool rebuild' "
                "makes a new one",
            )
        if ring.is_broken():
            raise PoolError(
                f"the journal of device {uuid_text(ring.device_uuid)} goes on behind batch {ring.number}, which is not "
                "there: the index is an old copy, or the journal is damaged",
                hint="put back the index directory that was last used with this pool, or rebuild it from the devices",
            )
        self._rings = {**self._rings, device: ring}
        self._note_rings()
        return batches

    def remove_ring(self, device: int) -> None:
        """Let go of a device's journal, which the index must hold."""
        self._rings = {other: ring for other, ring in self._rings.items() if other != device}
        self._note_rings()

    def _note_rings(self) -> None:
        self.batch_bytes_max = min((ring.batch_bytes_max for ring in self._rings.values()), default=0)

    def replay(self, entries: Iterable[Entry], dropped: Collection[int], graves: Sequence[Entry]) -> None:
        """Learn what the journal holds beyond the index, in the order given, and put it into the index.

        ``dropped`` are the sequences of PUTs that were never acknowledged and are not whole or were undone: they become
        graves. ``graves`` are the entries that begin other graves, GRAVE, and that end any, ERASED; what these name is
        deleted, also if its tombstone was on a device that is missing.
        """
        with self._learning:
            overlay = self._fresh
            for entry in entries:
                overlay.sequence = max(overlay.sequence, entry.sequence)
                if entry.sequence in dropped:
                    record = Record(entry.payload[16:])
                    self._bury(overlay, record, self.get(record.uuid), record.sequence)
                elif entry.kind is Kind.PUT:
                    self._replay_put(overlay, Record(entry.payload[16:]), entry.payload[:16])
                elif entry.kind is Kind.DELETE and (raw := self._raw(entry.payload)):
                    self._learn_delete(overlay, Record(raw), entry.sequence)
                elif entry.kind in (Kind.LAYER, Kind.MAP):
                    self._learn_layer(overlay, entry)
            for entry in graves:
                if entry.kind is Kind.GRAVE:
                    self._learn_noted_grave(overlay, entry)
            for entry in graves:
                for gone in decode_record_ids(entry.payload) if entry.kind is Kind.ERASED else ():
                    if (raw := self._raw(gone.uuid)) and Record(raw).id == gone:
                        self._learn_delete(overlay, Record(raw), gone.sequence)
                    self._learn_erased(overlay, gone)
            self._note_positions(overlay)
        self.checkpoint()

    def _replay_put(self, overlay: Overlay, record: Record, replaced: ObjectId) -> None:
        """Learn a PUT of the journal. Where two Objects have one name, the newer one counts.

        The older one was not acknowledged; its devices failed one after the other, so that no UNDO says so.
        """
        uuid = self.resolve(record.name) if record.name and replaced != record.uuid else None
        other = self.get(uuid) if uuid is not None and uuid not in (replaced, record.uuid) else None
        if other is not None and other.sequence > record.sequence:
            self._bury(overlay, record, None, record.sequence)
            return
        if other is not None:
            self._learn_delete(overlay, other, record.sequence)
        self._learn_put(overlay, record, replaced)

    def expect_generation(self, generation: int) -> None:
        """Remember the generation that the labels are about to have, and change nothing else in the index."""
        self.generation = generation
        self._commit({}, [], self.indexed_sequence)

    def note_generation(self, generation: int) -> None:
        """Remember the generation that the labels are about to have, and put everything into the index."""
        with self._learning:
            self.generation = generation
            self._note_positions(self._fresh)
        self.checkpoint()
        if self.is_behind:
            self.expect_generation(generation)

    def indexed(self) -> Iterator[Record]:
        """Every live Object in the index. Raises FormatError if one of them is damaged."""
        try:
            for _, raw in self._backend.scan(OBJECT, successor(OBJECT)):
                yield Record(raw)
        except FormatError as error:
            hint = "put back a copy of the index, or make a new one with 'rustorctl pool rebuild --replace'"
            raise FormatError(f"the index is damaged: {error.message}", hint=hint) from error

    def graves(self) -> list[Grave]:
        """The graves in the index: what is gone and whose blocks have not been erased yet."""
        return [decode_grave_entry(key, table) for key, table in self._backend.scan(GRAVE, successor(GRAVE))]

    def bases(self) -> list[Record]:
        """The deleted Objects in the index that were kept because a Layer builds, or built, on them."""
        return [Record(raw) for _, raw in self._backend.scan(BASE, successor(BASE))]

    def pages(self) -> Iterator[Page]:
        """All pages of Layers in the index."""
        return (decode_page(raw) for _, raw in self._backend.scan(PAGE, successor(PAGE)))

    def begin_to_keep(self, keep_pages: Callable[[list[Page]], bool], layers: Collection[bytes]) -> None:
        """From now on have pages written to their slots by ``keep_pages``, before the journal that has them is let go.

        While a pool is opened they are not: of a Layer that was erased the slots may be somebody else's by now. See
        `keep_all` for ``layers``.
        """
        self._keep_pages = keep_pages
        self.keep_all(layers)

    def keep_all(self, layers: Collection[bytes]) -> None:
        """Write all pages of ``layers``, which the index has, to their slots, if that was put off or not possible.

        So it was while the pool was opened, or if a rebuild has made the pages, or a device did not take one.
        """
        if self._backend.get(UNKEPT) is None:
            return
        with self._learning:
            for page in self.pages():
                if page.layer in layers:
                    newer = page._replace(generation=page.generation + 1)
                    self._fresh.pages[page_key(page.layer, page.number)] = newer.encode()
            self._fresh.pages[UNKEPT] = None
            self._expected = {}
            self._note_positions(self._fresh)
        self.checkpoint()  # before any slot is erased that a page has left: it may be the only one that is written

    def hold(self, gone: Iterable[RecordId], sequence: int) -> None:
        """Say of these again, with the next batch of the journal, that they are deleted, and keep what says so."""
        self._unerased.update(dict.fromkeys(gone, sequence))
        self._carry_due = bool(self._unerased)

    def forget_device(self, device: int) -> None:
        """Let go of what graves have on a device that leaves the pool; everything is in the index then."""
        self.checkpoint()
        with self._learning:
            for grave in self.graves():
                if device in grave.devices:
                    rest = [extent for extent in grave.extents if extent.device != device]
                    self._fresh.graves[RECORD_ID.pack(*grave.id)] = encode_extents(rest) if rest else None
                    if grave.id in self._noted and rest:
                        self._noted[grave.id] = grave_entry(Grave(grave.id, rest))
                    elif grave.id in self._noted:
                        del self._noted[grave.id], self._unerased[grave.id]
            self._note_positions(self._fresh)
        self.checkpoint()

    # Changing

    def journal(
        self,
        puts: Iterable[tuple[Record, ObjectId]],
        deletes: Iterable[tuple[Record, int]],
        undone: Iterable[tuple[Record, int]],
        erased: Mapping[int, list[RecordId]],
        durable: int,
        writable: Iterable[int],
    ) -> tuple[set[int], dict[int, RustordError]]:
        """Append to the journal of each device what concerns it; durable when these devices have been flushed.

        ``puts`` are Records with the uuid that each replaces (or `NOTHING`), ``deletes`` and ``undone`` Records with
        the sequence of their tombstone, ``erased`` what has been erased on each device and not been journalled yet.
        Returns the devices that were written to, and those that could not be, and why.
        """
        entries: dict[int, list[bytes]] = {}
        newest = 0
        writable = set(writable)
        needed = set[bytes]()
        for record, replaced in puts:
            entry = put_entry(record.sequence, replaced, record.raw)
            newest = record.sequence
            if replaced != NOTHING:
                needed.add(OBJECT + replaced)
            # A move may leave a copy where it is, on a device that is missing or takes no writes.
            for device in record.devices & writable if replaced == record.uuid else record.devices:
                entries.setdefault(device, []).append(entry)
        for record, sequence in deletes:
            newest = max(newest, sequence)
            if name := record.name:
                needed.add(name_key(name)[0])
            for device in (record.devices & writable) or sorted(writable)[:1]:
                entries.setdefault(device, []).append(delete_entry(sequence, record.uuid))
        for record, sequence in undone:
            newest = max(newest, sequence)
            for device in (record.devices & writable) or writable:  # somebody has to know of it
                entries.setdefault(device, []).append(undo_entry(sequence, record.id))
        try:
            self._look_ahead(needed)
        except RustordError as error:
            return set(), dict.fromkeys(entries, error)
        carried = bool(entries) and self._carry(entries, writable, newest)
        return self._append_all(entries, erased, durable, newest, carried)

    def journal_notes(
        self,
        entries: Sequence[Entry],
        devices: Iterable[int],
        erased: Mapping[int, list[RecordId]],
        durable: int,
        newest: int,
        writable: Collection[int],
    ) -> tuple[set[int], dict[int, RustordError]]:
        """The same for GRAVEs and changes of Layers, up to the sequence ``newest``: each goes to all of ``devices``.

        Raises what the index raises; nothing is written then.
        """
        changes = (decode_note(entry).changes() for entry in entries if entry.kind is not Kind.GRAVE)
        self._look_ahead({page_key(change.layer, change.number) for some in changes for change in some})
        batch = [encode_entry(entry) for entry in entries]
        batches = {device: list(batch) for device in devices}
        carried = self._carry(batches, set(writable), newest)
        return self._append_all(batches, erased, durable, newest, carried)

    def _look_ahead(self, keys: Iterable[bytes]) -> None:
        """Ask now for what has to be known to learn a batch: once that is durable, nothing may fail any more.

        Raises what the index raises, which may be a server that is away.
        """
        look = {OBJECT: lambda key: self._raw(key[1:]), NAME: self._name_value, PAGE: self._page}
        self._expected = {key: look[key[:1]](key) for key in keys}

    def _indexed(self, key: bytes) -> bytes | None:
        """What the index has, if that is not expected already."""
        expected = self._expected
        return expected[key] if key in expected else self._backend.get(key)

    def _append_all(
        self,
        entries: dict[int, list[bytes]],
        erased: Mapping[int, list[RecordId]],
        durable: int,
        newest: int,
        carried: bool,
    ) -> tuple[set[int], dict[int, RustordError]]:
        failed: dict[int, RustordError] = {}
        for device, batch in entries.items():
            if erased.get(device):
                batch.append(erased_entry(erased[device]))
            try:
                self._append(self._rings[device], batch, durable, newest)
            except RustordError as error:
                failed[device] = error
        if carried and failed:  # the old batches may be let go by now: the next one, which overwrites them, says it all
            self._carry_due = True
        return entries.keys() - failed.keys(), failed

    def _carry(self, entries: dict[int, list[bytes]], writable: set[int], newest: int) -> bool:
        """Write down once more what is deleted and not erased, if that keeps old batches from being let go.

        Erasing may take long, be put off by a reader, or be impossible because a device failed; no journal may fill up
        for it. Returns whether it was necessary.
        """
        oldest = min(self._unerased.values(), default=newest)
        length = RECORD_ID.size * len(self._unerased) + sum(len(entry.payload) for entry in self._noted.values())
        if not self._carry_due and not any(self._rings[device].is_held_by(oldest, length) for device in writable):
            return False
        if length > self.batch_bytes_max // 2:
            self._forget_oldest(self.batch_bytes_max // 4)
        self._carry_due = False
        carried = [unerased_entry(id for id in self._unerased if id not in self._noted)]
        carried += map(encode_entry, self._noted.values())
        for device in writable:
            entries.setdefault(device, []).extend(carried)
        with self._learning:
            self._unerased = dict.fromkeys(self._unerased, newest)
        return True

    def _forget_oldest(self, room: int) -> None:
        """Keep no more of what is not erased than goes into ``room`` bytes.

        With more, no change would find room in the journal any more. The index knows the others; who loses that while
        they are not erased may have them back.
        """
        log.warning("more is deleted and not erased yet than the journals have room for: keep the index")
        kept: dict[RecordId, int] = {}
        with self._learning:
            for id, sequence in reversed(self._unerased.items()):
                room -= len(self._noted[id].payload) if id in self._noted else RECORD_ID.size
                if room < 0:
                    break
                kept[id] = sequence
            self._unerased = dict(reversed(kept.items()))
            self._noted = {id: entry for id, entry in self._noted.items() if id in kept}

    def _append(self, ring: Ring, entries: list[bytes], durable: int, sequence: int) -> None:
        try:
            ring.append(entries, durable, sequence)
        except RingFull:
            self.checkpoint()
            try:
                ring.append(entries, durable, sequence)
            except RingFull as error:
                raise Unavailable(
                    f"the journal of device {uuid_text(ring.device_uuid)} is full of changes that are not finished yet",
                    hint="try again in a moment; if it stays so, see 'rustorctl status'",
                ) from error

    def learn(
        self,
        puts: Iterable[tuple[Record, ObjectId]],
        deletes: Iterable[tuple[Record, int]],
        undone: Iterable[tuple[Grave, int]],
        erased: Iterable[RecordId],
        sequence: int,
    ) -> None:
        """Know from now on what the journal holds durably, up to ``sequence``."""
        with self._learning:
            overlay = self._fresh
            for gone in erased:
                self._learn_erased(overlay, gone)
            for record, replaced in puts:
                self._learn_put(overlay, record, replaced)
            for record, tombstone in deletes:
                self._learn_delete(overlay, record, tombstone)
            for grave, tombstone in undone:
                self._learn_grave(overlay, grave, tombstone)
            overlay.sequence = sequence
            self._note_positions(overlay)
            self._expected = {}

    def learn_notes(self, entries: Iterable[Entry], ended: Iterable[RecordId], sequence: int) -> list[Grave]:
        """The same for GRAVEs and changes of Layers; those ``ended`` are none. Returns the slots that pages left."""
        with self._learning:
            overlay = self._fresh
            left = []
            for entry in entries:
                if entry.kind is Kind.GRAVE:
                    self._learn_noted_grave(overlay, entry)
                elif grave := self._learn_layer(overlay, entry):
                    left.append(grave)
            for gone in ended:
                self._learn_erased(overlay, gone)
            overlay.sequence = sequence
            self._note_positions(overlay)
            self._expected = {}
        return left

    def _learn_noted_grave(self, overlay: Overlay, entry: Entry) -> None:
        grave = decode_grave(entry.payload)
        self._learn_grave(overlay, grave, grave.id.sequence)
        self._noted[grave.id] = entry

    def _learn_layer(self, overlay: Overlay, entry: Entry) -> Grave | None:
        """Returns the slots that pages have left with this change; they are a grave."""
        left: list[Extent] = []
        note = decode_note(entry)
        if isinstance(note, LayerEntry):
            self._bases[note.layer] = decode_head(note.content).base
        for change in note.changes():
            if change.layer in self._bases:  # or else it has been erased since
                left += self._change_page(overlay, change, entry.sequence)
        if not left:
            return None
        grave = Grave(RecordId(note.layer, entry.sequence), left)
        self._learn_grave(overlay, grave, entry.sequence)
        return grave

    def _change_page(self, overlay: Overlay, change: PageChange, sequence: int) -> list[Extent]:
        """Each version that goes into the index has the next generation, so that it is written to the other slot.

        Returns the slots that the page had, if it has got others.
        """
        key = page_key(change.layer, change.number)
        raw = self._page(key)
        old = decode_page(raw) if raw else None
        if old is None and not change.address:  # its slots were erased with the Layer before the index was lost
            return []
        page = change.apply(old, sequence)
        if page is None:  # a device that was missing has an old entry
            return []
        generation = page.generation + (key not in overlay.pages)
        overlay.pages[key] = page._replace(generation=generation).encode()
        return slots_at(old.address) if old and old.address not in (0, page.address) else []

    def page(self, layer: bytes, number: int) -> Page | None:
        """A page of the map of a Layer, if it is known."""
        raw = self._page(page_key(layer, number))
        return decode_page(raw) if raw else None

    def home_of(self, layer: bytes) -> int | None:
        """The device of the head of a Layer; None if there is no such Layer."""
        head = self.page(layer, 0)
        return head.device if head else None

    def _page(self, key: bytes) -> bytes | None:
        for overlay in self._overlays:
            if key in overlay.pages:
                return overlay.pages[key]
        return self._indexed(key)

    def _forget_layer(self, overlay: Overlay, layer: bytes) -> None:
        del self._bases[layer]
        keys = self._retired[layer] if layer in self._retired else self._page_keys(layer)
        overlay.pages.update(dict.fromkeys(keys))

    def _page_keys(self, layer: bytes) -> set[bytes]:
        prefix = PAGE + layer
        keys = {key for key, _ in self._backend.scan(prefix, successor(prefix))}
        return keys | {key for overlay in self._overlays for key in overlay.pages if key.startswith(prefix)}

    def retire(self, layer: RecordId, sequence: int) -> None:
        """A Layer is about to be erased, since nobody needs it: its pages are not written to their slots any more.

        Like a tombstone at ``sequence`` it keeps the journal until then. Within `one_commit`: one that is under way may
        be writing them. Raises what the index raises.
        """
        self._retired[layer.uuid] = self._page_keys(layer.uuid)
        self._unerased[layer] = sequence

    def make_room(self) -> None:
        """Wait for the index if too much waits for it. Raises what the index raises."""
        if len(self._fresh) > _OVERLAY_MAX:
            self.checkpoint()

    def _note_positions(self, overlay: Overlay) -> None:
        """Once the index is behind, it learns no more: what is noted without a position is not committed."""
        if self.is_behind:
            return
        for ring in self._rings.values():
            overlay.positions[ring.device_uuid] = ring.position

    def _learn_put(self, overlay: Overlay, record: Record, replaced: ObjectId) -> None:
        if replaced == record.uuid:
            self._learn_move(overlay, record)
            return
        overlay.objects[record.uuid] = record.raw
        if name := record.name:
            key, tail = name_key(name)
            overlay.names[key] = record.uuid + tail
        if replaced != NOTHING and (raw := self._raw(replaced)):
            self._learn_delete(overlay, Record(raw), record.sequence)

    def _learn_move(self, overlay: Overlay, record: Record) -> None:
        """The Object is on other blocks now, unless it has been moved on since (by who did not know of this move)."""
        live = self.get(record.uuid)
        if live is not None and live.sequence > record.sequence:
            self._bury(overlay, record, live, record.sequence)
            return
        if live is not None:
            self._bury(overlay, live, record, record.sequence)
        elif name := record.name:
            key, tail = name_key(name)
            overlay.names[key] = record.uuid + tail
        overlay.objects[record.uuid] = record.raw

    def _bury(self, overlay: Overlay, record: Record, keeper: Record | None, sequence: int) -> None:
        """``record`` is gone; the blocks that ``keeper``, another Record of the same Object, names are not to erase."""
        extents = without(record.extents, keeper.extents) if keeper else record.extents
        self._learn_grave(overlay, Grave(record.id, extents), sequence)

    def _learn_grave(self, overlay: Overlay, grave: Grave, sequence: int) -> None:
        overlay.graves[RECORD_ID.pack(*grave.id)] = encode_extents(grave.extents)
        self._unerased[grave.id] = sequence

    def _learn_delete(self, overlay: Overlay, record: Record, sequence: int) -> None:
        uuid = record.uuid
        overlay.objects[uuid] = None
        if uuid in self._bases.values():
            overlay.bases[uuid] = record.raw
            self._kept.add(record.id)
            self._unerased[record.id] = sequence
        else:
            self._bury(overlay, record, None, sequence)
        if name := record.name:
            key, _ = name_key(name)
            value = self._name_value(key)
            if value is not None and value[:16] == uuid:
                overlay.names[key] = None

    def _learn_erased(self, overlay: Overlay, gone: RecordId) -> None:
        overlay.graves[RECORD_ID.pack(*gone)] = None
        self._unerased.pop(gone, None)
        self._noted.pop(gone, None)
        if not gone.sequence and gone.uuid in self._bases:
            self._forget_layer(overlay, gone.uuid)
        if gone in self._kept:
            self._kept.discard(gone)
            overlay.bases[gone.uuid] = None

    @contextmanager
    def one_commit(self) -> Iterator[None]:
        """Wait until no commit is under way, and keep others away. Raises Unavailable if that takes too long.

        A backend that hangs is not waited for again and again: the time since it began counts.
        """
        since = self._commit_since
        left_s = COMMIT_S_MAX if not since else max(0.0, since + COMMIT_S_MAX - monotonic())
        if not self._checkpointing.acquire(timeout=left_s):
            raise Unavailable("the index takes no changes: " + (self.trouble() or "it is busy"), hint=_TROUBLE_HINT)
        try:
            yield
        finally:
            self._checkpointing.release()

    def trouble(self) -> str:
        """Why the index does not take what waits for it; empty as long as it does."""
        since = self._commit_since
        waited_s = monotonic() - since if since else 0.0
        if waited_s <= COMMIT_S_MAX:
            return self._commit_error
        return f"a commit has not ended for {waited_s:.0f} s, in {whereabouts(self._committer)}"

    def checkpoint(self) -> None:
        """Put what has been learnt into the index, durably, and let go of the journal that holds it.

        Raises what the backend raises, and Unavailable if another commit does not end; it can be tried again then.
        """
        with self.one_commit():
            with self._learning:
                overlay = self._fresh
                if not overlay.positions:
                    return
                self._overlays = Overlay(), overlay
                unerased = min(self._unerased.values(), default=overlay.sequence + 1)
            sequence = max(overlay.sequence, self.indexed_sequence)
            try:
                puts, deletes = overlay.changes()
                pages = map(decode_page, filter(None, overlay.pages.values()))
                wanted = [page for page in pages if page.layer not in self._retired]
                if wanted and not (self._keep_pages and self._keep_pages(wanted)):
                    puts[UNKEPT] = b""
                    deletes = [key for key in deletes if key != UNKEPT]
                self._commit(puts, deletes, sequence)
            except BaseException:
                with self._learning:
                    self._overlays = overlay.under(self._fresh), Overlay()
                raise
            self.indexed_sequence = sequence
            with self._learning:
                self._overlays = self._fresh, Overlay()
                # Nothing names the pages of the others any more.
                self._retired = {layer: keys for layer, keys in self._retired.items() if layer in self._bases}
                for ring in self._rings.values():
                    number = int.from_bytes(overlay.positions.get(ring.device_uuid, bytes(8))[:8], "little")
                    ring.release(number, unerased - 1)

    def _commit(self, puts: dict[bytes, bytes], deletes: list[bytes], sequence: int) -> None:
        self._committer = threading.get_ident()
        self._commit_since = monotonic()
        try:
            commit(self._backend, puts, deletes, IndexState(sequence, self.generation, self._pool_uuid))
            self._commit_error = ""
        except RustordError as error:
            self._commit_error = error.message
            raise
        finally:
            self._commit_since = 0.0

    # Reading

    def _raw(self, uuid: ObjectId) -> bytes | None:
        # Both at once, then the index: what moves on, or back, meanwhile is then looked at twice, never missed.
        for overlay in self._overlays:
            if uuid in overlay.objects:
                return overlay.objects[uuid]
        return self._indexed(OBJECT + uuid)

    def get(self, uuid: ObjectId) -> Record | None:
        """The Record of a live Object, or None."""
        raw = self._raw(uuid)
        return None if raw is None else Record(raw)

    def stat(self, uuid: ObjectId) -> Record:
        """The Record of a live Object. Raises NotFound."""
        record = self.get(uuid)
        if record is None:
            raise NotFound(f"there is no Object {uuid_text(uuid)}", hint="'rustorctl ls' lists what there is")
        return record

    def base(self, uuid: ObjectId) -> Record | None:
        """The Record of an Object that is live, or was deleted and is kept because a Layer builds on it; or None."""
        raw = self._raw(uuid)
        if raw is None:
            for overlay in self._overlays:
                if uuid in overlay.bases:
                    raw = overlay.bases[uuid]
                    break
            else:
                raw = self._backend.get(BASE + uuid)
        return None if raw is None else Record(raw)

    def kept(self, uuid: ObjectId) -> Record | None:
        """The Record of a deleted Object that was kept because a Layer builds, or built, on it; or None."""
        record = self.base(uuid)
        return record if record is not None and record.id in self._kept else None

    def resolve(self, name: str) -> ObjectId | None:
        """The uuid that a name maps to, or None."""
        value = self._name_value(name_key(name)[0])
        return None if value is None else value[:16]

    def _name_value(self, key: bytes) -> bytes | None:
        for overlay in self._overlays:
            if key in overlay.names:
                return overlay.names[key]
        return self._indexed(key)

    def names(self, prefix: str = "", after: str = "", limit: int = 1000) -> list[tuple[str, ObjectId]]:
        """Up to ``limit`` names that begin with ``prefix``, strictly behind ``after``, with their uuids.

        They are in the order of their UTF-8 bytes (of the first 480 of them). Names that are there all the time are
        listed exactly once over a run of calls, whatever changes beside it.
        """
        first = NAME + prefix.encode()[:NAME_KEY_BYTES]
        start = max(first, name_key(after)[0] + b"\0") if after else first
        page: list[tuple[str, ObjectId]] = []
        for key, value in self._merged_scan("names", start, successor(first)):
            name = decode_name(key, value)
            if name.startswith(prefix):
                page.append((name, value[:16]))
                if len(page) == limit:
                    break
        return page

    def objects(self, after: ObjectId = b"", limit: int = 1000) -> list[Record]:
        """Up to ``limit`` live Objects in the order of their uuids, strictly behind ``after``."""
        start = OBJECT + after + b"\0" if after else OBJECT
        found = self._merged_scan("objects", start, successor(OBJECT))
        return [Record(raw) for _, raw in islice(found, limit)]

    def _merged_scan(self, what: str, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The index with the overlays laid over it. The overlays are copied before the index is looked at."""
        prefix = OBJECT if what == "objects" else b""
        laid: dict[bytes, bytes | None] = {}
        for overlay in reversed(self._overlays):
            table: dict[bytes, bytes | None] = getattr(overlay, what)
            laid.update((prefix + key, value) for key, value in list(table.items()))
        over = sorted((item for item in laid.items() if first <= item[0] < end), key=lambda item: item[0])
        under = (item for item in self._backend.scan(first, end) if item[0] not in laid)
        for key, value in merge(over, under, key=lambda item: item[0]):
            if value is not None:
                yield key, value

    def lag(self) -> int:
        """How many changes wait for the index."""
        return sum(map(len, self._overlays))

    def journal_used(self) -> float:
        """The fullest journal's used part, 0.0 to 1.0."""
        return max((ring.used for ring in self._rings.values()), default=0.0)

    def verify(self, progress: Callable[[int], object] = lambda entry_count: None) -> None:
        """Read every entry of the index, beside all other work. Raises Damaged unless it has what was put into it."""
        verify(self._backend, self._directory, progress)

    def info(self) -> Mapping[str, int | str]:
        """What the backend says of itself."""
        return self._backend.info()

    def close(self) -> None:
        self._backend.close()
