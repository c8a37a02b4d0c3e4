"""Volume: a writable, thin block device kept in the pool, while it is open.

Chunks that the volume has of its own are written in place. The first write to another chunk takes free blocks, writes
all of the chunk to them, with what the base has beside the new bytes, and only then changes the map in memory. If the
base has something there, the journal knows these blocks as a grave before: should the power fail, or the base be
deleted, nobody else would know what is on them. Flush::

    flush the devices -> journal the changes of the map -> flush the journal = the commit point -> erase, free -> return

So the journal never speaks of a chunk whose data is not durable: a crash leaves each chunk in its old place or whole in
its new one. Where only own chunks were written, the first step is all there is. Blocks that were given back are erased
and freed behind the commit point, once nobody reads or writes them any more; from there on they are a grave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import TypeVar

from rustord.allocator import Allocator
from rustord.blockdevice import BlockDevice
from rustord.blockstore import BlockStore
from rustord.errors import DeviceError, InvalidRequest, NoSpace, RustordError, Unsupported
from rustord.export import Kind, Run, State, merged
from rustord.extent import Extent
from rustord.gate import Gate
from rustord.layer import Layer, Layers
from rustord.lease import Place
from rustord.page import (
    BASE,
    CHUNK_BYTES,
    PAGE_CHUNKS,
    SLOT_COUNT,
    ZEROS,
    MapEntry,
    address_of,
    extent_at,
    page_of,
    place_at,
)
from rustord.pending import Pending
from rustord.record import RecordId

T = TypeVar("T")

Note = Callable[[Sequence[MapEntry], Sequence[RecordId], Sequence[Extent]], Sequence[RecordId]]
"""Makes changes durable, and has the KeyStore learn them; see `Journals.note`."""

Free = Callable[[Sequence[Extent], Callable[[RustordError | None], None], Sequence[RecordId]], None]
"""Erases blocks, which are these graves, and gives them back, in the background; is told when it is done."""

Announce = Callable[[Layer, Iterable[Sequence[Extent]]], Sequence[RecordId]]
"""Makes graves of blocks that are about to be filled with what a Layer has."""

_PENDING_MAX = 16384
"""Changes of the map that wait for a flush, before the next one flushes of its own accord."""
_COPIED_MAX = 1024
"""Chunks among them that are graves until then, of which the journals are told again and again."""
_SPARE_MAX = 64
"""Chunks whose blocks are announced at once, which costs a flush of the journal: 4 MiB."""
_ENTRY_CHUNKS = 4096
"""Changes in one entry of the journal: 64 KiB, which is little beside the shortest journal."""
_ERASE_S = 10.0
"""How long a write that finds no room waits for what was given back to be erased."""
_PAGE_BYTES = PAGE_CHUNKS * CHUNK_BYTES
_ZERO_BYTES = 1 << 20
_ZEROS = memoryview(bytes(_ZERO_BYTES))


class Volume:
    """The `rustord.export.Export` of a volume. Any number of threads may use it; a flush by one covers all."""

    kind = Kind.VOLUME

    def __init__(
        self,
        layer: Layer,
        layers: Layers,
        blocks: BlockStore,
        allocator: Allocator,
        note: Note,
        free: Free,
        announce: Announce,
        on_close: Callable[[], None] = lambda: None,
        *,
        is_copy: bool = False,
        pending: Pending | None = None,
    ) -> None:
        """``on_close`` is told of each `close`. With ``is_copy``, all that is written is somebody else's data.

        In ``pending`` changes of the map are noted before they are answered.
        """
        self.layer = layer
        self.key = layer.head.name
        """The volume's name, also while a snapshot has taken it from one Layer, and we are not on the next one yet."""
        self.size = layer.head.size
        self.read_only = False
        self.rotational = blocks.device(layer.home).rotational
        self.block_size = CHUNK_BYTES
        self._layers = layers
        self._blocks = blocks
        self._allocator = allocator
        self._note = note
        self._free = free
        self._announce = announce
        self._is_copy = is_copy
        self._pending = pending
        self.close = on_close
        self._gate = Gate()
        layers.watch(self._gate)  # before looking at the Layers: they are not changed until this has returned
        self.look()
        self._ended = False
        self._flushing = threading.Lock()
        self._mapping = threading.Lock()  # held while the map, or what is pending of it, changes
        self._dirty: dict[int, BlockDevice] = {}
        self._dirtying = threading.Lock()
        self._pages: dict[int, int] = {}
        self._chunks: dict[int, int] = {}
        self._freed: dict[int, list[Extent]] = {}  # what these chunks have left
        self._copied: dict[int, list[RecordId]] = {}  # graves that become these chunks with the next flush
        self._spare: list[tuple[Extent, RecordId]] = []  # graves for chunks to come
        self._spare_count = 1  # how many are taken next
        self._change_count = 0  # a chunk may have changed often
        self._left: list[tuple[Sequence[Extent], Sequence[RecordId]]] = []  # what is to be erased, durably a grave
        self._left_groups: set[int] = set()  # of chunks, that had it
        self._erasing = 0
        self._erased = threading.Condition()

    @contextmanager
    def still(self) -> Iterator[None]:
        """What the volume has is durable, and nobody reads, writes or moves it: its Layers may be changed."""
        with self._flushing, self._gate.shut():
            self._commit()
            try:
                yield
            finally:
                self.look()
                self._erase_left()

    def look(self) -> None:
        """See what the volume builds on now. Nobody is reading or writing it."""
        self._chain = self._layers.chain(self.layer)
        self._base_size = self._layers.base_size(self._chain)

    def split(self, split: Callable[[Layer], object]) -> Layer:
        """Have ``split`` put a new Layer on top of the present one, which is returned and not written any more.

        What the volume has at this moment is durable then. Raises what ``split`` raises, which may have done it.
        """
        with self.still():
            left = self.layer
            try:
                split(left)
            finally:
                self.layer = self._layers.volumes[self.key]
                self.give_back_spare()  # it is the other Layer's
        return left

    def move(self, layer: Layer, places: Mapping[int, Extent]) -> int:
        """Put chunks of ``layer``, as long as that is the one which is written, on the blocks ``places``, durably.

        A chunk is copied while nobody writes, and is the volume's with the next flush, as one that is written for the
        first time; until then its new blocks are a grave. Returns how many were moved. Raises DeviceError; chunks that
        were copied before are moved with the next flush, and the other ``places`` are given back.
        """
        left, ids = dict(places), dict[int, RecordId]()
        try:
            with self._flushing:
                if self._ended or self.layer is not layer:
                    return 0
                graves = self._announce(layer, [(extent,) for extent in places.values()])
                ids = dict(zip(places, graves, strict=True))
                with self._gate.shut():
                    for chunk, extent in places.items():
                        if self._copy(chunk, extent):
                            del left[chunk]
                            self._copied.setdefault(chunk, []).append(ids[chunk])
                self._flush()
        finally:
            self._erase([*left.values()], [ids[chunk] for chunk in left if chunk in ids])
        return len(places) - len(left)

    def _copy(self, chunk: int, extent: Extent) -> bool:
        """Whether the chunk is one that the Layer still has."""
        address = self.layer.get(chunk)
        if address <= ZEROS:
            return False
        old = extent_at(address, extent.count)
        self._write_in_place(address_of(extent), 0, self._blocks.read_copy((old,), 0, CHUNK_BYTES))
        self._change(chunk, address_of(extent), old)
        return True

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Make durable what can be, and change nothing of the Layer from then on, unless it has its name thereafter."""
        try:
            with self._flushing:
                with suppress(RustordError):
                    self._flush()
                self.give_back_spare()
                is_frozen = self._layers.is_frozen(self.layer)
                try:
                    yield
                finally:
                    self._ended = not self.layer.head.name
                    if self._ended and self._pending is not None:
                        self._pending.close()
                if self._ended and not is_frozen:
                    self._erase(_all(self._freed))  # which could not be flushed: the Layer does not name it any more
        finally:
            if self._ended:
                self._layers.unwatch(self._gate)

    # Of `rustord.lease.Grantor`

    @property
    def grantor(self) -> Volume:
        """The volume itself: what one connection has been granted, all of its process have."""
        return self

    @property
    def gates(self) -> tuple[Gate]:
        """Whatever changes where a chunk is shuts it, or is a change that the volume's own writers make."""
        return (self._gate,)

    def grant(self, first: int, end: int) -> list[Place | None]:
        with self._gate:
            own = [self.layer.get(chunk) > ZEROS for chunk in range(first, end)]  # before: it never is the base's again
            places = self._layers.places(self._chain, first, end)
            for number, place in enumerate(places):
                if place and place.device and own[number]:
                    is_writable = not (place.device.failed or place.device.read_only)
                    places[number] = place._replace(writable=is_writable)
        return places

    def dirtied(self, devices: Iterable[tuple[int, BlockDevice]]) -> None:
        """The next flush is for these devices as well."""
        with self._dirtying:
            for index, device in devices:
                if device.failed or index not in self._dirty:  # what is there instead does not make up for it
                    self._dirty[index] = device

    def flushed(self, slot: int, taken_s: float) -> None:
        """Count it as a flush of ours."""
        if slot in self._blocks.slots:
            self._blocks.slots[slot].flush_s.observe(taken_s)

    # Reading

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``. Raises DeviceError, Damaged or InvalidRequest."""
        self._check(offset, len(buffer))
        with self._gate:
            self._layers.fill(self._chain, offset, buffer)

    def _check(self, offset: int, length: int) -> None:
        if not 0 <= offset <= offset + length <= self.size:
            raise InvalidRequest(
                f"{length} bytes from {offset} on reach beyond the end of the volume at {self.size}",
                hint="ask within the volume",
            )

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Which parts of the range are holes."""
        self._check(offset, length)
        return merged(self._chunk_runs(offset, offset + length))

    def _chunk_runs(self, offset: int, end: int) -> Iterator[Run]:
        while offset < end:
            number = page_of(offset // CHUNK_BYTES)
            stop = min(end, number * _PAGE_BYTES)
            with self._gate:  # but not from one page to the next: nobody knows when, or if, that is asked for
                chunks = range(offset // CHUNK_BYTES, -(-stop // CHUNK_BYTES))
                found = [] if self._is_hole(number) else [*map(self._has_data, chunks)]
            if not found:
                yield Run(stop - offset, State.HOLE | State.ZERO)
                offset = stop
            for has_data in found:
                length = min(CHUNK_BYTES - offset % CHUNK_BYTES, end - offset)
                yield Run(length, State.DATA if has_data else State.HOLE | State.ZERO)
                offset += length

    def _is_hole(self, number: int) -> bool:
        """Whether there is nothing at all where a page would be, which is most of a large volume. Within the gate."""
        is_beyond = (number - 1) * _PAGE_BYTES >= self._base_size
        return is_beyond and not any(layer.has_page(number) for layer in self._chain)

    def _has_data(self, chunk: int) -> bool:
        """Whether the chunk may be anything but zeros. Within the gate, for a merge moves chunks to another Layer."""
        address = self._layers.find(self._chain, chunk)
        return address > ZEROS or (address == BASE and chunk * CHUNK_BYTES < self._base_size)

    def _has_base(self, chunk: int) -> bool:
        """Whether what is below the top Layer may have anything but zeros there."""
        address = self._layers.find(self._chain[1:], chunk)
        return address > ZEROS or (address == BASE and chunk * CHUNK_BYTES < self._base_size)

    # Writing

    def write(self, offset: int, data: memoryview) -> None:
        """Overwrite. Raises NoSpace, which leaves each chunk as it was or written, DeviceError or InvalidRequest."""
        self._check(offset, len(data))
        self._limit_pending()
        try:
            self._write(offset, data)
        except NoSpace:
            self._reclaim()
            self._write(offset, data)

    def _write(self, offset: int, data: memoryview) -> None:
        with self._gate:
            at, end = 0, len(data)
            while at < end:
                chunk, skip = divmod(offset + at, CHUNK_BYTES)
                address = self.layer.get(chunk)
                stop = min(at + CHUNK_BYTES - skip, end)
                if address <= ZEROS:
                    self._write_first(chunk, skip, data[at:stop])
                else:
                    following = address + self._layers.chunk_blocks
                    while stop < end and self.layer.get(chunk + 1) == following:
                        stop = min(stop + CHUNK_BYTES, end)
                        following, chunk = following + self._layers.chunk_blocks, chunk + 1
                    self._write_in_place(address, skip, data[at:stop])
                at = stop

    def _write_in_place(self, address: int, skip: int, data: memoryview) -> None:
        index, block = place_at(address)
        device = self._blocks.writable(index)
        device.write(block * self._blocks.block_size + skip, (data,))
        with self._dirtying:
            self._dirty.setdefault(index, device)  # one that was there before has yet to be flushed, if it still can be

    def _write_first(self, chunk: int, skip: int, data: memoryview) -> None:
        """Write to a chunk that the top Layer does not have yet."""
        with self._mapping:
            address = self.layer.get(chunk)
            if address > ZEROS:  # another thread was faster
                self._write_in_place(address, skip, data)
                return
            self._place(page_of(chunk))
            is_copy = self._is_copy or (len(data) < CHUNK_BYTES and self._has_data(chunk))
            extent, graves = self._take_announced() if is_copy else (self._run(), [])
            try:
                self._write_in_place(address_of(extent), 0, self._whole(chunk, skip, data))
            except BaseException:
                self._erase([extent], graves)
                raise
            self._change(chunk, address_of(extent))
            if graves:
                self._copied.setdefault(chunk, []).extend(graves)

    def _run(self) -> Extent:
        """Blocks for a chunk. Raises NoSpace."""
        return self._allocator.run(self._layers.chunk_blocks, self.layer.home, is_new=not self._is_copy)

    def _take_announced(self) -> tuple[Extent, list[RecordId]]:
        """Blocks for a chunk, and the grave that they are until the next flush.

        Each time that there are none, more are taken in advance: no more than have been needed until then.
        """
        if not self._spare:
            taken = [self._run()]
            try:
                with suppress(NoSpace):
                    for _ in range(self._spare_count - 1):
                        taken.append(self._run())
                graves = self._announce(self.layer, [(extent,) for extent in reversed(taken)])
            except BaseException:
                self._allocator.release(taken)
                raise
            self._spare = [*zip(reversed(taken), graves, strict=True)]
            self._spare_count = min(2 * self._spare_count, _SPARE_MAX)
        extent, grave = self._spare.pop()
        return extent, [grave]

    def give_back_spare(self) -> None:
        """Give back the blocks that were announced for chunks to come."""
        with self._mapping:
            spare, self._spare = self._spare, []
        self._erase([extent for extent, _ in spare], [grave for _, grave in spare])

    def _whole(self, chunk: int, skip: int, data: memoryview) -> memoryview:
        """The chunk as it will be."""
        if len(data) == CHUNK_BYTES:
            return data
        whole = memoryview(bytearray(CHUNK_BYTES))
        if self._has_data(chunk):
            self._layers.fill(self._chain, chunk * CHUNK_BYTES, whole)
        whole[skip : skip + len(data)] = data
        return whole

    def _place(self, number: int) -> None:
        """See to it that a page has slots. Raises NoSpace."""
        if number not in self.layer.places:
            place = address_of(self._allocator.run(SLOT_COUNT, self.layer.home))
            self.layer.places[number] = self._pages[number] = place
            if self._pending is not None:  # now: the chunk that it is for may find no room, and another one does
                self._pending.add(MapEntry(self.layer.uuid, [(number, place)], []))

    def _change(self, chunk: int, address: int, *left: Extent) -> None:
        """Have a chunk somewhere else, and ``left`` given back with the next flush."""
        self.layer.set(chunk, address)
        self._chunks[chunk] = address
        if left:
            self._freed.setdefault(chunk, []).extend(left)
        self._change_count += 1
        if self._pending is not None:
            self._pending.add(MapEntry(self.layer.uuid, [], [(chunk, address)]))

    def _limit_pending(self) -> None:
        """Flush what waits for that, if it is much: before there is more, for a client may not care if that fails."""
        if self._change_count > _PENDING_MAX or len(self._copied) > _COPIED_MAX:
            self.flush()

    # Giving back

    def trim(self, offset: int, length: int) -> None:
        """Give back whole chunks within the range, which read as zeros then. Raises InvalidRequest, NoSpace."""
        self._check(offset, length)
        first, end = -(-offset // CHUNK_BYTES), (offset + length) // CHUNK_BYTES
        while first < end:
            page_end = min(end, page_of(first) * PAGE_CHUNKS)
            self._limit_pending()
            try:
                self._trim_page(first, page_end)
            except NoSpace:
                self._reclaim()
                self._trim_page(first, page_end)
            first = page_end

    def _trim_page(self, first: int, end: int) -> None:
        """Give back chunks of one page."""
        with self._gate, self._mapping:
            if not self._is_hole(page_of(first)):
                for chunk in range(first, end):
                    self._trim_chunk(chunk)

    def _trim_chunk(self, chunk: int) -> None:
        address, bare = self.layer.get(chunk), ZEROS if self._has_base(chunk) else BASE
        if address == bare or (address == BASE and bare == BASE):
            return
        self._place(page_of(chunk))
        left = [extent_at(address, self._layers.chunk_blocks)] if address > ZEROS else []
        self._change(chunk, bare, *left)

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        """Make the range read as zeros. Whole chunks are given back unless ``keep``; the rest is written.

        Raises Unsupported if it is to be ``fast`` and all of it would be written, and as `write` and `trim` do.
        """
        self._check(offset, length)
        if keep and fast:
            raise Unsupported(
                "zeros that are to stay allocated are written, which is no faster than to write them from outside",
                hint="let the range be given back, or take the time",
            )
        end = offset + length
        head_end = min(end, -(-offset // CHUNK_BYTES) * CHUNK_BYTES)
        tail = max(head_end, end // CHUNK_BYTES * CHUNK_BYTES)
        if keep:
            head_end = tail = end
        self._write_zeros(offset, head_end, keep=keep)
        self.trim(head_end, tail - head_end)
        self._write_zeros(tail, end, keep=keep)

    def _write_zeros(self, offset: int, end: int, *, keep: bool) -> None:
        while offset < end:
            stop = min(end, offset + _ZERO_BYTES)
            with self._gate:
                is_due = keep or self._has_data(offset // CHUNK_BYTES)
            if is_due:
                self.write(offset, _ZEROS[: stop - offset])
            offset = stop

    # Making durable

    def flush(self) -> None:
        """Make durable all that was done before. What was not durable when it raises is flushed again.

        Raises DeviceError, or Unavailable; see `Pending.check`.
        """
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        try:
            self._commit()
        finally:
            if self._left:
                self._gate.drain(self._left_groups)  # nobody is reading or writing there any more
                self._erase_left()

    def _erase_left(self) -> None:
        left, self._left, self._left_groups = self._left, [], set()
        for extents, graves in left:
            self._erase(extents, graves)

    def _erase(self, extents: Sequence[Extent], graves: Sequence[RecordId] = ()) -> None:
        if extents:
            with self._erased:
                self._erasing += 1
            self._free(extents, self._on_erased, graves)

    def _on_erased(self, error: RustordError | None) -> None:
        del error  # then the blocks do not come back before the next start
        with self._erased:
            self._erasing -= 1
            self._erased.notify_all()

    def _reclaim(self) -> None:
        """Wait until what was given back is free."""
        self.give_back_spare()
        self.flush()
        with self._erased:
            self._erased.wait_for(lambda: not self._erasing, _ERASE_S)

    def _commit(self) -> None:
        """Everything but the erasing of what was given back, which is ``_left`` then."""
        for _ in range(0, max(len(self._chunks), 1), _ENTRY_CHUNKS):
            self._commit_oldest()

    def _commit_oldest(self) -> None:
        """Make durable what was written, and of the changes of the map as many as one entry of the journal takes.

        What these chunks leave is a grave from then on, in the same batch: no crash parts the two.
        """
        with self._mapping:
            pages, self._pages = self._pages, {}
            chunks = dict(islice(self._chunks.items(), _ENTRY_CHUNKS))
            freed = {chunk: self._freed.pop(chunk) for chunk in chunks if chunk in self._freed}
            copied = {chunk: self._copied.pop(chunk) for chunk in chunks if chunk in self._copied}
            for chunk in chunks:
                del self._chunks[chunk]
            change_count, self._change_count = self._change_count, len(self._chunks)
        with self._dirtying:
            dirty, self._dirty = self._dirty, {}
        try:
            self._flush_devices(dirty)
            if chunks or pages:
                self._journal(pages, chunks, _all(copied), freed)
        except BaseException:
            with self._mapping:
                self._pages = pages | self._pages
                self._chunks = chunks | self._chunks
                self._freed = _joined(freed, self._freed)
                self._copied = _joined(copied, self._copied)
                self._change_count += change_count
            with self._dirtying:
                self._dirty |= dirty
            raise

    def _flush_devices(self, dirty: dict[int, BlockDevice]) -> None:
        # A device that was removed was empty: nobody needs any more what was written there.
        dirty = {index: device for index, device in dirty.items() if index in self._blocks.slots}
        for index, device in dirty.items():
            if self._blocks.writable(index) is not device:
                raise DeviceError(
                    f"device {index} was away, and may have lost what was written to it",
                    hint="restart rustord, and check what is on the volume",
                )
        for error in self._blocks.flush(dirty).values():
            raise error

    def _journal(
        self, pages: dict[int, int], chunks: dict[int, int], copied: Sequence[RecordId], freed: dict[int, list[Extent]]
    ) -> None:
        """``copied`` are no graves any more, and what these chunks have ``freed`` is one."""
        entry = MapEntry(self.layer.uuid, sorted(pages.items()), sorted(chunks.items()))
        if self._pending is not None:
            with self._mapping:
                self._pending.check()
        left = _all(freed)
        graves = self._note([entry], copied, left)
        if left:
            self._left.append((left, graves))
            self._left_groups.update(chunk // PAGE_CHUNKS for chunk in freed)
        if self._pending is not None:
            with self._mapping:
                self._pending.settle(MapEntry(self.layer.uuid, [*self._pages.items()], [*self._chunks.items()]))


def _all(by_chunk: dict[int, list[T]]) -> list[T]:
    return [*chain.from_iterable(by_chunk.values())]


def _joined(older: dict[int, list[T]], newer: dict[int, list[T]]) -> dict[int, list[T]]:
    return {chunk: [*older.get(chunk, ()), *newer.get(chunk, ())] for chunk in older | newer}
