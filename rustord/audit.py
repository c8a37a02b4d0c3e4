"""Audit: is everything in a pool as it has to be? Compares the index with what the devices hold, and mends.

It works on a pool that is not open. To look changes nothing. What an audit mends, it takes from what is right: a label
from another copy, a footer from the index, the index from the footers and journals. Damaged data is left to the scrub,
which moves it to other blocks.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from rustord.blockdevice import BlockDevice
from rustord.blockstore import ErasePolicy, Slot, read_label, write_label
from rustord.errors import Damaged, DeviceError, FormatError, NotFound, PoolError
from rustord.extent import LAYERS, Extent, block_count, without
from rustord.journal import NOTHING, Batch, Kind, decode_record_ids
from rustord.keystore.backend import Backend
from rustord.keystore.contents import Contents, owner_of, read_contents, replace_index
from rustord.keystore.ring import Ring
from rustord.keystore.state import verify
from rustord.label import LABEL_BYTES, Label, State, decode_label
from rustord.layer import Layers
from rustord.manifest import chunk_count
from rustord.objkey import ObjectId, uuid_text
from rustord.page import Page, decode_head, slot_of
from rustord.pending import PENDING, promised
from rustord.pool import assemble
from rustord.record import Record
from rustord.replay import footer_of
from rustord.survey import SCAN_BYTES, Progress, take_survey

_SHOWN_MAX = 100
"""Findings of one kind that are told one by one."""
_VERIFY_BYTES = 1 << 20
_RESTORE = "restore the Object from elsewhere"
_NEXT_START = "the next start sees to that"
_HEALTH = "look at the device's health (smartctl)"


class Mend(enum.Enum):
    """What `Audit.mend` does, in this order."""

    NOTHING = ""
    LABEL = "write labels anew, from copies that are good"
    FOOTER = "write footers and maps of volumes anew, from the index"
    INDEX = "make the index anew, from what the devices hold"
    ERASE = "erase free blocks"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it has to be: ``kind`` says where, ``what`` what, ``remedy`` what to do about it.

    One that is ``harmless`` is what a crash may leave.
    """

    kind: str
    what: str
    remedy: str
    mend: Mend = Mend.NOTHING
    harmless: bool = False

    def plain(self) -> dict[str, str | bool]:
        """As values that JSON has."""
        return {"kind": self.kind, "what": self.what, "remedy": self.remedy, "harmless": self.harmless}


