"""Mover: moves Objects in the background: off devices that leave, to where copies are missing, to emptier devices.

It needs no memory of its own: which devices leave stands in the labels, and what is left to do shows in the Records.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rustord.change import Move
from rustord.errors import DeviceError, InvalidRequest, NoSpace, NotFound, PreconditionFailed, RustordError
from rustord.event import DEVICE_REMOVED, fields
from rustord.extent import Extent, block_count
from rustord.label import Standing
from rustord.layermover import LayerMover, Quota
from rustord.membership import remove_device
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import ZEROS, device_of
from rustord.record import Record
from rustord.relocation import Relocation
from rustord.task import Task, keep_note
from rustord.volumes import Volumes
from rustord.writer import Writer

log = logging.getLogger(__name__)

Work = Literal["heal", "rebalance"]
WORKS: tuple[Work, ...] = ("heal", "rebalance")

_PAGE_COUNT = 1000
_BATCH_COUNT = 128
_BATCH_BYTES = 16 << 20
"""How much is announced, copied and committed together: so little that one batch of the journal takes it."""
_COMMIT_S = 120.0
_POLL_S = 0.2
_LOOK_S = 5.0
"""How often a device that is to be empty, and is not, is looked through again."""
_TOLERANCE = 0.02
"""How much fuller than the average, as part of its size, a device may stay."""


class _Job(NamedTuple):
    """What to move: of each Object the blocks ``leave``, to no device in ``avoid``; those of a low ``rank`` first.

    ``pick`` says it while the Objects are listed, if that is less than what leaves when it comes to moving.
    """

    name: str
    leave: Callable[[Record], Sequence[Extent]]
    avoid: Callable[[], Collection[int]]
    pick: Callable[[Record], Sequence[Extent]] | None = None
    rank: Callable[[Record], int] = lambda record: 0
    salvage: bool = False


class Mover:
    """One thing at a time, on a thread of its own; see `Task`.

    ``job`` says what it does, or did last; ``moved`` counts Objects, ``stuck`` those that could not be moved.
    """

    def __init__(
        self,
        store: ObjectStore,
        writer: Writer,
        bytes_s_max: int = 0,
        notes: Path | None = None,
        volumes: Volumes | None = None,
    ) -> None:
        """``notes`` is the file that remembers over a restart what was asked for; ``volumes`` are those in use."""
        self.task = Task("mover", self._work, bytes_s_max=bytes_s_max)
        self.job = ""
        self.moved = 0
        self.stuck = 0
        self._store = store
        self._writer = writer
        self._notes = notes
        self._layers = LayerMover(store, volumes or Volumes(store, writer))
        self._wanted = _read(notes)
        self._problem: RustordError | None = None
        self._batch: list[tuple[Relocation, int]] = []
        """What has a place to go to, and how many bytes of it leave."""

    def start(self, work: str = "") -> None:
        """Begin with ``work``, "heal" or "rebalance", or with whatever there is to do; go on if it runs already."""
        if work:
            if work not in WORKS:
                raise InvalidRequest(f"the mover knows no work {work[:80]!r}", hint=f"choose {' or '.join(WORKS)}")
            self._wanted.add(work)
            self._note()
        if self._next() is not None:
            self.task.start()

    def stop(self) -> None:
        """End soon; what has been moved stays where it is. A device that leaves goes on doing so at the next start."""
        self._wanted.clear()
        self._note()
        self.task.stop()

    def pause(self) -> None:
        """End for now; the next `start`, or that of the daemon, goes on."""
        self.task.stop()

    def _note(self) -> None:
        if self._notes is not None:
            keep_note(self._notes, sorted(self._wanted))

    def status(self) -> dict[str, Any]:
        """What it does and how far it is, or how it ended."""
        return {
            "state": self.task.state,
            "job": self.job,
            "done_bytes": self.task.done,
            "total_bytes": self.task.total,
            "moved": self.moved,
            "stuck": self.stuck,
            "error": self.task.error,
        }

    # The task's thread

    def _next(self) -> Callable[[], None] | None:
        """What to do next: what restores copies comes first."""
        if "heal" in self._wanted:
            return self._heal
        for index, slot in sorted(self._store.blocks.slots.items()):
            if slot.standing is not Standing.IN_USE:
                return lambda: self._empty(index)
        return self._rebalance if "rebalance" in self._wanted else None

    def _work(self, task: Task) -> None:
        self.moved = 0
        try:
            while job := self._next():
                self.stuck, self._problem = 0, None
                job()
        except RustordError:
            self._wanted.clear()
            self._note()
            raise
        finally:
            for relocation, _ in self._batch:
                relocation.abort()
            self._batch = []

    def _empty(self, index: int) -> None:
        """Move everything off a device, and let go of it."""
        store = self._store
        slot = store.blocks.slots.get(index)
        if slot is None:
            return
        standing = slot.standing
        is_given_up = standing is Standing.GIVEN_UP
        job = _Job(
            f"emptying device {index}", lambda record: _on(record, {index}), lambda: {index}, salvage=is_given_up
        )
        path = slot.device.path if slot.device else ""
        while True:
            store.check_changeable()
            check_volumes(store, index)
            found = self._move_layers({index: math.inf}) + self._pass(job)
            if slot.standing is not standing:
                return  # to begin with it anew: it has been given up meanwhile
            if slot.state != "online" and not is_given_up:
                raise DeviceError(
                    f"device {index} is {slot.state}, and cannot be emptied: {slot.reason}",
                    hint="bring it back, or give it up with 'rustorctl device fail'",
                )
            if self.stuck:
                raise self._stuck(f"{self.stuck} Objects cannot be moved off device {index}")
            if self._layers.problem is not None:
                raise self._layers.problem
            if store.allocator.is_empty(index) or (slot.state != "online" and not found):
                break
            if not found:
                if away := [other for other in store.erasures.others_on(index) if not store.blocks.can_erase(other)]:
                    self.job += f", which is empty once device {away[0]} is back or given up"
                self._wait(lambda: store.allocator.is_empty(index) or slot.state != "online")

        def let_go() -> None:
            if index in store.blocks.slots:  # who asks for it once more, when it is empty, has it removed at once
                remove_device(store, index)

        try:
            self._writer.call(let_go, _COMMIT_S)
        except TimeoutError as error:
            raise _late() from error
        log.info("device %d has been emptied and removed", index, extra=DEVICE_REMOVED(device=path))

    def _heal(self) -> None:
        """Make those copies anew that are on devices which are missing or have failed."""

        def lost() -> set[int]:
            return {index for index, slot in self._store.blocks.slots.items() if slot.state in ("missing", "failed")}

        def intact(record: Record) -> int:
            return sum(not _on_devices(copy, lost()) for copy in record.copies) or len(record.copies)

        def leave(record: Record) -> Sequence[Extent]:
            return _on(record, lost()) if len(record.copies) > 1 else ()

        self._pass(_Job("healing", leave, lost, rank=intact))
        self._done("heal")
        if self.stuck:
            raise self._stuck(f"{self.stuck} Objects could not be given a new copy")

    def _rebalance(self) -> None:
        """Move Objects from the fuller devices to the emptier ones."""
        excess = {index: over for index, over in self._excess().items() if over > 0}
        self._move_layers(excess, slots=False)

        def pick(record: Record) -> Sequence[Extent]:
            full = {index for index in record.devices if excess.get(index, 0) > 0}
            extents = _on(record, full)
            for extent in extents:
                excess[extent.device] -= extent.count
            return extents

        def too_full() -> set[int]:
            return {index for index, over in self._excess().items() if over >= 0}

        self._pass(_Job("rebalancing", lambda record: _on(record, too_full()), too_full, pick))
        self._done("rebalance")

    def _move_layers(self, quota: Quota, *, slots: bool = True) -> int:
        """Move what volumes have; returns how many blocks were moved."""
        self.task.done = 0
        self.task.total = self._layers.count(quota.keys()) * self._store.label.block_size

        def pace(length: int) -> None:
            self.task.done += length
            self.task.pace(length)

        return self._layers.run(quota, pace, slots=slots)

    def _done(self, work: Work) -> None:
        self._wanted.discard(work)
        self._note()

    def _excess(self) -> dict[int, float]:
        """By how many blocks each device that takes data is fuller than the average of them."""
        allocator = self._store.allocator
        devices = self._store.blocks.accepting_indices()
        size = {index: allocator.size(index) for index in devices}
        used = {index: size[index] - allocator.free_count(index) for index in devices}
        share = sum(used.values()) / max(sum(size.values()), 1)
        excess = {index: used[index] - share * size[index] for index in devices}
        return {index: over if over > _TOLERANCE * size[index] else min(over, 0.0) for index, over in excess.items()}

    def _pass(self, job: _Job) -> int:
        """Move all Objects that ``job`` means, the newest of each rank first; returns how many there were."""
        self.job = job.name
        self.task.done = self.task.total = 0
        listed: dict[int, bytearray] = {}
        total = 0
        for record in self._records():
            if leave := (job.pick or job.leave)(record):
                listed.setdefault(job.rank(record), bytearray()).extend(record.uuid)
                total += block_count(leave)
        self.task.total = total * self._store.label.block_size
        found = 0
        for _, uuids in sorted(listed.items()):
            found += len(uuids) // 16
            while uuids:
                uuid = bytes(uuids[-16:])
                del uuids[-16:]
                self._move(uuid, job)
        self._commit()
        return found

    def _records(self) -> Iterator[Record]:
        page = self._store.objects(limit=_PAGE_COUNT)
        while page:
            yield from page
            self.task.pace(0)
            page = self._store.objects(page[-1].uuid, _PAGE_COUNT)

    def _move(self, uuid: bytes, job: _Job) -> None:
        record = self._store.keystore.get(uuid)
        leave = job.leave(record) if record is not None else ()
        if record is None or not leave:
            return
        try:
            relocation = self._place(record, leave, job)
        except NotFound:
            return
        except (DeviceError, NoSpace) as error:
            self._give_up(uuid, error)
            return
        self._batch.append((relocation, block_count(leave) * self._store.label.block_size))
        if len(self._batch) >= _BATCH_COUNT or sum(length for _, length in self._batch) >= _BATCH_BYTES:
            self._commit()

    def _place(self, record: Record, leave: Sequence[Extent], job: _Job) -> Relocation:
        try:
            return self._store.relocations.place(record, leave, job.avoid(), salvage=job.salvage)
        except NoSpace:  # what was moved before may not have been erased yet
            self._commit()
            self._store.keystore.checkpoint()
            self._wait(lambda: False, _POLL_S)
            return self._store.relocations.place(record, leave, job.avoid(), salvage=job.salvage)

    def _commit(self) -> None:
        """Announce what has places to go, copy it, and have it made the Objects' own."""
        if not self._batch:
            return
        self._announce([relocation for relocation, _ in self._batch])
        announced = [(relocation, length) for relocation, length in self._batch if relocation.id]
        moves = [move for relocation, length in announced if (move := self._copy(relocation, length))]
        self._batch = []  # from here on these are the writer's
        try:
            outcomes = self._writer.make(moves, _COMMIT_S) if moves else []
        except TimeoutError as error:
            raise _late() from error
        for change, outcome in outcomes:
            if isinstance(outcome, Record):
                self.moved += 1
            elif not isinstance(outcome, NotFound | PreconditionFailed):  # deleted or moved meanwhile
                assert isinstance(change, Move)
                self._give_up(change.source.record.uuid, outcome)

    def _announce(self, batch: Sequence[Relocation]) -> None:
        """If some cannot be announced, the others."""
        try:
            self._writer.call(lambda: self._store.relocations.announce(batch), _COMMIT_S)
        except TimeoutError as error:
            raise _late() from error
        except DeviceError as error:
            if len(batch) > 1:
                for relocation in batch:
                    self._announce([relocation])
                return
            (relocation,) = batch
            relocation.abort()
            self._give_up(relocation.record.uuid, error)

    def _copy(self, relocation: Relocation, length: int) -> Move | None:
        uuid = relocation.record.uuid
        try:
            move = self._store.relocations.copy(relocation, self.task.pace)
        except NotFound:
            return None
        except DeviceError as error:
            self._give_up(uuid, error)
            return None
        self.task.done += length
        self.task.pace(length if not relocation.body_block_count else 0)
        return move

    def _give_up(self, uuid: bytes, error: RustordError) -> None:
        self.stuck += 1
        self._problem = self._problem or error
        log.warning("Object %s cannot be moved: %s", uuid_text(uuid), error, extra=fields(uuid=uuid_text(uuid)))

    def _stuck(self, what: str) -> RustordError:
        assert self._problem is not None
        return type(self._problem)(f"{what}: {self._problem.message}", hint="the log has them all; read or delete them")

    def _wait(self, condition: Callable[[], bool], timeout_s: float = _LOOK_S) -> None:
        while timeout_s > 0 and not condition():
            self.task.pause(_POLL_S)
            timeout_s -= _POLL_S


def _late() -> DeviceError:
    return DeviceError("a cycle did not end in time", hint="see 'rustorctl status', and dmesg")


def check_volumes(store: ObjectStore, index: int) -> None:
    """Raise DeviceError if volumes have data on a device that is not there: nobody else has it."""
    slot, layers = store.blocks.slots[index], store.layers
    if slot.device is not None and not slot.device.failed:
        return
    chunks = (address for layer in [*layers.by_uuid.values()] for _, address in layer.chunks() if address > ZEROS)
    if any(device_of(address) == index for address in chunks):
        raise DeviceError(
            f"volumes have data on device {index}, which is {slot.state}, and nowhere else",
            hint="bring it back; or delete these volumes, with their snapshots and clones: 'rustorctl volume ls'",
        )


def _read(notes: Path | None) -> set[Work]:
    try:
        noted = json.loads(notes.read_text()) if notes else []
    except (OSError, ValueError):
        return set()
    return {work for work in WORKS if work in noted}


def _on(record: Record, devices: Collection[int]) -> list[Extent]:
    """What an Object has on these devices."""
    return [extent for extent in record.extents if extent.device in devices]


def _on_devices(copy: Sequence[Extent], devices: Collection[int]) -> bool:
    return any(extent.device in devices for extent in copy)
