"""What is SQLite's own. The contract is run in tests/testing/test_keystore.py."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from rustord.errors import Unavailable
from rustord.keystore.sqlite import SqliteBackend


def test_settings_are_those_of_a_durable_commit(tmp_path: Path) -> None:
    backend = SqliteBackend()
    backend.open(tmp_path)
    assert backend._writer is not None
    assert backend._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert backend._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    backend.close()


def test_index_can_be_read_with_plain_sqlite(tmp_path: Path) -> None:
    backend = SqliteBackend()
    backend.open(tmp_path)
    backend.commit({b"key": b"value"}, ())
    backend.close()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        assert connection.execute("SELECT key, value FROM entries").fetchall() == [(b"key", b"value")]


def test_a_lock_of_somebody_else_is_over_when_he_is_gone(tmp_path: Path) -> None:
    with closing(SqliteBackend()) as backend:
        backend.open(tmp_path)
        assert backend._writer is not None
        backend._writer.execute("PRAGMA busy_timeout = 10")
        with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with pytest.raises(Unavailable, match="locked by another process"):
                    backend.commit({b"key": b"value"}, ())
        assert backend.get(b"key") is None
        backend.commit({b"key": b"value"}, ())
        assert backend.get(b"key") == b"value"


def test_path_may_hold_any_character(tmp_path: Path) -> None:
    backend = SqliteBackend()
    backend.open(tmp_path / "a?b#c%20d")
    backend.commit({b"key": b"value"}, ())
    backend.close()
    assert (tmp_path / "a?b#c%20d" / "index.sqlite").exists()