class Audit:
    """Looks at a pool when it is made; ``findings`` has what came of it, ``mend`` puts right what can be.

    The devices are its own until it is closed, and locked. So is the index. ``object_count`` and ``data_bytes`` are
    those of the Objects that the pool has.
    """

    def __init__(
        self,
        devices: Sequence[BlockDevice],
        *,
        backend: Backend,
        directory: Path,
        policy: ErasePolicy = "zero",
        data: bool = False,
        progress: Progress = lambda size: None,
    ) -> None:
        """With ``data``, the checksums of all data are compared as well; ``policy`` is what is done to free blocks.

        Raises PoolError or DeviceError if the devices do not make up a pool; they are closed then.
        """
        self.findings: list[Finding] = []
        self._policy = policy
        self._backend = backend
        self._torn_footers: list[tuple[Record, int]] = []
        self._lost_pages: list[Page] = []
        self._leftovers: list[Extent] = []
        self._told: Counter[str] = Counter()
        self._stack = ExitStack()
        try:
            for device in devices:
                self._stack.callback(device.close)
            self._label, self._blocks = assemble(devices, "zero")
            self._stack.callback(self._blocks.close)
            self._own = {slot.index: read_label(slot.device) for slot in self._blocks.slots.values() if slot.device}
            self._check_devices()
            self._contents = self._open_index(directory)
            indexed = self._contents.objects.values() if self._contents else ()
            self._survey = take_survey(self._label, self._blocks, progress, {record.sequence for record in indexed})
            self._pending = self._check_journals()
            self._live = self._check_objects()
            self._pages = self._check_pages()
            self._bases = self._known_bases()
            self._layers = Layers(self._blocks, lambda uuid: self._live.get(uuid) or self._bases.get(uuid))
            self._layers.load(self._pages.values())
            for record in self._live.values():
                self._layers.use(record.layer)
            self._layers.part(())
            self._layers.serve()
            self._check_names()
            self._check_blocks()
            self._check_footers()
            self._check_free(directory)
            if data:
                self._check_data(progress)
        except BaseException:
            self.close()
            raise
        self.object_count = len(self._live)
        self.data_bytes = sum(record.size for record in self._live.values())

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the devices and the index."""
        self._stack.close()

    def _find(
        self, kind: str, what: str, remedy: str = "", mend: Mend = Mend.NOTHING, *, harmless: bool = False
    ) -> None:
        finding = Finding(kind, what, remedy or f"--repair: {mend.value}", mend, harmless)
        self._told[kind] += 1
        if self._told[kind] <= _SHOWN_MAX:
            self.findings.append(finding)
        elif self._told[kind] == _SHOWN_MAX + 1:
            self.findings.append(Finding(kind, "there is more of this kind", finding.remedy, mend, harmless))

    # Labels and devices

    def _check_devices(self) -> None:
        for slot in self._blocks.slots.values():
            own = self._own.get(slot.index)
            if slot.device is None:
                what = f"device {slot.index} ({uuid_text(slot.uuid)}) is missing: {slot.why}"
                self._find("device", what, "attach the device itself, not a copy of it")
            elif own is not None:
                self._check_label(slot, slot.device, own)

    def _check_label(self, slot: Slot, device: BlockDevice, own: Label) -> None:
        for problem in label_problems(slot, device, own):
            self._find("label", problem, mend=Mend.LABEL, harmless=problem.endswith("older than the others"))

    # The index and the journals

    def _open_index(self, directory: Path) -> Contents | None:
        """What the index holds; None if there is none that can be used."""
        try:
            self._backend.open(directory, read_only=not self._can_write())
            self._stack.callback(self._backend.close)
            owner, is_whole = owner_of(self._backend)
            if owner and owner != self._label.pool_uuid:
                raise PoolError(
                    f"the index at {directory} belongs to pool {uuid_text(owner)}",
                    hint="name the directory of this pool's index",
                )
            if is_whole:
                verify(self._backend, directory)
                return read_contents(self._backend)
            what = (
                f"a rebuild of the index at {directory} was cut short" if owner else f"there is no index at {directory}"
            )
            self._find("index", what, mend=Mend.INDEX)
        except NotFound:
            self._find("index", f"there is no index at {directory}", mend=Mend.INDEX)
        except Damaged as error:
            remedy = f"move {directory} away; 'rustorctl pool rebuild' makes a new one"
            self._find("index", error.message, remedy)
        return None

    def _is_whole(self) -> bool:
        """Whether no device is missing: what the others have may be older than what the index knows from it."""
        return all(slot.device is not None for slot in self._blocks.slots.values())

    def _can_write(self) -> bool:
        return all(slot.device is None or not slot.device.read_only for slot in self._blocks.slots.values())

    def _check_journals(self) -> set[ObjectId]:
        """Returns the Objects that the index need not know of yet, because their changes wait in the journals."""
        pending: set[ObjectId] = set()
        if self._contents is None:
            return pending
        count = 0
        for slot in self._blocks.slots.values():
            if slot.device is None:
                continue
            position = self._contents.positions.get(slot.uuid)
            ring = Ring(slot.device, slot.uuid, slot.geometry, self._label.secret)
            batches = ring.replay(position)
            self._check_reach(slot, ring.number)
            for entry in (entry for batch in batches for entry in batch.entries):
                count += bool(entry.sequence)
                if entry.kind is Kind.PUT:
                    pending |= {entry.payload[:16], Record(entry.payload[16:]).uuid} - {NOTHING}
                elif entry.kind in (Kind.DELETE, Kind.LAYER, Kind.MAP, Kind.GRAVE):
                    pending.add(entry.payload[:16])
                else:
                    pending |= {id.uuid for id in decode_record_ids(entry.payload)}
        if self._label.state is State.OPEN:
            what = f"the pool was not closed in order: {count:,} changes in its journals are not in the index yet"
            self._find("journal", what, _NEXT_START, harmless=True)
        return pending

    def _check_reach(self, slot: Slot, end: int) -> None:
        """``end`` is the number of the batch with which the next start ends its reading of a journal."""
        newest = max((batch.number for _, batch in self._whole_batches(slot)), default=0)
        if newest >= end:
            what = f"batch {end} in the journal of device {slot.index} is damaged, and it has batches up to {newest}"
            self._find("journal", f"{what}: to the next start, their changes would be lost", mend=Mend.INDEX)

    def _whole_batches(self, slot: Slot) -> Iterator[tuple[int, Batch]]:
        assert slot.device is not None
        return Ring(slot.device, slot.uuid, slot.geometry, self._label.secret).batches()

    # Objects, names and blocks

    def _check_objects(self) -> dict[ObjectId, Record]:
        """Compare the index with the devices. Returns the Objects that there are, as both together know them."""
        live = {uuid: Record(raw) for uuid, raw in self._survey.live.items()}
        if self._contents is None:
            return live
        for text in self._contents.strange:
            self._find("index", text, mend=Mend.INDEX)
        indexed = self._contents.objects
        for uuid in live.keys() - indexed.keys() - self._pending:
            if self._is_whole():
                self._find("index", f"{_name(live[uuid])} is on the devices, and not in the index", mend=Mend.INDEX)
            else:
                del live[uuid]  # the device that is missing may have what says that it was deleted
        for uuid, record in indexed.items():
            found = live.get(uuid)
            if uuid in self._pending or (found is not None and found.raw == record.raw):
                continue
            if record.id in self._survey.gone:
                what = "was moved, and the index has its old place" if found else "was deleted, and is in the index"
                self._find("index", f"{_name(record)} {what}", mend=Mend.INDEX)
            elif found is None or found.sequence < record.sequence:
                live[uuid] = record  # its footers are not there: told with these
            else:
                self._find("index", f"{_name(record)} is not in the index as on the devices", mend=Mend.INDEX)
        return live

    def _check_pages(self) -> dict[tuple[bytes, int], Page]:
        """The same for the maps of volumes."""
        indexed = self._contents.pages if self._contents else {}
        needless = self._needless_layers(self._survey.pages.values())
        pages = {key: page for key, page in self._survey.pages.items() if key[0] not in needless or key in indexed}
        if self._contents is None:
            return pages
        whole = [page for page in indexed.values() if (page.layer, 0) in indexed]
        erased = needless | self._needless_layers(whole)  # or next: nobody writes their pages to the slots any more
        for key in pages.keys() | indexed.keys():
            found, page = pages.get(key), indexed.get(key)
            if found == page or key[0] in self._pending:
                continue
            what = f"page {key[1]} of the map of layer {uuid_text(key[0])}"
            if page is not None and (found is None or found.generation < page.generation):
                pages[key] = page
                if key[0] in erased or not self._blocks.is_there((slot_of(page),)):
                    continue
                if self._contents is not None and self._contents.unkept:
                    self._find("footer", f"{what} is not on the devices yet", _NEXT_START, harmless=True)
                else:
                    self._lost_pages.append(page)
                    self._find("footer", f"{what} is in the index, and not on the devices", mend=Mend.FOOTER)
            elif self._is_whole():
                self._find("index", f"{what} is not in the index as on the devices", mend=Mend.INDEX)
            elif page is None:
                del pages[key]
            else:
                pages[key] = page
        return {key: page for key, page in pages.items() if (key[0], 0) in pages}

    def _needless_layers(self, pages: Iterable[Page]) -> set[bytes]:
        """Those of the Layers with these pages that nobody needs: deleted, and that they have been erased is not in the
        journal yet."""
        layers = Layers(self._blocks, lambda uuid: None)
        layers.load(pages)
        for record in self._live.values():
            layers.use(record.layer)
        return {layer.uuid for layer in layers.needless()}

    def _known_bases(self) -> dict[ObjectId, Record]:
        """The deleted Objects on which volumes build."""
        wanted = {decode_head(page.content).base for (_, number), page in self._pages.items() if not number}
        known = {uuid: Record(raw) for uuid, raw in self._survey.bases().items() if uuid in wanted}
        return known if self._contents is None else self._contents.bases | known

    def _layer_extents(self) -> Iterator[tuple[bytes, Extent]]:
        """The blocks of the volumes, with the uuid of the Layer that has them."""
        for layer in self._layers.by_uuid.values():
            for extent in layer.extents(self._layers.chunk_blocks):
                yield layer.uuid, extent

    def _check_names(self) -> None:
        if self._contents is None:
            return
        names = {record.name: uuid for uuid, record in self._live.items() if record.name}
        for name in sorted(names.keys() | self._contents.names.keys()):
            uuid, indexed = names.get(name), self._contents.names.get(name)
            if uuid == indexed or {uuid, indexed} & self._pending:
                continue
            if indexed is None:
                what = f"is that of Object {_text(uuid)}, and not in the index"
            elif uuid is None:
                what = f"leads to Object {_text(indexed)}, which does not have it, or does not exist"
            else:
                what = f"leads to Object {_text(indexed)} instead of {_text(uuid)}"
            self._find("name", f"the name {name!r} {what}", mend=Mend.INDEX)

    def _check_blocks(self) -> None:
        """No block may be that of two Objects of the index, or none of the pool's."""
        if self._contents is None:
            return
        runs: dict[int, list[tuple[int, int, ObjectId]]] = {index: [] for index in self._blocks.slots}
        records = (*self._contents.objects.items(), *self._bases.items())
        objects = ((uuid, extent) for uuid, record in records for extent in record.extents)
        for uuid, extent in chain(objects, self._layer_extents()):
            if extent.device not in runs or not self._is_data(extent):
                self._find("index", f"{_text(uuid)} has {_place(extent)}, which hold no data", mend=Mend.INDEX)
            else:
                runs[extent.device].append((extent.block, extent.count, uuid))
        for device, taken in runs.items():
            for (block, count, one), (other_block, _, other) in pairwise(sorted(taken)):
                if block + count > other_block and not {one, other} & self._pending:
                    what = f"{_text(one)} and {_text(other)} both have block {other_block} of device {device}"
                    self._find("blocks", what, mend=Mend.INDEX)
        for text in self._survey.doubtful:
            self._find("blocks", text, "the next rebuild of the index decides it so", harmless=True)

    def _is_data(self, extent: Extent) -> bool:
        runs = self._blocks.slots[extent.device].geometry.data_runs
        return any(block <= extent.block and extent.end <= block + count for block, count in runs)

    # What is on the blocks

    def _check_footers(self) -> None:
        good = {index: set(blocks) for index, blocks in self._survey.footers.items()}
        for record in self._live.values():
            for number, copy in enumerate(record.copies):
                device, block = copy[-1].device, copy[-1].end - 1
                if device not in good or block in good[device]:
                    continue
                where = f"the footer of copy {number} of {_name(record)}, in block {block} of device {device},"
                if record.uuid in self._pending:
                    self._find("footer", f"{where} is not whole yet", _NEXT_START, harmless=True)
                else:
                    self._torn_footers.append((record, number))
                    self._find("footer", f"{where} is missing or damaged", mend=Mend.FOOTER)

    def _check_free(self, directory: Path) -> None:
        """Free blocks end with no footer, and are zero if that is what the policy promises."""
        if self._contents is None or not self._is_whole():
            return  # what is free, all devices and the index have to tell
        records = (*self._live.values(), *self._bases.values())
        taken = [extent for record in records for extent in record.extents]
        taken += [extent for _, extent in self._layer_extents()]
        taken += promised(directory / PENDING, self._label.pool_uuid, self._blocks)
        for grave in [*self._contents.graves, *(self._survey.graves() if self._pending else ())]:
            taken += grave.extents
        for slot in self._blocks.slots.values():
            taken += [Extent(slot.index, run.block, run.count) for run in slot.bad.runs]
        if unreadable := without(self._survey.unreadable, _merged(taken)):
            self._find("free", f"{_first(unreadable)}: is free, and cannot be read", _HEALTH, harmless=True)
        taken += unreadable
        footers = self._footer_blocks()
        leftovers = set(self._written_outside(taken))
        with_footers = {extent for extent in leftovers if (extent.device, extent.block) in footers}
        self._tell_leftovers(with_footers, "ends with the footer of an Object that is deleted or was never committed")
        if self._policy == "zero":
            self._tell_leftovers(leftovers - with_footers, "is not zero")

    def _footer_blocks(self) -> set[tuple[int, int]]:
        return {(device, block) for device, blocks in self._survey.footers.items() for block in blocks}

    def _tell_leftovers(self, blocks: set[Extent], what: str) -> None:
        if blocks:
            self._find("free", f"{_first(blocks)}: is free, and {what}", mend=Mend.ERASE, harmless=True)
            self._leftovers += sorted(blocks)

    def _written_outside(self, taken: Iterable[Extent]) -> Iterator[Extent]:
        """The blocks that are not zero and not in ``taken``, one by one."""
        size = self._label.block_size
        zeros = bytes(size)
        for extent in without(self._survey.written, _merged(taken)):
            for first in range(0, extent.count, SCAN_BYTES // size):
                part = Extent(extent.device, extent.block + first, min(SCAN_BYTES // size, extent.count - first))
                data = bytes(self._blocks.read_copy((part,), 0, part.count * size))
                if data.count(0) < len(data):
                    for at in range(part.count):
                        if data[at * size : (at + 1) * size] != zeros:
                            yield Extent(part.device, part.block + at, 1)

    def _check_data(self, progress: Progress) -> None:
        for record in sorted(self._live.values(), key=lambda record: record.extents[:1]):
            bad = [number for number in range(len(record.copies)) if not self._is_right(record, number, progress)]
            for number in bad:
                has_other = len(bad) < len(record.copies)
                remedy = "start the daemon; 'rustorctl scrub start' mends it" if has_other else _RESTORE
                if record.uuid in self._pending:
                    what = f"copy {number} of {_name(record)} is not whole yet"
                    self._find("data", what, _NEXT_START, harmless=True)
                    continue
                self._find("data", f"copy {number} of {_name(record)} does not match its checksums", remedy)

    def _is_right(self, record: Record, number: int, progress: Progress) -> bool:
        """Whether the data of a copy matches its checksums, or is on a device that is missing."""
        try:
            if not self._blocks.is_there(record.copies[number]) or self._is_layer_away(record):
                return True
            for offset in range(0, record.size, _VERIFY_BYTES):
                length = min(_VERIFY_BYTES, record.size - offset)
                if not self._blocks.verify(record, number, offset, length):
                    return False
                progress(length)
        except (Damaged, DeviceError, NotFound):  # also of what is below a snapshot
            return False
        return True

    def _is_layer_away(self, record: Record) -> bool:
        return bool(record.layer) and self._layers.has_gone(record.layer, 0, chunk_count(record.size))

    # Mending

    @property
    def plan(self) -> list[Mend]:
        """What `mend` would do, in order. Empty if there is nothing to do."""
        wanted = {finding.mend for finding in self.findings}
        return [mend for mend in Mend if mend in wanted and mend is not Mend.NOTHING]

    def mend(self) -> None:
        """Carry out the plan. Can be repeated after a crash: each step can. Raises DeviceError or PoolError."""
        plan = self.plan
        missing = [slot.index for slot in self._blocks.slots.values() if slot.device is None]
        if Mend.INDEX in plan and missing:
            raise PoolError(
                f"device {missing[0]} is missing: the index cannot be made anew without it",
                hint="attach it; 'rustorctl pool rebuild --without' makes do with what there is",
            )
        if Mend.LABEL in plan:
            self._write_labels()
        if Mend.FOOTER in plan:
            self._write_footers()
        if Mend.INDEX in plan:
            survey, label = self._survey, self._label
            objects = (record for _, record in sorted(self._live.items()))
            state = (survey.sequence, label.generation, label.pool_uuid)
            bases, pages = self._bases.values(), self._pages.values()
            replace_index(self._backend, state, survey.positions, objects, survey.graves(), bases, pages)
        if Mend.ERASE in plan:
            self._blocks.erase(self._leftovers)
            self._flush({extent.device for extent in self._leftovers})

    def _write_labels(self) -> None:
        for slot in self._blocks.slots.values():
            own = self._own.get(slot.index)
            if slot.device is not None and own is not None:
                write_label(slot.device, own)

    def _write_footers(self) -> None:
        size = self._label.block_size
        for record, number in self._torn_footers:
            footer = footer_of(record, number, self._blocks, self._label)
            copy = record.copies[number]
            self._blocks.write_copy(copy, block_count(copy) * size - len(footer), footer)
        self._blocks.keep_pages(self._label.secret, self._lost_pages)
        written = {extent.device for record, number in self._torn_footers for extent in record.copies[number]}
        self._flush(written - {LAYERS})

    def _flush(self, devices: Iterable[int]) -> None:
        for error in self._blocks.flush(devices).values():
            raise error


def label_problems(slot: Slot, device: BlockDevice, own: Label) -> Iterator[str]:
    """What is wrong with the copies of a device's label, ``own`` being what the newest good one says."""
    for offset in slot.geometry.label_offsets:
        data = memoryview(bytearray(LABEL_BYTES))
        problem = "is absent"
        try:
            device.read(offset, (data,))
            copy = decode_label(data)
            if copy is not None:
                problem = "is older than the others" if copy.generation < own.generation else ""
        except (FormatError, DeviceError) as error:
            problem = f"is damaged: {error.message}"
        if problem:
            yield f"the copy of the label at byte {offset} of device {slot.index} {problem}"


def overlaps(one: Record, other: Record) -> bool:
    """Whether two Records have a block in common."""
    return sum(extent.count for extent in without(one.extents, _merged(other.extents))) < block_count(one.extents)


def _merged(extents: Iterable[Extent]) -> list[Extent]:
    """``extents`` in order, those that touch or overlap made one."""
    merged: list[Extent] = []
    for extent in sorted(extents):
        if merged and merged[-1].device == extent.device and extent.block <= merged[-1].end:
            last = merged.pop()
            extent = Extent(last.device, last.block, max(last.end, extent.end) - last.block)
        merged.append(extent)
    return merged


def _text(uuid: ObjectId | None) -> str:
    return uuid_text(uuid) if uuid and len(uuid) == 16 else "none"


def _name(record: Record) -> str:
    return f"Object {uuid_text(record.uuid)}" + (f" ({record.name!r})" if record.name else "")


def _first(blocks: Collection[Extent]) -> str:
    """Which of some blocks is the first, and how many more there are."""
    first = min(blocks)
    more = f", and {len(blocks) - 1:,} more" if len(blocks) > 1 else ""
    return f"block {first.block} of device {first.device}{more}"


def _place(extent: Extent) -> str:
    return f"blocks {extent.block} to {extent.end - 1} of device {extent.device}"
