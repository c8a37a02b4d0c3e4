"""Pending: what volumes have changed in memory only, kept where it outlives a process that is killed.

A write to a volume is answered before a flush makes it durable. By then the data is in the page cache, which outlives
the process; but where a chunk is that was written for the first time, and that one was trimmed, only the map in memory
knows. A client that connects again, as the kernel's nbd does, goes on as if nothing had been: when its next flush is
answered, all that was answered before has to be there. So each change of a map is noted in a file before it is
answered, without waiting for any device, and the next opening takes up what it finds there: if the machine has not been
started since, and no disk was away, for else the page cache is gone. Nobody was promised more then than was flushed.

A file has a line of JSON, and then changes of maps in the order in which they were made, as in the journal, each behind
its length. What is in the journal already may be there as well: the last change of a chunk is the one that counts.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from rustord.blockdevice import RawDevice
from rustord.blockstore import BlockStore
from rustord.errors import FormatError, Unavailable
from rustord.extent import Extent
from rustord.journal import Entry, Kind, grave_entry
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjectId, uuid_text
from rustord.page import (
    CHUNK_BYTES,
    PAGE_CHUNKS,
    ZEROS,
    MapEntry,
    decode_addresses,
    decode_head,
    decode_map_entry,
    device_of,
    extent_at,
    page_of,
)
from rustord.record import Grave, RecordId

PENDING = "pending"
"""The folder of all these files, in that of the index."""
LENGTH = struct.Struct("<I")
_NEXT = "~"
"""Ends the name of a file that is about to replace another; no volume's name ends so."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


def circumstances(pool_uuid: bytes, blocks: BlockStore) -> Mapping[str, object]:
    """What must be the same for the page cache to have what was written: the start of the machine, and the disks."""
    disks = {
        uuid_text(slot.uuid): [*slot.device.disk] if isinstance(slot.device, RawDevice) else []
        for slot in blocks.slots.values()
        if slot.device is not None
    }
    return {"boot": _read_boot_id(_BOOT_ID), "pool": uuid_text(pool_uuid), "disks": disks}


@cache
def _read_boot_id(path: Path) -> str:
    """Empty if nobody can tell."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class Pending:
    """Those of one volume. Not for two threads at a time."""

    def __init__(self, path: Path, circumstances: Callable[[], Mapping[str, object]]) -> None:
        self._path = path
        self._circumstances = circumstances
        self._fd = -1
        self._is_begun = False
        self._has_failed = False
        """Nothing is noted any more, before all is durable once: a note that is older than another one is wrong."""

    def add(self, change: MapEntry) -> None:
        """Note a change before it is answered. Raises nothing: a file that cannot be written is logged."""
        if not self._has_failed:
            try:
                self._add(change)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        what = "should rustord be killed, writes to volumes are lost that were not flushed"
        log.error("%s cannot be written (%s): %s", self._path, error.strerror or error, what)
        self._has_failed = True
        with suppress(OSError):
            self._remove()

    def _add(self, change: MapEntry) -> None:
        if self._fd < 0:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        raw = change.encode()
        raw = LENGTH.pack(len(raw)) + raw
        if not self._is_begun:
            raw = json.dumps(self._circumstances()).encode() + b"\n" + raw
        if os.write(self._fd, raw) < len(raw):
            raise OSError("a part of it was written")
        self._is_begun = True

    def check(self) -> None:
        """Raise Unavailable if there are notes that what is about to be made durable contradicts, and that stay.

        The next opening would take them up, and the blocks that they name may be others' by then.
        """
        if self._has_failed:
            try:
                self._remove()
            except OSError as error:
                what = f"{self._path} is out of date, and cannot be removed: {error.strerror or error}"
                raise Unavailable(what, hint="see to the filesystem with the directory of the index") from error

    def settle(self, left: MapEntry) -> None:
        """All that was noted is durable, but for what is ``left``. Raises nothing."""
        is_all = not (left.pages or left.chunks)
        try:
            if self._is_begun and is_all:
                os.ftruncate(self._fd, 0)
                self._is_begun = False
            elif self._is_begun:
                self._replace(left)
        except OSError as error:
            self._fail(error)
        if is_all:
            self._has_failed = False

    def _replace(self, left: MapEntry) -> None:
        rest = Pending(self._path.with_name(self._path.name + _NEXT), self._circumstances)
        try:
            rest._add(left)
            os.rename(rest._path, self._path)
            self._fd, rest._fd = rest._fd, self._fd
        finally:
            if rest._fd >= 0:
                os.close(rest._fd)

    def _remove(self) -> None:
        """Raises OSError, and has the file as before then."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd, self._is_begun = -1, False

    def close(self) -> None:
        """Forget all. What cannot be removed does no harm: nobody writes the volume any more."""
        try:
            self._remove()
        except OSError:
            os.close(self._fd)
            self._fd = -1


