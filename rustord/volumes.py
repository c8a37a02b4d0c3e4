"""Volumes: the writable block devices of a pool: made, frozen into Objects, cloned from them, opened and deleted."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from rustord.blockstore import chunk_sums
from rustord.change import Change, Erase, Put
from rustord.errors import InUse, InvalidRequest, NotFound, PreconditionFailed, RustordError, Unavailable
from rustord.extent import Extent
from rustord.journal import NOTHING
from rustord.label import LAYERED
from rustord.layer import Frozen, Layer
from rustord.objectstore import ObjectStore
from rustord.objkey import is_uuid, parse_uuid
from rustord.page import CHUNK_BYTES, SLOT_COUNT, Head, LayerEntry, MapEntry, address_of
from rustord.pending import PENDING, Pending, circumstances
from rustord.placement import too_long
from rustord.pool import renew_labels
from rustord.record import Metadata, Record, RecordId
from rustord.volume import Volume
from rustord.writer import busy, stopping

T = TypeVar("T")

SIZE_MAX = 1 << 43
"""The largest volume: 8 TiB, whose map takes 1 GiB of memory when all of it is in use."""
LAYERS_MAX = 64
"""How many Layers may lie upon one another: each read looks through them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_READ_BYTES = 1 << 20
_CHANGE_S = 600.0
"""How long a change may wait for the writer: it may have happened when somebody waits no longer."""
_ERASE_S = 3600.0
_SCARCE = 0.1
"""Below this part of free space volumes may soon fail to be written: each promises more than it has taken."""

log = logging.getLogger(__name__)


class Writer(Protocol):
    """What is needed of a `rustord.writer.Writer`."""

    def make(self, changes: Sequence[Change], timeout_s: float) -> Sequence[tuple[Change, Record | RustordError]]:
        """Make the changes in the next cycles. Raises TimeoutError; they may be made nevertheless."""

    def call(self, function: Callable[[], T], timeout_s: float = ...) -> T:
        """Run ``function`` between two cycles. Raises TimeoutError; it may run then, but begins no more."""


class Info(NamedTuple):
    """What there is to know of a volume. ``own_bytes`` are its own, ``shared_bytes`` those it has from what it was
    cloned from, or shares with its snapshots; the rest of ``size`` are holes."""

    name: str
    size: int
    own_bytes: int
    shared_bytes: int
    created_ns: int
    layer_count: int
    open_count: int


