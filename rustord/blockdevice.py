"""BlockDevice: one device of the pool, a raw block device or an image file.

Offsets and lengths are in bytes, ranges are half-open. A device is opened exclusively and stays locked until it is
closed (``O_EXCL`` keeps the kernel's own users away, an OFD lock keeps away whoever opened another node of the same
device or the same image file). I/O goes through the page cache; what was written is durable once ``flush`` returns.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from glob import iglob
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from rustord.errors import DeviceBusy, DeviceError, WriteProtected

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap
"""What is read into or written from. ``len()`` must be its size in bytes, so a memoryview has one-byte items."""

# linux/fs.h, as numbered by asm-generic (x86, arm, riscv, s390x, loongarch)
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKROTATIONAL = 0x127E
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272
BLKGETDISKSEQ = 0x80081280

# linux/falloc.h and linux/fs.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
SYNC_FILE_RANGE_WRITE = 2

IOV_MAX = os.sysconf("SC_IOV_MAX")
"""Most buffers that the kernel takes in one call."""

IMAGE_BLOCK_SIZE = 512
"""Logical block size of an image file: what a file has none of, a loop device over it would have."""

ZERO_RANGE_MIN = 1 << 20
"""Shortest range, in bytes, that ``zero`` leaves to the kernel; shorter ones are written as plain zeros.

