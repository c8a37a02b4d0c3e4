"""The in-tree backends keep the contract, and the contract finds backends that do not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rustord import defaults
from rustord.errors import DeviceError
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


class CountsItself(LmdbBackend):
    """Counts an entry of its own among the others."""

    def info(self) -> Mapping[str, int | str]:
        info = dict(super().info())
        return info | {"entries": int(info["entries"]) + 1}


class SizeUnknown(LmdbBackend):
    """Says nothing of its size."""

    def info(self) -> Mapping[str, int | str]:
        return dict(super().info()) | {"bytes": 0}


class MindsAbsence(LmdbBackend):
    """Refuses to delete what is not there, and to commit nothing."""

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        deletes = list(deletes)
        if (not puts and not deletes) or any(self.get(key) is None for key in deletes if key not in puts):
            raise KeyError
        super().commit(puts, deletes)


class GivesViews(LmdbBackend):
    """Hands out what it has of a value, without a copy."""

    def get(self, key: bytes) -> bytes | None:
        value = super().get(key)
        return None if value is None else memoryview(value)  # type: ignore[return-value]


class CutsValues(LmdbBackend):
    """Takes 4 MiB of a value and no more."""

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        super().commit({key: value[: 4 << 20] for key, value in puts.items()}, deletes)


class OrdersAsText(SqliteBackend):
    """Puts keys into the order of a dictionary for people."""

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(super().scan(first, end), key=lambda item: item[0].lower()))


class OneCursor(LmdbBackend):
    """Has one cursor, which the next scan takes over."""

    _newest = 0

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._newest += 1
        mine = self._newest
        for entry in super().scan(first, end):
            if mine != self._newest:
                return
            yield entry


class LeaksScans(LmdbBackend):
    """Keeps something of each scan that was not exhausted, until there is too much of it."""

    _kept = 0

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._kept += 1
        if self._kept > 200:
            raise DeviceError("no more room for scans")
        yield from super().scan(first, end)
        self._kept -= 1


class Volatile(LmdbBackend):
    """Begins anew each time."""

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        super().open(directory, read_only=read_only)
        if not read_only:
            super().commit({}, [key for key, _ in self.scan(b"", b"\xff" * 501)])


class ClosesOnce(LmdbBackend):
    """Is surprised to be closed when it is not open."""

    _is_open = False

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        super().open(directory, read_only=read_only)
        self._is_open = True

    def close(self) -> None:
        assert self._is_open
        self._is_open = False
        super().close()


class OnePlace(SqliteBackend):
    """Takes all directories below one for the same store."""

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        super().open(directory.parent if directory.name in ("one", "other") else directory, read_only=read_only)


class CreatesForReaders(LmdbBackend):
    """Makes a store for whoever only wants to read one."""

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        if read_only and not directory.exists():
            super().open(directory)
            super().close()
        super().open(directory, read_only=read_only)


class KeepsTwo(LmdbBackend):
    """Has a copy for those who get, and compares it with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._copy = LmdbBackend()

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        super().open(directory, read_only=read_only)
        self._copy.open(directory / "copy", read_only=read_only)

    def get(self, key: bytes) -> bytes | None:
        return self._copy.get(key)

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        deletes = list(deletes)
        self._copy.commit(puts, deletes)
        super().commit(puts, deletes)

    def close(self) -> None:
        self._copy.close()
        super().close()


BROKEN = [
    (ForgetfulReader, "test_commits_show_at_once_in_every_thread"),
    (ScanWithoutSnapshot, "test_scan_shows_one_moment"),
    (CommitInTwo, "test_readers_see_whole_batches_while_another_commits"),
    (CommitBehind, "test_what_was_committed_survives_a_kill_whole"),
    (DeletesLast, "test_key_that_is_deleted_and_put_is_put"),
    (LastKeyIncluded, "test_scan_begins_with_its_first_key_and_stops_before_its_end"),
    (LosesEmptyValues, "test_any_value"),
    (Unlocked, "test_second_opener_is_refused"),
    (KeepsTwo, "test_a_bit_that_flips_does_not_hide_what_a_scan_shows"),
]
BROKEN_OTHERWISE = [
    (ForgetfulReader, "test_put_replace_delete"),
    (DeletesLast, "test_behaves_as_a_dictionary_does"),
    (CountsItself, "test_new_store_is_empty"),
    (SizeUnknown, "test_info_counts_entries_and_bytes"),
    (MindsAbsence, "test_delete_of_an_absent_key_is_fine"),
    (MindsAbsence, "test_empty_batch_is_fine"),
    (GivesViews, "test_values_are_bytes_again"),
    (CutsValues, "test_big_value"),
    (OrdersAsText, "test_keys_are_ordered_by_their_bytes"),
    (OneCursor, "test_scans_may_overlap"),
    (LeaksScans, "test_scan_that_is_given_up_holds_nothing"),
    (Volatile, "test_entries_are_there_again"),
    (ClosesOnce, "test_closing_twice_is_fine"),
    (OnePlace, "test_directories_are_stores_of_their_own"),
    (CreatesForReaders, "test_read_only_needs_a_store"),
    (Unlocked, "test_read_only_reads"),
]


def cases(broken: list[tuple[type[LmdbBackend | SqliteBackend], str]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*each, marks=marks, id=f"{each[0].__name__}-{each[1]}") for each in broken]


@pytest.mark.parametrize(("backend", "found_by"), cases(BROKEN) + cases(BROKEN_OTHERWISE, pytest.mark.long))
def test_contract_finds_what_is_wrong(backend: Callable[[], LmdbBackend | SqliteBackend], found_by: str) -> None:
    report = check("keystore", lambda options: backend())
    assert found_by in [failure.test.partition("[")[0] for failure in report.failures]
    assert report.passed, "what is wrong with everything proves nothing"


def test_every_test_of_the_contract_finds_something() -> None:
    tests = {name for name in vars(KeyStoreContract) if name.startswith("test_")}
    assert {found_by for _, found_by in BROKEN + BROKEN_OTHERWISE} == tests
