"""What is SQLite's own. The contract is run in tests/testing/test_keystore.py."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

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


def test_path_may_hold_any_character(tmp_path: Path) -> None:
    backend = SqliteBackend()
    backend.open(tmp_path / "a?b#c%20d")
    backend.commit({b"key": b"value"}, ())
    backend.close()
    assert (tmp_path / "a?b#c%20d" / "index.sqlite").exists()
