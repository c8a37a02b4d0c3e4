"""The in-tree backends keep the contract, and the contract finds backends that do not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from rustord import defaults
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.sqlite import SqliteBackend
from rustord.testing import KeyStoreContract, check


class TestLmdb(KeyStoreContract):
    factory = staticmethod(defaults.rustord_keystores()["lmdb"])


class TestSqlite(KeyStoreContract):
    factory = staticmethod(defaults.rustord_keystores()["sqlite"])


class ForgetfulReader(LmdbBackend):
    """Keeps the first snapshot that it has read."""

    def get(self, key: bytes) -> bytes | None:
        self._commits = 0
        return super().get(key)

    def _end_idle(self) -> None:
        pass


class ScanWithoutSnapshot(LmdbBackend):
    """Looks up each next entry when it is asked for it."""

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        while entry := next(super().scan(first, end), None):
            yield entry
            first = entry[0] + b"\0"


class CommitInTwo(LmdbBackend):
    """Commits half a batch, and then the other half."""

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        entries = sorted(puts.items())
        super().commit(dict(entries[: len(entries) // 2]), deletes)
        super().commit(dict(entries[len(entries) // 2 :]), ())


class CommitBehind(LmdbBackend):
    """Returns from a commit before it is made."""

    _pending: Mapping[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._pending[key] if key in self._pending else super().get(key)

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        super().commit(self._pending, ())
        super().commit({}, deletes)
        self._pending = dict(puts)


class DeletesLast(SqliteBackend):
    """Deletes what it has just put."""

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        super().commit(puts, ())
        super().commit({}, deletes)


class LastKeyIncluded(SqliteBackend):
    """Takes the end of a range for its last key."""

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return super().scan(first, end + b"\0")


class LosesEmptyValues(SqliteBackend):
    """Takes an empty value for none."""

    def get(self, key: bytes) -> bytes | None:
        return super().get(key) or None


class Unlocked(LmdbBackend):
    """Lets a second opener in, to a database of its own at that."""

    _openers = itertools.count()

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        super().open(directory / f"{os.getpid()}-{next(self._openers)}", read_only=read_only)


@pytest.mark.parametrize(
    ("backend", "found_by"),
    [
        (ForgetfulReader, "test_commits_show_at_once_in_every_thread"),
        (ScanWithoutSnapshot, "test_scan_shows_one_moment"),
        (CommitInTwo, "test_readers_see_whole_batches_while_another_commits"),
        (CommitBehind, "test_what_was_committed_survives_a_kill_whole[0]"),
        (DeletesLast, "test_key_that_is_deleted_and_put_is_put"),
        (LastKeyIncluded, "test_scan_begins_with_its_first_key_and_stops_before_its_end"),
        (LosesEmptyValues, "test_any_value[]"),
        (Unlocked, "test_second_opener_is_refused"),
    ],
)
def test_contract_finds_what_is_wrong(backend: Callable[[], LmdbBackend | SqliteBackend], found_by: str) -> None:
    report = check("keystore", lambda options: backend())
    assert found_by in [failure.test for failure in report.failures]