BLKZEROOUT drops the range from the page cache and waits for the device, once a call; plain zeros only dirty the page
cache and share the flush that follows anyway. Measured on a loop device (µs, the flush included, one range):
4 KiB 268 plain against 300, 256 KiB 400 against 331, 1 MiB 776 against 339, 16 MiB 9,353 against 2,418. But 16 ranges
of 4 KiB and one flush take 762 against 2,396, of 256 KiB about 1,800 against 2,000; and where zeroing unmaps (loop,
thin volumes) the next 4 KiB write costs 440 instead of 257. So only where it wins clearly, also in a batch.
"""

_ZEROS = memoryview(mmap(-1, 1 << 20, flags=MAP_PRIVATE | MAP_ANONYMOUS)).toreadonly()  # never touched: no memory
_DIRECT_ALIGNMENT = 4096  # of what is read past the page cache: no device and no filesystem here asks for more
_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS))
_HEALTH_HINT = "look into the kernel log (dmesg) and at the device's health (smartctl), then replace the device"
_GONE_HINT = "attach it again; 'rustorctl status' shows what is missing, and the kernel log (dmesg) why"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class BlockDevice(Protocol):
    """What a pool asks of a device. Reads may run on any thread, beside one another and beside writes."""

    path: str
    size: int
    """In bytes, a multiple of ``block_size``."""
    block_size: int
    """Logical block size in bytes."""
    rotational: bool
    read_only: bool
    failed: str
    """Why the device takes no writes any more; empty as long as it does."""

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fills all buffers from ``offset`` on. Raises DeviceError if the device cannot (what is in them then is
        undefined); that does not make the device ``failed``."""

    def read_now(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Fills all buffers from the page cache. False, never an error, if that would have to wait or falls short."""

    def reread(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """As ``read``, but from the medium itself and not from the page cache, where that is possible, and without
        leaving anything there."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers to ``offset``; durable after the next ``flush``.

        Raises DeviceError if any of it lies beyond the end, if the device is read-only or ``failed`` (nothing is
        written then), or on an I/O error (the device is ``failed`` then, and any part may have been written).
        """

    def flush(self) -> None:
        """Makes durable whatever was written before. If that fails the device is ``failed`` and DeviceError is
        raised, now and for each later write and flush: the kernel reports a lost write only once, so a second flush
        that succeeds means nothing."""

    def zero(self, offset: int, length: int) -> None:
        """Makes the range read as zeros; durable after the next ``flush``. Raises as ``write`` does."""

    def scratch(self, offset: int, length: int) -> None:
        """Makes a range that may be bad read as zeros, durably. Raises DeviceError if that is impossible, which does
        not make the device ``failed``: for whom a bad block must not cost the whole device."""

    def discard(self, offset: int, length: int) -> None:
        """Tells the device that the range's content is no longer needed; it reads as anything then. Does nothing
        where the device knows no such thing. Raises as ``write`` does."""

    def start_writeback(self, offset: int, length: int) -> None:
        """A hint to begin to write the range to the device now, so that the flush has less to wait for."""

    def close(self) -> None:
        """Gives the device back, unflushed. May be called twice."""


def open_device(
    path: str | os.PathLike[str], *, read_only: bool = False, exclusive: bool = True
) -> RawDevice | ImageFile:
    """Opens the raw device or image file at ``path``.

    ``exclusive`` locks it until ``close`` (a read-only image file is shared with other readers). Raises DeviceBusy if
    somebody else holds it, DeviceError if it cannot be opened, is read-only and ``read_only`` is not asked for, or is
    neither a block device nor a regular file.
    """
    path = os.fspath(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _open_error(path, error) from error
    except ValueError as error:  # a null byte, or half a character
        raise DeviceError(f"{path!r} cannot be a path: {error}", hint="name a disk or an image file") from error
    if stat.S_ISBLK(mode):
        return RawDevice(path, read_only=read_only, exclusive=exclusive)
    if stat.S_ISREG(mode):
        return ImageFile(path, read_only=read_only, exclusive=exclusive)
    raise DeviceError(f"{path} is neither a block device nor a regular file", hint="name a disk or an image file")


class _OpenDevice:
    """A file descriptor and the data path that raw devices and image files share.

    The subclasses say what is there (``_identify``) and how the kernel zeroes and discards a range of it.
    """

    path: str
    size: int
    block_size: int
    rotational: bool

    def __init__(self, path: str, *, read_only: bool, exclusive: bool) -> None:
        self.path = path
        self.read_only = read_only
        self.failed = ""
        self.lost: dict[Hashable, Callable[[], None]] = {}
        """Called when it takes no writes any more, or is given back: before anybody learns that."""
        self._absence = ""  # why we hold nothing any more
        self._zeroes_ranges = True
        self._fd = self._direct_fd = -1
        self._opening = threading.Lock()
        self._fd = _open_locked(path, read_only=read_only, exclusive=exclusive)
        try:
            self._identify()
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        want = sum(map(len, buffers))
        try:
            if os.preadv(self._fd, buffers, offset) == want:
                return
        except OSError as error:
            if len(buffers) <= IOV_MAX:
                raise self._read_error(offset, want, error) from error
        self._read_piecewise(offset, buffers, want)

    def read_now(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        try:
            return os.preadv(self._fd, buffers, offset, os.RWF_NOWAIT) == sum(map(len, buffers))
        except OSError:
            return False  # EAGAIN; whatever else is wrong, the blocking read will say

    def reread(self, offset: int, buffers: Sequence[Buffer]) -> None:
        want = sum(map(len, buffers))
        skip = offset % _DIRECT_ALIGNMENT
        length = skip + want + -(skip + want) % _DIRECT_ALIGNMENT
        with mmap(-1, max(length, 1), flags=MAP_PRIVATE | MAP_ANONYMOUS) as aligned:
            try:
                got = os.preadv(self._direct(), (memoryview(aligned)[:length],), offset - skip)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    self.read(offset, buffers)
                    return
                raise self._read_error(offset, want, error) from error
            if got < skip + want:
                self.read(offset, buffers)  # which says what is wrong
                return
            for buffer in buffers:
                memoryview(buffer)[:] = aligned[skip : skip + len(buffer)]
                skip += len(buffer)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        want = sum(map(len, buffers))
        if self.failed or self.read_only or not 0 <= offset <= self.size - want:
            raise self._refusal("write", offset, want)
        try:
            if os.pwritev(self._fd, buffers, offset) == want:
                return
        except OSError as error:
            if len(buffers) <= IOV_MAX:
                raise self._fail(f"writing {want} bytes at byte {offset} failed", error) from error
        self._write_piecewise(offset, buffers, want)

    def flush(self) -> None:
        if self.failed:
            raise self._refusal("flush", 0, 0)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._fail("flushing failed", error) from error

    def zero(self, offset: int, length: int) -> None:
        if length >= ZERO_RANGE_MIN and self._zeroes_ranges and not (offset | length) % self.block_size:
            self._zeroes_ranges = self._change_range("zero", self._zero_range, offset, length)
            if self._zeroes_ranges:
                return
        end = offset + length
        for start in range(offset, end, len(_ZEROS)):
            self.write(start, (_ZEROS[: end - start],))

    def scratch(self, offset: int, length: int) -> None:
        if self.failed or self.read_only or not 0 <= offset <= self.size - length:
            raise self._refusal("zero", offset, length)
        end = offset + length
        try:
            for start in range(offset, end, len(_ZEROS)):
                zeros = _ZEROS[: end - start]
                if os.pwritev(self._direct(), (zeros,), start) != len(zeros):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            raise self._error(f"zeroing {length} bytes at byte {offset} failed", error) from error

    def _direct(self) -> int:
        """A descriptor of the same device that goes past the page cache and makes each write durable."""
        with self._opening:
            if self._direct_fd < 0:
                flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC
                # Through what we hold open and not by its name, under which another device may be found by now.
                self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", flags)
            return self._direct_fd

    def discard(self, offset: int, length: int) -> None:
        self._change_range("discard", self._discard_range, offset, length)

    def start_writeback(self, offset: int, length: int) -> None:
        _libc.sync_file_range(self._fd, offset, length, SYNC_FILE_RANGE_WRITE)

    def fileno(self) -> int:
        """The descriptor, for questions that are not in this class; -1 after ``close``."""
        return self._fd

    def share(self) -> tuple[int, int] | None:
        """Descriptors for another process: one to read and write with, and one that has the lock as long as it is open.

        The first one is told of each error for itself. None if the device takes no writes. Raises OSError.
        """
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC
        fd = os.open(f"/proc/self/fd/{self._fd}", flags)
        if self.failed:  # asked afterwards: from then on there may be nothing behind our own descriptor
            os.close(fd)
            return None
        return fd, os.dup(self._fd)

    def report(self, error: OSError) -> DeviceError:
        """Another process has failed to flush it; the error that there is now."""
        return self._fail("flushing failed", error)

    def _tell_lost(self) -> None:
        for tell in [*self.lost.values()]:
            tell()

    def let_go(self, why: str) -> None:
        """Give the device back while others may be using it: they find nothing in its place.

        It is closed when the last of them has forgotten it.
        """
        self.failed = self.failed or why
        self._absence = why
        self._tell_lost()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # for reading: nobody may think that he has written
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    def close(self) -> None:
        if self._fd >= 0:
            self._tell_lost()
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1
        self._absence = self._absence or "it was closed"

    __del__ = close

    def _identify(self) -> None:
        raise NotImplementedError

    def _zero_range(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def _discard_range(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def _read_piecewise(self, offset: int, buffers: Sequence[Buffer], want: int) -> None:
        """Reads again from the start, call by call: the way for short reads and for more than IOV_MAX buffers."""
        try:
            got = _transfer(os.preadv, self._fd, offset, buffers)
        except OSError as error:
            raise self._read_error(offset, want, error) from error
        if got < want:
            if self._why_absent():
                raise self._read_error(offset, want, f"it got {got}")
            raise DeviceError(
                f"{self.path} ends at byte {offset + got}: reading {want} bytes at byte {offset} got {got}",
                hint=f"it had {self.size} bytes when it was opened; if it was truncated, restore it from a copy",
            )

    def _write_piecewise(self, offset: int, buffers: Sequence[Buffer], want: int) -> None:
        what = f"writing {want} bytes at byte {offset} failed"
        try:
            done = _transfer(os.pwritev, self._fd, offset, buffers)
        except OSError as error:
            raise self._fail(what, error) from error
        if done < want:
            raise self._fail(what, f"the device took only {done}")

    def _change_range(self, verb: str, change: Callable[[int, int], None], offset: int, length: int) -> bool:
        """Has the kernel change a whole range; False if it does not know how to."""
        if self.failed or self.read_only or not 0 <= offset <= self.size - length:
            raise self._refusal(verb, offset, length)
        try:
            change(offset, length)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise self._fail(f"{verb} of {length} bytes at byte {offset} failed", error) from error
        return True

    def _read_error(self, offset: int, want: int, why: OSError | str) -> DeviceError:
        return self._error(f"reading {want} bytes at byte {offset} failed", why)

    def _fail(self, what: str, why: OSError | str) -> DeviceError:
        """Makes the device ``failed``; the first reason stays. Returns the error to raise."""
        error = self._error(what, why)
        self.failed = self.failed or error.message.removeprefix(f"{self.path}: ")
        self._tell_lost()
        return error

    def _error(self, what: str, why: OSError | str) -> DeviceError:
        """Says why, unless that is only how it looks when there is no device any more: a short read, ENOSPC, EBADF."""
        absent = self._why_absent()
        reason = absent or (why.strerror if isinstance(why, OSError) else why)
        return DeviceError(f"{self.path}: {what}: {reason}", hint=_GONE_HINT if absent else _HEALTH_HINT)

    def _why_absent(self) -> str:
        """Why there is nothing any more where the device was; empty if it is there, as far as the kernel tells."""
        return self._absence

    def _refusal(self, verb: str, offset: int, length: int) -> DeviceError:
        """Why a change is not even tried."""
        if self.failed:
            return DeviceError(f"{self.path} takes no writes any more: {self.failed}", hint=_HEALTH_HINT)
        if self.read_only:
            return DeviceError(f"{self.path} is open for reading only", hint="open it for writing")
        return DeviceError(
            f"{self.path}: {verb} of {length} bytes at byte {offset} reaches beyond the end at byte {self.size}",
            hint="the device is smaller than the pool takes it to be",
        )


class RawDevice(_OpenDevice):
    """A block device: disk, partition, logical volume, loop device.

    ``disk`` is its number and the kernel's count of disks when it was opened (0 before Linux 5.15): by these it is told
    from another one that was there before, or is later, under the same number.
    """

    disk: tuple[int, int]

    def _identify(self) -> None:
        size = self._ask(BLKGETSIZE64, "Q")
        self.block_size = self._ask(BLKSSZGET, "i")
        self.rotational = bool(self._ask(BLKROTATIONAL, "H"))
        self.size = size - size % self.block_size
        self.disk = (os.fstat(self._fd).st_rdev, self._diskseq())
        if not self.read_only and self._ask(BLKROGET, "i"):
            raise _read_only_error(self.path)

    def _ask(self, request: int, form: str) -> int:
        try:
            answer = fcntl.ioctl(self._fd, request, bytes(struct.calcsize(form)))
        except OSError as error:
            raise DeviceError(f"{self.path} does not say what it is: {error.strerror}", hint=_HEALTH_HINT) from error
        return int(struct.unpack(form, answer)[0])

    @property
    def is_gone(self) -> bool:
        """Whether there is no disk any more, as far as the kernel tells."""
        return bool(self._why_absent())

    def _diskseq(self) -> int:
        try:
            return int.from_bytes(fcntl.ioctl(self._fd, BLKGETDISKSEQ, bytes(8)), sys.byteorder)
        except OSError:
            return 0

    def _why_absent(self) -> str:
        if not self._absence:
            with suppress(OSError):
                if any(fcntl.ioctl(self._fd, BLKGETSIZE64, bytes(8))):
                    return ""
        return self._absence or "the device has gone"

    def _zero_range(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, BLKZEROOUT, struct.pack("QQ", offset, length))

    def _discard_range(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("QQ", offset, length))


class ImageFile(_OpenDevice):
    """A regular file in place of a device, for development and tests."""

    def _identify(self) -> None:
        self.block_size = IMAGE_BLOCK_SIZE
        self.rotational = False
        size = os.fstat(self._fd).st_size
        self.size = size - size % IMAGE_BLOCK_SIZE

    def flush(self) -> None:
        # A write behind the end of a truncated file would grow it again with a hole of zeros, unnoticed.
        if not self.failed and (size := os.fstat(self._fd).st_size) < self.size:
            raise self._fail("the file was truncated", f"it had {self.size} bytes when it was opened, now {size}")
        super().flush()

    def _zero_range(self, offset: int, length: int) -> None:
        # Not a hole: the space stays ours, so that a later write cannot run into a full filesystem.
        self._fallocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _discard_range(self, offset: int, length: int) -> None:
        self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if _libc.fallocate(self._fd, mode, offset, length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def tell_udev(path: str) -> None:
    """Have udev look at a device again that stays open: it does so whenever somebody closes it who could write."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))


class Opener(NamedTuple):
    """A process that has a device or file open."""

    name: str
    pid: int
    writing: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.pid})"


