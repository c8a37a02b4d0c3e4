"""Pool: making one from devices, opening it, and changing which devices it has."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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
    write_label,
)
from rustord.claim import require_ours
from rustord.errors import DeviceBusy, DeviceError, InvalidRequest, PoolError, RustordError, WriteProtected
from rustord.event import fields
from rustord.guard import GuardedKeyGen
from rustord.keygen import KeyGen
from rustord.keystore.backend import Backend
from rustord.keystore.store import KeyStore
from rustord.label import (
    BLOCK_SIZES,
    LABEL_BYTES,
    MEMBER_COUNT_MAX,
    Geometry,
    Label,
    Member,
    Standing,
    State,
)
from rustord.layer import Layers
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import LayerEntry
from rustord.pending import PENDING, take_up
from rustord.placer import Placer
from rustord.record import Grave, RecordId
from rustord.replay import take_journals
from rustord.stock import take_stock

log = logging.getLogger(__name__)

POOL_NAME_BYTES_MAX = 64


def create_pool(
    devices: Sequence[BlockDevice], keygen: KeyGen, *, name: str = "", block_size: int = 4096
) -> list[Label]:
    """Write the labels of a new pool to ``devices``, which the caller has proven free; returns the labels.

    Raises InvalidRequest or DeviceError; the labels already written are taken back then, as far as that can be.
    """
    check_new(len(devices), name, block_size)
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
    begun: list[tuple[BlockDevice, Geometry]] = []
    try:
        for device, label in zip(devices, labels, strict=True):
            begun.append((device, label.geometry))
            clear(device, label.geometry)
            write_label(device, label)
    except DeviceError:
        for device, geometry in begun:
            with suppress(DeviceError):
                wipe(device, geometry)
                device.flush()
        raise
    return labels


def check_new(device_count: int, name: str, block_size: int) -> None:
    """Raises InvalidRequest if there can be no such pool, whatever its devices are."""
    if block_size not in BLOCK_SIZES:
        hint = f"choose one of {', '.join(map(str, BLOCK_SIZES))}"
        raise InvalidRequest(f"a block cannot have {block_size} bytes", hint=hint)
    if not 1 <= device_count <= MEMBER_COUNT_MAX:
        raise InvalidRequest(f"a pool cannot have {device_count} devices", hint=f"it has 1 to {MEMBER_COUNT_MAX}")
    if not name.isprintable() or len(name.encode()) > POOL_NAME_BYTES_MAX:  # a lone surrogate is not printable
        raise InvalidRequest(f"{name!r} cannot be a pool's name", hint=f"at most {POOL_NAME_BYTES_MAX} printable bytes")


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
        sequence = take_up(directory / PENDING, label.pool_uuid, blocks, keystore, sequence)
        progress("reading the index")
        allocator = Allocator(placer, blocks.accepting_indices, blocks.refusals, blocks.leaving_indices)
        layers = Layers(blocks, keystore.base)
        layers.load(keystore.pages())
        layers.serve()
        stock, graves, stale, problem = take_stock(allocator, blocks, keystore, layers, progress)
        erased: list[Grave] = []
        certain: Sequence[Grave] = ()
        if not problem:
            keystore.begin_to_keep(partial(blocks.keep_pages, label.secret), layers.by_uuid)
            certain = _certain(graves, blocks, layers)
            erased = _finish_erasures(allocator, blocks, keystore, certain, stale)
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
        store.journals.remember_erased(grave.extents, [grave.id])
    done = {grave.id for grave in erased}
    # What says so in the journals must stay there: who loses the index would have these Objects back.
    keystore.hold((grave.id for grave in graves if grave.id not in done), keystore.indexed_sequence)
    for grave in certain:
        if grave.id not in done:
            store.erasures.put_off(grave.extents, [grave.id])
    if not read_only:
        _finish_freezing(store)
    return store


def _close(store: ObjectStore) -> None:
    """Finish what is left to do, and leave clean labels behind."""
    following = store.cycle(()).following
    while following:
        following = store.cycle(following).following
    try:
        lost = store.keystore.is_behind or any(slot.state == "failed" for slot in store.blocks.slots.values())
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
            behind=member.standing is Standing.GIVEN_UP,  # for all that we know
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
        return PoolError(
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
        if not device.size:  # a loop or network device may be there before what it stands for
            raise DeviceError(f"{device.path} has no size", hint="see whether it is attached to anything")
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
    """Bring the index up to the journals. Returns the label of this opening and the newest sequence used so far."""
    replay = take_journals(label, blocks, keystore)
    # The labels come first: once the index has moved on, nobody can tell any more what the last cycle never committed.
    keystore.expect_generation(replay.label.generation)
    label = write_labels(blocks, replay.label)
    keystore.replay(replay.changes, replay.dropped, replay.graves)
    return label, replay.sequence


def _finish_freezing(store: ObjectStore) -> None:
    """A volume whose Layer an Object names has become that Object: a crash came before its name was given up."""
    for layer in list(store.layers.volumes.values()):
        if store.layers.is_frozen(layer):
            head = layer.head._replace(name="")
            with store.journals.note([LayerEntry(layer.uuid, layer.address, head.encode())]):
                store.layers.rename(layer, head)


def _certain(graves: Sequence[Grave], blocks: BlockStore, layers: Layers) -> Sequence[Grave]:
    """Without those of blocks that a Layer was to have, or has left, if its home is missing: that alone can tell.

    Nor those if it takes no writes: its slots may have the Layer as it was when these blocks were the Layer's.
    """

    def is_open(grave: Grave) -> bool:
        layer = layers.by_uuid.get(grave.id.uuid) if grave.id.sequence else None
        home = blocks.slots.get(layer.home) if layer else None
        return home is not None and home.state != "online"

    return [grave for grave in graves if not is_open(grave)]


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
    for grave in graves:
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
                blocks.renew_bad_blocks(slot.index)
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

    Raises DeviceError, also for one that somebody else has taken since, and PoolError for one that is named twice.
    """
    devices: list[BlockDevice] = []
    try:
        for path in paths:
            try:
                devices.append(device := open_device(path, read_only=read_only))
            except WriteProtected as error:
                log.error("%s; it is only read", error, extra=fields(device=os.fspath(path)))
                devices.append(device := open_device(path, read_only=True))
            except DeviceBusy:
                for other in devices:
                    if os.path.samefile(other.path, path):
                        hint = "name each device once"
                        raise PoolError(f"{other.path} and {os.fspath(path)} are the same device", hint=hint) from None
                raise
            if not device.read_only:
                require_ours(device)
    except RustordError:
        for opened in devices:
            opened.close()
        raise
    return devices
