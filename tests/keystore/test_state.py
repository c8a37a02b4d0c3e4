"""An index whose database has lost or changed an entry is noticed, whichever bit it was."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from rustord.errors import Damaged, DeviceError, FormatError, RustordError
from rustord.keystore.backend import Backend
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.sqlite import SqliteBackend
from rustord.keystore.state import IndexState, commit, decode_state, state_of, verify

POOL = b"p" * 16
LAST = b"\xff" * 501
FILES = {LmdbBackend: "data.mdb", SqliteBackend: "index.sqlite"}
FLIPS = 40
FLIPS_LONG = 4_000
EVERYTHING_IS_RIGHT, NOTICED, SILENTLY_WRONG = 0, 1, 2


@pytest.fixture(params=[LmdbBackend, SqliteBackend])
def make(request: pytest.FixtureRequest) -> type[LmdbBackend | SqliteBackend]:
    chosen: type[LmdbBackend | SqliteBackend] = request.param
    return chosen


@pytest.fixture
def backend(make: Callable[[], Backend], tmp_path: Path) -> Iterator[Backend]:
    with closing(make()) as backend:
        backend.open(tmp_path)
        yield backend


class Index:
    """Changes an index as a KeyStore does, and knows what has to be in it."""

    def __init__(self, backend: Backend, rng: random.Random) -> None:
        self.backend = backend
        self.entries: dict[bytes, bytes] = {}
        self._rng = rng
        self._count = 0

    def change(self, object_count: int = 30) -> None:
        rng = self._rng
        puts: dict[bytes, bytes] = {}
        for _ in range(object_count):
            self._count += 1
            uuid = self._count.to_bytes(6, "big") + rng.randbytes(10)
            puts[b"o" + uuid] = rng.randbytes(rng.choice((150, 150, 200, 9_000 if self._count % 50 == 0 else 400)))
            if rng.random() < 0.3:
                puts[b"nnames/%d" % rng.randrange(300)] = uuid
        puts |= {key: rng.randbytes(160) for key in rng.sample(sorted(self.entries), min(3, len(self.entries)))}
        deletes = [b"oabsent", *rng.sample(sorted(self.entries), min(8, len(self.entries)))]
        puts[b"p" + bytes(16)] = rng.randbytes(16)
        commit(self.backend, puts, iter(deletes), IndexState(self._count, 1, POOL))
        for key in deletes:
            self.entries.pop(key, None)
        self.entries.update(puts)

    def is_right(self) -> bool:
        """Whether all of it can be got and is listed, and nothing else."""
        scanned = {key: value for key, value in self.backend.scan(b"", LAST) if key != b"s"}
        return scanned == self.entries and all(self.backend.get(key) == value for key, value in self.entries.items())


# The tally


def test_the_tally_follows_every_change(backend: Backend, seed: int, tmp_path: Path) -> None:
    verify(backend, tmp_path)  # a new, empty index
    index = Index(backend, random.Random(seed))
    for _ in range(12):
        index.change()
        verify(backend, tmp_path)
        state = state_of(backend)
        assert state is not None
        assert state.tally.entry_count == len(index.entries)
    assert index.is_right()


def test_a_commit_that_failed_and_is_there_all_the_same_can_be_repeated(tmp_path: Path) -> None:
    class Doubtful(LmdbBackend):
        fails = False

        def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
            super().commit(puts, deletes)
            if self.fails:
                raise DeviceError("the answer got lost")

    with closing(Doubtful()) as backend:
        backend.open(tmp_path)
        commit(backend, {b"oa": b"old", b"ob": b"old"}, (), IndexState(1, 1, POOL))
        backend.fails = True
        for _ in range(2):
            with pytest.raises(DeviceError):
                commit(backend, {b"oa": b"new", b"oc": b"new"}, [b"ob"], IndexState(2, 1, POOL))
        backend.fails = False
        commit(backend, {b"oa": b"new", b"oc": b"new"}, [b"ob"], IndexState(2, 1, POOL))
        verify(backend, tmp_path)


@pytest.mark.parametrize(
    ("puts", "deletes", "found"),
    [
        ({}, [b"oa"], "it has 2 entries, and should have 3"),
        ({b"od": b"more"}, [], "it has 4 entries, and should have 3"),
        ({b"ob": b"changed"}, [], "of its 3 entries, some are not as they were written"),
        ({b"oaa": b"1"}, [b"oa"], "of its 3 entries, some are not as they were written"),
        ({b"ob": b"1", b"oa": b"2"}, [], "of its 3 entries, some are not as they were written"),
        ({}, [b"s"], "what it says of itself is missing"),
        ({b"s": b"short"}, [], "what the index says of itself is damaged"),
    ],
)
def test_what_the_database_has_lost_or_changed_is_noticed(
    backend: Backend, tmp_path: Path, puts: dict[bytes, bytes], deletes: list[bytes], found: str
) -> None:
    commit(backend, {b"oa": b"1", b"ob": b"2", b"nc": b"3"}, (), IndexState(1, 1, POOL))
    backend.commit(puts, deletes)
    with pytest.raises(Damaged, match=found) as caught:
        verify(backend, tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "rustorctl pool rebuild" in caught.value.hint


def test_a_later_commit_does_not_hide_what_was_lost(backend: Backend, tmp_path: Path) -> None:
    index = Index(backend, random.Random(1))
    index.change()
    backend.commit({}, [next(key for key in index.entries if key.startswith(b"o"))])
    for _ in range(3):
        index.change()
        with pytest.raises(Damaged):
            verify(backend, tmp_path)


def test_every_bit_of_the_state_is_summed() -> None:
    raw = IndexState(7, 8, POOL).encode()
    assert decode_state(raw) == IndexState(7, 8, POOL)
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_state(bytes(flipped))


def test_an_index_that_is_being_rebuilt_has_no_tally_yet(backend: Backend, tmp_path: Path) -> None:
    backend.commit({b"oa": b"1", b"r": POOL}, ())
    verify(backend, tmp_path)


def test_it_is_verified_beside_commits(backend: Backend, tmp_path: Path) -> None:
    index = Index(backend, random.Random(1))
    index.change(2_000)

    class Busy:
        """Commits in the middle of each scan."""

        def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
            for number, entry in enumerate(backend.scan(first, end)):
                if number == 1_000:
                    index.change()
                yield entry

    verify(Busy(), tmp_path)  # type: ignore[arg-type]
    verify(backend, tmp_path)


# Bits of the file


def test_no_bit_flips_silently(make: type[LmdbBackend | SqliteBackend], tmp_path: Path, seed: int) -> None:
    flip_and_look(make, tmp_path, random.Random(seed), FLIPS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_bit_of_many_flips_silently(make: type[LmdbBackend | SqliteBackend], tmp_path: Path, seed: int) -> None:
    flip_and_look(make, tmp_path, random.Random(seed), FLIPS_LONG)


def test_a_flip_where_a_search_chooses_its_way_is_noticed(tmp_path: Path, seed: int) -> None:
    """A scan goes past the keys in LMDB's branch pages; a search that they mislead finds nothing, without an error."""

    def branches(data: bytes) -> list[int]:
        pages = range(8192, len(data), 4096)
        return [page for page in pages if data[page + 10 : page + 12] == b"\x01\0"]  # mp_flags: P_BRANCH

    flip_and_look(LmdbBackend, tmp_path, random.Random(seed), FLIPS, branches)


