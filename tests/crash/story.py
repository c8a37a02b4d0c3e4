"""A pool in memory whose every write is recorded; what is done to it, and what it may hold after a power cut.

Everything follows from one seed and runs on one thread: uuids, times, the pool's secret and the order of flushes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

from rustord.blockstore import ErasePolicy, read_label
from rustord.change import Change, Delete, Move, Put
from rustord.errors import FormatError, NotFound, PoolError, RustordError
from rustord.extent import LAYERS, Extent, block_count
from rustord.footer import encode_footer
from rustord.keygen import HashKeyGen, Uuid7
from rustord.label import Geometry
from rustord.membership import add_device, prepare_device, remove_device
from rustord.objectstore import Cycle, ObjectStore
from rustord.placer import Placer
from rustord.pool import create_pool, open_pool
from rustord.rebuild import Report, rebuild
from rustord.record import Metadata, Record
from rustord.testing.device import SECTOR_BYTES, MemoryDevice, VolatileDevice
from rustord.testing.recording import Recording, Sectors, State
from tests.crash.disks import Disk, found_disks
from tests.simulation import MIB, check_sound, live

T = TypeVar("T")

BLOCK = 4096
_START_BYTES = 64
NOWHERE = Path("nowhere")


class Content(NamedTuple):
    """What an Object consists of."""

    data: bytes
    name: str = ""
    content_type: str = ""
    attributes: tuple[tuple[str, str], ...] = ()


def content_of(store: ObjectStore, record: Record) -> Content:
    data = bytes(store.read(record, 0, record.size))
    return Content(data, record.name, record.content_type, tuple(record.attributes.items()))


def has_footer(store: ObjectStore, record: Record, number: int) -> bool:
    """Whether a copy of an Object could be found without index and journal."""
    copy = record.copies[number]
    blocks, label = store.blocks, store.label
    footer = encode_footer(record.raw, record.size, copy, blocks.device_uuids, label.secret, label.block_size)
    return blocks.read_copy(copy, block_count(copy) * label.block_size - len(footer), len(footer)) == footer


class Told(NamedTuple):
    """What users have been told until now, and what they are waiting for.

    ``objects`` were acknowledged, ``putting`` and ``deleting`` were not answered, or with an error of a device.
    ``deleted`` were acknowledged, as replaced ones too. ``moving`` are Objects whose moves began and did not end, even
    before an earlier power cut. ``members`` are the numbers of the pool's devices, with ``joining`` those that
    are being added or removed. ``made``: whether the pool was. ``bad`` are blocks that are never to be used again.
    ``disks`` are the volumes, the ``unsure`` ones are being made or deleted or become an Object of that data, and
    ``bases`` are Objects that may be kept for a volume when they are deleted.
    ``places`` are all blocks that Objects are known to have had; those of the ``erased`` were to be zeroed.
    """

    objects: Mapping[bytes, Content] = {}
    putting: tuple[Content, ...] = ()
    deleting: frozenset[bytes] = frozenset()
    deleted: Mapping[bytes, Content] = {}
    moving: frozenset[bytes] = frozenset()
    members: frozenset[int] = frozenset()
    joining: frozenset[int] = frozenset()
    made: bool = False
    bad: frozenset[Extent] = frozenset()
    disks: Mapping[str, Disk] = {}
    unsure: Mapping[str, bytes] = {}
    bases: frozenset[bytes] = frozenset()
    places: Mapping[bytes, frozenset[Extent]] = {}
    erased: frozenset[bytes] = frozenset()

    def at(self, record: Record) -> Told:
        """The Object is, or has been, where its record says."""
        own = frozenset(extent for extent in record.extents if extent.device != LAYERS)
        return self._replace(places={**self.places, record.uuid: self.places.get(record.uuid, frozenset()) | own})

    def leaving(self, layer: bytes, extents: frozenset[Extent], data: bytes) -> Told:
        """A Layer with this data is being deleted, and what it had there is to be erased."""
        deleted = {**self.deleted, layer: Content(data)}
        return self._replace(places={**self.places, layer: extents}, deleted=deleted)

    def after(self, found: Mapping[bytes, Content], members: frozenset[int]) -> Told:
        """What holds once somebody has looked at what a power cut left."""
        gone = {uuid: content for uuid, content in self.objects.items() if uuid not in found}
        return self._replace(
            objects=found,
            putting=(),
            deleting=frozenset(),
            deleted={**self.deleted, **gone},
            members=members,
            joining=frozenset(),
            unsure={},
        )


def starts(data: bytes, piece: int = BLOCK) -> Iterator[bytes]:
    """How the pieces of so many bytes begin that hold ``data``, but for those that are nothing special."""
    return (start for at in range(0, len(data), piece) if any(start := data[at : at + _START_BYTES]))


class Index(NamedTuple):
    """What the index database held after a commit."""

    entries: Mapping[bytes, bytes]


class MemoryBackend:
    """An index that is never torn: ``entries`` change at a commit, of which ``on_commit`` is told."""

    def __init__(self, entries: Mapping[bytes, bytes], on_commit: Callable[[Index], None]) -> None:
        self.entries = dict(entries)
        self._on_commit = on_commit

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        pass

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted((key, value) for key, value in self.entries.items() if first <= key < end)

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        gone = set(deletes)
        self.entries = {key: value for key, value in self.entries.items() if key not in gone} | dict(puts)
        self._on_commit(Index(self.entries))

    def info(self) -> Mapping[str, int | str]:
        return {"entries": len(self.entries), "bytes": 0}

    def close(self) -> None:
        pass


class _InTurn:
    """An executor that does everything at once, on the caller's thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def map(self, function: Callable[..., Any], values: Iterable[Any]) -> Iterator[Any]:
        return map(function, values)

    def shutdown(self) -> None:
        pass


