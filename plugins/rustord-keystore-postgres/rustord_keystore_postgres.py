"""The index of a pool in PostgreSQL: one table, whose ``bytea`` keys the server orders byte by byte."""

from __future__ import annotations

import dataclasses
import hashlib
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from rustord import settings
from rustord.errors import ConfigError, Damaged, DeviceBusy, DeviceError, NoSpace, NotFound, RustordError
from rustord.hookspecs import Options, hookimpl
from rustord.keystore.backend import Backend, check_batch
from rustord.settings import parse_options, setting

RUSTORD_API_VERSION = 1

_DEFAULTS: Final = {
    "application_name": "rustord",
    "connect_timeout": 10,
    # A server that is gone is noticed within half a minute, not after the two hours of TCP.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
_IDLE_MAX: Final = 8
"""Connections that are kept for readers; the server has few."""

_STATEMENT_BYTES: Final = 16 << 20
"""About how much of a batch goes into one statement: the server holds it in memory, and takes no more than 1 GiB."""

_LOCK_WAIT: Final = b"SET LOCAL lock_timeout = '5s'"
"""The server may notice only after a moment that who held the lock has closed its connection, or was killed."""

_DAMAGED = (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted)
_CREATE: Final = sql.SQL("CREATE TABLE {table} (key bytea PRIMARY KEY, value bytea NOT NULL)")
_COMMENT: Final = sql.SQL("COMMENT ON TABLE {table} IS {comment}")
_GET: Final = sql.SQL("SELECT value FROM {table} WHERE key = %b")
# COPY sends one snapshot row by row, however large it is. As text: psycopg before 3.2 fails on binary without rows.
_SCAN: Final = sql.SQL(
    "COPY (SELECT key, value FROM {table} WHERE key >= {first} AND key < {end} ORDER BY key) TO STDOUT"
)
_DELETE: Final = sql.SQL("DELETE FROM {table} WHERE key = ANY (%b::bytea[])")
_PUT: Final = sql.SQL(
    "INSERT INTO {table} SELECT * FROM unnest(%b::bytea[], %b::bytea[]) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)
_INFO: Final = sql.SQL("SELECT count(*), pg_total_relation_size(to_regclass(%s)), version() FROM {table}")


@hookimpl
def rustord_keystores() -> Mapping[str, Callable[[Options], Backend]]:
    return {"postgres": make_postgres}


@dataclasses.dataclass(frozen=True)
class PostgresOptions:
    conninfo: str = setting(
        settings.text("a connection string of libpq", r"(?s).*"), "", "Where the server is; libpq's defaults if empty."
    )
    table: str = setting(
        settings.text("a table's name: lower-case letters, digits and _", r"([a-z_][a-z0-9_]{0,62})?"),
        "",
        "The table, which belongs to this pool alone; named after the pool's index directory if empty.",
    )
    credential: str = setting(
        settings.text("the name of a credential", r"[A-Za-z0-9_.-]{0,255}"), "", "The credential with the password."
    )


def make_postgres(options: Options) -> Backend:
    """A `PostgresBackend`. Raises ConfigError, naming the option; it never shows a connection string."""
    parsed = parse_options(PostgresOptions, options, "keystore")
    try:
        given = conninfo_to_dict(parsed.conninfo)
    except psycopg.ProgrammingError:  # what it says quotes the string, and a password may be in there
        raise ConfigError(
            "[keystore.options] conninfo: libpq cannot read it",
            hint="it is a list of NAME=VALUE, or a URI postgresql://...; try it with psql",
        ) from None
    if parsed.credential:
        given["password"] = settings.credential(parsed.credential)
    return PostgresBackend({**_DEFAULTS, **given}, parsed.table)


class PostgresBackend:
    """A `Backend` on PostgreSQL 12 or newer. One connection writes, and holds an advisory lock that keeps others out.

    Each running read has a connection of its own; those that are idle wait in ``_idle``. Connections that broke are
    replaced when they are needed. So when the server was away, what is asked for in the meantime fails, and all else
    goes on: a batch may be committed again, since putting and deleting twice is as good as once.
    """

    def __init__(self, parameters: Mapping[str, Any], table: str = "") -> None:
        """``parameters`` are what libpq connects with, ``table`` the table, named after the directory if empty."""
        self._parameters = parameters
        self._table_name = self._chosen = table
        self._read_only = False
        self._comment = ""
        self._writer: psycopg.Connection[Any] | None = None
        self._idle: deque[psycopg.Connection[Any]] = deque()

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        path = str(directory.absolute())
        self._table_name = self._chosen or f"rustord_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
        self._read_only = read_only
        self._comment = f"index of the rustord pool at {path}"
        with self._translated():
            self._writer = self._connect_alone(create=True)

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(**self._parameters, autocommit=True)

    def _connect_alone(self, *, create: bool = False) -> psycopg.Connection[Any]:
        """A connection that holds the lock, to a server that keeps what it commits.

        Only who opens the index may ``create`` a table that is missing: one that is gone later had all that is there.
        """
        connection = self._connect()
        try:
            self._lock(connection)
            if _value(connection, "SHOW fsync") == "off":
                raise DeviceError("the server runs with fsync=off: it loses commits", hint="set it on, and restart it")
            if _value(connection, "SHOW synchronous_commit") == "off":
                connection.execute("SET synchronous_commit = on")
            if create and _value(connection, "SELECT to_regclass(%s)", self._table_name) is None:
                self._create(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _lock(self, connection: psycopg.Connection[Any]) -> None:
        key = int.from_bytes(hashlib.sha256(b"rustord " + self._table_name.encode()).digest()[:8], signed=True)
        function = "pg_advisory_lock_shared" if self._read_only else "pg_advisory_lock"
        try:
            with connection.transaction():
                connection.execute(_LOCK_WAIT)
                connection.execute(f"SELECT {function}(%s)".encode(), (key,))
        except psycopg.errors.LockNotAvailable:
            hint = "one process at a time opens a pool"
            raise DeviceBusy(f"the index in table {self._table_name} is in use", hint=hint) from None

    def _create(self, connection: psycopg.Connection[Any]) -> None:
        if self._read_only:
            hint = "it is made when the pool is opened for writing"
            raise NotFound(f"there is no table {self._table_name}", hint=hint)
        with connection.transaction():
            connection.execute(self._query(_CREATE))
            connection.execute(self._query(_COMMENT, comment=sql.Literal(self._comment)))

    def get(self, key: bytes) -> bytes | None:
        with self._reading() as connection:
            row = connection.execute(self._query(_GET), (key,), prepare=True, binary=True).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _reading(self) -> Iterator[psycopg.Connection[Any]]:
        with self._translated():
            connection = self._take_idle() or self._connect()
            try:
                yield connection
            finally:
                if connection.closed or len(self._idle) >= _IDLE_MAX:
                    connection.close()
                else:
                    self._idle.append(connection)

    def _take_idle(self) -> psycopg.Connection[Any] | None:
        """An idle connection that the server has not closed meanwhile."""
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if _is_alive(connection):
                    return connection
                connection.close()
        return None

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        query = self._query(_SCAN, first=sql.Literal(first), end=sql.Literal(end))
        with self._reading() as connection, connection.cursor() as cursor, cursor.copy(query) as copy:
            copy.set_types(["bytea", "bytea"])
            yield from copy.rows()

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        check_batch(puts)
        with self._translated():
            if self._writer is None or not _is_alive(self._writer):
                self._close_writer()
                self._writer = self._connect_alone()
            with self._writer.transaction(), self._writer.cursor() as cursor:
                cursor.execute(self._query(_DELETE), (list(deletes),), prepare=True)
                for keys, values in _pieces(puts):
                    cursor.execute(self._query(_PUT), (keys, values), prepare=True)

    def info(self) -> Mapping[str, int | str]:
        with self._reading() as connection:
            row = connection.execute(self._query(_INFO), (self._table_name,)).fetchone()
        assert row is not None
        return {"entries": row[0], "bytes": row[1], "library": row[2].partition(" (")[0], "table": self._table_name}

    def close(self) -> None:
        self._close_writer()
        while self._idle:
            self._idle.pop().close()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _query(self, query: sql.SQL, **parts: sql.Composable) -> sql.Composed:
        return query.format(table=sql.Identifier(self._table_name), **parts)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of psycopg come out as errors of the tree; what they say of values stays with the server."""
        try:
            yield
        except psycopg.Error as error:
            raise self._error(error) from error

    def _error(self, error: psycopg.Error) -> RustordError:
        what = f"the index in table {self._table_name}"
        why = error.diag.message_primary or str(error).strip() or type(error).__name__
        if isinstance(error, psycopg.errors.DiskFull):
            return NoSpace(f"no space left for {what}: {why}", hint="make room on the database server")
        if isinstance(error, _DAMAGED):
            hint = "see the server's log, and restore this table; the pool's devices themselves are not affected"
            return Damaged(f"{what} is damaged: {why}", hint=hint)
        return DeviceError(f"{what} cannot be reached: {why}", hint="see that the server runs, and its log")


def _value(connection: psycopg.Connection[Any], query: str, *parameters: object) -> Any:
    """The first column of the first row."""
    row = connection.execute(query.encode(), parameters or None).fetchone()
    assert row is not None
    return row[0]


def _is_alive(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server still holds its end, as far as is known here without asking it."""
    poll = select.poll()
    with suppress(psycopg.Error):
        poll.register(connection.fileno(), select.POLLIN)
        while not connection.closed and poll.poll(0):
            connection.pgconn.consume_input()  # a notice, or the news that it is closed
    return not connection.closed


def _pieces(puts: Mapping[bytes, bytes]) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """The keys and values of a batch, in pieces that fit into one statement each."""
    keys: list[bytes] = []
    values: list[bytes] = []
    size = 0
    for key, value in puts.items():
        keys.append(key)
        values.append(value)
        size += len(key) + len(value)
        if size >= _STATEMENT_BYTES:
            yield keys, values
            keys, values, size = [], [], 0
    if keys:
        yield keys, values
