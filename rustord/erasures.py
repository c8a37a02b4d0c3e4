"""Erasures: what has to be erased, and is held back while it is read, or while the index may lead there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from rustord.change import Change, Erase
from rustord.extent import Extent, extend
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjectId
from rustord.pins import Pins
from rustord.record import RecordId


class Erasures:
    """Erasures that wait for a cycle to take them. `add` is for any thread, the rest for one."""

    def __init__(self, keystore: KeyStore, pins: Pins) -> None:
        self._keystore = keystore
        self._pins = pins
        self._new: deque[Erase] = deque()
        self._held: list[Erase] = []
        self._put_off: dict[frozenset[int], tuple[list[Extent], list[RecordId]]] = {}
        """What could not be erased, by the devices that it is on: the blocks, and whose they were."""

    def add(self, erase: Erase) -> None:
        """Have a later cycle take it."""
        self._new.append(erase)

    def hold(self, erase: Erase) -> bool:
        """Keep it if it has to wait; whether that is so. Otherwise it is the caller's."""
        if not self._has_to_wait(erase):
            return False
        self._held.append(erase)
        return True

    def _has_to_wait(self, erase: Erase) -> bool:
        if erase.after > self._keystore.indexed_sequence:
            return True
        return erase.cause is None and self._pins.are_on(erase.ids)

    def put_off(self, extents: Iterable[Extent], ids: Iterable[RecordId]) -> None:
        """Keep blocks that could not be erased, since one of their devices takes no writes, until `try_again`."""
        extents = list(extents)
        kept, owners = self._put_off.setdefault(frozenset(extent.device for extent in extents), ([], []))
        extend(kept, extents)
        owners.extend(ids)

    def try_again(self, can_erase: Callable[[int], bool]) -> None:
        """Have a later cycle take what was put off, as far as all of its devices can be erased now."""
        for devices in [devices for devices in self._put_off if all(map(can_erase, devices))]:
            self._new.append(Erase(*self._put_off.pop(devices)))

    def others_on(self, device: int) -> set[int]:
        """The devices that have a part of what was put off and is on this one, too."""
        return {other for devices in [*self._put_off] if device in devices for other in devices} - {device}

    def are_due(self) -> bool:
        """Whether `take` would return any."""
        return bool(self._new) or not all(map(self._has_to_wait, self._held))

    def take(self) -> list[Change]:
        """What was added, and what need not wait any more."""
        waiting = [self._new.popleft() for _ in range(len(self._new))] + self._held
        self._held = []
        return [erase for erase in waiting if not self.hold(erase)]

    def take_left_behind(self, uuid: ObjectId) -> list[Erase]:
        """What an Object left when it was moved: once that is deleted, it need not wait for the index any more.

        That of copies which were given up a moment ago is among it.
        """
        left = [erase for erase in self._held if erase.after and erase.ids[0].uuid == uuid]
        if left:
            self._held = [erase for erase in self._held if erase not in left]
        for erase in [self._new.popleft() for _ in range(len(self._new))]:
            (left if erase.ids and erase.ids[0].uuid == uuid else self._new).append(erase)
        return left
