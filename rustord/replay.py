"""Replay: what of the journals counts, beyond what the index knows, when a pool is opened."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from rustord.blockstore import BlockStore
from rustord.errors import DeviceError
from rustord.event import fields
from rustord.extent import block_count
from rustord.footer import encode_footer
from rustord.journal import Batch, Entry, Kind, decode_record_ids, grave_entry
from rustord.keystore.ring import Ring
from rustord.keystore.store import KeyStore
from rustord.label import VOID_COUNT_MAX, Label, State, merge_voids
from rustord.notes import Notes
from rustord.objkey import ObjectId, uuid_text
from rustord.page import CHUNK_BYTES
from rustord.record import Record

log = logging.getLogger(__name__)

VOID_LENGTH = 1 << 20
"""Sequences skipped after an unclean stop: more than a cycle that was under way can have used."""
_VERIFY_BYTES = 1 << 20
_NO_END = 1 << 62


class Replay(NamedTuple):
    """What an opening has to bring into the index, and the ``label`` that it has to write before.

    ``changes`` are in their order, of which those whose sequences are ``dropped`` never counted; ``graves`` are the
    entries that begin and end graves. ``sequence`` is the newest that has been used so far.
    """

    label: Label
    changes: Sequence[Entry]
    dropped: Collection[int]
    graves: Sequence[Entry]
    sequence: int


def take_journals(label: Label, blocks: BlockStore, keystore: KeyStore) -> Replay:
    """Give the KeyStore the journals of all devices, and tell what counts of what they have. The index stays as it is.

    A device whose journal cannot be read is left out. Copies of Objects that count are made whole from the others.
    Raises PoolError as `KeyStore.add_ring` does.
    """
    journals: dict[int, list[Batch]] = {}
    for slot in blocks.slots.values():
        if slot.device is not None:
            try:
                ring = Ring(slot.device, slot.uuid, slot.geometry, label.secret)
                journals[slot.index] = keystore.add_ring(slot.index, ring)
            except DeviceError as error:
                path = slot.device.path
                log.error("%s is left out, its journal cannot be read: %s", path, error, extra=fields(device=path))
                blocks.retire(slot, f"its journal cannot be read: {error}")
    notes = Notes()
    for device, found in journals.items():
        for batch in found:
            notes.add(device, batch)
    uncounted = notes.uncounted(keystore.home_of, journals.keys(), label, keystore.indexed_sequence)
    batches = [batch for found in journals.values() for batch in found]
    entries = [entry for batch in batches for entry in batch.entries]
    graves = [entry for entry in entries if entry.kind in (Kind.GRAVE, Kind.ERASED)]
    graves += map(grave_entry, notes.graves(uncounted, label.block_size))
    changes = {entry.sequence: entry for entry in entries if entry.sequence}
    undone = {id for entry in entries if entry.kind is Kind.UNDO for id in decode_record_ids(entry.payload)}
    buried = {grave.id for grave in keystore.graves()}  # dropped before, while one of their devices was missing
    durable = sorted({batch.durable for batch in batches})
    ordered = [entry for sequence, entry in sorted(changes.items()) if sequence not in uncounted]
    # What a change that counts has deleted or replaced was there. Its blocks are not asked: they have been erased
    # since, or given to others. A change that does not count shows only that its Object was somewhere.
    gone: set[ObjectId] = set()

    def counts(put: Entry) -> bool:
        flushed = was_flushed(put.sequence, durable, label)
        if flushed and not undone and not buried:
            return True
        record = Record(put.payload[16:])
        if record.id in undone:
            return False
        if record.uuid in gone:
            return True
        return record.id not in buried and (flushed or _is_believed(put, record, ordered, keystore, blocks, label))

    dropped: set[int] = set()
    for entry in reversed(ordered):
        if entry.kind is Kind.PUT and not counts(entry):
            dropped.add(entry.sequence)
        elif entry.kind is not Kind.UNDO:
            gone.add(entry.payload[:16])
    kept = [entry for entry in ordered if entry.sequence not in dropped]
    if ordered:
        log.info("replayed %d changes of the journal, dropped %d that were never acknowledged", len(kept), len(dropped))
    settled = max([keystore.indexed_sequence, *durable])
    generation = max(label.generation, keystore.generation) + 1
    last = max([*changes, keystore.indexed_sequence, *(end - 1 for _, end in label.voids)])
    voids = label.voids
    if label.state is State.OPEN:  # of the last cycle, one device may have what is newer than what another one lost
        voids = merge_voids([*voids, (settled + 1, last + 1 + VOID_LENGTH)])
        last += VOID_LENGTH
    voids = tuple(_without(voids, kept)[-VOID_COUNT_MAX:])
    label = replace(label, generation=generation, state=State.OPEN, voids=voids)
    return Replay(label, ordered, dropped, graves, last)


def was_flushed(sequence: int, durable: Sequence[int], label: Label) -> bool:
    """Whether a later batch of the same opening of the pool shows that this change was made durable.

    Batches of later openings, in which the device was perhaps missing, prove nothing: a void lies between. The change
    may lie within that void, if the device was not there when it was noted.
    """
    at = bisect_left(durable, sequence)
    if at == len(durable):
        return False
    between = bisect_right(label.voids, (durable[at], _NO_END)) - 1  # the last that does not begin behind it
    return between < 0 or label.voids[between][1] <= sequence


def _without(voids: Iterable[tuple[int, int]], kept: Iterable[Entry]) -> list[tuple[int, int]]:
    """The voids without what was committed: a device that was missing when they were noted may have it."""
    committed = sorted(entry.sequence for entry in kept)
    left = []
    for first, end in voids:
        for sequence in committed[bisect_left(committed, first) : bisect_left(committed, end)]:
            left.append((first, sequence))
            first = sequence + 1
        left.append((first, end))
    return [void for void in left if void[0] < void[1]]


def _is_believed(
    entry: Entry, record: Record, ordered: Sequence[Entry], keystore: KeyStore, blocks: BlockStore, label: Label
) -> bool:
    """Whether a PUT that may never have been flushed counts: if it is whole, or if nobody can tell.

    A move that is not whole for certain is dropped as long as the Object is still where it was before. Its old blocks
    are not erased before the index knows of the move. One of which an earlier opening did not know, and whose Object is
    not there any more, has come too late: who deleted the Object did so where it was before.
    """
    is_move = entry.payload[:16] == record.uuid
    is_late = is_move and label.is_void(entry.sequence) and keystore.get(record.uuid) is None
    if is_late and not _before(entry, ordered, keystore):
        return False
    is_whole = _is_whole(record, blocks, label)
    if not is_whole and is_move and (earlier := _before(entry, ordered, keystore)):
        return not any(has_footer(old, blocks, label) for old in earlier)
    return is_whole is not False


def _before(move: Entry, ordered: Sequence[Entry], keystore: KeyStore) -> list[Record]:
    """The Records that an Object had before it was moved; some of them may never have counted."""
    uuid = move.payload[:16]
    puts = [entry for entry in ordered if entry.kind is Kind.PUT and entry.sequence < move.sequence]
    earlier = [record for entry in puts if (record := Record(entry.payload[16:])).uuid == uuid]
    indexed = keystore.get(uuid)
    return [*earlier, indexed] if indexed and indexed.sequence < move.sequence else earlier


def has_footer(record: Record, blocks: BlockStore, label: Label) -> bool:
    """Whether a copy still has its footer, so that its blocks have not been erased; True if it is on a device that
    cannot be asked."""
    if not record.devices <= blocks.slots.keys():
        return False
    try:
        return any(_footer_is_whole(record, number, blocks, label) for number in range(len(record.copies)))
    except DeviceError:
        return True


def _is_whole(record: Record, blocks: BlockStore, label: Label) -> bool | None:
    """Whether any copy of an Object reached its devices whole; None if nobody can tell.

    If some did, the others are made from them: an Object that is kept has all of its copies. They are durable once the
    labels have been written, which is before the index knows of the Object. If a copy did not, and none is known that
    did, the Object was never acknowledged, whatever is on devices that are missing: all copies are durable before that.
    """
    if not record.devices <= blocks.slots.keys():
        return None  # it was on a device that has been removed, so it has been deleted or moved
    whole = [_is_copy_whole(record, number, blocks, label) for number in range(len(record.copies))]
    if True not in whole:
        return False if False in whole else None
    try:
        for number, is_whole in enumerate(whole):
            if is_whole is False:
                blocks.repair(record, number, footer_of(record, number, blocks, label))
    except DeviceError as error:
        _warn(record, error)
    return True


def _is_copy_whole(record: Record, number: int, blocks: BlockStore, label: Label) -> bool | None:
    """The same of one copy; None if a part of it cannot be read, and the others, as far as they were looked at, are."""
    devices = {extent.device for extent in record.copies[number]} & record.devices  # not those of its Layer
    unsure = any(blocks.slots[device].device is None for device in devices)
    steps = _steps(record, number, blocks, label, CHUNK_BYTES if unsure else _VERIFY_BYTES)
    for is_right in steps:
        try:
            if not is_right():
                return False
        except DeviceError as error:
            if not unsure:  # it failed just now, and may take long to do so again
                _warn(record, error)
                return None
    return None if unsure else True


def _warn(record: Record, error: DeviceError) -> None:
    uuid = uuid_text(record.uuid)
    log.warning("Object %s could not be verified or repaired: %s", uuid, error, extra=fields(uuid=uuid))


def footer_of(record: Record, number: int, blocks: BlockStore, label: Label) -> bytes:
    copy = record.copies[number]
    return encode_footer(record.raw, record.size, copy, blocks.device_uuids, label.secret, label.block_size)


def copy_is_whole(record: Record, number: int, blocks: BlockStore, label: Label) -> bool:
    """Whether a copy has the right bytes and its footer. Raises DeviceError."""
    return all(is_right() for is_right in _steps(record, number, blocks, label, _VERIFY_BYTES))


def _steps(record: Record, number: int, blocks: BlockStore, label: Label, step: int) -> Iterator[Callable[[], bool]]:
    """What has to be right of a copy, ``step`` bytes of data at a time."""
    # What a Layer has was durable before the Object was thought of.
    for offset in range(0, record.size if not record.layer else 0, step):
        yield partial(blocks.verify, record, number, offset, min(step, record.size - offset))
    yield partial(_footer_is_whole, record, number, blocks, label)


def _footer_is_whole(record: Record, number: int, blocks: BlockStore, label: Label) -> bool:
    copy = record.copies[number]
    footer = footer_of(record, number, blocks, label)
    return blocks.read_copy(copy, block_count(copy) * label.block_size - len(footer), len(footer)) == footer
