"""LayerMover: moves what Layers have on a device to others, also while volumes are in use.

The journal says first which blocks are going to be filled; then chunks are copied; then the journal says so, and behind
that commit point the old blocks are erased, whatever happens. In a volume that is written, that is a flush of its own
(`Volume.move`). The slots of a page are not copied: the journal says
where the new ones are, they are written with the next version of the page, and the old ones are erased after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import TypeAlias

from rustord.errors import Damaged, DeviceError, NoSpace, RustordError
from rustord.extent import Extent
from rustord.layer import Layer
from rustord.objectstore import ObjectStore
from rustord.page import CHUNK_BYTES, SLOT_COUNT, ZEROS, LayerEntry, MapEntry, address_of, device_of, extent_at
from rustord.record import RecordId
from rustord.volumes import Volumes

log = logging.getLogger(__name__)

_BATCH_CHUNKS = 16
"""Chunks for which a volume that is in use is held up at once: 1 MiB."""
_BATCH_PAGES = 1024

Quota: TypeAlias = dict[int, float]
"""How many blocks may still be moved off each device; none is moved to one of these."""


class LayerMover:
    """For one thread. ``problem`` is why something could not be moved."""

    def __init__(self, store: ObjectStore, volumes: Volumes) -> None:
        self.problem: RustordError | None = None
        self._store = store
        self._layers = store.layers
        self._volumes = volumes

    def count(self, devices: Collection[int]) -> int:
        """How many blocks Layers have on ``devices``."""
        return sum(
            extent.count
            for layer in self._all()
            for extent in layer.extents(self._layers.chunk_blocks)
            if extent.device in devices
        )

    def run(self, quota: Quota, pace: Callable[[int], None], *, slots: bool = True) -> int:
        """Move what there is, until the ``quota``, which is changed, is used up; returns how many blocks were moved.

        ``pace`` is told the length of what has been moved, and may wait or raise. What cannot be moved is ``problem``.
        """
        self.problem = None
        self._volumes.give_back_spare()
        if slots:
            self._volumes.flush()  # what a client has given back stays until then, and he may never do that
        moved = self._move_bases(quota, pace) if slots else 0
        for layer in self._all():
            if slots:
                moved += SLOT_COUNT * self._volumes.call(lambda layer=layer: self._move_slots(layer, quota))  # type: ignore[misc]
            chunks = (chunk for chunk, address in layer.chunks() if address > ZEROS and self._leaves(address, quota))
            while batch := list(islice(chunks, _BATCH_CHUNKS)):
                count = self._move(layer, batch, quota)
                pace(count * CHUNK_BYTES)
                moved += count * self._layers.chunk_blocks
        return moved

    def _all(self) -> list[Layer]:
        return [*self._layers.by_uuid.values()]

    def _leaves(self, address: int, quota: Quota) -> bool:
        return quota.get(device_of(address), 0) > 0

    def _move_bases(self, quota: Quota, pace: Callable[[int], None]) -> int:
        """Have Layers have what deleted Objects have below them: an Object that is deleted cannot be moved."""
        moved = 0
        for record in self._store.keystore.bases():
            if record.uuid in self._layers.users and record.devices & quota.keys():
                try:
                    self._volumes.adopt(record, pace)
                    moved += sum(extent.count for extent in record.extents)
                except (DeviceError, NoSpace, Damaged) as error:
                    self.problem = self.problem or error
        return moved

    # Slots

    def _move_slots(self, layer: Layer, quota: Quota) -> int:
        """Give the Layer's pages other slots; how many. Called between cycles. Raises NoSpace or DeviceError."""
        if self._layers.by_uuid.get(layer.uuid) is not layer:
            return 0
        count = 0
        if self._leaves(layer.address, quota):
            self._store.keystore.checkpoint()  # the old home's journal need not tell of the map then
            slots = self._store.allocator.run(SLOT_COUNT, avoid=quota)
            with self._store.journals.note([LayerEntry(layer.uuid, address_of(slots), layer.head.encode())]):
                layer.address = address_of(slots)
            count = 1
        places = [*layer.places.items()]  # the volume that is written in the Layer may get pages meanwhile
        leaving = iter([number for number, place in places if self._leaves(place, quota)])
        while numbers := list(islice(leaving, _BATCH_PAGES)):
            count += self._move_pages(layer, [number for number in numbers if self._is_known(layer, number)], quota)
        return count

    def _is_known(self, layer: Layer, number: int) -> bool:
        """Whether the journal knows of a page; else it is in the next flush of the volume."""
        return self._store.keystore.page(layer.uuid, number) is not None

    def _move_pages(self, layer: Layer, numbers: Iterable[int], quota: Quota) -> int:
        """As far as there is room. The old slots are a grave from then on."""
        places: dict[int, int] = {}
        for number in numbers:
            try:
                slots = self._store.allocator.run(SLOT_COUNT, layer.home, avoid=quota)
            except NoSpace as error:
                self.problem = error
                break
            places[number] = address_of(slots)
        if places:
            with self._store.journals.note([MapEntry(layer.uuid, sorted(places.items()), ())]):
                layer.places |= places
        return len(places)

    # Chunks

    def _move(self, layer: Layer, chunks: list[int], quota: Quota) -> int:
        """Move chunks of a Layer; if some cannot be moved, the others."""
        try:
            return self._move_together(layer, chunks, quota)
        except (DeviceError, NoSpace) as error:
            if len(chunks) > 1:
                return sum(self._move(layer, [chunk], quota) for chunk in chunks)
            (chunk,) = chunks
            what = f"{self._name(layer)}, bytes {chunk * CHUNK_BYTES} to {(chunk + 1) * CHUNK_BYTES - 1}"
            log.warning("%s cannot be moved: %s", what, error)
            self.problem = self.problem or type(error)(f"{what}, cannot be moved: {error.message}", hint=error.hint)
            return 0

    def _name(self, layer: Layer) -> str:
        return f"volume {layer.head.name}" if layer.head.name else "a snapshot, or what a volume was cloned from"

    def _move_together(self, layer: Layer, chunks: list[int], quota: Quota) -> int:
        with self._volumes.reshaping:
            if layer.uuid in self._layers.torn:
                raise DeviceError("its map is not in order", hint="the log says why")
            self._store.blocks.writable(layer.home)  # without it nothing can be moved, and what was copied would stay
            places = self._take(layer, chunks, quota)
            if not places:
                return 0
            if volume := self._volumes.writer_of(layer):
                return volume.move(layer, places)
            return self._move_unwritten(layer, places)

    def _take(self, layer: Layer, chunks: list[int], quota: Quota) -> dict[int, Extent]:
        """Blocks for those of ``chunks`` that leave. Raises NoSpace."""
        places: dict[int, Extent] = {}
        try:
            for chunk in chunks:
                address = layer.get(chunk)
                if address > ZEROS and self._leaves(address, quota):
                    places[chunk] = self._store.allocator.run(self._layers.chunk_blocks, layer.home, avoid=quota)
                    quota[device_of(address)] -= places[chunk].count
        except NoSpace:
            self._store.allocator.release(places.values())
            raise
        return places

    def _move_unwritten(self, layer: Layer, places: dict[int, Extent]) -> int:
        """Move chunks of a Layer that nobody writes, and many may read."""
        new = [*places.values()]
        ids: Sequence[RecordId] = ()
        try:
            ids = self._volumes.announce(layer, [new])
            devices = {extent.device: self._store.blocks.writable(extent.device) for extent in new}
            for chunk, extent in places.items():
                self._copy(layer.get(chunk), extent)
            for error in self._store.blocks.flush(devices).values():
                raise error
            self._store.blocks.check_unchanged(devices)
        except BaseException:
            self._volumes.free(new, ids=ids)
            raise
        old, graves = self._volumes.call(lambda: self._switch(layer, places, ids))
        self._layers.drain()
        self._volumes.free(old, ids=graves)
        return len(places)

    def _copy(self, address: int, extent: Extent) -> None:
        data = self._store.blocks.read_copy((extent_at(address, extent.count),), 0, CHUNK_BYTES)
        self._store.blocks.write(extent, (data,))

    def _switch(
        self, layer: Layer, moved: dict[int, Extent], copied: Sequence[RecordId]
    ) -> tuple[list[Extent], Sequence[RecordId]]:
        """Have chunks where they were copied to. Returns what nobody needs then, a grave. Called between cycles."""
        if self._layers.by_uuid.get(layer.uuid) is not layer:
            return [*moved.values()], copied
        old = {chunk: extent_at(layer.get(chunk), extent.count) for chunk, extent in moved.items()}
        changes = [(chunk, address_of(extent)) for chunk, extent in sorted(moved.items())]
        with self._store.journals.note([MapEntry(layer.uuid, (), changes)], copied, [*old.values()]) as graves:
            for chunk, address in changes:
                layer.set(chunk, address)
        return [*old.values()], graves
