"""A plugin that fills every role well, until the file that HOSTILE names says how it shall misbehave.

It is no test, but what the tests install.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rustord.extent import Extent
from rustord.hookspecs import hookimpl
from rustord.keygen import Uuid7
from rustord.keystore.lmdb import LmdbBackend
from rustord.placer import Contiguous, FreeView

RUSTORD_API_VERSION = 1
FAR = 1 << 40


def mood() -> str:
    path = Path(os.environ["HOSTILE"])
    return path.read_text() if path.exists() else ""


def fail_if(*moods: str) -> None:
    if mood() in moods:
        if mood().endswith("exits"):
            sys.exit("I have had enough")
        raise ArithmeticError("I do not feel like it")


def hang_while(bad: str) -> None:
    while mood() == bad:
        time.sleep(0.01)


class HostileKeyGen:
    algorithm = "hostile"

    def __init__(self) -> None:
        self._make = Uuid7()
        self._last = b""

    def uuid(self) -> Any:
        fail_if("uuid raises", "uuid exits")
        strange = {"uuid is short": b"short", "uuid is text": "x" * 16, "uuid is none": None, "uuid again": self._last}
        if mood() in strange:
            return strange[mood()]
        self._last = self._make()
        return self._last

    def hasher(self) -> Any:
        fail_if("hasher raises")
        return None if mood() == "hasher is none" else HostileHasher()


class HostileHasher:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: Any) -> None:
        fail_if("update raises", "update exits")
        hang_while("update hangs")
        self._hash.update(data)

    def digest(self) -> Any:
        fail_if("digest raises")
        digest = self._hash.digest()
        return {
            "digest is empty": b"",
            "digest is short": digest[:20],
            "digest is endless": digest * 100,
            "digest is text": digest.hex(),
            "digest is none": None,
        }.get(mood(), digest)


class HostilePlacer:
    name = "hostile"
    copies = 1

    def place(self, count: int, free: FreeView) -> Any:
        fail_if("place raises", "place exits")
        chosen = Contiguous().place(count, free)
        hang_while("place hangs")
        first = chosen[0][0]
        taken = first._replace(block=300 * 4096)
        strange: dict[str, Any] = {
            "nothing": None,
            "no copy": [],
            "no extent": [[]],
            "a number": 7,
            "text": "somewhere",
            "two copies": [*chosen, *chosen],
            "too short": [[first._replace(count=count - 1)]],
            "too long": [[first._replace(count=count + 1)]],
            "overlapping": [[first, first._replace(count=0), first]],
            "twice the same": [[first._replace(count=1)] * count] if count > 1 else [[first, first]],
            "less than nothing": [[first._replace(count=count + 5), Extent(first.device, first.block + 900, -5)]],
            "another device": [[first._replace(device=first.device + 1)]],
            "no device": [[first._replace(device=None)]],
            "before the start": [[first._replace(block=-count)]],
            "the label": [[first._replace(block=0)]],
            "behind the end": [[taken]],
            "far behind the end": [[first._replace(block=FAR)]],
            "beyond all numbers": [[first._replace(block=1 << 70)]],
            "half a block": [[first._replace(block=first.block + 0.5)]],
            "plain numbers": [[(first.device, first.block, "many")]],
        }
        return strange.get(mood(), chosen)


class HostileBackend(LmdbBackend):
    def get(self, key: bytes) -> Any:
        fail_if("get raises")
        return {"get gives text": "text", "get gives a number": 7}.get(mood()) or super().get(key)

    def scan(self, first: bytes, end: bytes) -> Iterator[Any]:
        fail_if("scan raises")
        if mood() == "scan gives text":
            yield "text"
        if mood() == "scan gives numbers":
            yield (1, 2)
        if mood() == "scan goes astray":
            yield (b"\xff", b"value")
        yield from super().scan(first, end)

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        fail_if("commit raises")
        hang_while("commit hangs")
        if mood() == "commit is slow":
            time.sleep(0.5)
        if mood() != "commit does nothing":
            super().commit(dict(list(puts.items())[:-1]) if mood() == "commit does half" else puts, deletes)


@hookimpl
def rustord_keygens() -> Mapping[str, Any]:
    return {"hostile": lambda options: HostileKeyGen()}


@hookimpl
def rustord_placers() -> Mapping[str, Any]:
    return {"hostile": lambda options: HostilePlacer()}


@hookimpl
def rustord_keystores() -> Mapping[str, Any]:
    return {"hostile": lambda options: HostileBackend()}
