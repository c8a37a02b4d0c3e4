"""Inspection: looks at a pool that is open, beside its work: labels, the index, names, and what Objects share.

What it cannot see, since it changes all the time or would have to be read from end to end: footers, journals, the maps
of volumes, and free blocks. For these there is an `Audit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from rustord.audit import Finding, label_problems, overlaps
from rustord.blockstore import read_label
from rustord.errors import Damaged, DeviceError, FormatError
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId, uuid_text

_REMEDY = "stop rustord; 'rustorctl pool check --repair' makes the index anew"


def inspect(
    store: ObjectStore, between_cycles: Callable[[Callable[[], list[Finding]]], list[Finding]]
) -> list[Finding]:
    """What is not as it has to be. Any thread may call this; it takes some seconds for a million Objects.

    What looks wrong is looked at once more by a function that ``between_cycles`` calls while nothing changes.
    """
    try:
        store.keystore.verify()
    except Damaged as error:
        return [Finding("index", error.message, error.hint)]
    names, uuids, pairs = _suspects(store)

    def look_again() -> list[Finding]:
        return [*_labels(store), *_lost_names(store, names), *_nameless(store, uuids), *_contested(store, pairs)]

    return between_cycles(look_again)


def _suspects(store: ObjectStore) -> tuple[set[str], set[ObjectId], set[tuple[ObjectId, ObjectId]]]:
    """Names that lead nowhere, Objects without the name that they have, and pairs of Objects with a block in common.

    Some of them were only changed between two looks.
    """
    runs: dict[int, list[tuple[int, int, ObjectId]]] = {index: [] for index in store.blocks.slots}
    name_of: dict[ObjectId, str] = {}
    after = b""
    while page := store.objects(after):
        for record in page:
            for device, block, count in record.extents:
                runs.setdefault(device, []).append((block, count, record.uuid))
            if record.name:
                name_of[record.uuid] = record.name
        after = page[-1].uuid
    names = set()
    last = ""
    while listed := store.names(after=last):
        names |= {name for name, uuid in listed if name_of.pop(uuid, None) != name}
        last = listed[-1][0]
    pairs = {
        (one, other)
        for taken in runs.values()
        for (block, count, one), (next_block, _, other) in pairwise(sorted(taken))
        if block + count > next_block
    }
    return names, set(name_of), pairs


def _labels(store: ObjectStore) -> Iterator[Finding]:
    for slot in store.blocks.slots.values():
        if slot.device is None or slot.state == "failed":
            continue
        try:
            own = read_label(slot.device)
        except (FormatError, DeviceError) as error:
            yield Finding("label", f"device {slot.index}: {error.message}", "replace the device")
            continue
        for what in label_problems(slot, slot.device, own) if own else ():
            yield Finding("label", what, "a restart of rustord writes it anew")


def _lost_names(store: ObjectStore, names: set[str]) -> Iterator[Finding]:
    for name in sorted(names):
        uuid = store.resolve(name)
        record = store.keystore.get(uuid) if uuid else None
        if uuid and (record is None or record.name != name):
            what = f"the name {name!r} leads to Object {uuid_text(uuid)}, which does not have it, or does not exist"
            yield Finding("name", what, _REMEDY)


def _nameless(store: ObjectStore, uuids: set[ObjectId]) -> Iterator[Finding]:
    for uuid in sorted(uuids):
        record = store.keystore.get(uuid)
        if record is not None and store.resolve(record.name) != uuid:
            what = f"the name {record.name!r} is that of Object {uuid_text(uuid)}, and does not lead to it"
            yield Finding("name", what, _REMEDY)


def _contested(store: ObjectStore, pairs: set[tuple[ObjectId, ObjectId]]) -> Iterator[Finding]:
    for one, other in sorted(pairs):
        records = store.keystore.get(one), store.keystore.get(other)
        if records[0] and records[1] and overlaps(records[0], records[1]):
            what = f"Objects {uuid_text(one)} and {uuid_text(other)} have a block in common"
            yield Finding("blocks", what, _REMEDY)
