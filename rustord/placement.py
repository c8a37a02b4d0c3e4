"""Placement: an Object that has its blocks, its Record and its footers, and that a cycle is about to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from rustord.allocator import Allocator
from rustord.blockstore import BlockStore, chunk_sums
from rustord.change import Move, Put
from rustord.errors import NoSpace, RustordError
from rustord.extent import Extent, block_count, extend, trim, without
from rustord.footer import encode_footer, footer_blocks
from rustord.journal import NOTHING
from rustord.keygen import KeyGen
from rustord.layer import Frozen, Layers
from rustord.manifest import Data
from rustord.objkey import ObjectId, ObjKey
from rustord.record import Record, encode_record, record_length
from rustord.upload import Upload


@dataclass(slots=True)
class Placement:
    """What a Put or Move comes to: ``data`` and its tail go to each copy, behind its first ``skip`` blocks.

    The tails are the footers, with the zeros before them. ``replaced`` is what the Object, or its name, had before.
    """

    put: Put | Move
    record: Record
    copies: list[list[Extent]]
    skip: int
    data: Data
    tails: list[bytes]
    replaced: Record | None = None

    def failure(self, failed: Mapping[int, RustordError]) -> RustordError | None:
        """Why the Object did not reach all of its devices; None if it did."""
        if not failed:
            return None
        return next((failed[device] for device in self.record.devices if device in failed), None)

    @property
    def replaced_uuid(self) -> ObjectId:
        return self.replaced.uuid if self.replaced else NOTHING

    def remains(self, record: Record, keeper: Record | None) -> Sequence[Extent]:
        """The blocks of ``record`` to erase: not those that ``keeper`` has too, which a Move has left in place."""
        return without(record.extents, keeper.extents) if keeper and isinstance(self.put, Move) else record.extents


class Placements:
    """Makes the Placements of a pool. Changes go through one thread; `upload` may be called by any."""

    def __init__(self, secret: bytes, blocks: BlockStore, allocator: Allocator, keygen: KeyGen, layers: Layers) -> None:
        self._secret = secret
        self._block_size = blocks.block_size
        self._device_uuids = blocks.device_uuids
        self._blocks = blocks
        self._allocator = allocator
        self._keygen = keygen
        self._layers = layers
        self._copy_count = allocator.placer.copies
        self._layout = allocator.placer.name.encode("ascii")

    def put(self, put: Put, source: Upload | Frozen, sequence: int, length_max: int) -> Placement:
        """Place what a Put stores whose data is there; its Record is given ``sequence``, and may have ``length_max``
        bytes.

        Raises NoSpace, DeviceError or PluginError, and InvalidRequest or DeviceError if an Upload is not whole. The
        blocks of an Upload stay its own then; nothing else has changed.
        """
        if isinstance(source, Upload):
            return self._put_upload(put, source, sequence, length_max)
        return self._put_frozen(put, source, sequence, length_max)

    def put_each(
        self, puts: Iterable[tuple[Put, Data]], sequence: int, length_max: int
    ) -> dict[Put, Placement | RustordError]:
        """Place what Puts of plain data store; the Records are given sequences from ``sequence`` on.

        What comes of each is its Placement or an error, as of `put`. Every step is taken for all of them before the
        next one: what was just done is still in the processor's caches, so that it takes half of the time.
        """
        outcomes: dict[Put, Placement | RustordError] = {}
        drafts: list[tuple[Put, Data, ObjKey]] = []
        for put, data in puts:
            try:
                hasher = self._keygen.hasher()
                hasher.update(data)
                key = ObjKey(self._keygen.uuid(), self._keygen.algorithm, hasher.digest(), len(data))
            except RustordError as error:
                outcomes[put] = error
            else:
                drafts.append((put, data, key))
        counts = [self._blocks_needed(put, key, self._copy_count) for put, _, key in drafts]
        whole: list[tuple[Put, Data, Record, list[list[Extent]]]] = []
        for (put, data, key), copies in zip(drafts, self._allocator.place_each(counts), strict=True):
            if isinstance(copies, RustordError):
                outcomes[put] = copies
                continue
            try:
                if max(map(len, copies)) > 1:
                    self._fit(put, key, copies)
                record = self._record(put, key, copies, chunk_sums(data), sequence, length_max)
            except RustordError as error:
                self._release(copies)
                outcomes[put] = error
                continue
            whole.append((put, data, record, copies))
            sequence += 1
        for put, data, record, copies in whole:
            outcomes[put] = self._with_footers(put, record, copies, 0, data)
        return outcomes

    def take_back(self, placed: Placement) -> None:
        """Give back the blocks of a Placement that is not written."""
        self._release(placed.copies)

    def _put_upload(self, put: Put, upload: Upload, sequence: int, length_max: int) -> Placement:
        upload.finish()
        key = ObjKey(self._keygen.uuid(), self._keygen.algorithm, upload.hasher.digest(), upload.size)
        self._fit(put, key, upload.copies)
        record = self._record(put, key, upload.copies, upload.sums, sequence, length_max)
        copies, upload.copies = upload.copies, []  # they are the Object's now: to abort must not give them back
        return self._with_footers(put, record, copies, upload.written_block_count, upload.rest)

    def _put_frozen(self, put: Put, frozen: Frozen, sequence: int, length_max: int) -> Placement:
        """Only a footer is written; the data is where it was."""
        layer = self._layers.numbered(frozen.layer.head.number)
        data = self._layers.object_extent(layer)
        key = ObjKey(self._keygen.uuid(), self._keygen.algorithm, frozen.digest, layer.head.size)
        copies = [[data] for _ in range(self._copy_count)]
        try:
            self._fit(put, key, copies)
            record = self._record(put, key, copies, frozen.sums, sequence, length_max)
        except RustordError:
            self._release(copies)
            raise
        return self._with_footers(put, record, copies, data.count, b"")

    def move(self, move: Move, old: Record, sequence: int, length_max: int) -> Placement:
        """Place what a Move has copied; ``old`` is the Object before it. Raises NoSpace or DeviceError."""
        source = move.source
        source.finish()
        record = Record(old.moved(sequence, source.copies))
        if len(record.raw) > length_max:
            raise too_long(record.size, len(record.extents))
        placed = self._with_footers(move, record, source.commit(), source.body_block_count, source.rest)
        placed.replaced = old
        return placed

    def upload(self, put: Put, size: int | None, abandon: Callable[[list[Extent], list[Extent]], None]) -> Upload:
        """What takes in the data of ``put``, with blocks for all of it if its ``size`` in bytes is known."""
        hasher = self._keygen.hasher()
        if size is None:
            return Upload(self._allocator, self._blocks, hasher, None, 0, abandon)
        key = ObjKey(NOTHING, self._keygen.algorithm, hasher.digest(), size)
        needed = self._blocks_needed(put, key, self._copy_count)
        upload = Upload(self._allocator, self._blocks, hasher, size, needed, abandon)
        try:
            self._fit(put, key, upload.copies)
        except RustordError:
            upload.abort()
            raise
        return upload

    def _blocks_needed(self, put: Put, key: ObjKey, extent_count: int) -> int:
        """Blocks for the data and the footer of one copy, if all copies have ``extent_count`` extents together."""
        block_size = self._block_size
        length = record_length(key, self._layout, put.name_bytes, put.metadata, self._copy_count, extent_count)
        return -(-key.size // block_size) + footer_blocks(key.size, length, block_size)

    def _fit(self, put: Put, key: ObjKey, copies: list[list[Extent]]) -> None:
        """Make each copy just as long as it has to be: more extents make a longer Record, and so a longer footer."""
        while True:
            have = block_count(copies[0])
            need = self._blocks_needed(put, key, sum(map(len, copies)))
            if have == need:
                return
            if have < need:
                for copy, more in zip(copies, self._allocator.place(need - have), strict=True):
                    extend(copy, more)
            else:
                for copy in copies:
                    self._allocator.release(trim(copy, have - need))

    def _release(self, copies: Iterable[Iterable[Extent]]) -> None:
        self._allocator.release(extent for copy in copies for extent in copy)

    def _record(
        self, put: Put, key: ObjKey, copies: Sequence[Sequence[Extent]], sums: Data, sequence: int, length_max: int
    ) -> Record:
        raw = encode_record(key, sequence, put.created_ns, copies, sums, self._layout, put.name_bytes, put.metadata)
        record = Record(raw)
        if len(raw) > length_max:
            raise too_long(record.size, len(record.extents))
        return record

    def _with_footers(
        self, put: Put | Move, record: Record, copies: list[list[Extent]], skip: int, data: Data
    ) -> Placement:
        secret, block_size, device_uuids = self._secret, self._block_size, self._device_uuids
        tails = [encode_footer(record.raw, record.size, copy, device_uuids, secret, block_size) for copy in copies]
        return Placement(put, record, copies, skip, data, tails)


def too_long(size: int, extent_count: int) -> NoSpace:
    return NoSpace(
        f"the Record of an Object of {size} bytes in {extent_count} extents is too long for the journal",
        hint="the free space is too fragmented, or the device too small, for an Object of this size",
    )


def writes(placements: Iterable[Placement], block_size: int) -> Iterator[tuple[Extent, Sequence[Data]]]:
    """What to write where, in the order of the devices; what adjoins is one write."""
    parts: list[tuple[int, int, int, Sequence[Data]]] = []
    for placed in placements:
        for copy, tail in zip(placed.copies, placed.tails, strict=True):
            if len(copy) == 1 and not placed.skip:
                device, block, count = copy[0]
                parts.append((device, block, count, (placed.data, tail)))
            else:
                parts.extend(_split(copy, placed.skip, memoryview(b"".join((placed.data, tail))), block_size))
    return _joined(parts)


def _split(
    copy: Sequence[Extent], skip: int, data: memoryview, block_size: int
) -> Iterator[tuple[int, int, int, Sequence[Data]]]:
    """(device, block, count, buffers) for ``data`` in the blocks of ``copy`` behind its first ``skip``."""
    for device, block, count in copy:
        if skip >= count:
            skip -= count
            continue
        length = (count - skip) * block_size
        yield device, block + skip, count - skip, (data[:length],)
        data, skip = data[length:], 0


def _joined(parts: list[tuple[int, int, int, Sequence[Data]]]) -> Iterator[tuple[Extent, Sequence[Data]]]:
    """The same in the order of the devices, with what adjoins made one."""
    parts.sort(key=itemgetter(0, 1))
    device, block, count = -1, 0, 0
    buffers: list[Data] = []
    for next_device, next_block, next_count, more in parts:
        if next_device == device and next_block == block + count:
            count += next_count
        else:
            if buffers:
                yield Extent(device, block, count), buffers
            device, block, count, buffers = next_device, next_block, next_count, []
        buffers.extend(more)
    if buffers:
        yield Extent(device, block, count), buffers
