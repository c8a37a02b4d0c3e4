"""Pins: what is kept from being erased, since somebody reads it, or has it open as a block device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from rustord.errors import InUse
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjectId, uuid_text
from rustord.record import Record, RecordId


class Pins:
    """Any thread may call any method but `begin_export`."""

    def __init__(self, keystore: KeyStore) -> None:
        self._keystore = keystore
        self._pins: Counter[RecordId] = Counter()
        self._exports: Counter[ObjectId] = Counter()
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Keep the blocks of a Record from being erased when its Object is replaced by name or moved, until `remove`.

        A reader of a long Object is not cut off by a writer of the same name. An explicit DELETE does not wait.
        """
        with self._lock:
            self._pins[record.id] += 1

    def add_current(self, uuid: ObjectId) -> Record:
        """The same for the Record that an Object has now, whoever replaces or moves it at this moment.

        Raises NotFound.
        """
        while True:
            record = self._keystore.stat(uuid)
            self.add(record)
            current = self._keystore.get(uuid)
            if current is not None and current.id == record.id:
                return record
            self.remove(record)  # it may be erased already

    def remove(self, record: Record) -> None:
        """Undo one `add`."""
        with self._lock:
            self._pins[record.id] -= 1
            if self._pins[record.id] <= 0:
                del self._pins[record.id]

    def are_on(self, ids: Iterable[RecordId]) -> bool:
        """Whether any of these Records is pinned."""
        return any(id in self._pins for id in ids)

    def begin_export(self, uuid: ObjectId) -> Record:
        """Keep an Object from being deleted, and its blocks from being erased, until `end_export`.

        Called on the thread that changes the pool, between two cycles: no deletion is half done then. Raises NotFound.
        """
        record = self._keystore.stat(uuid)
        with self._lock:
            self._exports[uuid] += 1
        self.add(record)
        return record

    def continue_export(self, record: Record, moved: Record) -> bool:
        """Keep the blocks that the Object has now, in place of those that it had; whether it still has them."""
        self.add(moved)
        current = self._keystore.get(moved.uuid)
        kept = current is not None and current.id == moved.id
        self.remove(record if kept else moved)
        return kept

    def end_export(self, record: Record) -> None:
        """Undo one `begin_export`."""
        self.remove(record)
        with self._lock:
            self._exports[record.uuid] -= 1
            if self._exports[record.uuid] <= 0:
                del self._exports[record.uuid]

    def check_deletable(self, uuid: ObjectId) -> None:
        """Raise InUse if the Object is open as a block device."""
        if clients := self._exports.get(uuid, 0):
            raise InUse(
                f"Object {uuid_text(uuid)} is open as a block device, by {clients} connections",
                hint="'rustorctl exports' shows by whom; detach it first",
            )
