"""A directory that holds an index, locked against a second opener."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from rustord.errors import Damaged, DeviceBusy, DeviceError, NoSpace, NotFound, RustordError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class LockedDirectory:
    """An open directory with a flock(2) on the directory itself: exclusive for a writer, shared for readers.

    The lock needs no file, works on a read-only filesystem, and ends with the process, however that ends.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Raises `DeviceBusy` if another opener is in the way, `NotFound` if it is absent and ``read_only``."""
        self.path = path
        self.read_only = read_only
        try:
            if not read_only:
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise no_index(path) from None
        except OSError as error:
            raise file_error(error, path) from error
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self.close()
            if not isinstance(error, BlockingIOError):
                raise file_error(error, path) from error
            raise DeviceBusy(
                f"the index at {path} is in use{holder}", hint="one process at a time opens a pool: is rustord running?"
            ) from None

    def _holder(self) -> str:
        """Who has the lock, as far as /proc/locks tells: `` by process 17 (rustord)``, or nothing."""
        status = os.fstat(self._descriptor)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        try:
            locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF
            pid = next(fields[4] for fields in locks if fields[1] == "FLOCK" and fields[5] == place)
            return f" by process {pid} ({Path('/proc', pid, 'comm').read_text().strip()})"
        except (OSError, StopIteration, IndexError):
            return ""

    def sync(self) -> None:
        """Make the names of files that were created in it durable, and its own name.

        What root has created in a directory of another user is that user's then: a daemon uses what root has rebuilt.
        """
        self._give_away()
        os.fsync(self._descriptor)
        parent = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _give_away(self) -> None:
        owner = os.fstat(self._descriptor)
        if os.geteuid() or not owner.st_uid:
            return
        for name in os.listdir(self._descriptor):
            # By its name: to open and close a file would end the database's locks on it.
            status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if not status.st_uid and status.st_nlink == 1 and stat.S_ISREG(status.st_mode):
                os.chown(name, owner.st_uid, owner.st_gid, dir_fd=self._descriptor, follow_symlinks=False)

    def close(self) -> None:
        """Let go of the lock. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def file_error(error: OSError, path: Path) -> RustordError:
    """The error of the tree that an OSError upon the index at ``path`` amounts to."""
    if error.errno in _NO_SPACE:
        return no_space(path)
    return DeviceError(f"cannot use the index at {path}: {error.strerror}", hint="see that the daemon may write there")


def no_space(path: Path) -> NoSpace:
    return NoSpace(f"no space left for the index at {path}", hint="make room on the filesystem that holds it")


def damaged(path: Path, what: str) -> Damaged:
    """The error for an index of which ``what`` is not as it was written."""
    hint = f"move {path} away, then 'rustorctl pool rebuild' makes a new one from the devices, which are not affected"
    return Damaged(f"the index at {path} is damaged: {what}", hint=hint)


def no_index(path: Path) -> NotFound:
    return NotFound(f"there is no index at {path}", hint="it is made when the pool is opened for writing")
