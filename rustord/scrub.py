"""Scrub: reads everything that lives in the pool from the devices, in their order, verifies it, and has it mended.

What it has found, and where it is, stands in a file beside the index, so that it goes on there after a restart.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from BTrees.LOBTree import LOBTree

from rustord.event import SCRUB_BEGAN, SCRUB_ENDED
from rustord.extent import LAYERS, Extent
from rustord.manifest import Copy
from rustord.objectstore import ObjectStore
from rustord.objkey import ObjectId, uuid_text
from rustord.record import Record
from rustord.repair import Health, Repairer, Wound
from rustord.task import Stopped, Task, keep_note

log = logging.getLogger(__name__)

LIST_COUNT_MAX = 1000
"""Damaged Objects and bad extents that a report lists; beyond them it only counts."""
_WINDOW_COUNT_MAX = 500_000  # copies that are put in order at once: about 50 MiB
_PAGE_COUNT = 1024
_LISTING_BYTES = 256  # a Record that is looked at counts as that much read, so that a listing keeps to the pace, too
_NOTE_S = 5.0


class _Item(NamedTuple):
    """The copy of an Object that begins at ``block``."""

    block: int
    uuid: ObjectId
    copy: int


@dataclass
class Report:
    """What a scrub has found up to now, or had found when it ended; plain values, ready for JSON.

    ``state`` is "never", "running", "stopped", "done" or "failed"; ``device`` and ``block`` are where it goes on.
    ``began`` and ``ended`` are in seconds since 1970. ``copies`` counts what was examined, ``unread`` copies on devices
    that are missing, ``damaged`` the chunks and footers that were found bad, ``mended`` and ``lost`` how many of these
    were made good from another copy and how many cannot be, ``transient`` what was wrong only once.
    """

    state: str = "never"
    began: float = 0.0
    ended: float = 0.0
    device: int = 0
    block: int = 0
    done_bytes: int = 0
    copies: int = 0
    unread: int = 0
    damaged: int = 0
    mended: int = 0
    lost: int = 0
    transient: int = 0
    damaged_objects: list[dict[str, Any]] = field(default_factory=list)
    bad_extents: list[dict[str, int]] = field(default_factory=list)
    error: str = ""

    def add(self, record: Record, health: Health) -> None:
        """Count what an examination came to."""
        self.copies += 1
        self.unread += health.unread
        self.transient += health.transient
        if health.is_gone:
            return
        wounds = [*health.mended, *health.lost, *health.waiting]
        self.damaged += len(wounds)
        self.mended += len(health.mended)
        self.lost += len(health.lost)
        if wounds and len(self.damaged_objects) < LIST_COUNT_MAX:
            self.damaged_objects.append(
                {
                    "uuid": uuid_text(record.uuid),
                    "name": record.name,
                    "state": "lost" if health.lost else "not mended" if health.waiting else "mended",
                    "ranges": [_range(record, wound) for wound in wounds],
                    "reason": health.why,
                }
            )
        room = LIST_COUNT_MAX - len(self.bad_extents)
        self.bad_extents += [{"device": e.device, "block": e.block, "count": e.count} for e in health.bad[:room]]


def _range(record: Record, wound: Wound) -> dict[str, Any]:
    """Half-open, in bytes of the Object; of a footer, from its end."""
    what = "data" if wound.start < record.size else "footer"
    return {"copy": wound.copy, "what": what, "start": wound.start, "end": wound.end}


class Scrub:
    """One at a time, on a thread of its own; see `Task`."""

    def __init__(self, store: ObjectStore, repairer: Repairer, notes: Path, bytes_s_max: int = 0) -> None:
        """``notes`` is the file that remembers it over a restart."""
        self.task = Task("scrub", self._work, bytes_s_max=bytes_s_max)
        self.report = _read(notes)
        self.bytes_total = 0
        """Read since the start of the daemon."""
        self._store = store
        self.repairer = repairer
        self._notes = notes
        self._noted = 0.0

    def resume(self) -> None:
        """Go on with what was under way when the daemon ended."""
        if self.report.state == "running":
            log.info("the scrub goes on at block %d of device %d", self.report.block, self.report.device)
            self.task.start()

    def start(self, *, again: bool = False) -> dict[str, Any]:
        """Begin, or go on where the last one was stopped; ``again``: from the start. Nothing changes if one runs."""
        if not self.task.is_running:
            if again or self.report.state not in ("stopped", "running", "failed"):
                self.report = Report(began=time.time())
            self.report.state, self.report.error = "running", ""
            self.task.start()
        return self.status()

    def stop(self) -> dict[str, Any]:
        """End it soon; `start` goes on from there."""
        if self.task.is_running:
            self.task.stop()
        elif self.report.state == "running":
            self.report.state = "stopped"
        return self.status()

    def close(self) -> None:
        """End for now, and mend nothing more: the next start of the daemon goes on."""
        if self.task.is_running:
            self.task.stop()
            if self.report.state == "stopped":
                self.report.state = "running"
                self._note()
        self.repairer.close()

    def status(self) -> dict[str, Any]:
        """The report, and how far it is."""
        return {
            **asdict(self.report),
            "running": self.task.is_running,
            "total_bytes": self._total(),
            "rate_bytes_s": self.task.bytes_s_max,
        }

    def _total(self) -> int:
        allocator = self._store.allocator
        used = sum(
            allocator.size(index) - allocator.free_count(index) - allocator.lost_count(index)
            for index in self._store.blocks.slots
        )
        return used * self._store.label.block_size

    # On the task's thread

    def _work(self, task: Task) -> None:
        report = self.report
        log.info("the scrub begins at block %d of device %d", report.block, report.device, extra=SCRUB_BEGAN())
        try:
            self._scrub(task)
            report.state, report.ended = "done", time.time()
            report.device = report.block = 0
        except Stopped:
            report.state = "stopped"
            raise
        except Exception as error:
            report.state, report.error = "failed", str(error)
            raise
        finally:
            self._note()
            log.info(
                "the scrub is %s: %d copies examined, %d chunks and footers damaged, %d of them mended, %d lost",
                *(report.state, report.copies, report.damaged, report.mended, report.lost),
                extra=SCRUB_ENDED(),
            )

    def _scrub(self, task: Task) -> None:
        report = self.report
        for device in sorted(self._store.blocks.slots):
            if device < report.device:
                continue
            if device > report.device:
                report.device, report.block = device, 0
            for item in self._items(task, device, report.block):
                record = self._store.keystore.get(item.uuid)
                if record is not None and _begins_at(record, item, device):
                    report.add(record, self.repairer.examine(record, [item.copy], pace=self._pace))
                report.block = item.block + 1
                self._note_sometimes()

    def _pace(self, length: int) -> None:
        self.report.done_bytes += length
        self.bytes_total += length
        self.task.pace(length)

    def _items(self, task: Task, device: int, block: int) -> Iterator[_Item]:
        """The copies that begin on the device, from ``block`` on, in order; what is stored meanwhile may be missing."""
        is_whole = False
        while not is_whole:
            window, is_whole = self._window(task, device, block)
            for first, value in window.items():
                yield _Item(first, value[:16], value[16])
                block = first + 1

    def _window(self, task: Task, device: int, block: int) -> tuple[LOBTree, bool]:
        """The first copies from ``block`` on, and whether these are all.

        Millions of them fit into no list that could be sorted without holding up everybody else, so the index is gone
        through once for each window.
        """
        window, count, is_whole = LOBTree(), 0, True
        after = b""
        while page := self._store.objects(after, _PAGE_COUNT):
            after = page[-1].uuid
            for record in page:
                for number, copy in enumerate(record.copies):
                    first = _first(copy)
                    if first.device == device and first.block >= block:
                        count += window.insert(first.block, record.uuid + bytes([number]))
                        if count > _WINDOW_COUNT_MAX:
                            del window[window.maxKey()]
                            count, is_whole = count - 1, False
            task.pace(_LISTING_BYTES * len(page))
        return window, is_whole

    # The notes

    def _note_sometimes(self) -> None:
        now = time.monotonic()
        if now - self._noted > _NOTE_S:
            self._noted = now
            self._note()

    def _note(self) -> None:
        keep_note(self._notes, asdict(self.report))


def _first(copy: Copy) -> Extent:
    """The first blocks of a copy that are its own: the data of an Object may be that of a Layer."""
    return next(extent for extent in copy if extent.device != LAYERS)


def _begins_at(record: Record, item: _Item, device: int) -> bool:
    """Whether the copy is still there: its Object may have been moved since it was listed, and was read for that."""
    if item.copy >= len(record.copies):
        return False
    first = _first(record.copies[item.copy])
    return (first.device, first.block) == (device, item.block)


def _read(notes: Path) -> Report:
    """The last report; an empty one if there is none, or none that can be read."""
    try:
        given = json.loads(notes.read_text())
        blank = asdict(Report())
        if given.keys() == blank.keys() and all(type(given[key]) is type(blank[key]) for key in blank):
            return Report(**given)
        log.warning("%s is not a report of a scrub; the next one begins anew", notes)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s cannot be read, so the next scrub begins anew: %s", notes, error)
    return Report()
