"""Layer: the map of what a volume has of its own, chunk by chunk, over a base that it shares with others.

A volume is written in its top Layer. A chunk that this does not have is that of the base, which is another Layer (never
written any more) or an Object, or zeros. So a clone is a new, empty Layer; and a snapshot leaves the Layer of a volume
to an Object and puts a new one on top. However many share it, a block is named by one Layer or Object alone: who shares
it names that one, which stays as long as it is named.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import sub
from typing import NamedTuple

from rustord.blockstore import BlockStore
from rustord.errors import NotFound, RustordError
from rustord.extent import LAYER_SHIFT, LAYERS, Extent, extend
from rustord.gate import Gate
from rustord.journal import NOTHING
from rustord.lease import Place
from rustord.objectreader import ObjectReader
from rustord.objkey import ObjectId, uuid_text
from rustord.page import (
    BASE,
    CHUNK_BYTES,
    PAGE_CHUNKS,
    ZEROS,
    Head,
    Page,
    decode_addresses,
    decode_head,
    device_of,
    extent_at,
    page_of,
    place_at,
    slots_at,
)
from rustord.record import Record, RecordId

_NO_PAGE = array("Q", bytes(8 * PAGE_CHUNKS))
"""Where nothing is but what the base has."""


class Layer:
    """``address`` is where the slots of its head are, ``places`` where those of its other pages, by page number.

    Addresses of chunks are `BASE`, `ZEROS`, or where the chunk begins. While the volume is written, others may look.
    """

    __slots__ = ("_pages", "address", "head", "places", "uuid")

    def __init__(self, uuid: bytes, address: int, head: Head) -> None:
        self.uuid = uuid
        self.address = address
        self.head = head
        self.places: dict[int, int] = {}
        self._pages: dict[int, array[int]] = {}

    @property
    def home(self) -> int:
        """The device with its head, in whose journal each of its changes is."""
        return device_of(self.address)

    @property
    def id(self) -> RecordId:
        """By which the journal says that the Layer is gone."""
        return RecordId(self.uuid, 0)

    def load(self, page: Page) -> None:
        """Take over a page other than the head."""
        self.places[page.number] = page.address
        self._pages[page.number] = array("Q", decode_addresses(page.content))

    def get(self, chunk: int) -> int:
        """The address of a chunk."""
        page = self._pages.get(chunk // PAGE_CHUNKS + 1)
        return BASE if page is None else page[chunk % PAGE_CHUNKS]

    def has_page(self, number: int) -> bool:
        """Whether any of the chunks of a page was ever anything but the base's."""
        return number in self._pages

    def page(self, number: int) -> Sequence[int]:
        """The addresses of the chunks of a page."""
        return self._pages.get(number, _NO_PAGE)

    def page_numbers(self) -> list[int]:
        """Of the pages that it `has_page`."""
        return [*self._pages]

    def set(self, chunk: int, address: int) -> None:
        """Change the address of a chunk."""
        number = page_of(chunk)
        if number not in self._pages:
            self._pages[number] = array("Q", bytes(8 * PAGE_CHUNKS))
        self._pages[number][chunk % PAGE_CHUNKS] = address

    def take_over(self, lower: Layer, least: int) -> None:
        """Name what ``lower`` has above ``least``, and this one lacks; that does not name it any more.

        Page by page, for all of the pool waits meanwhile.
        """
        for number in lower.page_numbers():
            own, others = self.page(number), lower.page(number)
            taken = [0 if address or other <= least else other for address, other in zip(own, others, strict=True)]
            if any(taken):
                self._pages[number] = array("Q", map(max, own, taken))
                lower._pages[number] = array("Q", map(sub, others, taken))

    def drop(self, chunks: Iterable[int]) -> None:
        """Name these chunks no more: another Layer does."""
        for chunk in chunks:
            self._pages[page_of(chunk)][chunk % PAGE_CHUNKS] = BASE

    def chunks(self, first: int = 0, end: int = 1 << 62) -> Iterator[tuple[int, int]]:
        """(chunk, address) of each chunk from ``first`` to before ``end`` that is not the base's, in order."""
        for number in sorted(self._pages):
            start = (number - 1) * PAGE_CHUNKS
            if start < end and start + PAGE_CHUNKS > first:
                for chunk, address in enumerate(self._pages[number], start):
                    if address and first <= chunk < end:
                        yield chunk, address

    def own_count(self) -> int:
        """How many chunks it has blocks for."""
        return sum(PAGE_CHUNKS - page.count(BASE) - page.count(ZEROS) for page in [*self._pages.values()])

    def extents(self, chunk_blocks: int) -> list[Extent]:
        """All blocks that the Layer names: chunks of ``chunk_blocks`` blocks, and slots."""
        slots = [slot for address in (self.address, *self.places.values()) for slot in slots_at(address)]
        chunks = [run for page in [*self._pages.values()] for run in _runs(page, chunk_blocks)]
        runs: list[Extent] = []
        extend(runs, sorted(chunks))
        return runs + slots


