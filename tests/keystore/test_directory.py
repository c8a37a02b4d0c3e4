from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustord.errors import DeviceBusy, DeviceError, NoSpace, NotFound
from rustord.keystore.directory import LockedDirectory, file_error

HOLD = """
import sys
from pathlib import Path
from rustord.keystore.directory import LockedDirectory
directory = LockedDirectory(Path(sys.argv[1]), read_only=sys.argv[2] == "True")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture(params=[False, True])
def holder(path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the directory open: for writing, and only for reading."""
    path.mkdir()
    command = [sys.executable, "-c", HOLD, path, str(request.param)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_directory_is_made_for_its_owner_alone(path: Path) -> None:
    directory = LockedDirectory(path, read_only=False)
    directory.sync()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    directory.close()
    directory.close()


def test_second_opener_is_told_who_holds_it(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(DeviceBusy) as caught:
        LockedDirectory(path, read_only=False)
    assert f"process {holder.pid} (python" in caught.value.message
    assert str(path) in caught.value.message


def test_lock_ends_with_its_holder(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    LockedDirectory(path, read_only=False).close()


def test_readers_share(path: Path) -> None:
    LockedDirectory(path, read_only=False).close()
    one, other = LockedDirectory(path, read_only=True), LockedDirectory(path, read_only=True)
    with pytest.raises(DeviceBusy):
        LockedDirectory(path, read_only=False)
    one.close()
    other.close()
    LockedDirectory(path, read_only=False).close()


def test_reader_makes_no_directory(path: Path) -> None:
    with pytest.raises(NotFound):
        LockedDirectory(path, read_only=True)
    assert not path.exists()


def test_refusal_leaves_no_descriptor_open(path: Path) -> None:
    held = LockedDirectory(path, read_only=False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DeviceBusy):
        LockedDirectory(path, read_only=False)
    assert os.listdir("/proc/self/fd") == before
    held.close()


def test_full_is_told_from_failed(path: Path) -> None:
    assert isinstance(file_error(OSError(errno.ENOSPC, "full"), path), NoSpace)
    assert isinstance(file_error(OSError(errno.EDQUOT, "quota"), path), NoSpace)
    assert isinstance(file_error(OSError(errno.EIO, "failed"), path), DeviceError)
