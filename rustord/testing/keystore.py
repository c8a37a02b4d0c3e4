"""The contract of a KeyStore's backend."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from rustord.errors import DeviceBusy, NotFound, RustordError
from rustord.keystore.backend import KEY_BYTES_MAX, Backend

LAST = b"\xff" * (KEY_BYTES_MAX + 1)
"""Behind every key."""

BIG_VALUE_BYTES = 16 << 20
KILL_COUNT = 8
FLIP_COUNT = 20
LOCK_SECONDS_MAX = 30
"""How long a server may take to notice that a process which was killed holds its lock no more."""

Make = Callable[[], Backend]


class KeyStoreContract:
    """What every backend must do. ``factory`` is what the hook offers; the fixture `options` is what it is given.

    Each test has a directory of its own; it is the name of the store for a backend that keeps its data elsewhere.
    """

    factory: Callable[[Mapping[str, object]], Backend]

    @pytest.fixture
    def options(self) -> Mapping[str, object]:
        return {}

    @pytest.fixture
    def make(self, options: Mapping[str, object]) -> Make:
        """Makes a backend that is not open yet."""
        return lambda: self.factory(options)

    @pytest.fixture
    def backend(self, make: Make, tmp_path: Path) -> Iterator[Backend]:
        """An open, empty one."""
        backend = make()
        backend.open(tmp_path)
        yield backend
        backend.close()

    # Values and keys

    def test_new_store_is_empty(self, backend: Backend) -> None:
        assert backend.get(b"key") is None
        assert list(backend.scan(b"", LAST)) == []
        assert backend.info()["entries"] == 0

    def test_put_replace_delete(self, backend: Backend) -> None:
        backend.commit({b"key": b"value"}, ())
        assert backend.get(b"key") == b"value"
        backend.commit({b"key": b"another"}, ())
        assert backend.get(b"key") == b"another"
        backend.commit({}, [b"key"])
        assert backend.get(b"key") is None

    def test_delete_of_an_absent_key_is_fine(self, backend: Backend) -> None:
        backend.commit({b"key": b"value"}, [b"absent"])
        backend.commit({}, [b"absent"])
        assert list(backend.scan(b"", LAST)) == [(b"key", b"value")]

    def test_key_that_is_deleted_and_put_is_put(self, backend: Backend) -> None:
        backend.commit({b"key": b"old"}, ())
        backend.commit({b"key": b"new", b"other": b"new"}, iter([b"key", b"other"]))
        assert list(backend.scan(b"", LAST)) == [(b"key", b"new"), (b"other", b"new")]

    def test_empty_batch_is_fine(self, backend: Backend) -> None:
        backend.commit({}, ())

    def test_values_are_bytes_again(self, backend: Backend) -> None:
        backend.commit({b"key": b"value"}, ())
        assert type(backend.get(b"key")) is bytes
        assert [(type(key), type(value)) for key, value in backend.scan(b"", LAST)] == [(bytes, bytes)]

    @pytest.mark.parametrize("value", [b"", b"\0", b"'\\\"\0\xff", bytes(range(256)) * 17])
    def test_any_value(self, backend: Backend, value: bytes) -> None:
        backend.commit({b"key": value}, ())
        assert backend.get(b"key") == value
        assert list(backend.scan(b"", LAST)) == [(b"key", value)]

    def test_big_value(self, backend: Backend) -> None:
        value = random.Random(1).randbytes(BIG_VALUE_BYTES)
        backend.commit({b"big": value, b"small": b"value"}, ())
        assert backend.get(b"big") == value
        assert [(key, len(value)) for key, value in backend.scan(b"", LAST)] == [(b"big", len(value)), (b"small", 5)]
        backend.commit({}, [b"big"])
        assert backend.get(b"big") is None

    def test_keys_are_ordered_by_their_bytes(self, backend: Backend) -> None:
        longest = KEY_BYTES_MAX
        keys = [b"\0", b"\0\0", b"\0\xff", b"A", b"B", b"a", b"a\0", b"a\0\0", b"ab", b"b", b"\x7f", b"\x80", b"\xc3"]
        keys += [b"\xff", b"\xff" * longest, b"\xff" * (longest - 1) + b"\0", b"x" * longest, b"x" * (longest - 1)]
        backend.commit({key: bytes([number]) for number, key in enumerate(keys)}, ())
        assert [key for key, _ in backend.scan(b"", LAST)] == sorted(keys)
        for number, key in enumerate(keys):
            assert backend.get(key) == bytes([number])

    def test_scan_begins_with_its_first_key_and_stops_before_its_end(self, backend: Backend) -> None:
        keys = [b"a", b"b", b"ba", b"c", b"\xff"]
        backend.commit(dict.fromkeys(keys, b""), ())
        for first in [b"", b"\0", *keys, b"bb", b"\xff\xff"]:
            for end in [b"", b"\0", *keys, b"bb", b"\xff\xff"]:
                expected = [key for key in keys if first <= key < end]
                assert [key for key, _ in backend.scan(first, end)] == expected, (first, end)

    def test_behaves_as_a_dictionary_does(self, make: Make, tmp_path: Path) -> None:
        directories = (tmp_path / str(number) for number in itertools.count())
        machine: Any = partial(_Dictionary, make, directories)
        run_state_machine_as_test(machine, settings=_SETTINGS)

    # Snapshots and threads

    def test_scan_shows_one_moment(self, backend: Backend) -> None:
        before = {bytes([number]): b"before" for number in range(200)}
        backend.commit(before, ())
        scan = backend.scan(b"", LAST)
        seen = [next(scan) for _ in range(10)]
        backend.commit({bytes([number]): b"after" for number in range(250)}, [])
        backend.commit({}, [bytes([number]) for number in range(100, 150)])
        assert seen + list(scan) == list(before.items())
        assert len(list(backend.scan(b"", LAST))) == 200

    def test_scan_that_is_given_up_holds_nothing(self, make: Make, tmp_path: Path) -> None:
        with closing(make()) as backend:
            backend.open(tmp_path)
            backend.commit({bytes([number]): bytes(1000) for number in range(256)}, ())
            for _ in range(300):
                scan = backend.scan(b"", LAST)
                next(scan)
                scan.close()  # type: ignore[attr-defined]
            backend.commit({b"key": b"value"}, ())
        with closing(make()) as backend:
            backend.open(tmp_path)

    def test_scans_may_overlap(self, backend: Backend) -> None:
        entries = [(bytes([number]), b"value") for number in range(100)]
        backend.commit(dict(entries), ())
        one, other = backend.scan(b"", LAST), backend.scan(b"\x32", LAST)
        mixed = [(next(one), next(other)) for _ in range(50)]
        assert mixed == list(zip(entries[:50], entries[50:], strict=True))
        assert list(islice(one, 10)) == entries[50:60]
        assert list(other) == []
        assert list(one) == entries[60:]

    def test_commits_show_at_once_in_every_thread(self, backend: Backend) -> None:
        with ThreadPoolExecutor(4) as threads:
            for number in range(100):
                backend.commit({b"key": b"%d" % number}, [b"gone%d" % (number - 1)])
                backend.commit({b"gone%d" % number: b"value"}, ())
                keys = [b"key", b"gone%d" % number, b"gone%d" % (number - 1)]
                assert list(threads.map(backend.get, keys)) == [b"%d" % number, b"value", None]

    def test_readers_see_whole_batches_while_another_commits(self, backend: Backend) -> None:
        keys = [b"key%02d" % number for number in range(50)]
        backend.commit(dict.fromkeys(keys, b"0"), ())
        done = Event()

        def scan() -> int:
            rounds = 0
            while not done.is_set() or not rounds:
                assert len({value for _, value in backend.scan(b"key", b"kez")}) == 1
                rounds += 1
            return rounds

        def get() -> int:
            rounds, newest = 0, 0
            while not done.is_set() or not rounds:
                value = int(backend.get(keys[rounds % 50]) or -1)
                assert value >= newest, "an older value after a newer one"
                newest = value
                rounds += 1
            return rounds

        with ThreadPoolExecutor(6) as threads:
            readers = [threads.submit(reader) for reader in (scan, get) * 3]
            try:
                for number in range(1, 61):
                    backend.commit(dict.fromkeys(keys, b"%d" % number), ())
            finally:
                done.set()
            assert all(reader.result() for reader in readers)

    # Opening, closing, crashing

    def test_entries_are_there_again(self, make: Make, tmp_path: Path) -> None:
        for number in range(3):
            with closing(make()) as backend:
                backend.open(tmp_path)
                assert len(list(backend.scan(b"", LAST))) == number
                backend.commit({bytes([number]): b"value"}, ())

    def test_closing_twice_is_fine(self, make: Make, tmp_path: Path) -> None:
        backend = make()
        backend.close()
        backend.open(tmp_path)
        backend.close()
        backend.close()

    def test_directories_are_stores_of_their_own(self, make: Make, tmp_path: Path) -> None:
        with closing(make()) as one, closing(make()) as other:
            one.open(tmp_path / "one")
            other.open(tmp_path / "other")
            one.commit({b"key": b"one"}, ())
            assert other.get(b"key") is None
            other.commit({}, [b"key"])
            assert one.get(b"key") == b"one"

    def test_info_counts_entries_and_bytes(self, backend: Backend) -> None:
        backend.commit({b"a": bytes(100_000), b"b": b""}, ())
        info = backend.info()
        assert info["entries"] == 2
        assert isinstance(info["bytes"], int)
        assert info["bytes"] > 0

    def test_second_opener_is_refused(self, make: Make, backend: Backend, tmp_path: Path) -> None:
        for read_only in (False, True):
            second = make()
            with pytest.raises(DeviceBusy):
                second.open(tmp_path, read_only=read_only)
            second.close()
        backend.commit({b"key": b"value"}, ())
        assert backend.get(b"key") == b"value"

    def test_read_only_needs_a_store(self, make: Make, tmp_path: Path) -> None:
        with closing(make()) as backend, pytest.raises(NotFound):
            backend.open(tmp_path / "absent", read_only=True)

    def test_read_only_reads(self, make: Make, tmp_path: Path) -> None:
        with closing(make()) as backend:
            backend.open(tmp_path)
            backend.commit({b"a": b"1", b"b": b"2"}, ())
        with closing(make()) as backend:
            backend.open(tmp_path, read_only=True)
            assert backend.get(b"a") == b"1"
            assert list(backend.scan(b"", LAST)) == [(b"a", b"1"), (b"b", b"2")]
            second = make()
            with pytest.raises(DeviceBusy):
                second.open(tmp_path)

    def test_what_was_committed_survives_a_kill_whole(self, make: Make, tmp_path: Path) -> None:
        """Batch n sets 40 keys to n; a killed process leaves all at the last one it told of, or at the one after."""
        for rounds in range(1, KILL_COUNT + 1):
            told = _run_and_kill(make, tmp_path, rounds)
            with closing(_open_when_free(make, tmp_path)) as backend:
                values = {value for _, value in backend.scan(b"", LAST)}
                assert len(list(backend.scan(b"", LAST))) == 40
                assert len(values) == 1, "half a batch"
                assert int(values.pop()) in (told, told + 1)
                backend.commit({b"key%02d" % key: b"0" for key in range(40)}, ())

    def test_a_bit_that_flips_does_not_hide_what_a_scan_shows(self, make: Make, tmp_path: Path) -> None:
        """A backend may fail, and it may even lose an entry, which the core notices. But `get` and `scan` agree.

        What a backend keeps elsewhere than in its directory is its database's to check.
        """
        entries = {b"key%05d" % number: b"%d" % number * 50 for number in range(3_000)}
        with closing(make()) as backend:
            backend.open(tmp_path / "intact")
            for start in range(0, 3_000, 500):
                backend.commit(dict(list(entries.items())[start : start + 500]), ())
        files = [path for path in (tmp_path / "intact").rglob("*") if path.is_file() and path.stat().st_size > 8192]
        rng = random.Random(1)
        for number in range(FLIP_COUNT if files else 0):
            shutil.copytree(tmp_path / "intact", tmp_path / str(number))
            path = tmp_path / str(number) / rng.choice(files).relative_to(tmp_path / "intact")
            at, mask = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ mask]))
            told = _look_in_a_process(make, tmp_path / str(number))
            assert told in ("agree", "error", "killed"), f"byte {at} of {path.name}, bit {mask:#04x}: {told}"
            shutil.rmtree(tmp_path / str(number))


_LONG = b"x" * (KEY_BYTES_MAX - 1)
_KEYS = st.sampled_from([b"a", b"a\0", b"ab", b"b", b"\0", b"\x80", b"\xff", b"\xff\xff", _LONG, _LONG + b"\xff"])
_KEYS |= st.binary(min_size=1, max_size=2) | st.binary(min_size=1, max_size=KEY_BYTES_MAX)
_VALUES = st.binary(max_size=20) | st.builds(bytes.__mul__, st.binary(min_size=1, max_size=3), st.integers(0, 50_000))
_BOUNDS = st.just(b"") | st.just(LAST) | _KEYS
_SETTINGS = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class _Dictionary(RuleBasedStateMachine):
    """Does the same with a backend and with a dictionary, and looks for a difference after each step."""

    def __init__(self, make: Make, directories: Iterator[Path]) -> None:
        """Begins with an empty store, in the next of ``directories``."""
        super().__init__()
        self._make = make
        self._directory = next(directories)
        self._model: dict[bytes, bytes] = {}
        self._backend = make()
        self._backend.open(self._directory)

    @rule(puts=st.dictionaries(_KEYS, _VALUES, max_size=8), deletes=st.lists(_KEYS, max_size=5))
    def commit(self, puts: dict[bytes, bytes], deletes: list[bytes]) -> None:
        self._backend.commit(puts, iter(deletes))
        for key in deletes:
            self._model.pop(key, None)
        self._model |= puts

    @rule()
    def open_again(self) -> None:
        self._backend.close()
        self._backend = self._make()
        self._backend.open(self._directory)

    @rule(key=_KEYS)
    def get(self, key: bytes) -> None:
        assert self._backend.get(key) == self._model.get(key)

    @rule(first=_BOUNDS, end=_BOUNDS)
    def scan(self, first: bytes, end: bytes) -> None:
        expected = sorted(item for item in self._model.items() if first <= item[0] < end)
        assert list(self._backend.scan(first, end)) == expected

    @invariant()
    def holds_the_same(self) -> None:
        assert dict(self._backend.scan(b"", LAST)) == self._model
        assert self._backend.info()["entries"] == len(self._model)

    def teardown(self) -> None:
        self._backend.close()


def _look_in_a_process(make: Make, directory: Path) -> str:
    """What a process of its own finds: "agree", "error", what is wrong, or "killed" if that was the end of it."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_look, args=(make, directory, sender))
    process.start()
    sender.close()
    try:
        told: str = receiver.recv() if receiver.poll(LOCK_SECONDS_MAX) else "does not come to an end"
    except EOFError:
        told = "killed"
    process.kill()
    process.join()
    process.close()
    receiver.close()
    return told