def take_up(directory: Path, pool_uuid: bytes, blocks: BlockStore, keystore: KeyStore, sequence: int) -> int:
    """Put what a process left that was killed into the index, if the data is there, and forget it.

    ``sequence`` is the newest that has been used; returns the newest one then.
    """
    left = _read_all(directory, circumstances(pool_uuid, blocks), blocks)
    failed = blocks.flush(blocks.writable_indices()) if left else {}
    for error in failed.values():
        log.error("what volumes had answered before rustord was killed, and not flushed, is lost: %s", error)
    if left and not failed:
        changes, graves = [], []
        for change in left:
            head = keystore.page(change.layer, 0)
            name = decode_head(head.content).name if head else ""
            if not name or not _is_there(keystore.home_of(change.layer), blocks):
                continue  # nobody can write it, or does any more
            known = {number: keystore.page(change.layer, number) for number, _ in change.pages}
            pages = [(number, place) for number, place in change.pages if known[number] is None]
            changes.append(Entry(Kind.MAP, sequence + 1, change._replace(pages=pages).encode()))
            leaves = [*_leaving(change, blocks, keystore)]
            graves.append(grave_entry(Grave(RecordId(change.layer, sequence + 2), leaves)))
            sequence += 2
            log.info("took up %d changes of volume %s", len(change.chunks), name)
        keystore.replay(changes, (), graves)
    for path in _files(directory):
        path.unlink(missing_ok=True)
    return sequence


def promised(directory: Path, pool_uuid: bytes, blocks: BlockStore) -> list[Extent]:
    """The blocks that are volumes' by what `take_up` would find now."""
    left = _read_all(directory, circumstances(pool_uuid, blocks), blocks)
    return [extent for change in left for extent in change.extents(CHUNK_BYTES // blocks.block_size)]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*") if path.is_file())


def _is_there(home: int | None, blocks: BlockStore) -> bool:
    slot = blocks.slots.get(home) if home is not None else None  # none if it was removed from the pool
    return slot is not None and slot.device is not None


def _leaving(change: MapEntry, blocks: BlockStore, keystore: KeyStore) -> Iterator[Extent]:
    """The blocks that chunks had until then."""
    for number, chunks in groupby(change.chunks, lambda item: page_of(item[0])):
        page = keystore.page(change.layer, number)
        addresses = decode_addresses(page.content) if page else ()
        for chunk, address in chunks if addresses else ():
            old = addresses[chunk % PAGE_CHUNKS]
            if old > ZEROS and old != address:
                yield extent_at(old, CHUNK_BYTES // blocks.block_size)


def _read_all(directory: Path, now: Mapping[str, Any], blocks: BlockStore) -> list[MapEntry]:
    """One change for each Layer."""
    pages: dict[ObjectId, dict[int, int]] = {}
    chunks: dict[ObjectId, dict[int, int]] = {}
    for path in _files(directory):
        for change in _read(path, now, blocks):
            pages.setdefault(change.layer, {}).update(change.pages)
            chunks.setdefault(change.layer, {}).update(change.chunks)
    return [MapEntry(layer, sorted(pages[layer].items()), sorted(chunks[layer].items())) for layer in chunks]


def _read(path: Path, now: Mapping[str, Any], blocks: BlockStore) -> Sequence[MapEntry]:
    """Its changes; none if their data may be lost."""
    head, _, raw = path.read_bytes().partition(b"\n")
    if not head or path.name.endswith(_NEXT):
        return ()
    try:
        then = json.loads(head)
    except ValueError:  # it was being begun
        return ()
    changes = [*_decode(raw)]
    if not _are_kept(changes, then, now, blocks):
        log.warning("%s is not taken up: the machine has been started since, or its disks are others", path)
        return ()
    return changes


def _are_kept(changes: Iterable[MapEntry], then: Any, now: Mapping[str, Any], blocks: BlockStore) -> bool:
    """Whether the page cache has their data. Disks that have none of it may have been added since, or removed."""
    disks = then.get("disks") if isinstance(then, dict) else None
    if not now["boot"] or not isinstance(disks, dict) or {**then, "disks": now["disks"]} != now:
        return False
    members = {index: uuid_text(slot.uuid) for index, slot in blocks.slots.items()}
    if any(uuid in disks and disks[uuid] != now["disks"].get(uuid) for uuid in members.values()):
        return False
    addresses = [address for change in changes for _, address in (*change.pages, *change.chunks)]
    return all(members.get(device_of(address)) in disks for address in addresses if address > ZEROS)


def _decode(raw: bytes) -> Iterator[MapEntry]:
    """Up to one that was not noted whole: it was not answered."""
    at = 0
    while at + LENGTH.size <= len(raw):
        (length,) = LENGTH.unpack_from(raw, at)
        at += LENGTH.size + length
        try:
            yield decode_map_entry(raw[at - length : at])
        except FormatError:
            return