def flip_and_look(
    make: type[LmdbBackend | SqliteBackend],
    directory: Path,
    rng: random.Random,
    count: int,
    pages: Callable[[bytes], list[int]] = lambda data: list(range(0, len(data), 4096)),
) -> None:
    """Flip one bit after the other, each in one of ``pages`` of the file of an index: opening it has to notice it."""
    backend = make()
    backend.open(directory / "intact")
    index = Index(backend, rng)
    for _ in range(30):
        index.change()
    backend.close()
    data = (directory / "intact" / FILES[make]).read_bytes()
    places = pages(data)
    outcomes = []
    for _ in range(count):
        at, bit = rng.choice(places) + rng.randrange(4096), rng.randrange(8)
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        (directory / "flipped").mkdir(exist_ok=True)
        for file in (directory / "flipped").iterdir():
            file.unlink()
        (directory / "flipped" / FILES[make]).write_bytes(flipped)
        outcomes.append(_outcome(lambda: _look(make(), directory / "flipped", index)))
        assert outcomes[-1] != SILENTLY_WRONG, f"bit {bit} of byte {at} is not noticed"
    assert set(outcomes) >= {EVERYTHING_IS_RIGHT, NOTICED}, "nothing was tried"


def _look(backend: Backend, directory: Path, index: Index) -> int:
    with closing(backend):
        try:
            backend.open(directory)
            verify(backend, directory)
        except RustordError as error:
            return NOTICED if isinstance(error, Damaged | DeviceError) else SILENTLY_WRONG
        index.backend = backend
        return EVERYTHING_IS_RIGHT if index.is_right() else SILENTLY_WRONG


def _outcome(look: Callable[[], int]) -> int:
    """What ``look`` returns in a process of its own; `NOTICED` if that dies of a page that is not in the file.

    LMDB believes what a page says of where its entries are; older versions read behind the end of the file then.
    """
    process = os.fork()
    if not process:
        status = SILENTLY_WRONG
        try:
            signal.alarm(60)
            status = look()
        finally:
            os._exit(status)
    _, waited = os.waitpid(process, 0)
    if os.WIFSIGNALED(waited):
        assert os.WTERMSIG(waited) in (signal.SIGBUS, signal.SIGSEGV), f"killed by signal {os.WTERMSIG(waited)}"
        return NOTICED
    return os.waitstatus_to_exitcode(waited)
