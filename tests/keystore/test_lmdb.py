"""What is LMDB's own. The contract is run in tests/testing/test_keystore.py."""

from __future__ import annotations

import random
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustord.errors import DeviceError
from rustord.keystore.lmdb import LmdbBackend


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LmdbBackend]:
    backend = LmdbBackend()
    backend.open(tmp_path)
    yield backend
    backend.close()


def size(backend: LmdbBackend) -> int:
    found = backend.info()["bytes"]
    assert isinstance(found, int)
    return found


def test_threads_that_read_once_and_sleep_do_not_make_the_file_grow(backend: LmdbBackend) -> None:
    """LMDB keeps every page that the snapshot of any reader may show."""
    entries = {b"%d" % number: bytes(1_000) for number in range(500)}
    backend.commit(entries, ())
    asleep = threading.Barrier(9)
    wake = threading.Event()

    def read_and_sleep() -> None:
        assert backend.get(b"1") is not None
        asleep.wait()
        wake.wait()

    sleepers = [threading.Thread(target=read_and_sleep) for _ in range(8)]
    for sleeper in sleepers:
        sleeper.start()
    asleep.wait()
    try:
        for _ in range(5):
            backend.commit(entries, ())
        assert backend.get(b"1") is not None
        before = size(backend)
        for _ in range(50):
            backend.commit(entries, ())
        assert size(backend) <= before * 1.5
    finally:
        wake.set()
        for sleeper in sleepers:
            sleeper.join()


def test_file_takes_what_is_stored_not_what_is_mapped(backend: LmdbBackend, tmp_path: Path) -> None:
    backend.commit({b"key": b"value"}, ())
    assert (tmp_path / "data.mdb").stat().st_size < 1 << 20


def test_pages_that_a_commit_gave_back_do_not_make_the_file_look_cut_short(tmp_path: Path, seed: int) -> None:
    """LMDB does not write them, and as often as not they are the last ones of the file."""
    source = random.Random(seed)
    backend, crashed = LmdbBackend(), LmdbBackend()
    (tmp_path / "copy").mkdir()
    for _ in range(4):
        backend.open(tmp_path / "index")
        kept: list[bytes] = []
        for _ in range(5):
            new = {source.randbytes(8): bytes(source.randrange(500)) for _ in range(100)}
            backend.commit(new, ())
            kept += new
        backend.commit({}, source.sample(kept, len(kept)))
        shutil.copy(tmp_path / "index/data.mdb", tmp_path / "copy")  # as a crash would leave it
        crashed.open(tmp_path / "copy")
        assert not list(crashed.scan(b"", b"\xff" * 9))
        crashed.close()
        backend.close()
        assert (tmp_path / "index/data.mdb").stat().st_size < 1 << 20


def test_map_that_does_not_fit_into_memory_limits_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, hard))
    try:
        with pytest.raises(DeviceError):
            LmdbBackend().open(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
