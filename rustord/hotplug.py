"""Hotplug: finds the pool's devices at start, and takes them in when they appear and lets go when they vanish.

Only what the configuration means (a path in pool.devices, or a [[device]] rule) is looked at, and only what bears the
pool's own label is opened for writing. Looking reads the label and nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rustord.blockdevice import RawDevice, open_device
from rustord.blockstore import Slot, read_label
from rustord.claim import require_ours
from rustord.config import Config
from rustord.discovery import Candidate, DeviceRemoved, Watcher, candidates, matches
from rustord.errors import ConfigError, DeviceError, RustordError
from rustord.event import DEVICE_BACK, DEVICE_GONE, DEVICE_REFUSED, fields
from rustord.label import Label
from rustord.membership import attach_device, detach_device
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.writer import Writer

log = logging.getLogger(__name__)


def find_devices(config: Config) -> list[str]:
    """The paths to open at start: those that are named and there, and those that a rule means and that bear a label.

    Raises ConfigError if nothing is named, or if the rules find devices of several pools; DeviceError if what is there
    is not enough (yet: a disk may be late, and another try may find it).
    """
    if not config.pool.devices and not config.device:
        raise ConfigError(
            "no device is named",
            hint="name the pool's devices in pool.devices of rustord.toml, or on the command line",
        )
    named = [str(path) for path in config.pool.devices]
    there = [path for path in named if os.path.exists(path)]
    missing = [path for path in named if path not in there]
    for path in missing:
        log.warning("%s is not there", path, extra=fields(device=path))
    if named and not there:
        raise DeviceError(f"none of {', '.join(named)} is there", hint="see whether the devices are attached")
    looks = {path: _look_at(path) for path in there}
    labels = {path: look for path, look in looks.items() if isinstance(look, Label)}
    taken = {os.path.realpath(path) for path in there}
    found = {path: label for path, label in _labelled(config) if path not in taken}
    pools = {label.pool_uuid for label in (labels or found).values()}
    if not labels and len(pools) > 1:
        raise ConfigError(
            f"the [[device]] rules find devices of {len(pools)} pools: {', '.join(map(uuid_text, sorted(pools)))}",
            hint="make the rules narrower, or name one device of the pool in pool.devices",
        )
    if not pools:
        if missing:
            others = ", and ".join(f"{path} is no help: {why}" for path, why in looks.items())
            raise DeviceError(f"{', '.join(missing)} is not there, and {others}", hint="see whether it is attached")
        if there:
            return there  # to open them will say what is wrong
        raise DeviceError("no device that a [[device]] rule means bears a label", hint="see 'rustorctl pool create'")
    labels |= {path: label for path, label in found.items() if label.pool_uuid in pools}
    left_out = {path: look for path, look in looks.items() if isinstance(look, str)} | _let_go(labels)
    for path, why in left_out.items():
        log.error("%s is left out: %s", path, why, extra=DEVICE_REFUSED(device=path))
    return [path for path in labels if path not in left_out]


def _look_at(path: str) -> Label | str:
    """The label of a device that is named, or why it is none of the pool's.

    A disk that has died is not there, as one that was taken out: the pool does without it.
    """
    try:
        with closing(open_device(path, read_only=True, exclusive=False)) as device:
            require_ours(device)
            return read_label(device) or "it bears no rustord label"
    except RustordError as error:
        return str(error)


def _let_go(labels: Mapping[str, Label]) -> dict[str, str]:
    """Those that the pool has let go of and that are still plugged in, perhaps with their labels since they failed."""
    newest = max(labels.values(), key=lambda label: label.generation)
    members = {member.device_uuid for member in newest.members}
    return {
        path: "it was removed from the pool"
        for path, label in labels.items()
        if label.pool_uuid == newest.pool_uuid and label.device_uuid not in members
    }


def _labelled(config: Config) -> Iterable[tuple[str, Label]]:
    if not config.device:
        return
    for candidate in candidates():
        if any(matches(rule, candidate) for rule in config.device) and (label := peek(candidate.path)):
            yield candidate.path, label


def peek(path: str) -> Label | None:
    """The label of a device that may be anybody's, read without taking it; None if it bears none that can be read."""
    try:
        device = open_device(path, read_only=True, exclusive=False)
    except RustordError as error:
        log.debug("%s is not looked at: %s", path, error)
        return None
    try:
        require_ours(device)
        return read_label(device)
    except RustordError as error:
        log.warning("%s: %s", path, error, extra=fields(device=path))
        return None
    finally:
        device.close()