def _look(make: Make, directory: Path, sender: Connection) -> None:
    backend = make()
    try:
        backend.open(directory)
        wrong = [key for key, value in backend.scan(b"", LAST) if backend.get(key) != value]
        sender.send(f"a scan shows {wrong[0]!r}, and it cannot be got" if wrong else "agree")
    except RustordError:
        sender.send("error")
    except Exception as error:
        sender.send(f"raises {error!r}")


def _run_and_kill(make: Make, directory: Path, rounds: int) -> int:
    """Kill a process in the midst of its commits, after it told of ``rounds``; the last one it told of."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_commit_for_ever, args=(make, directory, sender))
    process.start()
    sender.close()
    told = 0
    try:
        while told < rounds:
            told = receiver.recv()
    finally:
        process.kill()
        process.join()
    try:
        while True:
            told = receiver.recv()  # told of before it died
    except EOFError:
        pass
    receiver.close()
    process.close()
    return told


def _commit_for_ever(make: Make, directory: Path, sender: Connection) -> None:
    backend = make()
    backend.open(directory)
    number = 0
    while True:
        number += 1
        backend.commit({b"key%02d" % key: b"%d" % number for key in range(40)}, [b"absent"])
        sender.send(number)


def _open_when_free(make: Make, directory: Path) -> Backend:
    """Open a store whose last user was killed; a server may need a moment to notice."""
    deadline = time.monotonic() + LOCK_SECONDS_MAX
    while True:
        backend = make()
        try:
            backend.open(directory)
        except DeviceBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return backend