def openers(path: str) -> list[Opener]:
    """Who has the device or file open, ourselves included; only the processes that we may look at."""
    target = os.stat(path)
    name = os.path.realpath(path)
    found = set()
    for fd in map(Path, iglob("/proc/[0-9]*/fd/*")):  # unlike Path.glob, it minds no process that ends meanwhile
        try:
            link = os.readlink(fd)
            # The names are looked at first: to stat whatever anybody has open could hang on a dead file server.
            if (link == name or link.startswith("/dev/")) and _same_device(fd.stat(), target):
                found.add(_opener(fd))
        except OSError:
            continue  # closed or ended since, or not ours to see
    return sorted(found)


def _opener(fd: Path) -> Opener:
    """The process of /proc/PID/fd/NUMBER."""
    process = fd.parent.parent
    flags = re.search(r"^flags:\s*([0-7]+)", (process / "fdinfo" / fd.name).read_text(), re.MULTILINE)
    writing = flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return Opener((process / "comm").read_text().strip(), int(process.name), writing)


def _same_device(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _open_locked(path: str, *, read_only: bool, exclusive: bool) -> int:
    """Opens ``path``, with O_EXCL (which Linux heeds for block devices only) and an OFD lock if ``exclusive``."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise _open_error(path, error) from error
    if not exclusive:
        return fd
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        os.close(fd)
        busy = error.errno in (errno.EAGAIN, errno.EACCES)
        raise (_busy_error(path) if busy else _open_error(path, error)) from error
    return fd


def _open_error(path: str, error: OSError) -> DeviceError:
    if error.errno == errno.EBUSY:
        return _busy_error(path)
    if error.errno == errno.EROFS or (error.errno == errno.EACCES and os.access(path, os.R_OK | os.W_OK)):
        return _read_only_error(path)
    hints = {
        errno.ENOENT: "check the path, and whether the device is attached (lsblk)",
        errno.EACCES: "run as root, or give this user access to it (group disk)",
        errno.EPERM: "run as root, or allow the device to this service (systemd: DeviceAllow=)",
    }
    return DeviceError(f"{path} cannot be opened: {error.strerror}", hint=hints.get(error.errno or 0, _HEALTH_HINT))


def _busy_error(path: str) -> DeviceBusy:
    users = ", ".join(map(str, openers(path))) or "another program or by the kernel"
    return DeviceBusy(
        f"{path} is in use by {users}",
        hint="stop what uses it; lsblk shows mounts and holders, fuser -v processes",
    )


def _read_only_error(path: str) -> DeviceError:
    return WriteProtected(f"{path} is read-only", hint="remove its write protection (blockdev --setrw), or use another")


def _transfer(
    call: Callable[[int, Sequence[Buffer], int], int], fd: int, offset: int, buffers: Sequence[Buffer]
) -> int:
    """Calls preadv or pwritev until all buffers are done or nothing more is; returns the bytes done."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    first = done = 0
    while first < len(views) and (count := call(fd, views[first : first + IOV_MAX], offset + done)):
        done += count
        while first < len(views) and count >= len(views[first]):
            count -= len(views[first])
            first += 1
        if count:
            views[first] = views[first][count:]
    return done
