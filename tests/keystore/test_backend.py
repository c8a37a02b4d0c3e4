"""What both in-tree backends do beyond the contract: full and failing filesystems, damage, wrong callers.

The contract itself is run in tests/testing/test_keystore.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustord.errors import Damaged, DeviceError, NoSpace
from rustord.keystore.backend import KEY_BYTES_MAX, VALUE_BYTES_MAX, Backend, check_batch
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.sqlite import SqliteBackend
from tests.conftest import FaultyLoop, PlainUser

LAST = b"\xff" * (KEY_BYTES_MAX + 1)


class Zeros(bytes):
    """A value that says it is longer than the largest one."""

    def __len__(self) -> int:
        return VALUE_BYTES_MAX + 1


@pytest.fixture(params=[LmdbBackend, SqliteBackend])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One that is not open."""
    backend: Backend = request.param()
    yield backend
    backend.close()


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem in memory of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def failing_filesystem(faulty_loop: FaultyLoop, tmp_path: Path) -> Iterator[Path]:
    """An ext4 without journal on a loop device that fails on demand: what fails is the write of the file itself."""
    path = tmp_path / "failing"
    path.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", faulty_loop.path], check=True)
    subprocess.run(["mount", "-o", "errors=continue", faulty_loop.path, path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.root
def test_what_root_makes_for_another_user_is_his(backend: Backend, plain_user: PlainUser) -> None:
    """As a rebuild does, if only the directory is left: the daemon runs as its owner."""
    index = plain_user.directory / "index"
    index.mkdir()
    os.chown(index, plain_user.uid, plain_user.gid)
    backend.open(index)
    backend.commit({b"key": b"value"}, ())
    assert {path.name: path.stat().st_uid for path in index.iterdir() if path.stat().st_uid != plain_user.uid} == {}
    backend.close()
    use = (
        "import pathlib, sys; from rustord.keystore.{module} import {name} as Backend; backend = Backend();"
        "backend.open(pathlib.Path(sys.argv[1])); backend.commit({{b'more': b'value'}}, ()); backend.close()"
    ).format(module=type(backend).__module__.rpartition(".")[2], name=type(backend).__name__)
    assert plain_user.run(sys.executable, "-c", use, index, env={**os.environ, "HOME": "/"}).stderr == ""


def test_keys_and_values_beyond_the_limits_are_the_callers_fault(backend: Backend, tmp_path: Path) -> None:
    backend.open(tmp_path)
    for puts in ({b"": b""}, {bytes(KEY_BYTES_MAX + 1): b""}, {b"key": Zeros()}):
        with pytest.raises(AssertionError):
            check_batch(puts)
        with pytest.raises(AssertionError):
            backend.commit(puts, ())
    backend.commit({b"key": b"value"}, ())
    assert list(backend.scan(b"", LAST)) == [(b"key", b"value")]


def test_batch_that_cannot_be_read_to_its_end_changes_nothing(backend: Backend, tmp_path: Path) -> None:
    def deletes() -> Iterator[bytes]:
        yield b"key"
        raise LookupError

    backend.open(tmp_path)
    backend.commit({b"key": b"value"}, ())
    with pytest.raises(LookupError):
        backend.commit({b"other": b""}, deletes())
    backend.commit({b"another": b""}, ())
    assert [key for key, _ in backend.scan(b"", LAST)] == [b"another", b"key"]


@pytest.mark.root
def test_full_filesystem_refuses_the_whole_batch(small_filesystem: Path, backend: Backend) -> None:
    backend.open(small_filesystem)
    told = 0
    with pytest.raises(NoSpace) as caught:  # noqa: PT012 - which of the commits does not matter
        for batch in range(10_000):
            backend.commit({b"%d-%d" % (batch, number): bytes(1_000) for number in range(40)}, ())
            told += 40
    assert str(small_filesystem) in caught.value.message
    assert "make room" in caught.value.hint
    assert told
    assert len(list(backend.scan(b"", LAST))) == told

    subprocess.run(["mount", "-o", "remount,size=16m", small_filesystem], check=True)
    backend.commit({b"later": b"value"}, ())
    backend.close()
    backend.open(small_filesystem)
    assert len(list(backend.scan(b"", LAST))) == told + 1


@pytest.mark.root
def test_nothing_is_committed_after_a_failed_flush(
    failing_filesystem: Path, faulty_loop: FaultyLoop, backend: Backend
) -> None:
    backend.open(failing_filesystem)
    backend.commit({b"key": b"value"}, ())
    with faulty_loop.failing():
        for _ in range(2):
            with pytest.raises(DeviceError):
                backend.commit({b"key": b"other"}, ())
    with pytest.raises(DeviceError):  # though the device works again
        backend.commit({b"key": b"other"}, ())
    assert backend.get(b"key") == b"value"
    backend.close()
    backend.open(failing_filesystem)
    backend.commit({b"key": b"another"}, ())
    assert backend.get(b"key") == b"another"


@pytest.mark.parametrize("harm", ["empty pages", "cut short", "text"])
def test_damaged_database_says_how_to_make_it_anew(backend: Backend, tmp_path: Path, harm: str) -> None:
    backend.open(tmp_path)
    for batch in range(3):  # the last two, whichever of LMDB's two meta pages they went through
        backend.commit({b"%d-%d" % (batch, number): bytes(500) for number in range(2_000)}, ())
    backend.close()
    file = next(path for path in tmp_path.iterdir() if path.name in ("data.mdb", "index.sqlite"))
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if harm == "cut short":
            opened.truncate(size // 2)
        elif harm == "text":
            opened.write(b"This is a letter. " * 1_000)
        else:
            opened.seek(8192)  # behind LMDB's meta pages, and SQLite's first page
            opened.write(bytes(size - 8192))

    with pytest.raises(Damaged) as caught:  # noqa: PT012 - at the latest when it is read
        backend.open(tmp_path)
        list(backend.scan(b"", LAST))
    assert "rustorctl pool rebuild" in caught.value.hint
    assert str(tmp_path) in caught.value.message


def test_directory_that_cannot_be_made_is_an_error(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DeviceError) as caught:
        backend.open(tmp_path / "file" / "index")
    assert str(tmp_path) in caught.value.message