class Hotplug:
    """Follows the devices of an open pool. `follow` may block, and is called by one thread at a time."""

    def __init__(self, store: ObjectStore, writer: Writer, config: Config) -> None:
        """Raises DeviceError if the kernel's events cannot be followed."""
        self.config = config
        """May be exchanged at any time; the next `follow` goes by it."""
        self._store = store
        self._writer = writer
        self._watcher = Watcher()
        self._gone: list[Candidate] = []  # what has vanished, and may still be in its slot
        self._refusals: dict[str, str] = {}  # what was said about a path, so that it is not said at every event

    def fileno(self) -> int:
        """Readable when `follow` has something to do."""
        return self._watcher.fileno()

    @property
    def has_refused(self) -> bool:
        """Whether a device that bears the pool's label was not taken in."""
        return bool(self._refusals)

    def follow(self) -> None:
        """Let go of what has vanished, and look at everything that may be a device of the pool that is missing.

        At everything, and not only at what has come: a link to a device may be made after it was seen first. Whatever
        this raises, the next call goes on with what was left.
        """
        changes = self._watcher.wait(0)
        log.debug("%d devices have come, gone or changed", len(changes))
        for change in changes:
            if isinstance(change, DeviceRemoved):
                self._refusals.pop(change.candidate.path, None)
                self._gone.append(change.candidate)
        for slot in self._slots():
            self._let_go_if_gone(slot)
        self._gone.clear()
        if any(slot.device is None for slot in self._slots()):
            for candidate in candidates():
                self._appeared(candidate)

    def _slots(self) -> list[Slot]:
        return list(self._store.blocks.slots.values())

    def _appeared(self, candidate: Candidate) -> None:
        path = candidate.path
        if any(_is_in(slot, candidate) for slot in self._slots()) or not self._is_meant(candidate):
            return
        label = peek(path)
        if label is None or label.pool_uuid != self._store.label.pool_uuid:
            return
        try:
            index = self._writer.call(lambda: attach_device(self._store, path))
        except RustordError as error:
            self._say_why(label, error)
            if self._refusals.get(path) != str(error):
                log.error("%s is not taken in: %s", path, error, extra=DEVICE_REFUSED(device=path))
                self._refusals[path] = str(error)
        else:
            log.info("device %d is back: %s", index, path, extra=DEVICE_BACK(device=path))
            self._refusals.pop(path, None)

    def _say_why(self, label: Label, error: RustordError) -> None:
        """Have the pool's status say why a device that is there is missing all the same, and what to do."""
        for slot in self._slots():
            if slot.uuid == label.device_uuid and slot.device is None:
                slot.why = f"{error} ({error.hint})"

    def _is_meant(self, candidate: Candidate) -> bool:
        names = {candidate.path, *candidate.by_id}
        named: Sequence[Path] = self.config.pool.devices
        return any(str(path) in names or os.path.realpath(path) == candidate.path for path in named) or any(
            matches(rule, candidate) for rule in self.config.device
        )

    def _let_go_if_gone(self, slot: Slot) -> None:
        """What went before it was ever listed, while the pool was being opened, is known by itself alone."""
        paths = [candidate.path for candidate in self._gone if _is_in(slot, candidate)]
        if isinstance(slot.device, RawDevice) and slot.device.is_gone:
            paths.append(slot.device.path)
        if paths:
            log.error("device %d has gone: %s", slot.index, paths[0], extra=DEVICE_GONE(device=paths[0]))
            self._writer.call(lambda: detach_device(self._store, slot.index))

    def close(self) -> None:
        """Follow nothing any more."""
        self._watcher.close()


def _is_in(slot: Slot, candidate: Candidate) -> bool:
    """Whether it is this disk that is open there, by whatever name: the link that it was opened by goes before it does.

    Another disk may get its number at once, so that is not enough to tell them apart.
    """
    return isinstance(slot.device, RawDevice) and slot.device.disk == (candidate.devnum, candidate.diskseq)
