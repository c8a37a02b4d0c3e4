"""Recording: all that was written to some devices and flushed, in order; and every state that a power cut may leave.

Writes since a device's last flush may each have reached the medium, or not, or be torn between two sectors, in any
order and on each device by itself. A few such writes are tried in every combination, more of them by chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from rustord.testing.device import SECTOR_BYTES, Flush, Write, put_sectors

EXHAUSTIVE_WRITE_COUNT = 4
"""Up to so many unflushed writes, every subset of them is tried."""

Sectors = Mapping[int, bytes]
"""What a medium holds: the sectors that are not zero, by their number."""


class Note(NamedTuple):
    """Something that whoever records wants to remember of this moment: what has been acknowledged, say."""

    value: object


class Restart(NamedTuple):
    """The power went off and on again: the devices hold ``media`` now, durably."""

    media: Mapping[int, Sectors]


class State(NamedTuple):
    """What a power cut left behind: after ``point`` events, ``media`` by the number of the device, and the notes.

    ``notes`` has the newest note of each type. ``what`` says what survived of the unflushed writes, for people.
    """

    point: int
    media: Mapping[int, Sectors]
    notes: Mapping[type, object]
    what: str


Event = Write | Flush | Note | Restart
_Keep = Callable[[int], bool]  # which sectors of a write survive


class Recording:
    """Events of the devices whose content at the beginning is ``media``. `VolatileDevice` tells it of them."""

    def __init__(self, media: Mapping[int, Sectors] | None = None) -> None:
        self.media = {number: dict(sectors) for number, sectors in (media or {}).items()}
        self.events: list[Event] = []
        self._from = 0

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def note(self, value: object) -> None:
        """Remember ``value`` from now on, in place of the last one of its type."""
        self.events.append(Note(value))

    def mark(self) -> None:
        """Begin here: power cuts before this moment are of no interest."""
        self._from = len(self.events)

    def cut(self, chance: random.Random) -> State:
        """One of the states that a power cut now may leave, by chance; the events go on behind it."""
        mark, self._from = self._from, len(self.events) - 1
        state = chance.choice(list(self.states(chance)))
        self._from = mark
        self.events.append(Restart(state.media))
        return state

    def states(self, chance: random.Random, samples: int = 8) -> Iterator[State]:
        """States that a power cut may leave, of each moment since the beginning or the last `mark`.

        Where more than `EXHAUSTIVE_WRITE_COUNT` writes are unflushed, ``samples`` of their states are chosen. What one
        point shares with the point before (the newest write is lost) is not tried again.
        """
        durable = {number: dict(sectors) for number, sectors in self.media.items()}
        pending: list[Write] = []
        notes: dict[type, object] = {}
        for point, event in enumerate(self.events, 1):
            if isinstance(event, Note):
                notes[type(event.value)] = event.value
            elif isinstance(event, Write):
                pending.append(event)
            elif isinstance(event, Restart):
                durable = {number: dict(sectors) for number, sectors in event.media.items()}
                pending = []
            else:
                for write in pending:
                    if write.device == event.device:
                        put_sectors(durable.setdefault(write.device, {}), write.offset, write.data)
                pending = [write for write in pending if write.device != event.device]
            if point <= self._from:
                continue
            for what, keeps in _choices(pending, chance, samples, newest=isinstance(event, Write)):
                yield State(point, _media(durable, pending, keeps), dict(notes), f"{what} of {len(pending)} writes")


def _media(durable: Mapping[int, Sectors], pending: Sequence[Write], keeps: Sequence[_Keep]) -> Mapping[int, Sectors]:
    media: dict[int, Sectors] = dict(durable)
    for number in {write.device for write in pending} | durable.keys():
        sectors = dict(durable.get(number, {}))
        for write, keep in zip(pending, keeps, strict=True):
            if write.device == number:
                put_sectors(sectors, write.offset, write.data, keep)
        media[number] = sectors
    return media


def _all(number: int) -> bool:
    return True


def _none(number: int) -> bool:
    return False


def _choices(
    pending: Sequence[Write], chance: random.Random, samples: int, *, newest: bool
) -> Iterator[tuple[str, list[_Keep]]]:
    """What may survive of ``pending``; of the ``newest`` of them something does."""
    if not pending:
        yield "nothing", []
        return
    count = len(pending)
    older = count - newest
    yield "all", [_all] * count
    if count <= EXHAUSTIVE_WRITE_COUNT:
        for subset in product((True, False), repeat=older):
            if not all(subset) or (not newest and not subset):
                yield _named(subset, newest), [*(_all if kept else _none for kept in subset), *[_all] * newest]
    else:
        if newest:
            yield "the newest", [*[_none] * older, _all]
        else:
            yield "none", [_none] * count
        for _ in range(samples):
            subset = tuple(chance.random() < 0.5 for _ in range(older))
            yield _named(subset, newest), [*(_all if kept else _none for kept in subset), *[_all] * newest]
    if newest:
        yield from _torn(pending, chance)
        yield "the first sector of each", [_first_sector(write) for write in pending]
    for _ in range(samples // 4):  # every sector of every write by itself
        seed = chance.randrange(1 << 32)
        share = chance.choice((0.1, 0.5, 0.9))
        yield f"sectors by chance ({seed})", [_by_chance(seed + n, share) for n in range(count)]


def _named(subset: Sequence[bool], newest: bool) -> str:
    return "kept " + "".join("+" if kept else "-" for kept in [*subset, *[True] * newest])


def _torn(pending: Sequence[Write], chance: random.Random) -> Iterator[tuple[str, list[_Keep]]]:
    """The newest write torn: its beginning, its end, or all but one sector survives, the others' all or nothing."""
    write = pending[-1]
    first, count = write.offset // SECTOR_BYTES, len(write.data) // SECTOR_BYTES
    if count < 2:
        return
    cut = first + chance.randrange(1, count)
    hole = first + chance.randrange(count)
    tears: list[tuple[str, _Keep]] = [
        ("the first sectors", lambda number: number < cut),
        ("the last sectors", lambda number: number >= cut),
        ("all but the last sector", lambda number: number != first + count - 1),
        ("all but one sector", lambda number: number != hole),
    ]
    for what, tear in tears:
        for kept, keep in (("all", _all), ("none", _none)):
            if len(pending) > 1 or kept == "all":
                yield f"{what} of the newest, {kept}", [*[keep] * (len(pending) - 1), tear]


def _first_sector(write: Write) -> _Keep:
    return lambda number: number == write.offset // SECTOR_BYTES


def _by_chance(seed: int, share: float) -> _Keep:
    return lambda number: hash((seed, number)) % 1000 < share * 1000  # of numbers: the same in each process