class Stage:
    """A pool in memory: devices of these ``sizes`` in bytes, by number; ``recording`` has all that happens to it."""

    def __init__(
        self,
        sizes: Mapping[int, int],
        placer: Placer,
        chance: random.Random,
        media: Mapping[int, Sectors] | None = None,
        index: Index | None = None,
        policy: ErasePolicy = "zero",
    ) -> None:
        self.sizes = dict(sizes)
        self.placer = placer
        self.chance = chance
        self.policy: ErasePolicy = policy
        self.recording = Recording(media)
        self.memory = {number: MemoryDevice(size, (media or {}).get(number)) for number, size in sizes.items()}
        self.devices: dict[int, VolatileDevice] = {}
        self.told = Told()
        self._index = index or Index({})
        self._clock = count(1_700_000_000_000_000_000, 1_000_000)
        self._keygen = HashKeyGen(
            "xxh3-128", uuid=Uuid7(now_ns=lambda: next(self._clock), random_bytes=self.chance.randbytes)
        )

    def after(self, state: State, index: Index, chance: random.Random) -> Stage:
        """The same machine after a power cut that left ``state``, with this index."""
        stage = Stage(self.sizes, self.placer, chance, state.media, index, self.policy)
        told = state.notes.get(Told, Told())
        assert isinstance(told, Told)
        stage.tell(told)
        stage.recording.note(index)
        stage.recording.mark()
        return stage

    def now(self) -> int:
        """The time in nanoseconds, which goes on by a millisecond each time that somebody asks."""
        return next(self._clock)

    def tell(self, told: Told) -> None:
        """Note what users know from now on."""
        self.told = told
        self.recording.note(told)

    def device(self, number: int) -> VolatileDevice:
        device = VolatileDevice(self.memory[number], number=number, record=self.recording)
        device.path = f"device{number}"
        self.devices[number] = device
        return device

    def lose_power(self, *, lose_index: bool = False) -> None:
        """Lose some of what was not flushed, and perhaps the index; `open` comes next."""
        state = self.recording.cut(self.chance)
        for number, memory in self.memory.items():
            memory.sectors = dict(state.media.get(number, {}))
        if lose_index:
            self._committed(Index({}))

    def restart(self, *, lose_index: bool = False) -> Story:
        """Cut the power, open the pool, and let users know what is left."""
        self.lose_power(lose_index=lose_index)
        store = self.open()
        self.tell(self.told.after(self.check(store), self.members(store)))
        return Story(self, store)

    def members(self, store: ObjectStore) -> frozenset[int]:
        """The numbers of the devices that the pool has."""
        there = [slot.device for slot in store.blocks.slots.values()]
        return frozenset(number for number, device in self.devices.items() if device in there)

    def create(self) -> None:
        """Make a pool of all devices."""
        with self.determined():
            create_pool([self.device(number) for number in self.sizes], self._keygen)
        self.tell(Told(members=frozenset(self.sizes), made=True))

    @contextmanager
    def determined(self) -> Iterator[None]:
        """Randomness and time are those of the stage meanwhile."""
        with patch("rustord.pool.os.urandom", self.chance.randbytes), patch("rustord.pool.time.time_ns", self.now):
            yield

    def open(self, *, away: int = -1) -> ObjectStore:
        """Open the pool on its devices: those of which users know, and whatever else bears its label; not ``away``."""
        return self._with_devices(self._open, away)

    def _with_devices(self, act: Callable[[Sequence[VolatileDevice]], T], away: int = -1) -> T:
        numbers = [number for number in self.sizes if number != away and self._belongs(number)]
        with ExitStack() as stack:
            stack.enter_context(patch("rustord.blockstore.ThreadPoolExecutor", _InTurn))
            stack.enter_context(patch("rustord.pool.os.urandom", self.chance.randbytes))
            try:
                return act([self.device(number) for number in numbers])
            except PoolError as error:
                if "was removed from pool" not in error.message:
                    raise
                certain = self.told.members - self.told.joining
                return act([self.device(number) for number in numbers if number in certain])

    def _belongs(self, number: int) -> bool:
        try:
            return read_label(self.memory[number]) is not None
        except FormatError:
            return number in self.told.members - self.told.joining

    def _open(self, devices: Sequence[VolatileDevice]) -> ObjectStore:
        return open_pool(
            devices,
            keygen=self._keygen,
            placer=self.placer,
            backend=MemoryBackend(self._index.entries, self._committed),
            directory=NOWHERE,
            erase_policy=self.policy,
        )

    def rebuild(self) -> Report:
        """Make the index anew from the devices."""
        return self._with_devices(
            lambda devices: rebuild(
                devices, backend=MemoryBackend(self._index.entries, self._committed), directory=NOWHERE, replace=True
            )
        )

    def _committed(self, index: Index) -> None:
        self._index = index
        self.recording.note(index)

    def check(self, store: ObjectStore, *, redundant: bool = True) -> dict[bytes, Content]:
        """Assert that the store holds what users may expect of it; returns what it holds.

        Not ``redundant``: one whole copy of each Object is enough.
        """
        told = self.told
        check_sound(store, redundant=redundant)
        assert not store.read_only
        for device, block, length in told.bad:
            assert store.blocks.slots[device].bad.within(block, length), f"block {block} is not bad any more"
        assert told.members - told.joining <= self.members(store), "a device is missing"
        assert all(slot.device for slot in store.blocks.slots.values()), "a device is missing that bears no label"
        records = live(store)
        found = {record.uuid: content_of(store, record) for record in records}
        for record in records:
            footers = [has_footer(store, record, number) for number in range(len(record.copies))]
            assert all(footers) if redundant else any(footers), f"{record.key} lacks a footer"
        unacknowledged = list(told.putting)
        extra = {uuid: content for uuid, content in found.items() if uuid not in told.objects}
        for uuid, content in extra.items():
            assert uuid not in told.deleted, "a deleted Object came back"
            assert content in unacknowledged, "nobody stored this"
            unacknowledged.remove(content)
        replaced = {content.name for content in extra.values() if content.name}
        for uuid, content in told.objects.items():
            if uuid in found:
                assert found[uuid] == content, "an Object has changed"
            else:
                assert uuid in told.deleting or content.name in replaced, "an acknowledged Object is lost"
        objects = {content.data for content in found.values()}
        self.told = told = told._replace(disks=found_disks(store, told.disks, told.unsure, objects))
        names = {content.name: uuid for uuid, content in found.items() if content.name}
        assert names == dict(store.names()), "names and Objects do not agree"
        assert sum(1 for content in found.values() if content.name) == len(names), "a name has two Objects"
        for record in records:
            told = told.at(record)
        self.told = told
        # What was being erased when the power failed, a rebuild may not know of any more.
        gone = told.places.keys() if redundant else told.places.keys() & told.erased
        self._check_erased(store, [uuid for uuid in gone if uuid not in found])
        return found

    def check_acknowledged(self, store: ObjectStore) -> None:
        """Assert that what was acknowledged is there, and what was deleted is not. Others there may be damaged.

        Nobody could tell of these, as long as a device was missing, that they had never been acknowledged.
        """
        told = self.told
        replacing = {content.name for content in told.putting if content.name}
        for uuid in told.objects.keys() - told.deleting:
            record = store.keystore.get(uuid)
            if record is not None:
                assert content_of(store, record) == told.objects[uuid], "an Object has changed"
            else:
                assert told.objects[uuid].name in replacing, "an acknowledged Object is lost"
        for uuid in told.deleted:
            assert uuid in told.objects or store.keystore.get(uuid) is None, "a deleted Object came back"

    def _check_erased(self, store: ObjectStore, gone: Iterable[bytes]) -> None:
        """No free block holds what was deleted."""
        numbers = {id(device): number for number, device in self.devices.items()}
        slots = store.blocks.slots.items()
        memory = {i: self.memory[numbers[id(slot.device)]] for i, slot in slots if slot.device is not None}
        free = {index: list(store.allocator._free[index]) for index in memory}
        for uuid in gone:
            for device, block, length in self.told.places[uuid]:
                for first, free_count in free.get(device, ()):
                    for at in range(max(first, block), min(first + free_count, block + length)):
                        assert not self.is_of(uuid, memory[device], at), f"free block {at} holds a deleted Object"

    def is_of(self, uuid: bytes, memory: MemoryDevice, block: int) -> bool:
        """Whether a block holds data of an Object that was deleted, or a piece of its footer."""
        first = block * BLOCK // SECTOR_BYTES
        if not any(sector in memory.sectors for sector in range(first, first + BLOCK // SECTOR_BYTES)):
            return False
        data = memory.block(block)
        if uuid in data:
            return True
        content = self.told.deleted.get(uuid, Content(b""))
        return self.policy == "zero" and any(data.startswith(start) for start in starts(content.data))

    def check_zeroed(self) -> None:
        """Assert that nothing is left of Objects whose DELETE was answered, but where others are by now.

        Called before anything is opened: this is what a thief would find.
        """
        places = self.told.places.items()
        others = {extent for uuid, extents in places if uuid not in self.told.erased for extent in extents}
        for uuid in self.told.erased:
            for device, block, length in self.told.places.get(uuid, ()):
                for at in range(block, block + length):
                    if not any(e.device == device and e.block <= at < e.end for e in others):
                        assert not self.is_of(uuid, self.memory[device], at), f"block {at} was not erased in time"

    def check_untraced(self) -> None:
        """Assert the same of all blocks, also those that no Object was ever known to have: copies that were cut short.

        An opening that has ended had its chance to erase what a crash had left.
        """
        told = self.told
        if not told.erased:
            return
        deleted = {start for uuid in told.erased for start in starts(told.deleted[uuid].data, SECTOR_BYTES)}
        contents = [content.data for content in (*told.objects.values(), *told.putting)]
        contents += [version for disk in told.disks.values() for version in disk.versions()]
        deleted -= {start for data in contents for start in starts(data, SECTOR_BYTES)}
        uuids = re.compile(b"|".join(map(re.escape, told.erased)))
        for number, memory in self.memory.items():
            geometry = Geometry.of_device(self.sizes[number], BLOCK)
            blocks = {at for first, block_count in geometry.data_runs for at in range(first, first + block_count)}
            for sector, data in memory.sectors.items():
                if sector * SECTOR_BYTES // BLOCK in blocks:
                    what = f"sector {sector} of device {number} has a copy of what was deleted"
                    assert self.policy != "zero" or data[:_START_BYTES] not in deleted, what
                    assert not uuids.search(data), what


class Story:
    """Changes of an open store, and what its users know of them, as the ``stage`` is told before and after each."""

    def __init__(self, stage: Stage, store: ObjectStore) -> None:
        self.stage = stage
        self.store = store
        self._asked: dict[Change, Content | bytes] = {}
        self._left: list[Change] = []

    @property
    def uuids(self) -> list[bytes]:
        """The Objects that there are."""
        return list(self.stage.told.objects)

    def named(self, name: str) -> bytes:
        return next(uuid for uuid, content in self.stage.told.objects.items() if content.name == name)

    def put(self, *contents: Content) -> None:
        self.change(*contents)

    def delete(self, *uuids: bytes) -> None:
        self.change(*uuids)

    def change(self, *what: Content | bytes, turns: int = 1000) -> None:
        """Store each Content, delete each uuid, in one cycle; and then what follows from it, in ``turns`` cycles."""
        changes, self._left = [*self._left, *self.asked(*what)], []
        self.follow(changes, turns)

    def asked(self, *what: Content | bytes) -> list[Change]:
        """The changes that store each Content and delete each uuid; users wait for them from now on."""
        told = self.stage.told
        changes: list[Change] = []
        for item in what:
            if isinstance(item, Content):
                change: Change = self._put(item)
                told = told._replace(putting=(*told.putting, item))
            else:
                change = Delete(item)
                told = told._replace(deleting=told.deleting | {item})
            self._asked[change] = item
            changes.append(change)
        self.stage.tell(told)
        return changes

    def _put(self, content: Content) -> Put:
        put = Put(content.data, Metadata(content.name, content.content_type, dict(content.attributes)))
        put.created_ns = self.stage.now()
        return put

    def follow(self, changes: Sequence[Change], turns: int = 1000) -> None:
        """Cycles until nothing is left to do."""
        while turns and (changes or self.store.idle_work()):
            changes = self.learn(self.store.cycle(changes))
            turns -= 1
        self._left = list(changes)

    def learn(self, cycle: Cycle) -> Sequence[Change]:
        """Let users know the outcomes of a cycle; returns what follows from it."""
        told = self.stage.told
        for change, outcome in cycle.outcomes:
            if change in self._asked:
                told = _learnt(told, self._asked[change], outcome)
            if isinstance(outcome, Record):
                told = told.at(outcome)
        self.stage.tell(told)
        return cycle.following

    def took_back(self) -> None:
        """Whatever failed has been undone by now, durably: it is not to be seen again."""
        self.stage.tell(self.stage.told._replace(putting=()))

    def upload(self, content: Content, *, declare: bool = False, abort: bool = False, piece: int = 100_000) -> None:
        told = self.stage.told
        put = self._put(content)
        self._asked[put] = content
        self.stage.tell(told._replace(putting=(*told.putting, content)))
        intake = self.store.upload(put, len(content.data) if declare else None)
        for at in range(0, len(content.data), piece):
            intake.write(content.data[at : at + piece])
        if abort:
            intake.abort()
            self.follow([])
            self.stage.tell(told)
        else:
            self.follow([put])

    def move(self, uuid: bytes) -> None:
        """Move an Object to other blocks."""
        moving = self.stage.told.moving
        self.follow([self.copy(uuid)])
        self.stage.tell(self.stage.told._replace(moving=moving))

    def copy(self, uuid: bytes) -> Move:
        """Copy an Object to other blocks; `follow` makes the Move."""
        record = self.store.stat(uuid)
        self.stage.tell(self.stage.told._replace(moving=self.stage.told.moving | {uuid}))
        return self.store.relocations.prepare(record, [extent for extent in record.extents if extent.device != LAYERS])

    def condemn(self, *extents: Extent) -> None:
        """Have free blocks never used again."""
        self.store.condemn(extents)
        self.stage.tell(self.stage.told._replace(bad=self.stage.told.bad | frozenset(extents)))

    def checkpoint(self) -> None:
        self.store.keystore.checkpoint()

    def add(self, size: int = 16 * MIB) -> None:
        """Add a new device to the pool."""
        stage, told = self.stage, self.stage.told
        number = max(stage.sizes) + 1
        stage.sizes[number] = size
        stage.memory[number] = MemoryDevice(size)
        stage.tell(told._replace(joining=frozenset({number})))
        device = stage.device(number)
        prepare_device(self.store, device)
        with stage.determined():
            add_device(self.store, device)
        stage.tell(told._replace(members=told.members | {number}))

    def remove(self, number: int) -> None:
        """Remove a device, which is empty."""
        stage, told = self.stage, self.stage.told
        index = next(i for i, slot in self.store.blocks.slots.items() if slot.device is stage.devices[number])
        stage.tell(told._replace(joining=frozenset({number})))
        remove_device(self.store, index)
        stage.tell(told._replace(members=told.members - {number}))

    def reopen(self) -> None:
        self.store.close()
        self._left.clear()
        self.store = self.stage.open()


def _learnt(told: Told, asked: Content | bytes, outcome: Record | RustordError) -> Told:
    """What is known once a change has been answered."""
    if isinstance(asked, bytes) and not isinstance(asked, Content):
        if isinstance(outcome, NotFound):  # another change of the batch replaced it
            return told._replace(deleting=told.deleting - {asked})
        if isinstance(outcome, RustordError):
            return told  # its device failed: nobody knows
        objects = dict(told.objects)
        content = objects.pop(asked, None) or told.deleted[asked]  # its name may be another's before this is answered
        deleted = {**told.deleted, asked: content}
        erased = told.erased | ({asked} - told.bases)
        return told._replace(objects=objects, deleted=deleted, deleting=told.deleting - {asked}, erased=erased)
    assert isinstance(asked, Content)
    if isinstance(outcome, RustordError):
        return told
    putting = list(told.putting)
    putting.remove(asked)
    gone = {uuid: c for uuid, c in told.objects.items() if asked.name and c.name == asked.name}
    objects = {uuid: content for uuid, content in told.objects.items() if uuid not in gone}
    return told._replace(
        objects=objects | {outcome.uuid: asked},
        putting=tuple(putting),
        deleted={**told.deleted, **gone},
        deleting=told.deleting - gone.keys(),
    )
