"""Admin: what can be asked of the daemon itself, beside its Objects: pool, devices, plugins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rustord.blockdevice import tell_udev
from rustord.blockstore import Slot
from rustord.claim import check, claim
from rustord.devicemap import draw
from rustord.errors import NoSpace, NotFound
from rustord.event import DEVICE_JOINED, DEVICE_REMOVED, fields
from rustord.inspection import inspect
from rustord.label import Standing
from rustord.membership import add_device, check_addable, prepare_device, remove_device, set_standing
from rustord.mover import Mover, check_volumes
from rustord.objectstore import ObjectStore
from rustord.objkey import is_uuid, parse_uuid, uuid_text
from rustord.plugins import PluginManager
from rustord.quantity import human_size
from rustord.scrub import Scrub
from rustord.volumes import Volumes
from rustord.wire.api import NewDevice
from rustord.writer import Writer, busy

log = logging.getLogger(__name__)

T = TypeVar("T")

_STANDINGS = {Standing.IN_USE: "in use", Standing.LEAVING: "leaving", Standing.GIVEN_UP: "given up"}


class Admin:
    """Answers with plain values, ready for JSON. Every method may block; any thread may call it."""

    def __init__(
        self,
        store: ObjectStore,
        writer: Writer,
        plugins: PluginManager,
        scrub: Scrub,
        volumes: Volumes,
        metrics: Callable[[], bytes] = lambda: b"",
        exports: Callable[[], Iterable[Mapping[str, Any]]] = lambda: (),
        *,
        mover: Mover | None = None,
    ) -> None:
        self._store = store
        self._writer = writer
        self._plugins = plugins
        self._scrub = scrub
        self.volumes = volumes
        self.metrics = metrics
        """Makes the text of /metrics."""
        self.exports = exports
        """Tells what is open as a block device."""
        self._mover = mover or Mover(store, writer, volumes=volumes)

    def pool(self) -> dict[str, Any]:
        """The state of the pool as a whole; ``problems`` is empty when all is well. Sizes in bytes."""
        store = self._store
        problems = self._problems()
        return {
            "uuid": uuid_text(store.label.pool_uuid),
            "name": store.label.pool_name,
            "state": self._state(problems),
            "problems": problems,
            "objects": store.stock.count,
            "data_bytes": store.stock.size,
            "size_bytes": self._size(),
            "free_bytes": self._free(),
            "free_runs": store.allocator.fragments(),
            "block_size": store.label.block_size,
            "devices": len(store.blocks.slots),
            "devices_online": sum(slot.state == "online" for slot in store.blocks.slots.values()),
            "algorithm": store.keygen.algorithm,
            "placer": store.allocator.placer.name,
            "erase": store.blocks.erase_policy,
            "generation": store.label.generation,
            "journal_used": round(store.keystore.journal_used(), 4),
            "index_lag": store.keystore.lag(),
            "exports": len({export["name"] for export in self.exports()}),
        }

    def summary(self) -> str:
        """How the pool is, in one line."""
        store = self._store
        problems = self._problems()
        free, size = human_size(self._free()), human_size(self._size())
        state = "; ".join([f"{store.label.pool_name} is {self._state(problems)}", *problems])
        return f"{state}: {store.stock.count} Objects, {free} of {size} free on {len(store.blocks.slots)} devices"

    def _problems(self) -> list[str]:
        slots = list(self._store.blocks.slots.values())
        problems = [f"device {slot.index} is {slot.state}: {slot.reason}" for slot in slots if slot.state != "online"]
        if self._store.read_only:
            problems.append(f"the pool takes no changes: {self._store.read_only}")
        if trouble := self._store.keystore.trouble():
            problems.append(f"the index takes no changes: {trouble}")
        if problem := self._writer.index_problem:
            problems.append(f"the index cannot be written: {problem}; when the journal is full, nothing can")
        if warning := self.volumes.warning():
            problems.append(warning)
        if lost := self._scrub.report.lost:
            problems.append(f"the last scrub found {lost} chunks lost; 'rustorctl scrub status' lists the Objects")
        return problems

    def _state(self, problems: Sequence[str]) -> str:
        return "read-only" if self._store.read_only else "degraded" if problems else "ok"

    def _size(self) -> int:
        slots = list(self._store.blocks.slots.values())
        return sum(slot.geometry.data_block_count for slot in slots) * self._store.label.block_size

    def _free(self) -> int:
        return sum(map(self._free_blocks, list(self._store.blocks.slots.values()))) * self._store.label.block_size

    def devices(self) -> list[dict[str, Any]]:
        """One entry for each device of the pool, missing ones too. Sizes in bytes."""
        return [self._device(slot) for _, slot in sorted(self._store.blocks.slots.items())]

    def _device(self, slot: Slot) -> dict[str, Any]:
        block_size = self._store.label.block_size
        return {
            "index": slot.index,
            "uuid": uuid_text(slot.uuid),
            "path": slot.device.path if slot.device else None,
            "state": slot.state,
            "reason": slot.reason,
            "standing": _STANDINGS[slot.standing],
            "size_bytes": slot.geometry.data_block_count * block_size,
            "free_bytes": self._free_blocks(slot) * block_size,
            "bad_bytes": slot.bad.block_count * block_size,
            "device_bytes": slot.geometry.size,
            "rotational": slot.device.rotational if slot.device else None,
        }

    def _free_blocks(self, slot: Slot) -> int:
        return self._store.allocator.free_count(slot.index)

    def add_device(self, new: NewDevice) -> dict[str, Any]:
        """Claim a device for the pool. Raises ClaimRefused with every reason, DeviceError, or InvalidRequest."""
        path, force = new.path, new.force
        check_addable(self._store)  # before anything is erased
        if new.dry_run:
            verdict = check(path)
            verdict.require(force=force)
            return {"path": path, "size_bytes": verdict.size, "would_erase": list(verdict.erasures) if force else []}
        self._store.check_changeable()
        old = self._find(new.replaces) if new.replaces else None
        device = claim(path, force=force, announce=lambda erasure: _announce(path, erasure))
        try:
            prepare_device(self._store, device)
            member = self._call(lambda: add_device(self._store, device))
        except BaseException:
            if all(slot.device is not device for slot in self._store.blocks.slots.values()):
                device.close()
            raise
        log.info("device %d is %s", member.device_index, path, extra=DEVICE_JOINED(device=path))
        tell_udev(path)
        if old is not None:
            self.remove_device(str(old.index), give_up=old.state != "online")
        return self._device(self._store.blocks.slots[member.device_index])

    def map_device(self, which: str, cell_count: int) -> dict[str, Any]:
        """How full each part of a device is, in ``cell_count`` cells; see `DeviceMap`. Raises NotFound."""
        slot = self._find(which)
        runs = self._store.allocator.free_runs(slot.index) if slot.device else []
        bad = [(run.block, run.count) for run in slot.bad.runs]
        drawn = draw(slot.geometry, runs, bad, cell_count)
        return {
            "index": slot.index,
            "path": slot.device.path if slot.device else None,
            "state": slot.state,
            "size_bytes": slot.geometry.size,
            "block_size": slot.geometry.block_size,
            "free_bytes": sum(count for _, count in runs) * slot.geometry.block_size,
            "free_runs": len(runs),
            "longest_free_run_bytes": max((count for _, count in runs), default=0) * slot.geometry.block_size,
            "used": [round(part, 4) for part in drawn.used],
            "reserved": drawn.reserved,
            "bad": drawn.bad,
        }

    def remove_device(self, which: str, *, give_up: bool = False) -> dict[str, Any]:
        """Let go of a device, named by index, uuid or path: at once if it is empty, else when its Objects have moved.

        To ``give_up`` is for one that is lost or dying: copies elsewhere take its place, and what cannot be read is
        lost. Raises NotFound, DeviceError, InvalidRequest, or NoSpace if the others have no room for what is on it.
        """
        slot = self._find(which)
        is_leaving = slot.standing is not Standing.IN_USE  # then it is the mover that lets go of it
        if not is_leaving and slot.state == "online" and self._store.allocator.is_empty(slot.index):
            entry = self._device(slot)
            self._call(lambda: remove_device(self._store, slot.index))
            log.info("device %d was removed", slot.index, extra=DEVICE_REMOVED(device=entry["path"] or ""))
            return {**entry, "standing": "removed"}
        self._store.check_changeable()
        check_volumes(self._store, slot.index)
        if not give_up:
            self._store.blocks.writable(slot.index)
            self._check_room(slot)
        standing = Standing.GIVEN_UP if give_up or slot.behind else Standing.LEAVING
        self._call(lambda: set_standing(self._store, slot.index, standing))
        self._mover.start()
        return self._device(slot)

    def _check_room(self, leaving: Slot) -> None:
        allocator, block_size = self._store.allocator, self._store.label.block_size
        others = [index for index in self._store.blocks.accepting_indices() if index != leaving.index]
        used = allocator.size(leaving.index) - allocator.free_count(leaving.index)
        free = sum(map(allocator.free_count, others))
        if used > free or len(others) < allocator.placer.copies:
            raise NoSpace(
                f"device {leaving.index} holds {human_size(used * block_size)}, and the {len(others)} others that take "
                f"data have {human_size(free * block_size)} free for {allocator.placer.copies} copies",
                hint="add a device first, or delete Objects",
            )

    def keep_device(self, which: str) -> dict[str, Any]:
        """Keep a device that was to leave; what has been moved off it stays where it is. Raises NotFound."""
        slot = self._find(which)
        self._mover.pause()
        try:
            self._call(lambda: set_standing(self._store, slot.index, Standing.IN_USE))
        finally:
            self._mover.start()
        return self._device(slot)

    def _call(self, function: Callable[[], T]) -> T:
        """Run ``function`` between two cycles. Raises Unavailable if it takes too long; it may go on all the same."""
        try:
            return self._writer.call(function)
        except TimeoutError:
            raise busy() from None

    def mover(self) -> dict[str, Any]:
        """What is being moved, and how far that is."""
        return self._mover.status()

    def start_mover(self, work: str) -> dict[str, Any]:
        """Begin to "heal" or to "rebalance". Raises InvalidRequest."""
        self._store.check_changeable()
        self._mover.start(work)
        return self._mover.status()

    def stop_mover(self) -> dict[str, Any]:
        """Move nothing any more."""
        self._mover.stop()
        return self._mover.status()

    def _find(self, which: str) -> Slot:
        for slot in self._store.blocks.slots.values():
            named = slot.device is not None and slot.device.path == which
            if named or which == str(slot.index) or (is_uuid(which) and parse_uuid(which) == slot.uuid):
                return slot
        raise NotFound(f"the pool has no device {which[:80]!r}", hint="'rustorctl device list' shows them")

    def scrub(self) -> dict[str, Any]:
        """How far the scrub is, and what it has found."""
        return self._scrub.status()

    def start_scrub(self, again: bool) -> dict[str, Any]:
        """Begin to verify everything, or go on with it; ``again``: from the start. Nothing changes if that is so."""
        return self._scrub.start(again=again)

    def stop_scrub(self) -> dict[str, Any]:
        """End the scrub where it is."""
        return self._scrub.stop()

    def check(self) -> list[dict[str, Any]]:
        """What is not as it has to be, as far as that can be told of a pool at work."""
        return [finding.plain() for finding in inspect(self._store, self._call)]

    def plugins(self) -> list[dict[str, Any]]:
        """What is loaded, and what is only installed."""
        return [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "loaded": plugin.loaded,
                "offers": _plain(plugin.offers),
            }
            for plugin in self._plugins.plugins()
        ]


def _announce(path: str, erasure: str) -> None:
    log.warning("%s: erasing %s", path, erasure, extra=fields(device=path))


def _plain(offers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {role: list(names) for role, names in offers.items()}
