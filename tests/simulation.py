"""A pool on image files whose power can be cut and whose devices can fail; and what tells that it is sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from rustord.audit import Audit, Finding
from rustord.badblocks import BadBlocks, BadRun
from rustord.blockdevice import open_device
from rustord.change import Change, Put
from rustord.errors import RustordError
from rustord.extent import LAYERS
from rustord.keygen import HashKeyGen, KeyGen
from rustord.keystore.backend import Backend
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.state import commit, state_of
from rustord.objectstore import ObjectStore
from rustord.placer import Contiguous, Placer
from rustord.pool import create_pool, open_devices, open_pool
from rustord.record import Record
from rustord.testing.device import Power, VolatileDevice
from rustord.testing.device import PowerCut as PowerCut

T = TypeVar("T")

MIB = 1 << 20


class Simulation:
    """Makes a pool in ``directory`` and opens it again and again, each time on new `VolatileDevice`s.

    ``paths`` are the image files, ``index`` is the directory of the index, ``devices`` the devices of the store that is
    open, ``placer`` what the next opening uses, ``power`` goes off when it is told to.
    """

    def __init__(
        self,
        directory: Path,
        sizes: Sequence[int | Path] = (16 * MIB,),
        *,
        placer: Placer | None = None,
        algorithm: str = "xxh3-128",
        block_size: int = 4096,
        backend: Callable[[], Backend] = LmdbBackend,
    ) -> None:
        """``sizes`` are those of the image files in bytes, or paths of devices to use in their place.

        ``backend`` makes the backend of each opening.
        """
        self.index = directory / "index"
        self.paths = [
            _image(directory / f"device{number}.img", size) if isinstance(size, int) else size
            for number, size in enumerate(sizes)
        ]
        self.placer: Placer = placer or Contiguous()
        self.devices: list[VolatileDevice] = []
        self.power = Power()
        self._store: ObjectStore | None = None
        self._keygen = HashKeyGen(algorithm)
        self._backend = backend
        devices = [open_device(path) for path in self.paths]
        create_pool(devices, self._keygen, block_size=block_size)
        for device in devices:
            device.close()

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def open(self, *, without: Collection[int] = (), keygen: KeyGen | None = None) -> ObjectStore:
        """Open the pool on all devices but those whose numbers are in ``without``. Raises as `open_pool` does."""
        numbers = [number for number in range(len(self.paths)) if number not in without]
        self.devices = [VolatileDevice(open_device(self.paths[number]), self.power) for number in numbers]
        self._store = open_pool(
            self.devices,
            keygen=keygen or self._keygen,
            placer=self.placer,
            backend=self._backend(),
            directory=self.index,
        )
        return self._store

    def cut_power(self, keep: Callable[[int], bool] = lambda offset: False) -> None:
        """End the store that is open, or the opening that was under way, as a power cut does.

        Of what was not flushed, sectors stay for whose offset on their device ``keep`` says yes.
        """
        for device in self.devices:
            device.cut_power(keep)
        self.power = Power()
        if self._store is not None:
            self._store.keystore.close()
            self._store.blocks.close()
            self._store = None

    def audit(self) -> list[Finding]:
        """What an audit finds in the pool, which is closed."""
        devices = open_devices(self.paths, read_only=True)
        with Audit(devices, backend=LmdbBackend(), directory=self.index) as audit:
            return audit.findings

    def close(self) -> None:
        """Close the store that is open, in order."""
        assert self._store is not None, "not open"
        self._store.close()
        self._store = None

    def save(self) -> Callable[[], None]:
        """Remember what a pool that is not open has on its devices and in its index; returns what brings it back."""
        images = [path.read_bytes() for path in self.paths]
        index = {file.name: file.read_bytes() for file in self.index.iterdir()}

        def restore() -> None:
            for path, image in zip(self.paths, images, strict=True):
                path.write_bytes(image)
            self.lose_index()
            self.index.mkdir()
            for name, data in index.items():
                (self.index / name).write_bytes(data)

        return restore

    def lose_index(self) -> None:
        """Remove the index of a pool that is not open."""
        shutil.rmtree(self.index)

    def change_index(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = ()) -> None:
        """Change the index of a pool that is not open, as a rustord would that is wrong: the database is whole."""
        backend = self._backend()
        backend.open(self.index)
        with closing(backend):
            state = state_of(backend)
            assert state is not None
            commit(backend, puts, deletes, state)

    def read(self, device: int, block: int, count: int) -> bytes:
        """What an image file holds; blocks have 4 KiB."""
        with self.paths[device].open("rb") as file:
            file.seek(block * 4096)
            return file.read(count * 4096)


def _image(path: Path, size: int) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
    return path


def live(store: ObjectStore) -> list[Record]:
    """All Objects of a store, by uuid."""
    found: list[Record] = []
    while page := store.objects(found[-1].uuid if found else b""):
        found += page
    return found


def check_sound(store: ObjectStore, *, redundant: bool = True) -> None:
    """Assert that every block is free, bad, an Object's or a Layer's, and only one of that; and that Objects are whole.

    Each copy has to be whole, unless not ``redundant``: then one is enough.

    Nothing may be under way: no upload, and no erasure that follows from an earlier cycle.
    """
    records = live(store)
    kept = filter(None, map(store.keystore.kept, store.layers.users))
    named = [extent for record in [*records, *kept] for extent in record.extents]
    named += [e for layer in store.layers.by_uuid.values() for e in layer.extents(store.layers.chunk_blocks)]
    for index, slot in store.blocks.slots.items():
        runs = list(store.allocator._free[index])
        free = BadBlocks(tuple(BadRun(block, count) for block, count in runs))
        assert not any(free.within(bad.block, bad.count) for bad in slot.bad.runs), "a bad block is free"
        runs += [(block, count) for device, block, count in named if device == index]
        used = BadBlocks(tuple(BadRun(block, count) for block, count in sorted(runs)))
        runs += [run for bad in slot.bad.runs for run in used.without(bad.block, bad.count)]
        assert _joined(runs) == list(slot.geometry.data_runs), f"the blocks of device {index} do not add up"
    for record in records:
        store.read(record, 0, record.size)
        for number, copy in enumerate(record.copies):
            there = all(store.blocks.slots[e.device].device is not None for e in copy if e.device != LAYERS)
            if redundant and there:
                assert store.blocks.verify(record, number, 0, record.size), f"copy {number} of {record.key} is damaged"
    assert (store.stock.count, store.stock.size) == (len(records), sum(record.size for record in records))


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for block, count in sorted(runs):
        if joined and joined[-1][0] + joined[-1][1] == block:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((block, count))
    return joined


def run(store: ObjectStore, *changes: Change) -> list[Record | RustordError]:
    """Make ``changes`` in one cycle, and then whatever follows from them; returns the outcome of each."""
    outcomes: dict[Change, Record | RustordError] = {}
    following: Sequence[Change] = changes
    while following or store.idle_work():
        cycle = store.cycle(following)
        outcomes.update(cycle.outcomes)
        following = cycle.following
    return [outcomes[change] for change in changes]


class Direct:
    """A writer that makes all cycles at once, on the caller's thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def make(self, changes: Sequence[Change], timeout_s: float) -> list[tuple[Change, Record | RustordError]]:
        del timeout_s
        return list(zip(changes, run(self._store, *changes), strict=True))

    def call(self, function: Callable[[], T], timeout_s: float = 60.0) -> T:
        del timeout_s
        answer = function()
        run(self._store)
        return answer


def stored(outcome: Record | RustordError) -> Record:
    """The Record that is the outcome; raises what it is otherwise."""
    if isinstance(outcome, RustordError):
        raise outcome
    return outcome


def upload(
    store: ObjectStore, data: bytes, put: Put | None = None, *, declare: bool = False, piece: int = 300_000
) -> Record:
    """Store ``data`` as an upload in pieces, of a size that is declared or not."""
    put = put or Put(b"")
    intake = store.upload(put, len(data) if declare else None)
    try:
        for at in range(0, len(data), piece):
            intake.write(data[at : at + piece])
    except RustordError:
        intake.abort()
        run(store)
        raise
    return stored(run(store, put)[0])


def free_blocks(store: ObjectStore) -> dict[int, list[tuple[int, int]]]:
    """The free runs (block, count) of each device."""
    return {index: list(store.allocator._free[index]) for index in store.blocks.slots}


def free_count(store: ObjectStore) -> int:
    """Free blocks of all devices."""
    return sum(map(store.allocator.free_count, store.blocks.slots))
