"""Guard: what stands between the core and a plugin that fills a role.

Whatever goes wrong in a plugin's code is a `PluginError` that names the plugin, and fails the one request that it was
asked for; and nothing comes out of it that the core could not record. What rustord itself offers keeps the contracts,
which its tests see to, and goes without a guard. The extents that a Placer chooses are validated by the
`rustord.allocator.Allocator`, for they depend on what is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rustord.errors import PluginError, RustordError
from rustord.keygen import Hasher, KeyGen
from rustord.keystore.backend import Backend
from rustord.objkey import ObjectId
from rustord.placer import Placer

if TYPE_CHECKING:
    from typing_extensions import Buffer

COPIES_MAX: Final = 16
DIGEST_BYTES_MAX: Final = 64
_NAME_LENGTH_MAX = 32
_RECENT_COUNT_MAX = 4096
"""Uuids that may not be known to the KeyStore yet: more than a cycle makes."""
_LOOK_COUNT_MAX = 16
"""Entries of a commit that are looked up after it."""

T = TypeVar("T")


class _Blame:
    """Turns whatever a plugin's code raises into an error that names the plugin."""

    def __init__(self, plugin: str, role: str) -> None:
        self._who = f"the {role} of plugin {plugin}"

    def error(self, what: str) -> PluginError:
        return PluginError(f"{self._who} {what}", hint="choose another one in rustord.toml, or tell those who make it")

    def ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (Exception, SystemExit) as error:
            raise self.error(f"failed: {error!r}") from error

    def name(self, what: str, value: object, forbidden: str = "") -> str:
        """``value``, which must be a name that can be recorded."""
        good = (
            isinstance(value, str) and 1 <= len(value) <= _NAME_LENGTH_MAX and value.isascii() and value.isprintable()
        )
        if not good or any(character in str(value) for character in forbidden):
            raise self.error(f"has the {what} {value!r}; 1 to {_NAME_LENGTH_MAX} printable ASCII characters are wanted")
        return str(value)


class GuardedKeyGen:
    """A plugin's KeyGen: its uuids are new, its digests bytes of one length. Raises PluginError if it is none."""

    def __init__(self, keygen: KeyGen, plugin: str) -> None:
        self._keygen = keygen
        self._blame = _Blame(plugin, "keygen")
        self._recent: dict[ObjectId, None] = {}
        self._remembering = threading.Lock()
        self.algorithm = self._blame.name("algorithm", self._blame.ask(lambda: keygen.algorithm), forbidden=":")
        self._digest_length = 0
        self._digest_length = len(self.hasher().digest())
        self.is_known: Callable[[ObjectId], bool] = lambda uuid: False
        """Whether an Object has this uuid; the pool that is opened sets it."""

    def uuid(self) -> ObjectId:
        uuid = self._blame.ask(lambda: self._keygen.uuid())
        if type(uuid) is not bytes or len(uuid) != 16:
            raise self._blame.error(f"gave {uuid!r:.80} as a uuid; 16 bytes are wanted")
        with self._remembering:
            is_new = uuid not in self._recent
            self._recent[uuid] = None
            if len(self._recent) > _RECENT_COUNT_MAX:
                del self._recent[next(iter(self._recent))]
        if not is_new or self.is_known(uuid):
            raise self._blame.error(f"gave the uuid {uuid.hex()} a second time")
        return uuid

    def hasher(self) -> Hasher:
        return _GuardedHasher(self._blame.ask(lambda: self._keygen.hasher()), self._blame, self._digest_length)


class _GuardedHasher:
    __slots__ = ("_blame", "_hasher", "_length")

    def __init__(self, hasher: Hasher, blame: _Blame, length: int) -> None:
        """``length`` is that of all digests in bytes, 0 if it is not known yet."""
        self._hasher, self._blame, self._length = hasher, blame, length

    def update(self, data: Buffer, /) -> None:
        try:
            self._hasher.update(data)
        except (Exception, SystemExit) as error:
            raise self._blame.error(f"failed to hash: {error!r}") from error

    def digest(self) -> bytes:
        digest = self._blame.ask(lambda: self._hasher.digest())
        if type(digest) is not bytes or not 1 <= len(digest) <= DIGEST_BYTES_MAX:
            raise self._blame.error(f"gave {digest!r:.80} as a digest; 1 to {DIGEST_BYTES_MAX} bytes are wanted")
        if self._length and len(digest) != self._length:
            raise self._blame.error(f"gave a digest of {len(digest)} bytes; all others have {self._length}")
        return digest


class GuardedPlacer:
    """A plugin's Placer: its name and its number of copies are read once. Raises PluginError if they cannot be used."""

    def __init__(self, placer: Placer, plugin: str) -> None:
        blame = _Blame(plugin, "placer")
        self.name = blame.name("name", blame.ask(lambda: placer.name))
        copies: Any = blame.ask(lambda: placer.copies)
        if type(copies) is not int or not 1 <= copies <= COPIES_MAX:
            raise blame.error(f"makes {copies!r} copies; a number from 1 to {COPIES_MAX} is wanted")
        self.copies: int = copies
        self.place = blame.ask(lambda: placer.place)


class GuardedBackend:
    """A plugin's backend of the KeyStore: what it commits can be read again, and what it returns is bytes."""

    def __init__(self, backend: Backend, plugin: str) -> None:
        self._backend = backend
        self._blame = _Blame(plugin, "keystore")

    def _ask(self, question: Callable[[], T]) -> T:
        """What it answers. The errors of the contract (Damaged, DeviceError, NoSpace, ...) are answers, too."""
        try:
            return question()
        except RustordError:
            raise
        except (Exception, SystemExit) as error:
            raise self._blame.error(f"failed: {error!r}") from error

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        self._ask(lambda: self._backend.open(directory, read_only=read_only))

    def get(self, key: bytes) -> bytes | None:
        value = self._ask(lambda: self._backend.get(key))
        if value is not None and type(value) is not bytes:
            raise self._blame.error(f"gave {value!r:.80} as a value; bytes are wanted")
        return value

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        entries = self._ask(lambda: iter(self._backend.scan(first, end)))
        last = None
        try:
            while (entry := self._ask(lambda: next(entries, None))) is not None:
                if [type(part) for part in self._ask(lambda: tuple(entry))] != [bytes, bytes]:
                    raise self._blame.error(f"gave {entry!r:.80} as an entry; a key and a value in bytes are wanted")
                if not first <= entry[0] < end or (last is not None and entry[0] <= last):
                    raise self._blame.error(f"gave the key {entry[0]!r:.80} where it does not belong")
                last = entry[0]
                yield entry
        finally:
            if close := getattr(entries, "close", None):
                close()

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        """As the contract says; and looks whether some of it is there. Only then may a journal let go of it."""
        deletes = list(deletes)
        self._ask(lambda: self._backend.commit(puts, deletes))
        step = -(-len(puts) // _LOOK_COUNT_MAX) or 1
        kept = all(self.get(key) == value for key, value in islice(puts.items(), 0, None, step))
        gone = all(self.get(key) is None for key in islice(deletes, _LOOK_COUNT_MAX) if key not in puts)
        if not (kept and gone):
            raise self._blame.error("says that it has committed a batch, and does not have it")

    def info(self) -> Mapping[str, int | str]:
        return self._ask(lambda: self._backend.info())

    def close(self) -> None:
        self._ask(lambda: self._backend.close())
