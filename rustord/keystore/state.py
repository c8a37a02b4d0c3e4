"""State: what an index says of itself: how far it has got, whose it is, and the tally of all its other entries.

A database does not notice each bit that decays below it: a damaged page of a B-tree may hide entries without any error.
So each commit takes along the tally of what the index has then, and each opening compares that with what is there.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

from xxhash import xxh3_64_digest, xxh3_64_intdigest, xxh3_128_intdigest

from rustord.errors import FormatError
from rustord.keystore.backend import Backend
from rustord.keystore.directory import damaged

STATE_KEY: Final = b"s"
"""The last of all keys."""
REBUILDING_KEY: Final = b"r"
"""The last but one: the pool's uuid, while a rebuild is putting an index together, which has no state yet."""

STATE = struct.Struct("<QQ16sQ16s8s")
"""sequence, generation, pool_uuid, entry_count, entry_sum, checksum"""
_CHECKSUM_BYTES: Final = 8
_SUM_BYTES: Final = 16
_SUM_MASK: Final = (1 << 8 * _SUM_BYTES) - 1
_PROGRESS_COUNT: Final = 500_000


class Tally(NamedTuple):
    """How many entries there are, and the sum of their digests, modulo 2**128: whichever order they come in."""

    entry_count: int = 0
    entry_sum: int = 0

    def after(self, backend: Backend, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> Tally:
        """The tally of what ``backend`` holds, which is this one now, when the batch has been committed."""
        count = self.entry_count + len(puts)
        total = self.entry_sum + sum(digest(key, value) for key, value in puts.items())
        for key in _perhaps_there(backend, puts.keys() | set(deletes)):
            old = backend.get(key)
            if old is not None:
                count, total = count - 1, total - digest(key, old)
        return Tally(count, total & _SUM_MASK)


class IndexState(NamedTuple):
    """``sequence`` is that of the newest change in the index, ``generation`` that of the labels."""

    sequence: int
    generation: int
    pool_uuid: bytes
    tally: Tally = Tally()

    def encode(self) -> bytes:
        count, total = self.tally
        fields = (self.sequence, self.generation, self.pool_uuid, count, total.to_bytes(_SUM_BYTES, "little"))
        unsigned = STATE.pack(*fields, b"")[:-_CHECKSUM_BYTES]
        return unsigned + xxh3_64_digest(unsigned)


def decode_state(raw: bytes) -> IndexState:
    """Raises FormatError if it is damaged."""
    if len(raw) != STATE.size or xxh3_64_digest(raw[:-_CHECKSUM_BYTES]) != raw[-_CHECKSUM_BYTES:]:
        hint = "move its directory away, then 'rustorctl pool rebuild' makes a new index from the devices"
        raise FormatError("what the index says of itself is damaged", hint=hint)
    sequence, generation, pool_uuid, count, total, _ = STATE.unpack(raw)
    return IndexState(sequence, generation, pool_uuid, Tally(count, int.from_bytes(total, "little")))


def state_of(backend: Backend) -> IndexState | None:
    """What an opened ``backend`` says of itself; None if it is new, or is being rebuilt."""
    raw = backend.get(STATE_KEY)
    return None if raw is None else decode_state(raw)


def commit(backend: Backend, puts: Mapping[bytes, bytes], deletes: Iterable[bytes], state: IndexState) -> None:
    """Commit a batch to an index, with the ``state`` that it has then, but for the tally.

    That goes on from what the index itself says: a commit that failed may be there all the same.
    """
    deletes = list(deletes)
    before = state_of(backend)
    tally = (before.tally if before else Tally()).after(backend, puts, deletes)
    backend.commit({**puts, STATE_KEY: state._replace(tally=tally).encode()}, deletes)


def digest(key: bytes, value: bytes) -> int:
    """What an entry adds to the sum."""
    return xxh3_128_intdigest(value, xxh3_64_intdigest(key))


def verify(backend: Backend, directory: Path, progress: Callable[[int], object] = lambda count: None) -> None:
    """Read every entry of the index in ``directory``, with an opened ``backend``; a commit may come in between.

    Raises Damaged unless they are those that were put into it. ``progress`` is told of the entries read now and then.
    """
    count = total = 0
    key = value = b""
    for next_key, value in backend.scan(b"", b"\xff"):
        if next_key <= key:  # a tree whose pages lead in a circle has no end
            raise damaged(directory, f"its entries are not in order behind {key[:40]!r}")
        key = next_key
        total += digest(key, value)
        count += 1
        if count % _PROGRESS_COUNT == 0:
            progress(count)
    if key == STATE_KEY:
        _compare(value, Tally(count - 1, (total - digest(key, value)) & _SUM_MASK), directory)
    elif count and key != REBUILDING_KEY:
        raise damaged(directory, "what it says of itself is missing")


def _compare(raw: bytes, found: Tally, directory: Path) -> None:
    try:
        expected = decode_state(raw).tally
    except FormatError as error:
        raise damaged(directory, error.message) from error
    if found.entry_count != expected.entry_count:
        raise damaged(directory, f"it has {found.entry_count:,} entries, and should have {expected.entry_count:,}")
    if found != expected:
        raise damaged(directory, f"of its {found.entry_count:,} entries, some are not as they were written")


def _perhaps_there(backend: Backend, keys: Iterable[bytes]) -> Iterator[bytes]:
    """Those of ``keys`` that may be in the index: all but those behind the last one of their kind.

    To look each one up may cost more than the commit. New Objects are behind all others if their uuids are of the time.
    """
    for kind, of_kind in groupby(sorted(keys), lambda key: key[:1]):
        group = list(of_kind)
        end = bytes([kind[0] + 1])
        yield from group[: bisect_left(group, True, key=lambda key: next(backend.scan(key, end), None) is None)]
