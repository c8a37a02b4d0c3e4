"""The `sqlite` backend: one table in ``index.sqlite``, for those who want to look into their index with ``sqlite3``.

Commit point: the frame that ends the batch in the write-ahead log, synced (``synchronous=FULL``). A crash before it
leaves the old entries, after it the new ones.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from rustord.errors import DeviceError, RustordError, Unavailable
from rustord.keystore.backend import check_batch
from rustord.keystore.directory import LockedDirectory, damaged, no_index, no_space

_TABLE: Final = "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
_GET: Final = "SELECT value FROM entries WHERE key = ?"
_SCAN: Final = "SELECT key, value FROM entries WHERE key >= ? AND key < ? ORDER BY key"
_PUT: Final = "INSERT INTO entries VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_DELETE: Final = "DELETE FROM entries WHERE key = ?"

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class SqliteBackend:
    """A `Backend` on SQLite in WAL mode: one connection writes, and each running read has a connection of its own.

    Idle readers wait in ``_idle``, each belonging to whoever took it off (popping is atomic). A statement that has
    ended holds no snapshot, so an idle reader keeps nothing from being reused.
    """

    def __init__(self) -> None:
        self._idle: deque[sqlite3.Connection] = deque()
        self._failed = ""
        self._read_only = False
        self._directory: LockedDirectory | None = None
        self._writer: sqlite3.Connection | None = None

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        assert self._directory is None, "opened twice"
        self._directory = LockedDirectory(directory, read_only=read_only)
        self._read_only = read_only
        self._failed = ""
        try:
            if read_only and not self._file.exists():
                raise no_index(directory)
            if read_only:
                self._idle.append(self._connect())
            else:
                self._writer = self._connect()
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute(_TABLE)
                self._directory.sync()
            self.get(b"")  # reads the header and the schema
        except sqlite3.Error as error:
            translated = self._translated(error)
            self.close()
            raise translated from error
        except RustordError:
            self.close()
            raise

    @property
    def _file(self) -> Path:
        assert self._directory is not None, "not open"
        return self._directory.path / "index.sqlite"

    def _connect(self) -> sqlite3.Connection:
        """A connection; any thread may use it, one at a time."""
        uri = f"{self._file.absolute().as_uri()}?mode={'ro' if self._read_only else 'rwc'}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)

    def get(self, key: bytes) -> bytes | None:
        with self._reading() as connection:
            row = connection.execute(_GET, (key,)).fetchone()
            if row is None:
                return None
            self._check_types(row)
            value: bytes = row[0]
            return value

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A reader for as long as the context lasts; errors come out translated."""
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                yield connection
            finally:
                self._idle.append(connection)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._reading() as connection, contextlib.closing(connection.cursor()) as cursor:
            for entry in cursor.execute(_SCAN, (first, end)):
                self._check_types(entry)
                yield entry

    def _check_types(self, row: tuple[object, ...]) -> None:
        """Raises Damaged unless all are blobs: SQLite keeps the type of each value beside it."""
        if any(type(part) is not bytes for part in row):
            assert self._directory is not None
            raise damaged(self._directory.path, "it has an entry that is not bytes")

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        assert self._writer is not None, "not open for writing"
        check_batch(puts)
        if self._failed:
            raise DeviceError(self._failed, hint="find out what failed, then restart rustord")
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            self._writer.executemany(_DELETE, ((key,) for key in deletes))
            self._writer.executemany(_PUT, sorted(puts.items()))  # in order, neighbours share a page in the cache
            self._writer.execute("COMMIT")
        except BaseException as error:
            self._roll_back()
            if not isinstance(error, sqlite3.Error):
                raise
            translated = self._translated(error)
            if isinstance(translated, DeviceError):
                self._failed = translated.message
            raise translated from error

    def _roll_back(self) -> None:
        assert self._writer is not None
        if self._writer.in_transaction:  # SQLite has rolled back by itself after the worst errors
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")

    def info(self) -> Mapping[str, int | str]:
        with self._reading() as connection:
            entries = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        files = (self._file, self._file.with_name(self._file.name + "-wal"))
        return {
            "entries": entries,
            "bytes": sum(file.stat().st_blocks * 512 for file in files if file.exists()),
            "library": f"SQLite {sqlite3.sqlite_version}",
        }

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    def _translated(self, error: sqlite3.Error) -> RustordError:
        """The error of the tree that SQLite's ``error`` amounts to."""
        assert self._directory is not None
        path = self._directory.path
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes carry the plain one in the low byte
        if code == sqlite3.SQLITE_FULL:
            return no_space(path)
        if code in _DAMAGED:
            return damaged(path, str(error))
        if code == sqlite3.SQLITE_BUSY:  # nothing has been begun, so it can be tried again
            return Unavailable(f"the index at {path} is locked by another process", hint="end what has it open")
        return DeviceError(f"the index at {path} failed: {error}", hint="see the kernel's log for that device")
