"""Pool: making one from devices, opening it, and changing which devices it has."""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rustord.allocator import Allocator
from rustord.blockdevice import BlockDevice, open_device
from rustord.blockstore import (
    BlockStore,
    ErasePolicy,
    Slot,
    read_bad_blocks,
    read_label,
    write_bad_blocks,
    write_label,
)
from rustord.claim import require_ours
from rustord.errors import DeviceError, InvalidRequest, PoolError, RustordError, WriteProtected
from rustord.event import fields
from rustord.extent import Extent, block_count
from rustord.footer import encode_footer
from rustord.freelist import FreeList
from rustord.guard import GuardedKeyGen
from rustord.journal import Batch, Entry, Kind, decode_record_ids
from rustord.keygen import KeyGen
from rustord.keystore.backend import Backend
from rustord.keystore.ring import Ring
from rustord.keystore.store import KeyStore
from rustord.label import (
    BLOCK_SIZES,
    LABEL_BYTES,
    MEMBER_COUNT_MAX,
    VOID_COUNT_MAX,
    Geometry,
    Label,
    Member,
    State,
    merge_voids,
)
from rustord.layer import Layers
from rustord.objectstore import ObjectStore, Stock
from rustord.objkey import ObjectId, uuid_text
from rustord.page import LayerEntry
from rustord.placer import Placer
from rustord.record import Grave, Record, RecordId

log = logging.getLogger(__name__)

POOL_NAME_BYTES_MAX = 64
VOID_LENGTH = 1 << 20
"""Sequences skipped after an unclean stop: more than a cycle that was under way can have used."""
_VERIFY_BYTES = 1 << 20


def create_pool(
    devices: Sequence[BlockDevice], keygen: KeyGen, *, name: str = "", block_size: int = 4096
) -> list[Label]:
    """Write the labels of a new pool to ``devices``, which the caller has proven free; returns the labels.

    Raises InvalidRequest or DeviceError; the labels already written then make no pool that can be opened.
    """
    if block_size not in BLOCK_SIZES:
        hint = f"choose one of {', '.join(map(str, BLOCK_SIZES))}"
        raise InvalidRequest(f"a block cannot have {block_size} bytes", hint=hint)
    if not 1 <= len(devices) <= MEMBER_COUNT_MAX:
        raise InvalidRequest(f"a pool cannot have {len(devices)} devices", hint=f"it has 1 to {MEMBER_COUNT_MAX}")
    if not name.isprintable() or len(name.encode()) > POOL_NAME_BYTES_MAX:  # a lone surrogate is not printable
        raise InvalidRequest(f"{name!r} cannot be a pool's name", hint=f"at most {POOL_NAME_BYTES_MAX} printable bytes")
    members = []
    for index, device in enumerate(devices):
        check_block_size(device, block_size)
        geometry = Geometry.of_device(device.size, block_size)
        members.append(Member(keygen.uuid(), index, geometry.block_count))
    first = Label(
        pool_uuid=keygen.uuid(),
        pool_name=name,
        device_uuid=members[0].device_uuid,
        device_index=0,
        block_size=block_size,
        block_count=members[0].block_count,
        secret=os.urandom(32),
        created_ns=time.time_ns(),
        next_index=len(members),
        members=tuple(members),
    )
    labels = [first.for_member(member) for member in members]
    for device, label in zip(devices, labels, strict=True):
        clear(device, label.geometry)
        write_label(device, label)
    return labels


def check_block_size(device: BlockDevice, block_size: int) -> None:
    if block_size < device.block_size:
        raise DeviceError(
            f"{device.path} has logical blocks of {device.block_size} bytes, more than the pool's {block_size}",
            hint="make the pool with a larger --block-size",
        )


def clear(device: BlockDevice, geometry: Geometry) -> None:
    """Zero what is reserved: the first and the last MiB, and the journal."""
    device.zero(0, geometry.journal_offset + geometry.journal_length)
    tail = geometry.label_offsets[2]
    device.zero(tail, geometry.size - tail)


def wipe(device: BlockDevice, geometry: Geometry) -> None:
    """Leave nothing behind by which a device that was let go could be taken for the pool's, or for anybody's."""
    head, middle, tail = geometry.label_offsets
    device.zero(head, geometry.journal_offset)
    device.zero(middle, LABEL_BYTES)
    device.zero(tail, geometry.size - tail)