class Frozen(NamedTuple):
    """A Layer that is not written any more, as the data of a new Object: with the hash of what it has, and its sums."""

    layer: Layer
    digest: bytes
    sums: bytes


class Layers:
    """All Layers of a pool, and how to read through them. Changed by the writer alone; anybody may read."""

    def __init__(self, blocks: BlockStore, record_of: Callable[[ObjectId], Record | None]) -> None:
        """``record_of`` finds the Record of an Object, also of one that was deleted and is a base."""
        self.chunk_blocks = CHUNK_BYTES // blocks.block_size
        self.by_uuid: dict[bytes, Layer] = {}
        self.volumes: dict[str, Layer] = {}
        """The top Layer of each volume, by its name."""
        self.users: Counter[bytes] = Counter()
        """How many name an Object or Layer as what they build on, by its uuid. There are no zeros."""
        self.torn: set[bytes] = set()
        """Layers of which the one above has taken some chunks, and not all: they have to be merged."""
        self.on_less_used: Callable[[], None] = lambda: None
        """Is told that there may be something to merge."""
        self._blocks = blocks
        self._record_of = record_of
        self._by_number: dict[int, Layer] = {}
        self._bases: dict[ObjectId, ObjectReader] = {}
        """Of the Objects that are read as bases."""
        self.gate = Gate()
        """Of all who have none of their own."""
        self._gates = {self.gate}
        self._gating = threading.Lock()

    def load(self, pages: Iterable[Page]) -> None:
        """Take over all pages of the index."""
        later = []
        for page in pages:
            if page.number:
                later.append(page)
            else:
                self.add(Layer(page.layer, page.address, decode_head(page.content)))
        for page in later:
            self.by_uuid[page.layer].load(page)

    def serve(self) -> None:
        """From now on the BlockStore reads here what Objects have in Layers."""
        blocks = self._blocks
        blocks.read_layer, blocks.read_layer_now = self.read_object, self.read_object_now
        blocks.reread_layer = partial(self.read_object, reread=True)
        blocks.layer_place = self.object_place

    def add(self, layer: Layer) -> None:
        """A new Layer."""
        self.by_uuid[layer.uuid] = self._by_number[layer.head.number] = layer
        if layer.head.base != NOTHING:
            self.users[layer.head.base] += 1
        if layer.head.name:
            self.volumes[layer.head.name] = layer

    def rename(self, layer: Layer, head: Head) -> None:
        """Give the Layer another head, perhaps with another name or none, but with the same base and number."""
        if self.volumes.get(layer.head.name) is layer:
            del self.volumes[layer.head.name]
        layer.head = head
        if head.name:
            self.volumes[head.name] = layer

    def rebase(self, layer: Layer, head: Head) -> None:
        """Give the Layer another head with another base, and the same name and number."""
        below, layer.head = layer.head.base, head
        if head.base != NOTHING:
            self.users[head.base] += 1
        self.let_go(below)

    def mergeable(self) -> list[tuple[Layer, Layer]]:
        """(upper, lower) where nobody but the upper Layer needs the lower one."""
        pairs = [(upper, self.by_uuid.get(upper.head.base)) for upper in [*self.by_uuid.values()]]
        return [(upper, lower) for upper, lower in pairs if lower is not None and self.is_mergeable(upper, lower)]

    def is_mergeable(self, upper: Layer, lower: Layer) -> bool:
        there = self.by_uuid.get(upper.uuid) is upper and self.by_uuid.get(lower.uuid) is lower
        only = upper.head.base == lower.uuid and self.users[lower.uuid] == 1
        return there and only and not lower.head.name

    def part(self, needless: Sequence[Layer]) -> None:
        """Where a crash has left chunks with two Layers that were being merged: they are the upper one's."""
        lower = [*needless, *(below for _, below in reversed(self.mergeable()))]
        if not lower:
            return
        shared = {address for layer in lower for _, address in layer.chunks() if address > ZEROS}
        owners: dict[int, set[bytes]] = {}
        for layer in self.by_uuid.values():
            for _, address in layer.chunks():
                if address in shared:
                    owners.setdefault(address, set()).add(layer.uuid)
        for layer in lower:
            taken = [chunk for chunk, address in layer.chunks() if owners.get(address, set()) - {layer.uuid}]
            for chunk in taken:
                owners[layer.get(chunk)].discard(layer.uuid)
            layer.drop(taken)
            if taken and layer.uuid in self.by_uuid:
                self.torn.add(layer.uuid)

    def new_number(self, sequence: int) -> int:
        """A number that no Layer has, nor had in the last 2**32 changes; ``sequence`` is that of the next change."""
        while (number := sequence % (1 << 32)) in self._by_number or not number:
            sequence += 1
        return number

    def numbered(self, number: int) -> Layer:
        """The Layer that Objects name by ``number``. Raises NotFound."""
        layer = self._by_number.get(number)
        if layer is None:
            raise NotFound(f"there is no layer {number}", hint="the Object that needs it is damaged")
        return layer

    def use(self, number: int) -> None:
        """One more Object has its data in the Layer with this number."""
        if number in self._by_number:
            self.users[self._by_number[number].uuid] += 1

    def is_frozen(self, layer: Layer) -> bool:
        """Whether others build on it, so that it must not be written any more."""
        return layer.uuid in self.users

    def bases(self, layers: Iterable[Layer]) -> list[ObjectId]:
        """The Objects right below Layers that were forgotten, as often as they are."""
        return [layer.head.base for layer in layers if layer.head.base in self.users.keys() - self.by_uuid.keys()]

    def needless(self) -> list[Layer]:
        """The Layers that nobody needs: those without name and users, and so on downwards."""
        users = Counter(self.users)
        found = [layer for layer in self.by_uuid.values() if not (layer.head.name or self.is_frozen(layer))]
        for layer in found:  # which grows meanwhile
            base = layer.head.base
            users[base] -= 1
            if base in self.by_uuid and not (users[base] or self.by_uuid[base].head.name):
                found.append(self.by_uuid[base])
        return found

    def forget(self, layers: Iterable[Layer]) -> None:
        """Those that are `needless`, in that order. An Object below has as many users as before, until `let_go`."""
        for layer in layers:
            del self.by_uuid[layer.uuid]
            if self._by_number[layer.head.number] is layer:
                del self._by_number[layer.head.number]
            if layer.head.base in self.by_uuid:
                self.let_go(layer.head.base)

    def let_go(self, uuid: bytes) -> None:
        """One user less of an Object or Layer."""
        self.users[uuid] -= 1
        if self.users[uuid] <= 0:
            del self.users[uuid]
            self._bases.pop(uuid, None)
        else:
            self.on_less_used()

    def leave(self, records: Iterable[RecordId]) -> None:
        """Read no more where Objects were before they were moved: it is erased next. The KeyStore knows better."""
        for record in records:
            reader = self._bases.get(record.uuid)
            if reader is not None and reader.record.id == record:
                self._bases.pop(record.uuid, None)
                for gate in [*self._gates]:  # not locked: who waits with all of them shut may be waiting for us
                    gate.recall()

    def chain(self, layer: Layer) -> list[Layer]:
        """The Layer and those below it."""
        chain = [layer]
        while below := self.by_uuid.get(chain[-1].head.base):
            chain.append(below)
        return chain

    # Reading

    def object_extent(self, layer: Layer) -> Extent:
        """How the Manifest of an Object names all of a Layer."""
        return Extent(LAYERS, layer.head.number << LAYER_SHIFT, layer.head.size // self._blocks.block_size)

    def read_object(self, offset: int, buffer: memoryview, *, reread: bool = False) -> None:
        """Read as from the device with index `LAYERS`; ``offset`` in bytes. Raises NotFound, DeviceError, Damaged."""
        number, skip = divmod(offset, self._blocks.block_size << LAYER_SHIFT)
        self.read(self.numbered(number), skip, buffer, reread=reread)

    def read(self, layer: Layer, offset: int, buffer: memoryview, *, reread: bool = False) -> None:
        """Fill ``buffer`` with what a Layer has from ``offset`` on, for who has no gate himself. Raises as `fill`."""
        with self.gate:
            self.fill(self.chain(layer), offset, buffer, reread=reread)

    def watch(self, gate: Gate) -> None:
        """From now on whoever reads through Layers within ``gate`` is waited for."""
        with self._gating:
            self._gates.add(gate)

    def unwatch(self, gate: Gate) -> None:
        """The opposite of `watch`."""
        with self._gating:
            self._gates.discard(gate)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nobody reads through any Layer; not from within a gate."""
        with self._gating, ExitStack() as shut:
            for gate in self._gates:
                shut.enter_context(gate.shut())
            yield

    def drain(self) -> None:
        """Wait until nobody reads any more where the Layers had something up to now; not from within a gate."""
        with self._gating:
            gates = list(self._gates)
        for gate in gates:
            gate.drain()

    def read_object_now(self, offset: int, buffer: memoryview) -> bool:
        """The same from the page cache; False if it cannot be."""
        number, skip = divmod(offset, self._blocks.block_size << LAYER_SHIFT)
        layer = self._by_number.get(number)
        if layer is None:
            return False
        chain = self.chain(layer)
        runs = list(self._runs(chain, skip, len(buffer)))
        at = 0
        try:
            for address, begin, length in runs:
                if not self._fill_run_now(chain, address, begin, buffer[at : at + length]):
                    return False
                at += length
        except RustordError:
            return False  # to read it from the device will say what is wrong
        # Blocks are erased only when no map leads there any more, so those that it still leads to had not been.
        return runs == list(self._runs(chain, skip, len(buffer)))

    def places(self, chain: Sequence[Layer], first: int, end: int) -> list[Place | None]:
        """Where the chunks from ``first`` to before ``end`` are; None for one that is not in one place, or whose device
        is missing. Raises NotFound.

        Within a gate that is watched, as all that is done with what it returns.
        """
        addresses = [self.find(chain, chunk) for chunk in range(first, end)]
        places: list[Place | None] = [Place()] * (end - first)
        if BASE in addresses and chain[-1].head.base != NOTHING:
            places = self._base_places(chain[-1].head.base, first, end)
        for number, address in enumerate(addresses):
            if address > ZEROS:
                places[number] = self._blocks.place_at(*self._place(address, 0))
            elif address == ZEROS:
                places[number] = Place()
        return places

    def _base_places(self, base: ObjectId, first: int, end: int) -> list[Place | None]:
        reader = self._base(base)
        base_end = min(max(first, -(-reader.record.size // CHUNK_BYTES)), end)
        places = reader.places(first, base_end)
        if self._bases.get(base) is not reader:  # see `_read_base_now`; who is told to leave later recalls what we say
            places = [None] * len(places)
        return places + [Place()] * (end - base_end)

    def object_place(self, offset: int) -> Place | None:
        """Where the chunk at ``offset`` of what is read as a device with index `LAYERS` is. Raises NotFound."""
        number, skip = divmod(offset, self._blocks.block_size << LAYER_SHIFT)
        chunk, inside = divmod(skip, CHUNK_BYTES)
        return None if inside else self.places(self.chain(self.numbered(number)), chunk, chunk + 1)[0]

    def has_gone(self, number: int, first: int, end: int) -> bool:
        """Whether a device is away that has chunks from ``first`` to before ``end`` of the Layer with this number.

        Raises NotFound.
        """
        chain = self.chain(self.numbered(number))
        addresses = {self.find(chain, chunk) for chunk in range(first, end)}
        if any(map(self._blocks.is_away, {device_of(address) for address in addresses if address > ZEROS})):
            return True
        base = chain[-1].head.base if BASE in addresses else NOTHING
        return base != NOTHING and all(map(self._blocks.has_gone, self._record(base).copies))

    def find(self, chain: Sequence[Layer], chunk: int) -> int:
        """The address of a chunk: of the first Layer that has it; `BASE` if none has."""
        for layer in chain:
            if address := layer.get(chunk):
                return address
        return BASE

    def base_size(self, chain: Sequence[Layer]) -> int:
        """The size of the Object below all Layers; 0 if there is none."""
        base = chain[-1].head.base
        return self._base(base).record.size if base != NOTHING else 0

    def shared_count(self, chain: Sequence[Layer]) -> int:
        """How many chunks the top Layer has from those below it."""
        count = base_count = -(-self.base_size(chain) // CHUNK_BYTES)
        for number in _pages_of(chain):
            from_base = min(max(base_count - (number - 1) * PAGE_CHUNKS, 0), PAGE_CHUNKS)
            own, below = chain[0].page(number), self._find_all(chain[1:], number)
            shared = [ZEROS if address else other for address, other in zip(own, below, strict=True)]
            in_layers = PAGE_CHUNKS - shared.count(BASE) - shared.count(ZEROS)
            count += in_layers + shared[:from_base].count(BASE) - from_base
        return count

    def used_size(self, chain: Sequence[Layer]) -> int:
        """Up to which byte there may be anything but zeros."""
        base_count = -(-self.base_size(chain) // CHUNK_BYTES)
        base_end = page_of(base_count - 1)
        beyond = sorted((number for number in _pages_of(chain) if number > base_end), reverse=True)
        for number in (*beyond, *range(base_end, 0, -1)):
            for chunk, address in reversed([*enumerate(self._find_all(chain, number), (number - 1) * PAGE_CHUNKS)]):
                if address > ZEROS or (address == BASE and chunk < base_count):
                    return (chunk + 1) * CHUNK_BYTES
        return 0

    def _find_all(self, chain: Sequence[Layer], number: int) -> Sequence[int]:
        """The addresses of the chunks of a page, as `find` tells them."""
        pages = [layer.page(number) for layer in chain if layer.has_page(number)]
        if len(pages) > 1:
            return [next(filter(None, found), BASE) for found in zip(*pages, strict=True)]
        return pages[0] if pages else _NO_PAGE

    def fill(self, chain: Sequence[Layer], offset: int, buffer: memoryview, *, reread: bool = False) -> None:
        """Fill ``buffer`` with what the volume has from ``offset`` on. Raises DeviceError, Damaged or NotFound.

        With ``reread`` what Layers have comes from the medium itself; what is of the Object below them is verified.
        Within a gate that is watched: blocks that a Layer leaves are erased once nobody is in there any more.
        """
        chunk, skip = divmod(offset, CHUNK_BYTES)
        if skip + len(buffer) <= CHUNK_BYTES:
            self._fill_run(chain, self.find(chain, chunk), offset, buffer, reread)
            return
        at = 0
        for address, begin, length in self._runs(chain, offset, len(buffer)):
            self._fill_run(chain, address, begin, buffer[at : at + length], reread)
            at += length

    def _runs(self, chain: Sequence[Layer], offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(address of the first chunk, offset, length) of each part of a range that lies in one place."""
        end = offset + length
        while offset < end:
            begin, chunk = offset, offset // CHUNK_BYTES
            address = following = self.find(chain, chunk)
            step = self.chunk_blocks if address > ZEROS else 0
            while (offset := (chunk + 1) * CHUNK_BYTES) < end:
                chunk, following = chunk + 1, following + step
                if self.find(chain, chunk) != following:
                    break
            yield address, begin, min(offset, end) - begin

    def _place(self, address: int, offset: int) -> tuple[int, int]:
        """The device of a chunk, and where on it the byte at ``offset`` of the volume is."""
        device, block = place_at(address)
        return device, block * self._blocks.block_size + offset % CHUNK_BYTES

    def _fill_run(self, chain: Sequence[Layer], address: int, offset: int, buffer: memoryview, reread: bool) -> None:
        if address > ZEROS:
            index, place = self._place(address, offset)
            device = self._blocks.device(index)
            (device.reread if reread else device.read)(place, (buffer,))
            return
        done = 0
        if address == BASE and chain[-1].head.base != NOTHING:
            done = self._fill_from_object(chain[-1].head.base, offset, buffer)
        buffer[done:] = bytes(len(buffer) - done)

    def _fill_run_now(self, chain: Sequence[Layer], address: int, offset: int, buffer: memoryview) -> bool:
        if address > ZEROS:
            device, place = self._place(address, offset)
            slot = self._blocks.slots.get(device)
            return slot is not None and slot.device is not None and slot.device.read_now(place, (buffer,))
        done = 0
        if address == BASE and chain[-1].head.base != NOTHING:
            reader = self._base(chain[-1].head.base)
            done = max(0, min(reader.record.size - offset, len(buffer)))
            if done and not self._read_base_now(reader, offset, buffer[:done]):
                return False
        buffer[done:] = bytes(len(buffer) - done)
        return True

    def _fill_from_object(self, uuid: ObjectId, offset: int, buffer: memoryview) -> int:
        """Read from an Object, verified; how many bytes it has there."""
        while True:
            reader = self._base(uuid)
            record = reader.record
            length: int = min(record.size - offset, len(buffer))
            if length <= 0:
                return 0
            if self._read_base_now(reader, offset, buffer[:length]):
                return length
            try:
                data = self._blocks.read(record, offset, length)
            except RustordError:
                self.leave((record.id,))
                if self._base(uuid).record.id == record.id:  # it has not been moved meanwhile
                    raise
            else:
                assert data is not None
                buffer[:length] = data
                return length

    def _read_base_now(self, reader: ObjectReader, offset: int, buffer: memoryview) -> bool:
        # What was compared counts only as long as nobody has been told to leave; see there.
        return reader.read_now(offset, buffer) and self._bases.get(reader.record.uuid) is reader

    def _base(self, uuid: ObjectId) -> ObjectReader:
        reader = self._bases.get(uuid)
        while reader is None:
            record = self._record(uuid)
            self._bases[uuid] = reader = ObjectReader(self._blocks, record)
            if self._record(uuid).id != record.id:  # moved before there was a reader that could be told to leave
                self.leave((record.id,))
                reader = self._bases.get(uuid)
        return reader

    def _record(self, uuid: ObjectId) -> Record:
        record = self._record_of(uuid)
        if record is None:
            hint = "'rustorctl pool check' tells what else is missing"
            raise NotFound(f"Object {uuid_text(uuid)}, on which a volume builds, is gone", hint=hint)
        return record


def _pages_of(chain: Iterable[Layer]) -> set[int]:
    return {number for layer in chain for number in layer.page_numbers()}


def _runs(addresses: Iterable[int], count: int) -> Iterator[Extent]:
    """The chunks of ``count`` blocks that have these addresses; those that adjoin as one, for there may be millions."""
    first = end = -1
    for address in sorted(addresses):
        if address == end:
            end += count
        elif address > ZEROS:
            if end > 0:
                yield extent_at(first, end - first)
            first, end = address, address + count
    if end > 0:
        yield extent_at(first, end - first)