class Volumes:
    """Any thread may call any method; all of them may wait for devices.

    One operation at a time works on a volume. A volume that is open is neither made shorter, frozen nor deleted. What a
    device fails to flush has happened all the same, though it raises DeviceError; see `Journals.note`.
    """

    def __init__(self, store: ObjectStore, writer: Writer, directory: Path | None = None) -> None:
        """What is not flushed is noted below ``directory``, that of the index, for who opens the pool after a kill."""
        self._store = store
        self._directory = directory
        self._layers = store.layers
        self._writer = writer
        self._volumes: dict[str, Volume] = {}
        self._open: dict[str, int] = {}
        self._busy: set[str] = set()
        self._opening: list[str] = []
        """By all who open it at this moment, which many may do at once."""
        self._warned = False
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self.reshaping = threading.Lock()
        """Held by who moves chunks of Layers, or merges these."""
        self._ending: set[str] = set()
        self._stopping = False

    # Looking

    def names(self) -> list[str]:
        """The names of all volumes, in order."""
        return sorted(self._layers.volumes)

    def list(self) -> list[Info]:
        """All volumes, by name."""
        found = []
        for name in self.names():
            with suppress(NotFound):  # deleted meanwhile
                found.append(self.stat(name))
        return found

    def stat(self, name: str) -> Info:
        """Raises NotFound."""
        layer = self._layer(name)
        chain = self._layers.chain(layer)
        own, shared = layer.own_count(), self._layers.shared_count(chain)
        head = layer.head
        opened = self._open.get(name, 0)
        return Info(name, head.size, own * CHUNK_BYTES, shared * CHUNK_BYTES, head.created_ns, len(chain), opened)

    def size(self, name: str) -> int:
        """The size of a volume in bytes, which costs less than all of `stat`. Raises NotFound."""
        return self._layer(name).head.size

    def _layer(self, name: str) -> Layer:
        layer = self._layers.volumes.get(name)
        if layer is None:
            raise NotFound(f"there is no volume {name[:80]!r}", hint="'rustorctl volume ls' shows them")
        return layer

    @contextmanager
    def _working_on(self, name: str, *, closed: bool) -> Iterator[None]:
        """Nobody else makes, changes or opens the volume meanwhile; with ``closed``, nobody has it open either."""
        with self._lock:
            self._check_idle(name)
            if name in self._opening:
                raise InUse(f"volume {name} is being opened", hint="try again in a moment")
            if closed and self._open.get(name):
                raise InUse(f"volume {name} is in use", hint="detach it first; or take a snapshot, which may be")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(name)

    def _check_idle(self, name: str) -> None:
        if name in self._busy:
            raise InUse(f"volume {name} is being worked on", hint="try again when that has finished")

    # Using

    def open(self, name: str) -> Volume:
        """The volume to read and write, until its `Volume.close`. Raises NotFound, InUse or DeviceError."""
        with self._lock:
            self._check_idle(name)
            self._opening.append(name)
        try:
            volume = self._volume(name)
            volume.read_only = bool(self._store.read_only)
            with self._lock:
                self._open[name] = self._open.get(name, 0) + 1
        finally:
            with self._lock:
                self._opening.remove(name)
        return volume

    def _volume(self, name: str) -> Volume:
        layer = self._layer(name)
        if self._layers.is_frozen(layer):
            raise InUse(f"volume {name} has become an Object", hint="restart rustord, which finishes that")
        self._store.blocks.device(layer.home)
        self._check_whole(layer)
        with self._making:
            return self._made(layer)

    def _check_whole(self, layer: Layer) -> None:
        def is_torn() -> bool:
            return any(below.uuid in self._layers.torn for below in self._layers.chain(layer))

        if is_torn() and not self._store.read_only:
            with self.reshaping:  # it may be being merged at this moment
                if is_torn():
                    what = f"the map of volume {layer.head.name} is not in order, because a merge was cut short"
                    raise Unavailable(what, hint="the log says why it cannot be finished; see 'rustorctl status'")

    def _made(self, layer: Layer) -> Volume:
        name, store = layer.head.name, self._store
        if name not in self._volumes:
            self._volumes[name] = Volume(
                *(layer, self._layers, store.blocks, store.allocator),
                *(self._note, self.free, self.announce, lambda: self._close(name)),
                pending=self._pending(name),
            )
        return self._volumes[name]

    def _pending(self, name: str) -> Pending | None:
        store = self._store
        if self._directory is None:
            return None
        return Pending(self._directory / PENDING / name, lambda: circumstances(store.label.pool_uuid, store.blocks))

    def writer_of(self, layer: Layer) -> Volume | None:
        """The volume that is written in a Layer, open or not; None if it is not written any more."""
        name = layer.head.name
        with self._making:
            if self._layers.volumes.get(name) is not layer or name in self._ending or self._layers.is_frozen(layer):
                return None
            return self._made(layer)

    def warning(self) -> str:
        """Why writes to volumes may soon fail; "" if there is room."""
        store = self._store
        slots, accepting = store.blocks.slots, {*store.blocks.accepting_indices()}
        sizes = {index: slot.geometry.data_block_count for index, slot in slots.items() if index in accepting}
        free = sum(map(store.allocator.free_count, sizes)) / max(sum(sizes.values()), 1)
        if not self._layers.volumes or free >= _SCARCE:
            return ""
        what = f"{free:.0%} of the devices that take new data are free: writes to volumes may soon fail"
        return f"{what}; delete something, or add a device"

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the writer's thread, between cycles. Raises what it does, or Unavailable."""
        try:
            return self._writer.call(function, _CHANGE_S)
        except TimeoutError:
            raise busy() from None

    def announce(self, layer: Layer, places: Iterable[Sequence[Extent]]) -> Sequence[RecordId]:
        """Make graves of blocks that are about to be filled with what a Layer has. Raises ReadOnly or DeviceError.

        Returns the id of each; see `Journals.announce`.
        """
        copies = [(layer.uuid, extents) for extents in places]
        return self.call(lambda: self._store.journals.announce(copies))

    def _note(
        self, notes: Sequence[MapEntry], copied: Sequence[RecordId], left: Sequence[Extent]
    ) -> Sequence[RecordId]:
        def note() -> Sequence[RecordId]:
            with self._store.journals.note(notes, copied, left) as ids:
                return ids

        ids = self.call(note)
        warning = self.warning()
        if warning and not self._warned:
            log.warning("%s", warning)
        self._warned = bool(warning)
        return ids

    def free(
        self,
        extents: Sequence[Extent],
        finished: Callable[[RustordError | None], None] = lambda error: None,
        ids: Sequence[RecordId] = (),
    ) -> None:
        """Erase blocks that nobody names or reads any more, in the background; see `Erase`."""
        self._store.erasures.add(Erase(extents, ids, finished=finished))
        self.call(lambda: None)  # the writer looks for something to do then

    def _close(self, name: str) -> None:
        with self._lock:
            self._open[name] -= 1
            if self._open[name]:
                return
            del self._open[name]
        self.give_back_spare(name)

    def give_back_spare(self, *names: str) -> None:
        """Give back what these volumes, or all, have taken for chunks to come. Raises nothing: it is for later then."""
        for name in names or [*self._volumes]:
            if volume := self._volumes.get(name):
                with suppress(RustordError):
                    volume.give_back_spare()

    def stop(self) -> None:
        """Whoever reads a whole volume to make an Object of it is told to give up."""
        self._stopping = True

    def close(self) -> None:
        """Flush all volumes; the writer still runs."""
        self.give_back_spare()
        self.flush()

    def flush(self) -> None:
        """Flush all volumes. Raises nothing: what cannot be flushed was not promised."""
        for volume in list(self._volumes.values()):
            try:
                volume.flush()
            except RustordError:
                continue

    # Making

    def create(self, name: str, size: int) -> Info:
        """Make an empty volume of ``size`` bytes, rounded up to 64 KiB; it takes room only where it is written.

        Raises InvalidRequest, PreconditionFailed if there is one of that name, NoSpace, DeviceError or ReadOnly.
        """
        check_volume_name(name)
        size = _rounded(size)
        with self._working_on(name, closed=True):
            self.call(lambda: self._make(name, size, NOTHING))
        return self.stat(name)

    def clone(self, key: str, name: str) -> Info:
        """Make a volume of what an Object has, by its uuid or name; it shares its blocks until they are written.

        Raises NotFound as well.
        """
        check_volume_name(name)
        with self._working_on(name, closed=True):
            self.call(lambda: self._clone(key, name))
        return self.stat(name)

    def _clone(self, key: str, name: str) -> None:
        uuid = parse_uuid(key) if is_uuid(key) else self._store.resolve(key)
        if uuid is None:
            is_volume = key in self._layers.volumes
            hint = "that is a volume; clone a snapshot of it" if is_volume else "'rustorctl ls' lists the names"
            raise NotFound(f"there is no Object named {key[:80]!r}", hint=hint)
        record = self._store.stat(uuid)
        base = self._layers.numbered(record.layer).uuid if record.layer else uuid
        self._make(name, _rounded(record.size), base)

    def _make(self, name: str, size: int, base: bytes) -> None:
        """Called between cycles."""
        self._store.check_changeable()
        if name in self._layers.volumes:
            raise PreconditionFailed(f"there is a volume {name} already", hint="choose another name")
        if base in self._layers.by_uuid:
            self._check_depth(self._layers.by_uuid[base])
        enable_layers(self._store)
        self._add(Head(size, time.time_ns(), base, self._layers.new_number(self._store.journals.sequence + 1), name))

    def _add(self, head: Head, left: Layer | None = None) -> Layer:
        """Put a new Layer into the pool. One that is ``left`` gives it its name, and its home if that has room."""
        slots = self._store.allocator.run(SLOT_COUNT, left.home if left else -1)
        layer = Layer(self._store.keygen.uuid(), address_of(slots), head)
        nameless = [(left, left.head._replace(name=""))] if left else []
        try:
            with self._store.journals.note([_entry(*one) for one in ((layer, head), *nameless)]):
                self._layers.add(layer)
                for other, other_head in nameless:
                    other.head = other_head
        except RustordError:
            if layer.uuid not in self._layers.by_uuid:  # no journal has it
                self._store.allocator.release([slots])
            raise
        return layer

    def _check_depth(self, layer: Layer) -> None:
        if len(self._layers.chain(layer)) >= LAYERS_MAX:
            raise InvalidRequest(
                f"{LAYERS_MAX} snapshots and clones of clones already lie upon one another",
                hint="copy the volume's content to a new one, and go on with that",
            )

    # Changing

    def resize(self, name: str, size: int) -> Info:
        """Make the volume longer, or shorter if there is nothing beyond the new end. Raises InvalidRequest, ...

        Who has it open sees that it is longer when he opens it again.
        """
        size = _rounded(size)
        with self._working_on(name, closed=False):
            layer = self._layer(name)
            if size < layer.head.size and self._open.get(name):
                raise InUse(f"volume {name} is in use", hint="detach it first; making it longer need not wait")
            used = self._layers.used_size(self._layers.chain(layer))
            if size < used:
                raise InvalidRequest(
                    f"volume {name} has data up to byte {used}, beyond {size}", hint="trim what is beyond, and flush"
                )
            volume = self._volume(name)
            volume.flush()
            try:
                self._set_head(layer, lambda head: head._replace(size=size))
            finally:
                volume.size = layer.head.size
        return self.stat(name)

    def _set_head(self, layer: Layer, renew: Callable[[Head], Head], then: Callable[[], object] = lambda: None) -> None:
        def change() -> None:
            head = renew(layer.head)  # of now: a merge may have changed what the Layer builds on
            with self._store.journals.note([_entry(layer, head)]):
                self._layers.rename(layer, head)
                then()

        self.call(change)

    def delete(self, name: str) -> None:
        """Delete a volume; on return what nobody else needs of it has been erased. Raises NotFound, InUse, ..."""
        with self._working_on(name, closed=True):
            self._drop(self._layer(name))

    def _drop(self, layer: Layer) -> None:
        name = layer.head.name
        erased: Future[RustordError | None] = Future()

        def hold() -> None:  # or somebody else might have it erased, and we would not be told
            self._layers.users[layer.uuid] += 1

        def sweep() -> None:
            self._layers.let_go(layer.uuid)
            self._store.sweep(erased.set_result)

        try:
            self._forget(layer, hold)
        except RustordError:
            if not layer.head.name:
                self.call(lambda: self._layers.let_go(layer.uuid))
            raise
        self.call(sweep)
        try:
            error = erased.result(_ERASE_S)
        except TimeoutError:
            what = f"the volume {name!r} is gone, and what it had is still being erased"
            raise Unavailable(what, hint="see 'rustorctl top' for a device that is slow") from None
        if error:
            raise error

    def _forget(self, layer: Layer, then: Callable[[], object] = lambda: None) -> None:
        """Take the name off a Layer, which is not written any more. ``then`` is called before anything else changes."""
        name = layer.head.name
        with self._making:
            self._ending.add(name)
            volume = self._volumes.get(name)
        try:
            with volume.ending() if volume else nullcontext():
                self._set_head(layer, lambda head: head._replace(name=""), then)
        finally:
            if not layer.head.name:
                self._volumes.pop(name, None)
            self._ending.discard(name)

    def adopt(self, base: Record, pace: Callable[[int], None]) -> None:
        """Put what a deleted Object has into a Layer, for those that build on it; then its blocks are erased.

        What it has is verified now, and has no checksums of its own any more. ``pace`` is told the length of each piece
        and may raise. Raises NoSpace, DeviceError or Damaged as well; nothing has changed then.
        """
        with self.reshaping:
            layer = self.call(lambda: self._add_held(_rounded(base.size)))
            try:
                self._fill(layer, base, pace)
                with self._layers.still():
                    try:
                        self.call(lambda: self._replace(base, layer))
                    finally:
                        for volume in [*self._volumes.values()]:
                            volume.look()
            finally:
                self.call(lambda: self._let_go(layer))

    def _add_held(self, size: int) -> Layer:
        """A Layer that nothing builds on yet, and that stays until `_let_go`. Called between cycles."""
        head = Head(size, time.time_ns(), NOTHING, self._layers.new_number(self._store.journals.sequence + 1), "")
        layer = self._add(head)
        self._layers.users[layer.uuid] += 1
        return layer

    def _fill(self, layer: Layer, base: Record, pace: Callable[[int], None]) -> None:
        store = self._store
        writing = Volume(
            *(layer, self._layers, store.blocks, store.allocator, self._note, self.free, self.announce), is_copy=True
        )
        try:
            for offset in range(0, base.size, _READ_BYTES):
                length = min(_READ_BYTES, base.size - offset)
                data = store.blocks.read(base, offset, length)
                assert data is not None
                if bytes(data).strip(b"\0"):
                    writing.write(offset, data)
                pace(length)
            writing.flush()
        finally:
            with writing.ending():
                pass

    def _replace(self, base: Record, layer: Layer) -> None:
        """Have build on a Layer what built on a deleted Object, if anything does still. Called between cycles."""
        kept = self._store.keystore.kept(base.uuid)
        above = [upper for upper in self._layers.by_uuid.values() if upper.head.base == base.uuid]
        if kept is None or kept.id != base.id or not above:
            return
        heads = [upper.head._replace(base=layer.uuid) for upper in above]
        entries = [_entry(upper, head) for upper, head in zip(above, heads, strict=True)]
        with self._store.journals.note(entries):
            for upper, head in zip(above, heads, strict=True):
                self._layers.rebase(upper, head)
        self._store.sweep_base(base)

    # Freezing

    def freeze(self, name: str, object_name: str = "") -> Record:
        """Make a volume an Object, named as the volume was unless ``object_name`` is given; no data is moved.

        Raises NotFound, InUse, PreconditionFailed if the name is taken, ...
        """
        with self._working_on(name, closed=True):
            layer, volume = self._layer(name), self._volume(name)
            self._check_length(layer)
            volume.flush()
            frozen = self._sum(layer, volume.read, object_name or name)
            with self.reshaping:  # who moves its chunks waits for readers of the volume, not for those of an Object
                record = self._store_frozen(frozen, object_name or name)
                self._forget(layer)
        return record

    def snapshot(self, name: str, object_name: str = "") -> Record:
        """Make an Object of what a volume has at this moment, while it is in use; no data is moved.

        Raises NotFound, PreconditionFailed if the name is taken, InvalidRequest if there are too many, ...
        """
        with self._working_on(name, closed=False):
            self._check_new(object_name)
            layer = self._layer(name)
            self._check_depth(layer)
            self._check_length(layer)
            left = self._volume(name).split(lambda left: self.call(lambda: self._cover(left)))
        try:
            frozen = self._sum(left, partial(self._layers.read, left), object_name)
            return self._store_frozen(frozen, object_name)
        finally:
            self.call(lambda: self._let_go(left))

    def _let_go(self, left: Layer) -> None:
        """Called between cycles: whoever needs the Layer has said so."""
        self._layers.let_go(left.uuid)
        self._store.sweep()

    def _cover(self, left: Layer) -> Layer:
        """Put a new Layer on top of that of a volume. Called between cycles."""
        number = self._layers.new_number(self._store.journals.sequence + 1)
        head = Head(left.head.size, time.time_ns(), left.uuid, number, left.head.name)
        top = self._add(head, left)
        self._layers.users[left.uuid] += 1  # as long as it takes to make it an Object
        return top

    def _check_new(self, object_name: str) -> None:
        if object_name and self._store.resolve(object_name) is not None:
            raise PreconditionFailed(f"there is an Object named {object_name!r} already", hint="choose another name")

    def _check_length(self, layer: Layer) -> None:
        """Raise NoSpace if no journal takes an Object with the checksums of all of it: to make them takes hours."""
        if 8 * (layer.head.size // CHUNK_BYTES) > self._store.keystore.batch_bytes_max // 2:
            raise too_long(layer.head.size, 1)

    def _store_frozen(self, frozen: Frozen, object_name: str) -> Record:
        put = Put(frozen, Metadata(object_name), if_none_match=bool(object_name))
        try:
            ((_, outcome),) = self._writer.make([put], _CHANGE_S)
        except TimeoutError:
            raise busy() from None
        if isinstance(outcome, RustordError):
            raise outcome
        return outcome

    def _sum(self, layer: Layer, read: Callable[[int, memoryview], None], object_name: str) -> Frozen:
        """Hash and sum what ``read`` says that a Layer has."""
        self._check_new(object_name)
        hasher = self._store.keygen.hasher()
        buffer = memoryview(bytearray(_READ_BYTES))
        sums = []
        for offset in range(0, layer.head.size, _READ_BYTES):
            piece = buffer[: min(_READ_BYTES, layer.head.size - offset)]
            if self._stopping:  # this may take hours, and the process does not end before
                raise stopping()
            read(offset, piece)
            hasher.update(piece)
            sums.append(chunk_sums(piece))
        return Frozen(layer, hasher.digest(), b"".join(sums))


def _entry(layer: Layer, head: Head) -> LayerEntry:
    return LayerEntry(layer.uuid, layer.address, head.encode())


def _rounded(size: int) -> int:
    if not 0 < size <= SIZE_MAX:
        raise InvalidRequest(f"a volume cannot have {size} bytes", hint=f"it has 1 to {SIZE_MAX} bytes (8 TiB)")
    return -(-size // CHUNK_BYTES) * CHUNK_BYTES


def check_volume_name(name: str) -> None:
    """Raise InvalidRequest unless a volume may have this name."""
    if not _NAME.fullmatch(name) or is_uuid(name):
        raise InvalidRequest(
            f"{name[:80]!r} is no name for a volume",
            hint="1 to 128 letters, digits, '.', '_' and '-', not beginning with one of these, and no uuid",
        )


def enable_layers(store: ObjectStore) -> None:
    """Say in the labels that the pool has Layers, which keeps older versions of rustord away from it."""
    if not store.label.incompatible & LAYERED:
        renew_labels(store, replace(store.label, incompatible=store.label.incompatible | LAYERED))
