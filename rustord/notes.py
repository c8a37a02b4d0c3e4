"""Notes: the changes of Layers that journals have, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from rustord.journal import Batch, Kind
from rustord.label import Label
from rustord.objkey import ObjectId
from rustord.page import CHUNK_BYTES, LayerEntry, MapEntry, decode_note
from rustord.record import Grave, RecordId


class Notes:
    """The changes of Layers in the journals, by sequence, and which devices have them.

    What a map is, the journal of the Layer's home alone says: each MAP is durable there before anybody is told of it.
    One that is on other devices only was cut short, or the home is missing: then nobody writes the volume, and nobody
    can tell. A LAYER is in all journals. So one that comes late, in a void, and which a home that is there does not
    have, was cut short as well; and another one that is no newer than the index is known there, or has been forgotten.
    """

    def __init__(self) -> None:
        self.changes: dict[int, LayerEntry | MapEntry] = {}
        self._devices: dict[int, set[int]] = {}
        self._together: dict[int, list[int]] = {}

    def add(self, device: int, batch: Batch) -> None:
        """Take what a batch in the journal of a device has."""
        entries = [entry for entry in batch.entries if entry.kind in (Kind.LAYER, Kind.MAP)]
        together = [entry.sequence for entry in entries]
        for entry in entries:
            self.changes[entry.sequence] = decode_note(entry)
            self._devices.setdefault(entry.sequence, set()).add(device)
            self._together[entry.sequence] = together

    def uncounted(
        self,
        home_of: Callable[[ObjectId], int | None],
        there: Collection[int],
        label: Label,
        indexed_sequence: int = 0,
        reaches: Callable[[int, int], bool] = lambda device, sequence: True,
    ) -> set[int]:
        """The sequences of those that do not count. ``home_of`` tells the homes before these changes, as far as known.

        ``reaches`` tells whether the journal of a device has all from a sequence on: what it has not, was not to be.
        A Layer that is not known, and of whose head the home has overwritten a change, had that in its slots by then.
        It has been erased since, even if another device, which was away, still tells of it.
        """
        homes: dict[ObjectId, int | None] = {}
        found: set[int] = set()

        def home(note: LayerEntry | MapEntry) -> int | None:
            if note.layer not in homes:
                homes[note.layer] = home_of(note.layer)
            known = homes[note.layer]
            return note.home if known is None and isinstance(note, LayerEntry) else known

        erased = {
            note.layer
            for sequence, note in self.changes.items()
            if isinstance(note, LayerEntry) and note.home in there and note.home not in self._devices[sequence]
            if not reaches(note.home, sequence) and home_of(note.layer) is None
        }
        for sequence, note in sorted(self.changes.items()):
            devices = self._devices[sequence]
            if isinstance(note, MapEntry):
                at = home(note)
                if at is not None and at not in devices and reaches(at, sequence):
                    found.add(sequence)
            elif note.layer in erased:
                found.add(sequence)
            elif sequence not in found:
                needed = {home(self.changes[other]) for other in self._together[sequence]} & {*there}
                is_late = label.is_void(sequence)
                if needed - devices if is_late else sequence <= indexed_sequence:
                    found.update(self._together[sequence])
                else:
                    homes[note.layer] = note.home
        return found

    def graves(self, uncounted: Iterable[int], block_size: int) -> Iterator[Grave]:
        """What changes that do not count were to add to Layers: graves, until a home that is missing says otherwise."""
        for sequence in uncounted:
            change = self.changes[sequence]
            if isinstance(change, MapEntry) and (extents := change.extents(CHUNK_BYTES // block_size)):
                yield Grave(RecordId(change.layer, sequence), extents)
