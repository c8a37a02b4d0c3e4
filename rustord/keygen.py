"""KeyGen: makes what identifies an Object, a new uuid and the hash of its data."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import xxhash

from rustord.errors import InvalidRequest
from rustord.objkey import ObjectId

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Hasher(Protocol):
    """A hash in the making. The hash objects of hashlib and xxhash are Hashers as they are."""

    def update(self, data: Buffer, /) -> object:
        """Append ``data`` to what is hashed. What it returns, if anything, does not matter."""

    def digest(self) -> bytes:
        """The hash of all data so far, 1 to 64 bytes; always the same length for one algorithm."""


class KeyGen(Protocol):
    """Makes the parts of an ObjKey: a uuid before the data is there, a hasher that sees the data go by."""

    @property
    def algorithm(self) -> str:
        """Name of the hash, recorded with each Object; 1 to 32 ASCII characters."""

    def uuid(self) -> ObjectId:
        """A new uuid of 16 bytes, never given before; later ones had better sort behind earlier ones. Any thread."""

    def hasher(self) -> Hasher:
        """A hasher that has seen no data. Any thread."""


_UUID = struct.Struct(">QQ")
_COUNTER_BITS = 42


class Uuid7:
    """Makes uuids of version 7 (RFC 9562, section 5.7): time-ordered, so that inserting them into an index appends.

    ::

        unix_ts_ms 48 bits | version 4 | counter 12 | variant 2 | counter 30 | random 32

    The counter starts at random in each millisecond, with its highest bit clear, and goes up by one (section 6.2,
    method 1). Time and counter are kept as one number that only grows. So each uuid of an instance sorts behind all
    that it made before, even when the clock was set back, and a counter that overflows carries into the time.

    Instances are thread-safe, but not to be used on both sides of a fork.
    """

    __slots__ = ("_lock", "_now_ns", "_random", "_time_and_counter")

    def __init__(
        self, *, now_ns: Callable[[], int] = time.time_ns, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        """``now_ns`` tells the nanoseconds since the Unix epoch, ``random_bytes`` gives n random bytes."""
        self._now_ns = now_ns
        self._random = _random_words(random_bytes)
        self._time_and_counter = 0
        self._lock = threading.Lock()

    def __call__(self) -> ObjectId:
        """The next uuid."""
        now_ms = self._now_ns() // 1_000_000
        with self._lock:
            random = next(self._random)
            if now_ms > self._time_and_counter >> _COUNTER_BITS:
                # The upper half of the random number; the lower half ends the uuid.
                self._time_and_counter = now_ms << _COUNTER_BITS | random >> 32 << 9
            else:
                self._time_and_counter += 1
            value = self._time_and_counter
        return _UUID.pack(
            value >> _COUNTER_BITS << 16 | 0x7000 | value >> 30 & 0xFFF,
            1 << 63 | (value & 0x3FFFFFFF) << 32 | random & 0xFFFFFFFF,
        )


def _random_words(random_bytes: Callable[[int], bytes]) -> Iterator[int]:
    """Random numbers of 64 bits, without end. A system call for each would take longer than the rest of a uuid."""
    words = struct.Struct("=512Q")
    while True:
        yield from words.unpack(random_bytes(words.size))


HASHES: Mapping[str, Callable[[], Hasher]] = MappingProxyType(
    {
        "xxh3-128": xxhash.xxh3_128,
        "xxh3-64": xxhash.xxh3_64,
        "blake2b": partial(hashlib.blake2b, digest_size=32),
        "sha256": hashlib.sha256,
    }
)
"""The hashes that rustord brings along, by the name that is recorded with an Object. The first one is the default."""


def find_hash(algorithm: str) -> Callable[[], Hasher]:
    """What makes hashers for a name in `HASHES`, whatever new Objects use. Raises InvalidRequest if there is none."""
    try:
        return HASHES[algorithm]
    except KeyError:
        raise InvalidRequest(
            f"there is no hash algorithm {algorithm!r}",
            hint=f"rustord itself has {', '.join(HASHES)}; others need their plugin",
        ) from None


class HashKeyGen:
    """A KeyGen put together from a hash and UUIDv7. A plugin that brings a hash needs no more than this either."""

    __slots__ = ("algorithm", "hasher", "uuid")

    def __init__(
        self,
        algorithm: str,
        hasher: Callable[[], Hasher] | None = None,
        *,
        uuid: Callable[[], ObjectId] | None = None,
    ) -> None:
        """``algorithm`` names one of `HASHES`, or what ``hasher`` makes. Raises InvalidRequest for an unknown name."""
        self.algorithm = algorithm
        self.hasher = find_hash(algorithm) if hasher is None else hasher
        self.uuid = Uuid7() if uuid is None else uuid
