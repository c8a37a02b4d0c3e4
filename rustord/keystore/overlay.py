"""Overlay: what the KeyStore knows and the index does not hold yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from rustord.keystore.keys import BASE, GRAVE, OBJECT, POSITION
from rustord.objkey import ObjectId


@dataclass
class Overlay:
    """What the index does not hold yet. None as a value means that the key is gone."""

    objects: dict[ObjectId, bytes | None] = field(default_factory=dict)
    graves: dict[bytes, bytes | None] = field(default_factory=dict)
    bases: dict[ObjectId, bytes | None] = field(default_factory=dict)
    pages: dict[bytes, bytes | None] = field(default_factory=dict)
    names: dict[bytes, bytes | None] = field(default_factory=dict)
    sequence: int = 0
    positions: dict[bytes, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.objects) + len(self.graves) + len(self.pages)

    def changes(self) -> tuple[dict[bytes, bytes], list[bytes]]:
        """The same as keys of the index: what to put and what to delete."""
        puts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        tables = (
            (OBJECT, self.objects),
            (GRAVE, self.graves),
            (BASE, self.bases),
            (b"", self.pages),
            (b"", self.names),
        )
        for prefix, table in tables:
            for key, value in table.items():
                if value is None:
                    deletes.append(prefix + key)
                else:
                    puts[prefix + key] = value
        for device_uuid, position in self.positions.items():
            puts[POSITION + device_uuid] = position
        return puts, deletes

    def under(self, newer: Overlay) -> Overlay:
        """Both, with what is ``newer`` laid over this."""
        return Overlay(
            self.objects | newer.objects,
            self.graves | newer.graves,
            self.bases | newer.bases,
            self.pages | newer.pages,
            self.names | newer.names,
            max(self.sequence, newer.sequence),
            self.positions | newer.positions,
        )