def open_pool(
    devices: Sequence[BlockDevice],
    *,
    keygen: KeyGen,
    placer: Placer,
    backend: Backend,
    directory: Path,
    erase_policy: ErasePolicy = "zero",
    read_only: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> ObjectStore:
    """Open the pool that ``devices`` make up, replay its journal and finish what a crash interrupted.

    The devices are the store's from then on, also when this raises: PoolError if they are not one pool, bear no
    label, or do not go with the index in ``directory``; DeviceError, Damaged.
    """
    backend_open = False
    try:
        label, blocks = assemble(devices, erase_policy)
        backend.open(directory)
        backend_open = True
        progress("checking the index")
        keystore = KeyStore(
            backend, label.pool_uuid, directory, lambda count: progress(f"checking the index: {count} entries")
        )
        _check_generation(keystore, label)
        progress("replaying the journal")
        label, sequence = _replay(label, blocks, keystore)
        progress("reading the index")
        allocator = Allocator(placer, blocks.accepting_indices, blocks.refusals, blocks.leaving_indices)
        layers = Layers(blocks, keystore.base)
        layers.load(keystore.pages())
        blocks.read_layer, blocks.read_layer_now = layers.read_object, layers.read_object_now
        stock, graves, stale, problem = _take_stock(allocator, blocks, keystore, layers, progress)
        erased = []
        if not problem:
            keystore.begin_to_keep(partial(blocks.keep_pages, label.secret), layers.by_uuid)
            erased = _finish_erasures(allocator, blocks, keystore, graves, stale)
    except BaseException:
        if backend_open:
            backend.close()
        for device in devices:
            device.close()
        raise
    if isinstance(keygen, GuardedKeyGen):
        keygen.is_known = lambda uuid: keystore.get(uuid) is not None
    read_only = read_only or problem
    store = ObjectStore(label, blocks, allocator, keystore, keygen, layers, stock, sequence, _close, read_only)
    for grave in erased:
        store.remember_erased(grave.extents, [grave.id])
    if not read_only:
        _finish_freezing(store)
    return store


def _close(store: ObjectStore) -> None:
    """Finish what is left to do, and leave clean labels behind."""
    following = store.cycle(()).following
    while following:
        following = store.cycle(following).following
    try:
        lost = any(slot.state == "failed" for slot in store.blocks.slots.values())
        state = State.OPEN if lost else State.CLEAN  # a void then parts what the device lost from what follows
        renew_labels(store, replace(store.label, state=state))
    finally:
        store.keystore.close()
        store.blocks.close()


def assemble(devices: Sequence[BlockDevice], erase_policy: ErasePolicy) -> tuple[Label, BlockStore]:
    """The newest label of the devices, and the pool's slots with the devices in them.

    A device that is not as the pool has left it is closed, and counts as missing.
    """
    labels = [_label_of(device) for device in devices]
    pools = sorted({uuid_text(label.pool_uuid) for label in labels})
    if len(pools) != 1:
        what = f"belong to different pools ({', '.join(pools)})" if pools else "are none"
        raise PoolError(f"the devices that were named {what}", hint="name the devices of one pool")
    newest = max(labels, key=lambda label: label.generation)
    _check_rounds(devices, labels, newest)
    there = {label.device_uuid: (device, label) for device, label in zip(devices, labels, strict=True)}
    if len(there) != len(devices):
        raise PoolError("the same device was named twice, or one is a copy of another", hint="name each device once")
    members = {member.device_uuid: member for member in newest.members}
    for uuid, (device, _) in there.items():
        if uuid not in members:
            raise PoolError(f"{device.path} was removed from pool {pools[0]}", hint="claim it anew, or leave it out")
    slots, present = [], []
    for member in newest.members:
        slot = Slot(
            member.device_index,
            member.device_uuid,
            Geometry(member.block_count, newest.block_size),
            None,
            "not found",
            standing=member.standing,
        )
        if member.device_uuid in there:
            device, label = there[member.device_uuid]
            if problem := check_return(device, label, member, slot.geometry):
                if len(devices) == 1:
                    raise problem
                log.error("%s is left out: %s", device.path, problem, extra=fields(device=device.path))
                slot.why = str(problem)
                device.close()
            else:
                slot.device, slot.why = device, ""
                slot.bad = read_bad_blocks(device, slot)
                member = replace(member, generation=label.generation, round=label.round)
        slots.append(slot)
        present.append(member)
    return replace(newest, members=tuple(present)), BlockStore(newest.block_size, slots, erase_policy)


def _check_rounds(devices: Sequence[BlockDevice], labels: Sequence[Label], newest: Label) -> None:
    """Refuse devices of which none is newer than the others, though they were not used together."""
    for device, label in zip(devices, labels, strict=True):
        if label.generation == newest.generation and label.round != newest.round:
            other = devices[labels.index(newest)]
            raise PoolError(
                f"{device.path} and {other.path} have each been used without the other since they were used together",
                hint="name only the one whose Objects are to stay; then claim the other anew with --force",
            )


def check_return(device: BlockDevice, label: Label, member: Member, geometry: Geometry) -> RustordError | None:
    """Why a device, which bears ``label``, cannot take its place in the pool again; None if it can."""
    if device.size < geometry.size:
        return DeviceError(
            f"{device.path} has {device.size} bytes, but its label speaks of {geometry.size}: it was cut short",
            hint="restore the device or image file to its full size; do not write to it meanwhile",
        )
    if member.bears(label):
        return None
    if label.generation < max(member.before, member.generation):
        what = f"an older state of itself (generation {label.generation}, not {member.generation})"
        return PoolError(
            f"{device.path} is {what}: a copy, or restored from one",
            hint="attach the device itself; if it is lost, 'rustorctl device fail' gives it up",
        )
    return PoolError(
        f"{device.path} has been used without the other devices of the pool",
        hint="keep it apart; 'rustorctl device fail' gives it up, then it can be claimed anew with --force",
    )


def _label_of(device: BlockDevice) -> Label:
    label = read_label(device)
    if label is None:
        raise PoolError(
            f"{device.path} bears no rustord label",
            hint="make a pool of it with 'rustorctl pool create', or name another device",
        )
    return label


def _check_generation(keystore: KeyStore, label: Label) -> None:
    """Generations are counted up in the index first, then in the labels: an index that is behind is an old copy."""
    if 0 < keystore.generation < label.generation:
        raise PoolError(
            f"the index is older (generation {keystore.generation}) than the devices (generation {label.generation})",
            hint="put back the index directory that was last used with this pool; if it is lost, "
            "'rustorctl pool rebuild --replace' makes a new one",
        )


def _replay(label: Label, blocks: BlockStore, keystore: KeyStore) -> tuple[Label, int]:
    """Bring the index up to the journal. Returns the label of this opening and the newest sequence used so far."""
    batches: list[Batch] = []
    for slot in blocks.slots.values():
        if slot.device is not None:
            try:
                batches += keystore.add_ring(slot.index, Ring(slot.device, slot.uuid, slot.geometry, label.secret))
            except DeviceError as error:
                path = slot.device.path
                log.error("%s is left out, its journal cannot be read: %s", path, error, extra=fields(device=path))
                blocks.retire(slot, f"its journal cannot be read: {error}")
    entries = [entry for batch in batches for entry in batch.entries]
    graves = [entry for entry in entries if entry.kind in (Kind.GRAVE, Kind.ERASED)]
    changes = {entry.sequence: entry for entry in entries if entry.sequence}
    undone = {id for entry in entries if entry.kind is Kind.UNDO for id in decode_record_ids(entry.payload)}
    buried = {grave.id for grave in keystore.graves()}  # dropped before, while one of their devices was missing
    durable = sorted({batch.durable for batch in batches})
    ordered = [entry for _, entry in sorted(changes.items())]
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
    # The labels come first: once the index has moved on, nobody can tell any more what the last cycle never committed.
    keystore.expect_generation(generation)
    label = write_labels(blocks, replace(label, generation=generation, state=State.OPEN, voids=voids))
    keystore.replay(ordered, dropped, graves)
    return label, last


def was_flushed(sequence: int, durable: Sequence[int], label: Label) -> bool:
    """Whether a later batch of the same opening of the pool shows that this change was made durable.

    Batches of later openings, in which the device was perhaps missing, prove nothing: a void lies between. The change
    may lie within that void, if the device was not there when it was noted.
    """
    at = bisect_left(durable, sequence)
    if at == len(durable):
        return False
    between = bisect_right(label.voids, (durable[at], _NO_RUN)) - 1  # the last that does not begin behind it
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
    are not erased before the index knows of the move.
    """
    is_whole = _is_whole(record, blocks, label)
    if not is_whole and entry.payload[:16] == record.uuid and (earlier := _before(entry, ordered, keystore)):
        return not any(_has_footer(old, blocks, label) for old in earlier)
    return is_whole is not False


def _before(move: Entry, ordered: Sequence[Entry], keystore: KeyStore) -> list[Record]:
    """The Records that an Object had before it was moved; some of them may never have counted."""
    uuid = move.payload[:16]
    puts = [entry for entry in ordered if entry.kind is Kind.PUT and entry.sequence < move.sequence]
    earlier = [record for entry in puts if (record := Record(entry.payload[16:])).uuid == uuid]
    indexed = keystore.get(uuid)
    return [*earlier, indexed] if indexed and indexed.sequence < move.sequence else earlier


def _has_footer(record: Record, blocks: BlockStore, label: Label) -> bool:
    """Whether a copy still has its footer, so that its blocks have not been erased; True if it is on a device that
    cannot be asked."""
    if not record.devices <= blocks.slots.keys():
        return False
    try:
        return any(_footer_is_whole(record, number, blocks, label) for number in range(len(record.copies)))
    except DeviceError:
        return True


def _is_whole(record: Record, blocks: BlockStore, label: Label) -> bool | None:
    """Whether any copy of an Object reached its devices whole; None if none did that is on devices that can be asked.

    If some did, the others are made from them: an Object that is kept has all of its copies. They are durable once the
    labels have been written, which is before the index knows of the Object.
    """
    if not record.devices <= blocks.slots.keys():
        return None  # it was on a device that has been removed, so it has been deleted or moved
    try:
        whole = [copy_is_whole(record, number, blocks, label) for number in range(len(record.copies))]
        if any(whole) and not all(whole):
            for number in range(len(whole)):
                if not whole[number]:
                    blocks.repair(record, number, footer_of(record, number, blocks, label))
    except DeviceError as error:
        uuid = uuid_text(record.uuid)
        log.warning("Object %s could not be verified or repaired: %s", uuid, error, extra=fields(uuid=uuid))
        return None
    return any(whole)


def footer_of(record: Record, number: int, blocks: BlockStore, label: Label) -> bytes:
    copy = record.copies[number]
    return encode_footer(record.raw, record.size, copy, blocks.device_uuids, label.secret, label.block_size)


def copy_is_whole(record: Record, number: int, blocks: BlockStore, label: Label) -> bool:
    # What a Layer has was durable before the Object was thought of.
    for offset in range(0, record.size if not record.layer else 0, _VERIFY_BYTES):
        length = min(_VERIFY_BYTES, record.size - offset)
        if not blocks.verify(record, number, offset, length):
            return False
    return _footer_is_whole(record, number, blocks, label)


def _footer_is_whole(record: Record, number: int, blocks: BlockStore, label: Label) -> bool:
    copy = record.copies[number]
    footer = footer_of(record, number, blocks, label)
    return blocks.read_copy(copy, block_count(copy) * label.block_size - len(footer), len(footer)) == footer


def _take_stock(
    allocator: Allocator, blocks: BlockStore, keystore: KeyStore, layers: Layers, progress: Callable[[str], None]
) -> tuple[Stock, list[Grave], list[RecordId], str]:
    """Fill the FreeLists: free is what no Record and no Layer names.

    Returns also the graves, which of them are none any more, and why the pool takes no changes; "" if it does.
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
    stale = _add_graves(graves, used)
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
    needless = layers.collect()
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


def _finish_freezing(store: ObjectStore) -> None:
    """A volume whose Layer an Object names has become that Object: a crash came before its name was given up."""
    for layer in list(store.layers.volumes.values()):
        if store.layers.is_frozen(layer):
            head = layer.head._replace(name="")
            store.note([LayerEntry(layer.uuid, layer.address, head.encode())], [layer.home])
            store.layers.rename(layer, head)


def _add_graves(graves: Iterable[Grave], used: Mapping[int, list[int]]) -> list[RecordId]:
    """Add the blocks of ``graves`` to ``used``, which is sorted; returns those of which somebody else has a block.

    A block is given to nobody before it is erased, so these are erased. The journal may not say so: if the index, which
    knew, is lost, the journal's tombstones make them graves again. To erase them now would destroy the other's data.
    """
    buried: dict[int, list[int]] = {index: [] for index in used}
    stale = []
    for grave in sorted(graves, key=lambda grave: grave.id.sequence, reverse=True):
        if not grave.devices <= used.keys() or any(
            _is_taken(taken[extent.device], extent) for extent in grave.extents for taken in (used, buried)
        ):
            stale.append(grave.id)
        else:
            for device, block, count in grave.extents:
                insort(buried[device], block << 32 | count)
    for index, runs in buried.items():
        used[index].extend(runs)
    return stale


def _is_taken(taken: Sequence[int], extent: Extent) -> bool:
    """Whether the sorted runs (block << 32 | count) have a block of ``extent``."""
    at = bisect_left(taken, extent.end << 32)
    return at > 0 and (taken[at - 1] >> 32) + (taken[at - 1] & 0xFFFFFFFF) > extent.block


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


_NO_RUN = 1 << 62


def _run(runs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    block, count = next(iter(runs), (_NO_RUN, 0))
    return block, block + count


def _finish_erasures(
    allocator: Allocator,
    blocks: BlockStore,
    keystore: KeyStore,
    graves: Iterable[Grave],
    stale: Sequence[RecordId],
) -> list[Grave]:
    """Erase what was deleted before the last stop and not erased yet; what cannot be stays a grave, and not free.

    ``stale`` graves were erased before. Returns those that have been erased now.
    """
    finished = []
    touched: set[int] = set()
    done = set(stale)
    for grave in graves:
        if grave.id in done:
            continue
        try:
            for device in grave.devices:
                blocks.writable(device)
            blocks.erase(grave.extents)
        except DeviceError as error:
            uuid = uuid_text(grave.id.uuid)
            log.warning("blocks of Object %s are not erased yet: %s", uuid, error, extra=fields(uuid=uuid))
            continue
        finished.append(grave)
        touched |= grave.devices
    failed = blocks.flush(touched)
    erased = [grave for grave in finished if not grave.devices & failed.keys()]
    for grave in erased:
        allocator.release(grave.extents)
    # The index must not know of sequences behind the void that only the labels, which come later, will have.
    keystore.learn((), (), (), [*stale, *(grave.id for grave in erased)], keystore.indexed_sequence)
    keystore.checkpoint()  # before any of these blocks is used again: the journal does not say that they are free
    return erased


def write_labels(blocks: BlockStore, label: Label) -> Label:
    """Write ``label`` to every device that takes writes; returns it as it was written, which says to whom.

    A device that cannot take its label takes no more writes. Raises DeviceError if that is true of all of them.
    """
    writable = blocks.writable_indices()
    round = int.from_bytes(os.urandom(8), "little")
    members = tuple(
        replace(member, before=member.generation, generation=label.generation, round=round)
        if member.device_index in writable
        else member
        for member in label.members
    )
    label = replace(label, round=round, members=members)
    problem: DeviceError | None = None
    for member in members:
        if member.device_index not in writable:
            continue
        slot = blocks.slots[member.device_index]
        assert slot.device is not None
        try:
            if slot.bad.number and label.state is State.OPEN:
                write_bad_blocks(slot.device, slot)  # a copy that was damaged is good again
            write_label(slot.device, label.for_member(member))
        except DeviceError as error:
            log.error("%s takes no label: %s", slot.device.path, error, extra=fields(device=slot.device.path))
            problem = error
    if problem is not None and not blocks.writable_indices():
        raise problem
    return label


def renew_labels(store: ObjectStore, label: Label) -> None:
    """Write ``label`` with a new generation, which the index knows first. Raises DeviceError."""
    generation = store.label.generation + 1
    store.keystore.note_generation(generation)
    store.label = write_labels(store.blocks, replace(label, generation=generation))


def open_devices(paths: Iterable[str | os.PathLike[str]], *, read_only: bool = False) -> list[BlockDevice]:
    """Open and lock all of ``paths``, or none; what is write-protected, for reading.

    Raises DeviceError, also for one that somebody else has taken since.
    """
    devices: list[BlockDevice] = []
    try:
        for path in paths:
            try:
                devices.append(device := open_device(path, read_only=read_only))
            except WriteProtected as error:
                log.error("%s; it is only read", error, extra=fields(device=os.fspath(path)))
                devices.append(device := open_device(path, read_only=True))
            if not device.read_only:
                require_ours(device)
    except RustordError:
        for opened in devices:
            opened.close()
        raise
    return devices
