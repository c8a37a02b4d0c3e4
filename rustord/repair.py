"""Repairer: finds out what is wrong with an Object on its devices, and mends what can be mended.

Readers report what was wrong, and go on with another copy; a thread beside the writer then looks at the medium itself.
What is right there was a transient fault: it is counted, and nothing moves. What is wrong twice is bad: its blocks go
into the device's table of bad blocks, and the Object gets new ones for them, filled from a copy that is right. Where
none is, the chunk stays as and where it is: an error, never wrong bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import NamedTuple

from rustord.blockstore import chunk_sums
from rustord.errors import DeviceError, NotFound, PreconditionFailed, RustordError
from rustord.event import FAULT, OBJECT_DAMAGED, OBJECT_MENDED, fields
from rustord.extent import Extent, part
from rustord.footer import encode_footer
from rustord.manifest import CHUNK_BYTES, chunk_count
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import ZEROS, extent_at
from rustord.record import Record, RecordId
from rustord.writer import Writer

log = logging.getLogger(__name__)

PIECE_BYTES = 4 * CHUNK_BYTES
"""How much is examined at once."""
REPORT_COUNT_MAX = 1000
"""Reports that wait; what is reported beyond them is found by the next reader, or by a scrub."""
KNOWN_COUNT_MAX = 10_000
MOVE_S = 300.0
CLOSE_S = 30.0

Pace = Callable[[int], None]


class Wound(NamedTuple):
    """Bytes of copy ``copy`` of an Object that are wrong on the medium: a chunk, or from its size on the footer."""

    copy: int
    start: int
    end: int


class _Report(NamedTuple):
    """What a reader found wrong: a range of bytes of the Object that the Record was of."""

    id: RecordId
    start: int
    end: int


@dataclass
class Health:
    """What an examination of an Object, or of one copy of it, came to.

    ``lost`` are the wounds that no copy can heal, ``mended`` those that are made good, ``waiting`` those that could be
    and are not, and ``why``. ``bad`` are blocks that are never used again. ``transient`` counts what was wrong only
    once. ``unread`` copies are on devices that are missing. ``is_gone``: the Object was deleted or moved meanwhile.
    """

    mended: list[Wound] = field(default_factory=list)
    lost: list[Wound] = field(default_factory=list)
    waiting: list[Wound] = field(default_factory=list)
    bad: list[Extent] = field(default_factory=list)
    transient: int = 0
    unread: int = 0
    is_gone: bool = False
    why: str = ""


class Repairer:
    """Examines and mends; `examine` may be called from any thread, and runs for one Object at a time.

    ``transient``, ``damaged`` and ``mended`` count chunks and footers: those that were wrong and right when they were
    read again, those that were found bad, and of these those that were made good.
    """

    def __init__(self, store: ObjectStore, writer: Writer) -> None:
        """From now on, what readers of ``store`` report is seen to."""
        self.transient = self.damaged = self.mended = 0
        self._store = store
        self._writer = writer
        self._reports: Queue[_Report | None] = Queue(REPORT_COUNT_MAX)
        self._known: set[_Report] = set()  # what cannot be mended now
        self._examining = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repair", daemon=True)
        self._thread.start()
        store.blocks.on_damage = self._report

    def _report(self, record: Record, start: int, end: int) -> None:
        report = _Report(record.id, start, end)
        if report not in self._known and not self._closing.is_set():
            try:
                self._reports.put_nowait(report)
            except Full:
                log.warning("Object %s is not looked at now: too much is damaged", uuid_text(record.uuid))

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                report = self._reports.get(timeout=60.0)
            except Empty:
                continue
            if report is None:
                return
            try:
                self._look_at(report)
            except RustordError as error:
                log.error("Object %s could not be examined: %s", uuid_text(report.id.uuid), error)
            except Exception:
                log.exception("Object %s could not be examined", uuid_text(report.id.uuid), extra=FAULT())

    def _look_at(self, report: _Report) -> None:
        record = self._store.keystore.get(report.id.uuid)
        if record is None or record.id != report.id or report in self._known:
            return
        health = self.examine(record, range(len(record.copies)), report.start, report.end)
        if health.lost or health.waiting:
            if len(self._known) >= KNOWN_COUNT_MAX:
                self._known.clear()
            self._known.add(report)
        elif not (health.mended or health.transient or health.unread or health.is_gone):
            health.transient = 1  # only the reader has seen it
            self._note_transient(record, health)

    def close(self) -> None:
        """Begin nothing more, and wait a while for what is under way."""
        self._closing.set()
        with suppress(Full):  # then it sees `_closing` with the next one
            self._reports.put_nowait(None)
        self._thread.join(CLOSE_S)

    # Examining

    def examine(
        self,
        record: Record,
        copies: Iterable[int],
        start: int = 0,
        end: int | None = None,
        pace: Pace = lambda length: None,
    ) -> Health:
        """Read ``copies`` of an Object from the medium, and mend what is wrong; the footers too without an ``end``.

        ``pace`` is told how much has been read, and may wait or raise. Raises what keeps the writer from working.
        """
        with self._examining:
            health = Health()
            wounds: list[Wound] = []
            for number in copies:
                if self._has_gone(record, number, start, record.size if end is None else end):
                    health.unread += 1
                    continue
                wounds += (
                    self._data_wounds(record, number, start, end, health, pace)
                    if end is not None
                    else self._copy_wounds(record, number, health, pace)
                )
            if (wounds or health.transient) and self._is_gone(record):
                return Health(unread=health.unread, is_gone=True)  # its blocks may have been those of others
            self._note_transient(record, health)
            if wounds:
                self._treat(record, wounds, health, pace)
            return health

    def _is_gone(self, record: Record) -> bool:
        current = self._store.keystore.get(record.uuid)
        return current is None or current.sequence != record.sequence

    def _copy_wounds(self, record: Record, number: int, health: Health, pace: Pace) -> list[Wound]:
        is_short = record.size <= PIECE_BYTES
        if is_short and self._is_whole(record, number, pace):
            return []
        transient = health.transient
        wounds = [
            *self._data_wounds(record, number, 0, record.size, health, pace),
            *self._footer_wounds(record, number, health, pace),
        ]
        if is_short and not wounds:
            health.transient = transient + 1  # what the first look saw is counted once
        return wounds

    def _is_whole(self, record: Record, number: int, pace: Pace) -> bool:
        """Whether a short copy is right at the first look, data and footer: most are, and one read tells."""
        footer = self._footer(record, number)
        try:
            found = self._store.blocks.reread_copy(record.copies[number], 0, record.size + len(footer))
        except RustordError:
            return False
        pace(len(found))
        data = found[: record.size]
        return found[record.size :] == footer and chunk_sums(data) == record.sums(0, chunk_count(record.size))

    def _footer(self, record: Record, number: int) -> bytes:
        """What stands behind the data of a copy."""
        blocks, label = self._store.blocks, self._store.label
        copy = record.copies[number]
        return encode_footer(record.raw, record.size, copy, blocks.device_uuids, label.secret, label.block_size)

    def _data_wounds(
        self, record: Record, number: int, start: int, end: int, health: Health, pace: Pace
    ) -> Iterable[Wound]:
        for at in range(start - start % CHUNK_BYTES, end, PIECE_BYTES):
            stop = min(at + PIECE_BYTES, record.size)
            if not self._is_right(record, number, at, stop):
                chunks = [(first, min(first + CHUNK_BYTES, stop)) for first in range(at, stop, CHUNK_BYTES)]
                wrong = [chunk for chunk in chunks if not self._is_right(record, number, *chunk)]
                health.transient += not wrong
                yield from (Wound(number, *chunk) for chunk in wrong)
            pace(stop - at)

    def _is_right(self, record: Record, number: int, start: int, end: int) -> bool:
        """Whether a range of whole chunks is right on the medium. A device that went away meanwhile is not asked."""
        try:
            data = self._store.blocks.reread_copy(record.copies[number], start, end - start)
        except RustordError:  # of what a Layer has, also that the Object below it is damaged, or that it is gone itself
            return self._has_gone(record, number, start, end)
        return chunk_sums(data) == record.sums(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))

    def _has_gone(self, record: Record, number: int, start: int, end: int) -> bool:
        """Whether a device is away that a copy needs; of what a Layer has, for a range of it."""
        if self._store.blocks.has_gone(record.copies[number]):
            return True
        try:
            chunks = start // CHUNK_BYTES, -(-end // CHUNK_BYTES)
            return bool(record.layer) and self._store.layers.has_gone(record.layer, *chunks)
        except NotFound:
            return False

    def _footer_wounds(self, record: Record, number: int, health: Health, pace: Pace) -> Iterable[Wound]:
        blocks, copy, footer = self._store.blocks, record.copies[number], self._footer(record, number)
        pace(len(footer))
        for attempt in range(2):
            try:
                found = blocks.reread_copy(copy, record.size, len(footer))
            except DeviceError:
                if blocks.has_gone(copy):
                    return
                continue
            if found == footer:
                health.transient += attempt
                return
        yield Wound(number, record.size, record.size + len(footer))

    def _note_transient(self, record: Record, health: Health) -> None:
        if health.transient:
            self.transient += health.transient
            log.warning(
                "Object %s was read wrong, and right when it was read again: nothing is moved",
                uuid_text(record.uuid),
                extra=fields(uuid=uuid_text(record.uuid)),
            )

    # Mending

    def _treat(self, record: Record, wounds: Sequence[Wound], health: Health, pace: Pace) -> None:
        self.damaged += len(wounds)
        for wound in wounds:
            (health.waiting if self._can_be_mended(record, wound) else health.lost).append(wound)
        health.bad = [extent for wound in wounds for extent in self._blocks_of(record, wound)]
        self._say(record, health)
        self._condemn(health)
        try:
            if health.waiting:
                self._move(record, [e for wound in health.waiting for e in self._blocks_of(record, wound)], pace)
                health.mended, health.waiting = health.waiting, []
                self.mended += len(health.mended)
                uuid = uuid_text(record.uuid)
                log.info("Object %s is mended, on other blocks", uuid, extra=OBJECT_MENDED(uuid=uuid))
        except (NotFound, PreconditionFailed):
            health.is_gone = True
        except (RustordError, TimeoutError) as error:
            health.why = str(error)
            log.error("Object %s is not mended: %s", uuid_text(record.uuid), error)

    def _condemn(self, health: Health) -> None:
        try:
            self._writer.call(lambda: self._store.condemn(health.bad))
        except (RustordError, TimeoutError) as error:
            health.why = str(error)
            log.error("bad blocks are not noted: %s", error)

    def _can_be_mended(self, record: Record, wound: Wound) -> bool:
        """A footer is made anew; of a chunk there must be a copy that is right."""
        if wound.start >= record.size:
            return True
        try:
            self._store.blocks.read(record, wound.start, wound.end - wound.start)
        except RustordError:
            return False
        return True

    def _blocks_of(self, record: Record, wound: Wound) -> list[Extent]:
        if record.layer and wound.start < record.size:
            return self._blocks_of_layer(record, wound)
        block_size = self._store.label.block_size
        return part(record.copies[wound.copy], wound.start // block_size, -(-wound.end // block_size))

    def _blocks_of_layer(self, record: Record, wound: Wound) -> list[Extent]:
        """Those of the chunk in the Layers that the Object is made of; none if it is that of another Object below."""
        layers = self._store.layers
        try:
            address = layers.find(layers.chain(layers.numbered(record.layer)), wound.start // CHUNK_BYTES)
        except NotFound:
            return []
        return [extent_at(address, layers.chunk_blocks)] if address > ZEROS else []

    def _say(self, record: Record, health: Health) -> None:
        for wound in (*health.waiting, *health.lost):
            what = f"bytes {wound.start} to {wound.end - 1}" if wound.start < record.size else "the footer"
            log.error(
                "Object %s: %s of copy %d cannot be read or do not match the checksum%s",
                *(uuid_text(record.uuid), what, wound.copy),
                ", and there is no other copy that is right" if wound in health.lost else "",
                extra=OBJECT_DAMAGED(uuid=uuid_text(record.uuid)),
            )

    def _move(self, record: Record, leave: Sequence[Extent], pace: Pace) -> None:
        move = self._store.relocations.prepare(record, leave, pace=pace, call=self._writer.call)
        ((_, outcome),) = self._writer.make([move], MOVE_S)
        if isinstance(outcome, RustordError):
            raise outcome
