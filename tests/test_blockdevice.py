"""BlockDevice against real loop devices and image files, failing ones among them."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rustord import blockdevice
from rustord.blockdevice import IOV_MAX, ZERO_RANGE_MIN, ImageFile, RawDevice, open_device, openers, tell_udev
from rustord.errors import DeviceBusy, DeviceError

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(params=["image", pytest.param("raw", marks=pytest.mark.root)])
def path(request: pytest.FixtureRequest, make_image: Callable[[int], Path]) -> Path:
    """An image file, and a loop device: a pool treats both alike."""
    device: Path = make_image(SIZE) if request.param == "image" else request.getfixturevalue("make_loop")(SIZE)
    return device


def read(device: blockdevice.BlockDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.read(offset, [buffer])
    return bytes(buffer)


def fill(path: Path, seed: int) -> bytes:
    """Random content for the whole device."""
    content = random.Random(seed).randbytes(SIZE)
    with closing(open_device(path)) as device:
        device.write(0, [content])
        device.flush()
    return content


class TestReadAndWrite:
    def test_what_is_written_and_flushed_is_on_the_device(self, path: Path) -> None:
        with closing(open_device(path)) as device:
            device.write(4096, [b"a" * 100, memoryview(b"b" * 412), bytearray(b"c" * 4096)])
            device.flush()
            first, second = bytearray(512), bytearray(4096)
            device.read(4096, [first, memoryview(second)])
        assert first + second == b"a" * 100 + b"b" * 412 + b"c" * 4096
        with path.open("rb") as file:
            assert file.read(4096 + 512 + 4096 + 1) == bytes(4096) + first + second + b"\0"

    def test_more_buffers_than_one_system_call_takes(self, path: Path, seed: int) -> None:
        chance = random.Random(seed)
        pieces = [chance.randbytes(chance.choice((0, 1, 512, 700))) for _ in range(3 * IOV_MAX)]
        targets = [bytearray(len(piece)) for piece in pieces]
        with closing(open_device(path)) as device:
            device.write(512, pieces)
            device.read(512, targets)
            assert not device.failed
        assert targets == pieces

    def test_short_transfers_are_continued(self, path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        content = random.Random(seed).randbytes(10_000)
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, _short(getattr(os, name)))
        pieces = [content[:1], content[1:5000], b"", content[5000:]]
        targets = [bytearray(len(piece)) for piece in pieces]
        with closing(open_device(path)) as device:
            device.write(0, pieces)
            device.read(0, targets)
        assert b"".join(targets) == content

    def test_read_now_tells_cached_from_uncached(self, path: Path, seed: int) -> None:
        content = fill(path, seed)
        buffer = bytearray(4096)
        with closing(open_device(path)) as device:
            _drop_cache(path)
            assert device.read_now(MIB, [buffer]) is False
            device.read(MIB, [bytearray(4096)])
            assert device.read_now(MIB, [buffer]) is True
            assert buffer == content[MIB : MIB + 4096]

    def test_read_now_is_no_error_past_the_end(self, path: Path) -> None:
        with closing(open_device(path)) as device:
            assert device.read_now(SIZE - 512, [bytearray(1024)]) is False
            assert device.read_now(1 << 62, [bytearray(1024)]) is False
            assert device.read_now(0, [bytearray(1)] * (IOV_MAX + 1)) is False

    def test_reread_asks_the_medium(self, path: Path, seed: int) -> None:
        content = fill(path, seed)
        with closing(open_device(path)) as device:
            for offset, length in ((0, 4096), (MIB, 100), (4000, 200), (4096, MIB + 1), (SIZE - 4096, 4096)):
                pieces = [bytearray(length // 3), bytearray(length - length // 3)]
                device.reread(offset, pieces)
                assert b"".join(pieces) == content[offset : offset + length]
            with pytest.raises(DeviceError, match=r"ends at byte|reading"):
                device.reread(SIZE, [bytearray(512)])
            assert not device.failed

    def test_reread_sees_what_was_just_written(self, path: Path) -> None:
        buffer = bytearray(10)
        with closing(open_device(path)) as device:
            device.write(8192, [b"0123456789"])
            device.reread(8192, [buffer])
        assert buffer == b"0123456789"

    def test_scratch_zeroes_and_nothing_else(self, path: Path, seed: int) -> None:
        content = fill(path, seed)
        with closing(open_device(path)) as device:
            buffer = bytearray(SIZE)
            device.read(0, [buffer])  # now it is in the page cache
            device.scratch(8192, 4096 + MIB)
            device.read(0, [buffer])
            assert buffer == content[:8192] + bytes(4096 + MIB) + content[8192 + 4096 + MIB :]
            with pytest.raises(DeviceError, match="beyond the end"):
                device.scratch(SIZE, 4096)

    def test_start_writeback_never_fails(self, path: Path) -> None:
        device = open_device(path)
        device.write(0, [bytes(MIB)])
        device.start_writeback(0, MIB)
        device.start_writeback(-1, -1)
        device.close()
        device.start_writeback(0, MIB)


def _short(call: Callable[..., int]) -> Callable[..., int]:
    """preadv or pwritev as they are at a signal: they stop after 1,000 bytes."""

    def transfer(fd: int, buffers: list[bytes], offset: int) -> int:
        left, some = 1000, []
        for buffer in buffers:
            some.append(memoryview(buffer)[:left])
            left -= len(some[-1])
        return call(fd, some, offset)

    return transfer


def _drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class TestTheEnd:
    def test_a_write_beyond_it_changes_nothing(self, path: Path, seed: int) -> None:
        content = fill(path, seed)
        with closing(open_device(path)) as device:
            assert device.size == SIZE
            device.write(SIZE - 512, [content[-512:]])
            for offset, length in ((SIZE - 512, 1024), (SIZE, 1), (SIZE + 4096, 512), (-512, 512), (1 << 62, 512)):
                for change in (device.zero, device.discard, lambda o, n: device.write(o, [bytes(n)])):
                    with pytest.raises(DeviceError, match="beyond the end"):
                        change(offset, length)
            assert not device.failed
            device.flush()
            assert read(device, 0, SIZE) == content
        assert open_size(path) == SIZE

    def test_a_read_beyond_it_names_device_and_offset(self, path: Path) -> None:
        with closing(open_device(path)) as device:
            with pytest.raises(DeviceError) as caught:
                device.read(SIZE - 512, [bytearray(4096)])
            assert str(path) in caught.value.message
            assert str(SIZE - 512) in caught.value.message
            assert "restore" in caught.value.hint
            assert not device.failed

    def test_a_truncated_image_file_is_told_and_takes_no_acknowledged_write(self, make_image: Any) -> None:
        path = make_image(SIZE)
        with closing(open_device(path)) as device:
            os.truncate(path, MIB)
            with pytest.raises(DeviceError, match=f"{path} ends at byte {MIB}"):
                device.read(MIB - 512, [bytearray(1024)])
            device.write(4 * MIB, [b"x" * 512])  # the kernel takes it: the file grows again, with a hole
            with pytest.raises(DeviceError, match="truncated"):
                device.flush()
            with pytest.raises(DeviceError, match="truncated"):
                device.write(0, [b"x" * 512])

    def test_a_device_that_shrank_fails_at_the_write(self, make_loop: Any) -> None:
        path = make_loop(SIZE)
        with closing(open_device(path)) as device:
            os.truncate(make_loop.image(path), MIB)
            subprocess.run(["losetup", "--set-capacity", path], check=True)
            with pytest.raises(DeviceError, match="writing 1024 bytes"):
                device.write(MIB - 512, [bytes(1024)])
            assert "No space" in device.failed
            with pytest.raises(DeviceError, match="takes no writes any more: writing 1024 bytes"):
                device.flush()


def open_size(path: Path) -> int:
    with closing(open_device(path)) as device:
        return device.size


class TestGone:
    WHAT = (
        ("reading 512 bytes at byte 4096", lambda device: device.read(4096, [bytearray(512)])),
        ("reading 512 bytes at byte 4096", lambda device: device.reread(4096, [bytearray(512)])),
        ("zeroing 4096 bytes at byte 4096", lambda device: device.scratch(4096, 4096)),
        ("writing 512 bytes at byte 4096", lambda device: device.write(4096, [bytes(512)])),
    )

    def test_a_device_that_has_gone_says_so(self, make_loop: Any) -> None:
        with closing(open_device(path := make_loop(SIZE))) as device:
            os.truncate(make_loop.image(path), 0)
            subprocess.run(["losetup", "--set-capacity", path], check=True)  # as of a disk that was pulled out
            for what, ask in self.WHAT:
                with pytest.raises(DeviceError) as caught:
                    ask(device)
                assert caught.value.message == f"{path}: {what} failed: the device has gone"
                assert "attach it again" in caught.value.hint
            with pytest.raises(DeviceError, match=r"takes no writes any more: writing .* failed: the device has gone"):
                device.flush()

    def test_what_was_let_go_says_why(self, path: Path) -> None:
        with closing(open_device(path)) as device:
            device.let_go("it was removed")
            for what, ask in self.WHAT:
                device.failed = ""  # as whoever found it that has begun before
                with pytest.raises(DeviceError) as caught:
                    ask(device)
                assert caught.value.message == f"{path}: {what} failed: it was removed"


class TestShare:
    def test_another_process_has_the_device_and_its_lock_until_it_lets_go_of_both(self, path: Path) -> None:
        device = open_device(path)
        shared = device.share()
        assert shared is not None
        os.pwrite(shared[0], b"from elsewhere", 4096)
        assert read(device, 4096, 14) == b"from elsewhere"
        device.close()
        for fd in shared:
            with pytest.raises(DeviceBusy):
                open_device(path)
            os.close(fd)
        open_device(path).close()

    def test_who_shares_it_learns_that_it_is_lost_before_anybody_finds_another_in_its_place(self, path: Path) -> None:
        for lose in (lambda device: device.let_go("it was removed"), lambda device: device.report(OSError(5, "EIO"))):
            with closing(open_device(path)) as device:
                told: list[tuple[bool, bytes]] = []

                def learn(device: RawDevice | ImageFile = device, told: list[tuple[bool, bytes]] = told) -> None:
                    told.append((bool(device.failed), os.pread(device.fileno(), 1, 0)))

                device.lost["me"] = learn
                lose(device)
                assert told == [(True, bytes(1))]
                assert device.share() is None
                told.clear()
            assert told, "to close it is to lose it as well"


class TestZeroAndDiscard:
    def test_zero_clears_the_range_and_nothing_else(self, path: Path, seed: int) -> None:
        content = bytearray(fill(path, seed))
        chance = random.Random(seed)
        lengths = (1, 512, 4096, ZERO_RANGE_MIN - 512, ZERO_RANGE_MIN, ZERO_RANGE_MIN + 1, 3 * MIB + 512)
        with closing(open_device(path)) as device:
            for length in lengths:
                offset = chance.randrange(0, SIZE - length, 512)
                device.zero(offset, length)
                content[offset : offset + length] = bytes(length)
                assert read(device, 0, SIZE) == content, (offset, length)
            device.zero(0, SIZE)
            device.flush()
            assert read(device, 0, SIZE) == bytes(SIZE)

    def test_zero_covers_what_is_still_only_in_the_page_cache(self, path: Path) -> None:
        with closing(open_device(path)) as device:
            device.write(0, [b"x" * (4 * MIB)])
            device.zero(MIB, 2 * MIB)
            device.flush()
        _drop_cache(path)
        with closing(open_device(path)) as device:
            assert read(device, 0, 4 * MIB) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB

    def test_large_ranges_cost_no_memory_or_data_path(self, path: Path) -> None:
        """From ZERO_RANGE_MIN on, the kernel does it: nothing of the range is in the page cache afterwards."""
        with closing(open_device(path)) as device:
            device.zero(1, 2 * MIB)  # not aligned, so it is written, but that must not end the other way for good
            device.zero(0, 8 * MIB)
            assert read(device, 0, 512) == bytes(512)
            if device.path.startswith("/dev/"):
                assert device.read_now(4 * MIB, [bytearray(4096)]) is False

    def test_zero_where_the_kernel_cannot(self) -> None:
        """tmpfs zeroes no ranges, so they are written."""
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="rustord-test-") as file:
            file.write(b"x" * SIZE)
            file.flush()
            with closing(open_device(file.name)) as device:
                device.zero(512, 3 * MIB)
                assert not device.failed
                assert read(device, 0, 4 * MIB) == b"x" * 512 + bytes(3 * MIB) + b"x" * (MIB - 512)

    def test_zero_below_the_logical_block_size(self, make_loop: Any, seed: int) -> None:
        path = make_loop(SIZE, sector_size=4096)
        content = fill(path, seed)
        with closing(open_device(path)) as device:
            assert device.block_size == 4096
            device.zero(512, 2 * MIB)
            assert read(device, 0, SIZE) == content[:512] + bytes(2 * MIB) + content[512 + 2 * MIB :]

    def test_discard_gives_the_space_back_and_touches_nothing_else(self, make_image: Any, seed: int) -> None:
        path = make_image(SIZE)
        content = fill(path, seed)
        used = path.stat().st_blocks
        with closing(open_device(path)) as device:
            device.discard(MIB, 8 * MIB)
            device.flush()
            assert read(device, 0, MIB) == content[:MIB]
            assert read(device, 9 * MIB, 7 * MIB) == content[9 * MIB :]
        assert path.stat().st_blocks < used * 0.6
        assert path.stat().st_size == SIZE

    def test_discard_does_nothing_where_unsupported(self, make_loop: Any, seed: int) -> None:
        path = make_loop(SIZE)
        content = fill(path, seed)
        with closing(open_device(path)) as device:
            device.discard(512, 1)  # the kernel refuses what is not aligned
            assert not device.failed
            assert read(device, 0, SIZE) == content


class TestOpening:
    def test_nobody_else_gets_it_and_the_holder_is_named(self, path: Path) -> None:
        with _open_in_another_process(path) as holder:
            with pytest.raises(DeviceBusy) as caught:
                open_device(path)
            assert str(path) in caught.value.message
            assert f"({holder.pid})" in caught.value.message
            with pytest.raises(DeviceBusy):
                open_device(path, read_only=True)
        open_device(path).close()

    def test_another_node_of_the_same_device_is_locked_too(self, make_loop: Any, tmp_path: Path) -> None:
        path, node = make_loop(SIZE), tmp_path / "node"
        os.mknod(node, path.stat().st_mode, path.stat().st_rdev)
        with closing(open_device(path)), pytest.raises(DeviceBusy):
            open_device(node)

    def test_readers_share_an_image_file(self, make_image: Any) -> None:
        path = make_image(SIZE)
        with closing(open_device(path, read_only=True)), closing(open_device(path, read_only=True)):
            with pytest.raises(DeviceBusy):
                open_device(path)
            open_device(path, exclusive=False).close()

    def test_read_only_refuses_changes(self, path: Path) -> None:
        with closing(open_device(path, read_only=True)) as device:
            for change in (device.zero, device.discard, lambda o, n: device.write(o, [bytes(n)])):
                with pytest.raises(DeviceError, match="for reading only"):
                    change(0, 2 * MIB)
            device.flush()
            assert not device.failed

    def test_a_read_only_device_is_refused_unless_asked_for(self, make_loop: Any) -> None:
        path = make_loop(SIZE)
        subprocess.run(["blockdev", "--setro", path], check=True)
        try:
            with pytest.raises(DeviceError, match=f"{path} is read-only") as caught:
                open_device(path)
            assert "--setrw" in caught.value.hint
            with closing(open_device(path, read_only=True)) as device:
                assert read(device, 0, 512) == bytes(512)
        finally:  # it would stay read-only for whoever attaches it next
            subprocess.run(["blockdev", "--setrw", path], check=True)

    def test_what_is_no_device(self, tmp_path: Path) -> None:
        with pytest.raises(DeviceError, match="No such file") as caught:
            open_device(tmp_path / "absent")
        assert "lsblk" in caught.value.hint
        for path in (tmp_path, Path("/dev/null")):
            with pytest.raises(DeviceError, match="neither a block device nor a regular file"):
                open_device(path)
        for name in ("a\0b", "a\ud800b"):
            with pytest.raises(DeviceError, match="cannot be a path"):
                open_device(name)

    def test_close_twice_and_use_after_close(self, path: Path) -> None:
        device = open_device(path)
        device.close()
        device.close()
        for use in (lambda: read(device, 0, 512), lambda: device.write(0, [bytes(512)]), device.flush):
            with pytest.raises(DeviceError):
                use()

    def test_openers_tell_readers_from_writers(self, path: Path) -> None:
        with _open_in_another_process(path) as holder, path.open("rb"):
            found = {opener.pid: opener.writing for opener in openers(str(path))}
        assert found[holder.pid] is True
        assert found[os.getpid()] is False


@contextmanager
def _open_in_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    script = (
        "import sys; from rustord.blockdevice import open_device; device = open_device(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    root = Path(blockdevice.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


class TestFailing:
    def test_a_failed_write_ends_all_writing(self, make_image: Any) -> None:
        path = make_image(SIZE)
        with closing(open_device(path)) as device:
            device.write(0, [b"x" * 512])
            with _largest_file(MIB), pytest.raises(DeviceError, match="writing 1024 bytes at byte") as caught:
                device.write(MIB - 512, [bytes(1024)])  # half of it fits
            assert "smartctl" in caught.value.hint
            assert "File too large" in device.failed
            first_reason = device.failed
            for change in (device.zero, device.discard, lambda o, n: device.write(o, [bytes(n)])):
                with pytest.raises(DeviceError, match="takes no writes any more"):
                    change(0, 512)
            with pytest.raises(DeviceError, match="File too large"):
                device.flush()
            assert device.failed == first_reason
            assert read(device, 0, 512) == b"x" * 512

    def test_a_failed_zeroing_ends_all_writing(self, make_image: Any) -> None:
        with closing(open_device(make_image(SIZE))) as device:
            with _largest_file(MIB), pytest.raises(DeviceError):
                device.zero(MIB, 4096)
            assert "File too large" in device.failed

    def test_a_failed_flush_is_never_retried_into_success(self, faulty_loop: Any) -> None:
        with closing(open_device(faulty_loop.path)) as device:
            device.write(0, [b"old" + bytes(4093)])
            device.flush()
            device.write(4096, [b"x" * 4096])
            with faulty_loop.failing(), pytest.raises(DeviceError, match="flushing failed: Input/output error"):
                device.flush()
            # The device works again and a second fdatasync would say so, but the write is lost.
            for _ in range(2):
                with pytest.raises(DeviceError, match="flushing failed: Input/output error"):
                    device.flush()
            with pytest.raises(DeviceError, match="takes no writes any more"):
                device.write(8192, [bytes(4096)])
            assert read(device, 0, 3) == b"old"

    def test_an_unreadable_block_is_told_and_the_device_still_takes_writes(self, faulty_loop: Any) -> None:
        with closing(open_device(faulty_loop.path)) as device:
            with faulty_loop.failing():
                assert device.read_now(4 * MIB, [bytearray(4096)]) is False
                with pytest.raises(DeviceError, match="reading 4096 bytes at byte 4194304 failed: Input/output error"):
                    read(device, 4 * MIB, 4096)
            assert not device.failed
            assert read(device, 4 * MIB, 4096) == bytes(4096)
            device.write(4 * MIB, [b"x" * 4096])
            device.flush()


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """The kernel writes no file beyond `size` bytes for us."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_udev_is_told_without_letting_go(path: Path) -> None:
    """udevd watches each device as this does, and looks at it again when a descriptor for writing is closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    with closing(open_device(path)), open(libc.inotify_init1(os.O_NONBLOCK), "rb", buffering=0) as events:
        assert libc.inotify_add_watch(events.fileno(), os.fsencode(path), 8) >= 0  # IN_CLOSE_WRITE
        assert events.read(4096) is None
        tell_udev(str(path))
        assert events.read(4096)
        with pytest.raises(DeviceBusy):
            open_device(path)
    tell_udev(f"{path}/absent")
