"""Membership: which devices an open pool has, and what becomes of each of them. All of it is called between cycles."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace

from rustord.blockdevice import BlockDevice, open_device
from rustord.blockstore import Slot, read_bad_blocks, read_label, write_label
from rustord.claim import require_ours
from rustord.errors import DeviceError, InvalidRequest, PoolError
from rustord.extent import Extent
from rustord.freelist import FreeList
from rustord.keystore.ring import Ring
from rustord.label import MEMBER_COUNT_MAX, Geometry, Member, Standing
from rustord.objectstore import ObjectStore
from rustord.pool import check_block_size, check_return, clear, renew_labels, wipe, write_labels

log = logging.getLogger(__name__)


def check_addable(store: ObjectStore) -> None:
    """Raises InvalidRequest if the pool can have no further device, whatever that is."""
    if len(store.label.members) >= MEMBER_COUNT_MAX:
        raise InvalidRequest(f"the pool has {MEMBER_COUNT_MAX} devices already", hint="remove a device first")


def prepare_device(store: ObjectStore, device: BlockDevice) -> None:
    """Clear what is reserved on a device that the caller has proven free; not between cycles, since it takes its time.

    Raises InvalidRequest or DeviceError.
    """
    check_addable(store)
    check_block_size(device, store.label.block_size)
    clear(device, Geometry.of_device(device.size, store.label.block_size))


def add_device(store: ObjectStore, device: BlockDevice) -> Member:
    """Take a device that `prepare_device` has cleared into an open pool. Called between cycles.

    Raises DeviceError; the pool's other labels do not name the device then.
    """
    label = store.label
    geometry = Geometry.of_device(device.size, label.block_size)
    index, generation = label.next_index, label.generation + 1
    member = Member(store.keygen.uuid(), index, geometry.block_count, generation, round=label.round)
    label = replace(label, next_index=index + 1, members=(*label.members, member))
    # Also if this fails half-way, what is written to the others next is newer, or the new one would be another round.
    store.label = replace(store.label, generation=generation)
    store.keystore.note_generation(generation + 1)
    write_label(device, replace(label, generation=generation).for_member(member))
    store.keystore.add_ring(index, Ring(device, member.device_uuid, geometry, label.secret))
    store.blocks.add(Slot(index, member.device_uuid, geometry, device))
    store.label = write_labels(store.blocks, replace(label, generation=generation + 1))
    store.allocator.add(index, FreeList(geometry.data_runs), geometry.data_block_count)
    return member


def attach_device(store: ObjectStore, path: str) -> int:
    """Take back a device of the pool that was missing; returns its index. Called between cycles.

    Raises PoolError if it is none, is there already, or holds changes that only an opening can replay; DeviceError.
    """
    store.keystore.checkpoint()  # which knows how far it has got in the device's journal
    # udev tells everybody to look again at what was open for writing: who refuses that each time is told so for ever.
    with closing(open_device(path, read_only=True, exclusive=False)) as device:
        store.keystore.remove_ring(_returned(store, device)[0].index)
    device = open_device(path)
    try:
        require_ours(device)
        slot, returned = _returned(store, device)
        slot.bad = read_bad_blocks(device, slot)
        store.allocator.condemn(Extent(slot.index, run.block, run.count) for run in slot.bad.runs)
    except BaseException:
        device.close()
        raise
    slot.device, slot.why = device, ""
    store.keystore.keep_all(store.layers.by_uuid)  # what it did not take when it failed
    members = (returned if m.device_index == slot.index else m for m in store.label.members)
    renew_labels(store, replace(store.label, members=tuple(members)))
    store.erase_again()
    return slot.index


def _returned(store: ObjectStore, device: BlockDevice) -> tuple[Slot, Member]:
    """The slot of a device that was missing, and the member with the label that it has; the KeyStore has its journal.

    Raises as `attach_device`.
    """
    label = read_label(device)
    member = next((m for m in store.label.members if label and m.device_uuid == label.device_uuid), None)
    if label is None or member is None:
        raise PoolError(f"{device.path} is no device of this pool", hint="claim it with 'rustorctl device add'")
    slot = store.blocks.slots[member.device_index]
    if slot.device is not None:
        raise PoolError(
            f"{device.path} cannot stand in for device {slot.index}: that is there already",
            hint="'rustorctl device list' shows the devices",
        )
    if problem := check_return(device, label, member, slot.geometry):
        raise problem
    if store.keystore.add_ring(slot.index, Ring(device, slot.uuid, slot.geometry, store.label.secret)):
        store.keystore.remove_ring(slot.index)
        raise PoolError(
            f"{device.path} holds changes that the index does not know", hint="restart rustord, which replays them"
        )
    return slot, replace(member, generation=label.generation, round=label.round)


def detach_device(store: ObjectStore, index: int) -> None:
    """Do without a device that has gone. Called between cycles."""
    slot = store.blocks.slots[index]
    if slot.device is not None:
        store.keystore.remove_ring(index)
        store.blocks.retire(slot, "it was removed from the machine")


def set_standing(store: ObjectStore, index: int, standing: Standing) -> None:
    """Say what the pool means to do with a device, durably: one that leaves takes no new data from now on.

    Raises InvalidRequest if no other device is left, or if this one was given up and is behind; DeviceError.
    """
    slot = _slot(store, index)
    if slot.behind and standing is not Standing.GIVEN_UP:
        raise InvalidRequest(
            f"device {index} was given up, and what was deleted since may still be on it",
            hint="let it be emptied ('rustorctl device fail'), then it can be claimed anew with --force",
        )
    if standing is not Standing.IN_USE and not set(store.blocks.accepting_indices()) - {index}:
        raise _last(index)
    if slot.standing is not standing:
        members = (replace(m, standing=standing) if m.device_index == index else m for m in store.label.members)
        renew_labels(store, replace(store.label, members=tuple(members)))
        slot.standing = standing
        store.erase_again()


def _last(index: int) -> InvalidRequest:
    return InvalidRequest(
        f"no device but device {index} takes new data", hint="add another device first, then remove this one"
    )


def _slot(store: ObjectStore, index: int) -> Slot:
    slot = store.blocks.slots.get(index)
    if slot is None:
        raise InvalidRequest(f"the pool has no device {index}", hint="'rustorctl device list' shows them")
    return slot


def remove_device(store: ObjectStore, index: int) -> None:
    """Let go of an empty device and wipe its label. Raises InvalidRequest or DeviceError.

    One that is given up and takes no writes is let go as it is; the caller knows that no Object is on it.
    """
    slot = _slot(store, index)
    if len(store.blocks.slots) == 1:
        raise InvalidRequest(f"device {index} is the pool's only one", hint="add another device first")
    if store.blocks.accepting_indices() == [index]:
        raise _last(index)
    is_lost = slot.standing is Standing.GIVEN_UP and slot.state != "online"
    device = slot.device if is_lost else store.blocks.writable(index)
    if not is_lost and not store.allocator.is_empty(index):
        raise DeviceError(f"device {index} holds Objects", hint="it is emptied first: 'rustorctl device remove'")
    members = tuple(member for member in store.label.members if member.device_index != index)
    store.keystore.forget_device(index)
    renew_labels(store, replace(store.label, members=members))
    store.blocks.remove(index)  # from here on nothing fails that would leave it half removed
    store.allocator.remove(index)
    if slot.device is not None:
        store.keystore.remove_ring(index)
    store.erase_again()
    if device is None:
        return
    try:
        wipe(device, slot.geometry)
        device.flush()
    except DeviceError:
        if not is_lost:
            raise
    finally:
        device.close()
