"""BlockStore: the pool as one set of devices; reads (verified), writes, flushes and erases blocks on them."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from time import perf_counter
from typing import Literal

from xxhash import xxh3_64_digest

from rustord.badblocks import RUN_COUNT_MAX, TABLE_BYTES, BadBlocks, choose_bad_blocks, decode_bad_blocks
from rustord.blockdevice import BlockDevice, ImageFile, RawDevice
from rustord.distribution import Distribution
from rustord.errors import Damaged, DeviceError, FormatError, RustordError
from rustord.event import DEVICE_FAILED, OBJECT_DAMAGED
from rustord.extent import LAYERS, Extent, extend
from rustord.label import LABEL_BYTES, Geometry, Label, Standing, choose_label, decode_label, label_offsets
from rustord.lease import Place
from rustord.manifest import CHUNK_BYTES, Copy, Data
from rustord.objkey import uuid_text
from rustord.page import Page, encode_slot, slot_of
from rustord.record import Record

log = logging.getLogger(__name__)

ErasePolicy = Literal["zero", "discard", "none"]

_REPAIR_BYTES = 1 << 20


@dataclass
class Slot:
    """The place of one device in the pool. ``device`` is None while it is missing; then ``why`` says why.

    ``bad`` are its blocks that are never used again, ``standing`` is what the pool means to do with it. It is
    ``behind`` if it was given up, and something may be on it that counts as erased.
    """

    index: int
    uuid: bytes
    geometry: Geometry
    device: BlockDevice | None
    why: str = ""
    bad: BadBlocks = field(default_factory=BadBlocks)
    standing: Standing = Standing.IN_USE
    behind: bool = False
    flush_s: Distribution = field(default_factory=Distribution)
    """How long its flushes took, in seconds."""

    @property
    def state(self) -> Literal["online", "failed", "read-only", "missing"]:
        if self.device is None:
            return "missing"
        if self.device.failed:
            return "failed"
        return "read-only" if self.device.read_only else "online"

    @property
    def reason(self) -> str:
        """Why the device is not online; "" if it is."""
        return self.why if self.device is None else self.device.failed


class BlockStore:
    """The devices of a pool, by index. Block numbers become byte offsets here and nowhere else."""

    def __init__(self, block_size: int, slots: Iterable[Slot], erase_policy: ErasePolicy = "zero") -> None:
        self.block_size = block_size
        self.slots: Mapping[int, Slot] = {}
        """By index, in order; never changed but replaced, since any thread may go through it."""
        self.device_uuids: dict[int, bytes] = {}
        """The uuid of each device, by index; of those removed, too: who has an older Record goes on with it."""
        self.erase_policy = erase_policy
        self.on_damage: Callable[[Record, int, int], None] = lambda record, start, end: None
        """Told by readers, on their threads, of bytes of an Object of which a copy was wrong or could not be read."""
        self.is_gone: Callable[[Record], bool] = lambda record: False
        """Whether an Object was deleted or moved meanwhile, so that what is on these blocks is nobody's concern."""
        self.read_layer: Callable[[int, memoryview], None] = _no_layer
        """Fills a buffer from an offset in bytes on what stands for a device with index `LAYERS`."""
        self.reread_layer: Callable[[int, memoryview], None] = _no_layer
        """The same from the medium itself."""
        self.read_layer_now: Callable[[int, memoryview], bool] = lambda offset, buffer: False
        """The same from the page cache; False if that is not possible."""
        self.layer_place: Callable[[int], Place | None] = lambda offset: None
        """Where the chunk at such an offset is."""
        self._condemning = threading.Lock()
        self._flushers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="flush")
        for slot in slots:
            self.add(slot)

    def add(self, slot: Slot) -> None:
        """Make a device one of the pool's."""
        self.slots = dict(sorted({**self.slots, slot.index: slot}.items()))
        self.device_uuids[slot.index] = slot.uuid

    def remove(self, index: int) -> None:
        """Forget a device, which the caller closes."""
        self.slots = {other: slot for other, slot in self.slots.items() if other != index}

    def device(self, index: int) -> BlockDevice:
        """The device in slot ``index``. Raises DeviceError if it is missing."""
        slot = self.slots.get(index)
        if slot is None or slot.device is None:
            which = f"{index} ({uuid_text(slot.uuid)})" if slot else f"{index}"
            raise DeviceError(
                f"device {which} of the pool is missing" + (f": {slot.why}" if slot and slot.why else ""),
                hint="attach it again; 'rustorctl device list' shows what is there",
            )
        return slot.device

    def writable(self, index: int) -> BlockDevice:
        """The device in slot ``index``. Raises DeviceError if it is missing or takes no writes."""
        device = self.device(index)
        if device.failed or device.read_only:
            raise DeviceError(
                f"device {index} ({device.path}) takes no writes: {device.failed or 'it is read-only'}",
                hint="replace the device, or restart rustord once it is repaired",
            )
        return device

    def writable_indices(self) -> list[int]:
        """The devices that take writes now, in order."""
        return [index for index, slot in self.slots.items() if slot.state == "online"]

    def writers(self, indices: Collection[int]) -> Mapping[int, BlockDevice]:
        """Those of these devices that take writes now, for `check_unchanged`."""
        slots = self.slots
        return {i: device for i in indices if i in slots and slots[i].state == "online" and (device := slots[i].device)}

    def check_unchanged(self, devices: Mapping[int, BlockDevice]) -> None:
        """Raise DeviceError unless ``devices``, to which data was written, are still in their slots and take writes.

        One that was away and is back has lost what was not flushed, and the next flush would not tell.
        """
        for index, device in devices.items():
            if self.writable(index) is not device:
                raise DeviceError(
                    f"device {index} was away while the data came in, and may have lost what it had of it",
                    hint="send the data again",
                )

    def accepting_indices(self) -> list[int]:
        """The devices that take new data now, in order."""
        in_use = Standing.IN_USE
        return [i for i, slot in self.slots.items() if slot.standing is in_use and slot.state == "online"]

    def leaving_indices(self) -> list[int]:
        """The devices that are being emptied, in order."""
        return [index for index, slot in self.slots.items() if slot.standing is Standing.LEAVING]

    def is_given_up(self, index: int) -> bool:
        """Whether the device is lost for good: given up, and missing or without writes."""
        slot = self.slots[index]
        return slot.standing is Standing.GIVEN_UP and slot.state != "online"

    def can_erase(self, index: int) -> bool:
        """Whether nothing keeps `erase` from what it has to do to blocks of this device, which may be nothing."""
        slot = self.slots.get(index)
        return slot is None or slot.state == "online" or self.is_given_up(index)

    def refusals(self) -> list[str]:
        """Why the other devices take no new data, one line for each."""
        return [
            f"device {index} is {slot.state}: {slot.reason}" if slot.state != "online" else f"device {index} is leaving"
            for index, slot in self.slots.items()
            if slot.state != "online" or slot.standing is not Standing.IN_USE
        ]

    # Writing

    def write(self, extent: Extent, buffers: Sequence[Data]) -> None:
        """Write ``buffers``, which fill no more than ``extent``, from its first block on."""
        self.writable(extent.device).write(extent.block * self.block_size, buffers)

    def start_writeback(self, extent: Extent, length: int) -> None:
        """Let the device begin with the ``length`` bytes just written at the start of ``extent``."""
        self.writable(extent.device).start_writeback(extent.block * self.block_size, length)

    def flush(self, indices: Iterable[int]) -> Mapping[int, DeviceError]:
        """Make all that was written to these devices durable, side by side; returns those that failed, and how."""
        indices = list(indices)
        if len(indices) == 1:
            outcomes = [self._flush(indices[0])]
        else:
            outcomes = list(self._flushers.map(self._flush, indices))
        return {index: error for index, error in zip(indices, outcomes, strict=True) if error is not None}

    def _flush(self, index: int) -> DeviceError | None:
        began = perf_counter()
        try:
            self.writable(index).flush()
        except DeviceError as error:
            path = device.path if (device := self.slots[index].device) else ""
            log.error("device %d takes no writes any more: %s", index, error, extra=DEVICE_FAILED(device=path))
            return error
        self.slots[index].flush_s.observe(perf_counter() - began)
        return None

    def condemn(self, extents: Iterable[Extent], *, dead: bool = False) -> None:
        """Note blocks as bad on their devices, durably; ``dead`` if what they hold is deleted and cannot be erased.

        Raises DeviceError if a device cannot note them, or has no room for more; those of other devices are noted.
        """
        problem: DeviceError | None = None
        with self._condemning:
            for extent in extents:
                try:
                    self._condemn(extent, dead=dead)
                except DeviceError as error:
                    problem = problem or error
        if problem is not None:
            raise problem

    def _condemn(self, extent: Extent, *, dead: bool) -> None:
        index, block, count = extent
        device = self.writable(index)
        slot = self.slots[index]
        bad = slot.bad.adding(block, count, dead=dead)
        if len(bad.runs) > RUN_COUNT_MAX:
            raise DeviceError(
                f"device {index} has more bad extents than its table holds ({RUN_COUNT_MAX:,})",
                hint="replace the device: blocks that were found bad now are used again after a restart",
            )
        if bad.runs != slot.bad.runs:
            slot.bad = replace(bad, number=bad.number + 1)
            write_bad_blocks(device, slot)

    def renew_bad_blocks(self, index: int) -> None:
        """Write the table of a device's bad blocks once more: a copy that was damaged is good again.

        Raises DeviceError.
        """
        with self._condemning:  # or what another thread notes meanwhile would be overwritten by what was known before
            write_bad_blocks(self.writable(index), self.slots[index])

    def keep_pages(self, secret: bytes, pages: Iterable[Page]) -> bool:
        """Write pages of Layers to their slots, durably; whether all are. What a device does not take is as before."""
        touched, failed = set(), dict[int, DeviceError]()
        for page in pages:
            slot = slot_of(page)
            data = encode_slot(page.encode(), self.device_uuids[slot.device], slot.block, secret, self.block_size)
            try:
                self.write(slot, (data,))
                touched.add(slot.device)
            except DeviceError as error:
                failed[slot.device] = error
        failed |= self.flush(touched)
        for problem in failed.values():
            log.error("the map of a volume is written no more: %s", problem)
        return not failed

    def erase(self, extents: Iterable[Extent]) -> None:
        """Do to the blocks of deleted Objects what the policy says. The last block of an extent is always zeroed.

        The last block may hold the trailer of a footer, by which a deleted Object could come back. Bad blocks are
        zeroed as far as they can be; what cannot be is logged, and is dead.
        """
        extents = [part for extent in extents for part in self._without_bad(extent)]
        block_size = self.block_size
        if self.erase_policy == "zero":
            runs: list[Extent] = []
            extend(runs, sorted(extents))
            for index, block, count in runs:
                self.writable(index).zero(block * block_size, count * block_size)
            return
        for index, block, count in extents:
            device = self.writable(index)
            if self.erase_policy == "discard":
                device.discard(block * block_size, count * block_size)
            device.zero((block + count - 1) * block_size, block_size)

    def _without_bad(self, extent: Extent) -> Iterable[Extent]:
        """The good part of what is to be erased; the bad part has been seen to, and what is given up is left."""
        slot = self.slots.get(extent.device)
        if slot is None:
            return ()
        if self.is_given_up(extent.device):
            slot.behind = True
            return ()
        if not slot.bad.runs:
            return (extent,)
        for block, count, dead in slot.bad.within(extent.block, extent.count):
            if not dead:
                self._scratch(Extent(extent.device, block, count))
        good = slot.bad.without(extent.block, extent.count)
        return [Extent(extent.device, block, count) for block, count in good]

    def _scratch(self, bad: Extent) -> None:
        try:
            self.writable(bad.device).scratch(bad.block * self.block_size, bad.count * self.block_size)
        except DeviceError as error:
            log.warning(
                "bad blocks %d to %d of device %d keep what was deleted there, and are never used again: %s",
                *(bad.block, bad.end - 1, bad.device, error),
                extra={"RUSTORD_DEVICE": bad.device},
            )
            self.condemn((bad,), dead=True)

    # Reading

    def read(
        self, record: Record, offset: int, length: int, *, wait: bool = True, room: memoryview | None = None
    ) -> memoryview | None:
        """``length`` bytes of the Object from ``offset`` on, verified; the range must lie within the Object.

        Whole chunks are read, into ``room`` if that is given and long enough, and compared with their checksums. A
        mismatch, or a device that fails, is tried once more, then on every other copy. Without ``wait`` the answer is
        None instead of a wait for a device. Raises Damaged or DeviceError, which name the Object and the range, if no
        copy has the right bytes.
        """
        first = offset // CHUNK_BYTES
        start = first * CHUNK_BYTES
        last = -(-(offset + length) // CHUNK_BYTES)
        end = min(last * CHUNK_BYTES, record.size)
        sums = record.sums(first, last)
        fits = room is not None and end - start <= len(room)
        buffer = room[: end - start] if room is not None and fits else memoryview(bytearray(end - start))
        if not wait:
            copy = record.copies[self.preferred(record)]
            if not self._fill_now(copy, start, buffer) or chunk_sums(buffer) != sums:
                return None
        else:
            self._fill_from_any(record, start, buffer, sums)
        if start == offset and len(buffer) == length:
            return buffer
        return buffer[offset - start : offset - start + length]

    def preferred(self, record: Record) -> int:
        """The copy to read first: the copies share the load, and those on missing devices come last."""
        copies = record.copies
        if len(copies) == 1:
            return 0
        order = range(len(copies))
        turn = record.uuid[-1] % len(copies)
        return min(order, key=lambda i: (not self.is_there(copies[i]), (i - turn) % len(copies)))

    def is_there(self, copy: Copy) -> bool:
        """Whether no device of the copy is missing, or was removed."""
        slots = self.slots
        return all(e.device in slots and slots[e.device].device is not None for e in copy if e.device != LAYERS)

    def has_gone(self, copy: Copy) -> bool:
        """Whether a device of the copy is away."""
        return any(self.is_away(extent.device) for extent in copy if extent.device != LAYERS)

    def is_away(self, index: int) -> bool:
        """Whether a device is not there, or has gone, which nobody may have noticed yet."""
        slot = self.slots.get(index)
        device = slot.device if slot is not None else None
        return device is None or (isinstance(device, RawDevice) and device.is_gone)

    def read_copy_now(
        self, record: Record, number: int, offset: int, buffer: memoryview, *, verify: bool = False
    ) -> bool:
        """Fill ``buffer`` with bytes of copy ``number`` from the page cache; False, never an error, if it cannot be.

        With ``verify`` it is false, too, if they do not match their checksums; the range is one of whole chunks then.
        """
        if not self._fill_now(record.copies[number], offset, buffer):
            return False
        first, last = offset // CHUNK_BYTES, -(-(offset + len(buffer)) // CHUNK_BYTES)
        return not verify or chunk_sums(buffer) == record.sums(first, last)

    def _fill_now(self, copy: Copy, start: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from the page cache; False if that is not possible."""
        for index, offset, piece in self._pieces(copy, start, buffer):
            if index == LAYERS:
                if not self.read_layer_now(offset, piece):
                    return False
                continue
            slot = self.slots.get(index)
            if slot is None or slot.device is None or not slot.device.read_now(offset, (piece,)):
                return False
        return True

    def places(self, copy: Copy, first: int, end: int) -> list[Place | None]:
        """Where the chunks of a copy from ``first`` to before ``end`` are; None for one that is in several places."""
        places: list[Place | None] = [None] * (end - first)
        at = first * CHUNK_BYTES
        for index, offset, length in self._runs(copy, at, (end - first) * CHUNK_BYTES):
            for chunk in range(-(-at // CHUNK_BYTES), (at + length) // CHUNK_BYTES):
                begin = offset + chunk * CHUNK_BYTES - at
                places[chunk - first] = self.layer_place(begin) if index == LAYERS else self.place_at(index, begin)
            at += length
        return places

    def place_at(self, index: int, offset: int) -> Place | None:
        """What begins at ``offset`` of a device; None if that is missing."""
        slot = self.slots.get(index)
        return Place(index, slot.device, offset) if slot is not None and slot.device is not None else None

    def _fill_from_any(self, record: Record, start: int, buffer: memoryview, sums: bytes) -> None:
        copies = record.copies
        preferred = self.preferred(record)
        problem: RustordError | None = None
        for turn in range(len(copies)):
            number = (preferred + turn) % len(copies)
            for fill in (self._fill, self._refill):  # what is wrong in the page cache may be right on the medium
                try:
                    fill(copies[number], start, buffer)
                except DeviceError as error:
                    if not isinstance(problem, DeviceError):  # a copy that cannot be read may be good
                        problem = error
                    continue
                if chunk_sums(buffer) == sums:
                    if problem is not None:
                        self.on_damage(record, start, start + len(buffer))
                    return
                problem = problem or Damaged(
                    f"Object {uuid_text(record.uuid)}, bytes {start} to {start + len(buffer) - 1}, does not match its "
                    f"checksum on any of {len(copies)} copies",
                    hint="the bytes on the device have changed; restore the Object from elsewhere",
                )
                if not self.is_gone(record):
                    uuid = uuid_text(record.uuid)
                    what = "copy %d of Object %s is damaged near byte %d"
                    log.error(what, number, uuid, start, extra=OBJECT_DAMAGED(uuid=uuid))
        if len(buffer) > CHUNK_BYTES:  # one copy has this chunk, another one that; and an error names one chunk
            for at in range(0, len(buffer), CHUNK_BYTES):
                number = at // CHUNK_BYTES
                self._fill_from_any(
                    record, start + at, buffer[at : at + CHUNK_BYTES], sums[8 * number : 8 * number + 8]
                )
            return
        assert problem is not None
        self.on_damage(record, start, start + len(buffer))
        if isinstance(problem, DeviceError):
            where = f"Object {uuid_text(record.uuid)}, bytes {start} to {start + len(buffer) - 1}"
            raise DeviceError(f"{where}, cannot be read: {problem.message}", hint=problem.hint) from problem
        raise problem

    def verify(self, record: Record, number: int, offset: int, length: int) -> bool:
        """Whether copy ``number`` holds the right bytes; ``offset`` is that of a chunk. Raises DeviceError."""
        first, last = offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)
        return chunk_sums(self.read_copy(record.copies[number], offset, length)) == record.sums(first, last)

    def read_copy(self, copy: Copy, offset: int, length: int) -> memoryview:
        """Bytes of a copy, footer included, as they are on the device. Raises DeviceError."""
        buffer = memoryview(bytearray(length))
        self._fill(copy, offset, buffer)
        return buffer

    def reread_copy(self, copy: Copy, offset: int, length: int) -> memoryview:
        """As `read_copy`, but as they are on the medium, whatever the page cache has."""
        buffer = memoryview(bytearray(length))
        self._refill(copy, offset, buffer)
        return buffer

    def repair(self, record: Record, number: int, footer: bytes) -> None:
        """Write copy ``number`` anew from the others, with ``footer`` behind the data; durable after the next flush.

        Raises Damaged or DeviceError.
        """
        start = 0
        for device, block, count in record.copies[number]:
            end = start + count * self.block_size
            for at in range(start, end, _REPAIR_BYTES) if device != LAYERS else ():
                stop = min(at + _REPAIR_BYTES, end)
                data = self.read(record, at, min(stop, record.size) - at) if at < record.size else b""
                assert data is not None
                tail = footer[max(at - record.size, 0) : max(stop - record.size, 0)]
                skip = (at - start) // self.block_size
                self.write(Extent(device, block + skip, count - skip), (data, tail))
            start = end

    def write_copy(self, copy: Copy, offset: int, data: Data) -> None:
        """Write over bytes of a copy, which are durable after the next flush. Raises DeviceError."""
        for index, at, piece in self._pieces(copy, offset, memoryview(data)):
            self.writable(index).write(at, (piece,))

    def _fill(self, copy: Copy, start: int, buffer: memoryview) -> None:
        for index, offset, piece in self._pieces(copy, start, buffer):
            if index == LAYERS:
                self.read_layer(offset, piece)
            else:
                self.device(index).read(offset, (piece,))

    def _refill(self, copy: Copy, start: int, buffer: memoryview) -> None:
        for index, offset, piece in self._pieces(copy, start, buffer):
            if index == LAYERS:
                self.reread_layer(offset, piece)
            else:
                self.device(index).reread(offset, (piece,))

    def _pieces(self, copy: Copy, start: int, buffer: memoryview) -> Iterable[tuple[int, int, memoryview]]:
        """(device, offset on it, part of ``buffer``) for the bytes of ``copy`` from ``start`` on."""
        if len(copy) == 1:
            index, block, _ = copy[0]
            return ((index, block * self.block_size + start, buffer),)
        pieces = []
        done = 0
        for index, offset, length in self._runs(copy, start, len(buffer)):
            pieces.append((index, offset, buffer[done : done + length]))
            done += length
        return pieces

    def _runs(self, copy: Copy, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(device, offset on it, length) of each part of a range of a copy."""
        block_size = self.block_size
        starts = list(accumulate((extent.count * block_size for extent in copy), initial=0))
        number = bisect_right(starts, start) - 1
        end = start + length
        while start < end:
            index, block, count = copy[number]
            skip = start - starts[number]
            length = min(count * block_size - skip, end - start)
            yield index, block * block_size + skip, length
            start += length
            number += 1

    def retire(self, slot: Slot, why: str) -> None:
        """Do without a device from now on. It is not closed: a reader may be using it at this moment.

        But the disk is let go of at once, so that it can be opened again when it comes back.
        """
        assert slot.device is not None
        if isinstance(slot.device, RawDevice | ImageFile):
            slot.device.let_go(why)
        slot.device, slot.why = None, why

    def close(self) -> None:
        """Close every device, which lets go of them."""
        self._flushers.shutdown()
        for slot in self.slots.values():
            if slot.device is not None:
                slot.device.close()


def _no_layer(offset: int, buffer: memoryview) -> None:
    raise DeviceError("the pool has no volumes, and an Object needs one", hint="the Object is damaged")


def chunk_sums(data: Data) -> bytes:
    """The checksums of the chunks of ``data``, which begins on a chunk."""
    if len(data) <= CHUNK_BYTES:
        return xxh3_64_digest(data) if data else b""
    view = memoryview(data)
    return b"".join([xxh3_64_digest(view[at : at + CHUNK_BYTES]) for at in range(0, len(view), CHUNK_BYTES)])


def read_label(device: BlockDevice) -> Label | None:
    """What the device's label says; None if it bears none.

    Raises FormatError if every copy that there is is damaged, or was written by a newer rustord; DeviceError.
    """
    if device.size < LABEL_BYTES:
        return None
    return choose_label([_read_copy(device, offset) for offset in label_offsets(device.size)])


def _read_copy(device: BlockDevice, offset: int) -> Label | FormatError | DeviceError | None:
    data = bytearray(LABEL_BYTES)
    try:
        device.read(offset, (data,))
        return decode_label(memoryview(data))
    except (FormatError, DeviceError) as error:
        return error


def write_label(device: BlockDevice, label: Label) -> None:
    """Write all copies of the label, one durably before the next, the newest that is there last.

    So a crash leaves the newest label or this one, also if it comes in the middle of mending what another crash has
    left. Raises DeviceError.
    """
    data = label.encode()
    for offset in sorted(label.geometry.label_offsets, key=lambda offset: _generation_at(device, offset)):
        device.write(offset, (data,))
        device.flush()


def _generation_at(device: BlockDevice, offset: int) -> int:
    """The generation of a copy of the label, 0 if it is not good."""
    copy = _read_copy(device, offset)
    return copy.generation if isinstance(copy, Label) else 0


def read_bad_blocks(device: BlockDevice, slot: Slot) -> BadBlocks:
    """What the device in ``slot`` has noted as bad. If no copy of the table can be used, that is logged: reads are
    verified whatever is bad, but blocks that were found bad may be used again."""
    copies: list[BadBlocks | FormatError | None] = []
    for offset in slot.geometry.bad_table_offsets:
        data = bytearray(TABLE_BYTES)
        try:
            device.read(offset, (data,))
            copies.append(decode_bad_blocks(memoryview(data), slot.uuid))
        except FormatError as error:
            copies.append(error)
        except DeviceError as error:
            copies.append(FormatError(error.message, hint=error.hint))
    try:
        return choose_bad_blocks(copies)
    except FormatError as error:
        log.error("device %d has lost its table of bad blocks: %s", slot.index, error)
        return BadBlocks()


def write_bad_blocks(device: BlockDevice, slot: Slot) -> None:
    """Write both copies of the table, the first one durably before the second. Raises DeviceError."""
    data = slot.bad.encode(slot.uuid)
    for offset in slot.geometry.bad_table_offsets:
        device.write(offset, (data,))
        device.flush()
