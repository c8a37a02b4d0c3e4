"""The `lmdb` backend: a memory-mapped B+tree in ``data.mdb``, the default.

Commit point: LMDB writes the new pages beside the old ones, syncs, and then writes and syncs one meta page that names
the new root. A crash before the meta page leaves the old tree, after it the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb

from rustord.errors import DeviceError, RustordError
from rustord.keystore.backend import check_batch
from rustord.keystore.directory import LockedDirectory, damaged, no_index, no_space

_MAP_BYTES: Final = 1 << 40
"""Address space that is reserved for the map: 1 TiB, the records of some billions of Objects. The file grows with what
is stored, not with this, and a map that need never be resized spares readers and the writer from stopping one another
(mdb_env_set_mapsize allows no live transaction). The map is read-only, so it counts against no memory limit, and a
stray pointer in the process cannot damage the index."""

_READERS_MAX: Final = 1022
"""Read transactions at a time, 64 bytes each in the lock file: far more than the daemon has threads."""

_SPARE_MAX: Final = 16
"""Ended read transactions that py-lmdb keeps, so that beginning one takes neither a lock nor a search for a slot."""

_CHECKED_COUNT: Final = 10_000
"""Keys that are in memory at a time while an index is opened."""

_PAGES_PER_CHANGE: Final = 8
"""More than a change of one key takes anew: the pages from the root to the key, a half of one that is split, some for
the list of free pages. What a long value takes comes on top."""

_FULL_BYTES: Final = 1 << 20
"""A filesystem with less room than this is full; some keep a little back for themselves."""

_DAMAGED = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError)
_FULL = (lmdb.DiskError, lmdb.MapFullError)


class LmdbBackend:
    """A `Backend` on LMDB. The directory needs a local filesystem, as every memory-mapped database does.

    Read transactions that `get` may use again wait in ``_idle``, each with the count of commits when it was begun. One
    belongs to whoever took it off (popping is atomic), so `get` takes no lock. It is used again as long as there was
    no commit; and a commit ends those that are idle, because LMDB cannot reuse a page that any snapshot may still
    show: a thread that reads once and then sleeps would make the file grow for ever.
    """

    def __init__(self) -> None:
        self._idle: deque[tuple[int, lmdb.Transaction[bytes]]] = deque()
        self._commits = 0
        self._failed = ""
        self._directory: LockedDirectory | None = None
        self._environment: lmdb.Environment | None = None

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        assert self._environment is None, "opened twice"
        self._failed = ""
        self._commits = 0
        self._directory = LockedDirectory(directory, read_only=read_only)
        try:
            if read_only and not (directory / "data.mdb").exists():
                raise no_index(directory)
            self._environment = lmdb.open(
                os.fspath(directory),
                map_size=_MAP_BYTES,
                max_readers=_READERS_MAX,
                max_spare_txns=_SPARE_MAX,
                readonly=read_only,
                create=not read_only,
                lock=not read_only,  # a shared lock on the directory keeps every writer away
            )
            self._check_length(directory / "data.mdb")
            self._check_search(directory)
            if not read_only:
                self._directory.sync()
        except (lmdb.Error, OSError) as error:
            translated = self._translated(error)
            self.close()
            raise translated from error
        except RustordError:
            self.close()
            raise

    def _check_length(self, file: Path) -> None:
        """Raises `Damaged` for a file that was cut short: to read a page behind the end would kill the process."""
        needed = self._length()
        size = file.stat().st_size
        if size < needed:
            raise damaged(file.parent, f"{file.name} has {size} bytes, it should have {needed}")

    def _check_search(self, directory: Path) -> None:
        """Raises `Damaged` unless `get` finds all that `scan` shows.

        The keys by which a search turns to one page or another stand in pages that a scan does not look at. If a search
        leads to the first and to the last key of each page, it leads to those between them as well; and a cursor
        that is on the page of a key finds it there, without a search from the root. So one goes forwards and finds
        each first key by a search, and one backwards, which finds each last key so. It takes 0.5 s for a million
        entries.
        """
        assert self._environment is not None
        left = self._environment.stat()["entries"]
        with self._environment.begin() as transaction, transaction.cursor() as cursor, transaction.cursor() as forwards:
            keys = cursor.iternext(keys=True, values=False)
            while some := list(islice(keys, _CHECKED_COUNT)):
                left -= len(some)
                with transaction.cursor() as backwards:  # a new one: this one is on the page of the last key
                    if left < 0 or not (all(map(forwards.set_key, some)) and all(map(backwards.set_key, some[::-1]))):
                        raise damaged(directory, "its pages do not lead to all entries")

    def _length(self) -> int:
        """Where the last page ends that LMDB has ever taken, in bytes."""
        assert self._environment is not None
        return int((self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"])

    def _lengthen(self, change_count: int, value_bytes: int) -> None:
        """Have the file end behind every page that a commit may take.

        LMDB does not write a page that a commit takes and gives back, as deletions do by the dozen. If that is the last
        one, the file would end before it, and look as if it had been cut short. The length costs no space.
        """
        assert self._environment is not None
        assert self._directory is not None
        file = self._directory.path / "data.mdb"
        more = (change_count + 1) * _PAGES_PER_CHANGE * self._environment.stat()["psize"] + 2 * value_bytes
        if file.stat().st_size < self._length() + more:
            os.truncate(file, self._length() + 2 * more)  # so much that it is seldom done

    def get(self, key: bytes) -> bytes | None:
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = self._begin()
        try:
            if reader[0] != self._commits:
                reader[1].abort()
                reader = self._begin()
            value = reader[1].get(key)
        except lmdb.Error as error:
            raise self._translated(error) from error
        self._idle.append(reader)
        return value

    def _begin(self) -> tuple[int, lmdb.Transaction[bytes]]:
        assert self._environment is not None, "not open"
        # The count is read first: a commit in between costs one more beginning, and hides nothing.
        commits = self._commits
        try:
            return commits, self._environment.begin(buffers=False)
        except lmdb.Error as error:
            raise self._translated(error) from error

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        assert self._environment is not None, "not open"
        try:
            with self._environment.begin(buffers=False) as transaction, transaction.cursor() as cursor:
                if first >= end or not (cursor.set_range(first) if first else cursor.first()):
                    return
                for entry in cursor.iternext():
                    if entry[0] >= end:
                        return
                    yield entry
        except lmdb.Error as error:
            raise self._translated(error) from error

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        assert self._environment is not None, "not open"
        check_batch(puts)
        if self._failed:
            raise DeviceError(self._failed, hint="find out what failed, then restart rustord")
        deletes = list(deletes)
        with contextlib.suppress(OSError):  # what the filesystem cannot do now, the commit will say
            self._lengthen(len(puts) + len(deletes), sum(map(len, puts.values())))
        try:
            with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                for key in deletes:
                    transaction.delete(key)
                cursor.putmulti(sorted(puts.items()))  # in order, neighbours meet the page that the cursor is on
        except lmdb.Error as error:
            translated = self._translated(error)
            if isinstance(translated, DeviceError):
                self._failed = translated.message
            raise translated from error
        self._commits += 1
        self._end_idle()

    def _end_idle(self) -> None:
        with contextlib.suppress(IndexError):  # empty
            while True:
                self._idle.pop()[1].abort()

    def info(self) -> Mapping[str, int | str]:
        assert self._environment is not None
        assert self._directory is not None
        status = (self._directory.path / "data.mdb").stat()
        return {
            "entries": self._environment.stat()["entries"],
            "bytes": status.st_blocks * 512,
            "library": "LMDB " + ".".join(str(part) for part in lmdb.version()),
        }

    def close(self) -> None:
        self._end_idle()
        if self._environment is not None:
            if self._commits:
                self._shorten()
            self._environment.close()
            self._environment = None
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    def _shorten(self) -> None:
        """Have the file end where its pages do, so that a copy of it is no longer than it has to be."""
        assert self._directory is not None
        with contextlib.suppress(OSError, lmdb.Error):
            os.truncate(self._directory.path / "data.mdb", self._length())

    def _translated(self, error: Exception) -> RustordError:
        """The error of the tree that LMDB's ``error`` amounts to."""
        assert self._directory is not None
        path = self._directory.path
        if isinstance(error, _FULL) or (os.strerror(errno.EIO) in str(error) and _is_full(path)):
            return no_space(path)
        if isinstance(error, _DAMAGED):
            return damaged(path, str(error))
        return DeviceError(f"the index at {path} failed: {error}", hint="see the kernel's log for that device")


def _is_full(path: Path) -> bool:
    """Whether the filesystem is: LMDB calls a write that was cut short, as the last one before ENOSPC is, EIO.

    Should the device have failed as well, going on is safe: the next commit writes all of its pages anew.
    """
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize < _FULL_BYTES
