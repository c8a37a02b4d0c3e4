"""Claiming against real devices: whatever is in the way is told, and nothing is changed before it is taken."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rustord import claim as claim_module
from rustord.blockdevice import open_device
from rustord.claim import Verdict, check, claim, require_ours
from rustord.errors import ClaimRefused, DeviceBusy
from rustord.label import Label, label_offsets
from rustord.objkey import parse_uuid
from tests.container import LOOP_MAJOR, LoopNumber
from tests.daemon import make_pool
from tests.zoo import BEASTS, NEED_LOOP, Zoo, damage, run, signatures, write

MIB = 1 << 20
SIZE = 64 * MIB
POOL = "0198a1b2-0000-7000-8000-00000000beef"


beasts = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.root] if name in NEED_LOOP else []) for name in BEASTS]
)


@pytest.fixture(params=["image", pytest.param("raw", marks=pytest.mark.root)])
def path(request: pytest.FixtureRequest) -> Path:
    """A blank image file, and a blank loop device."""
    device: Path = request.getfixturevalue("image" if request.param == "image" else "loop_device")
    return device


PIECE = 1 << 16


def digest(path: Path) -> str:
    """SHA-256 of all pieces of the device that are not zero, and of their places; past the page cache."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for number in _pieces_with_data(file.fileno(), file.seek(0, os.SEEK_END)):
            data = os.pread(file.fileno(), PIECE, number * PIECE)
            if data.count(0) < len(data):
                sha256.update(b"%d %d " % (number, len(data)) + data)
    return sha256.hexdigest()


def _pieces_with_data(file: int, size: int) -> Iterator[int]:
    """The numbers of those pieces that are no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
            end = -(-os.lseek(file, start, os.SEEK_HOLE) // PIECE) * PIECE
        except OSError:
            if end:
                return  # nothing but a hole follows
            start, end = 0, size  # a device that knows no holes
        yield from range(start // PIECE, -(-end // PIECE))


def refused(path: Path, *, force: bool = False) -> list[str]:
    """The reasons, after making sure that neither looking nor claiming changed a byte."""
    before = digest(path)
    verdict = check(path)
    with pytest.raises(ClaimRefused) as caught:
        claim(path, force=force)
    assert digest(path) == before
    assert list(caught.value.reasons) == [str(reason) for reason in verdict.reasons]
    assert str(path) in caught.value.message
    assert "nothing on it was changed" in caught.value.hint
    return list(caught.value.reasons)


class TestFree:
    def test_a_blank_device_is_free_and_taken_open_and_locked(self, path: Path) -> None:
        before = digest(path)
        assert check(path) == Verdict(str(path), SIZE, (), ())
        with closing(claim(path)) as device:
            assert (device.path, device.size, device.read_only) == (str(path), SIZE, False)
            with pytest.raises(DeviceBusy):
                open_device(path)
            with pytest.raises(ClaimRefused):
                claim(path)
        assert digest(path) == before
        claim(path).close()

    def test_what_is_neither_at_the_start_nor_at_the_end_stands_in_nobodys_way(self, path: Path, seed: int) -> None:
        content = random.Random(seed).randbytes(4 * MIB)
        write(path, 8 * MIB, content)
        claim(path).close()
        claim(path, force=True).close()
        with path.open("rb") as file:
            file.seek(8 * MIB)
            assert file.read(4 * MIB) == content


def make_two_things(path: Path) -> None:
    """What blkid calls ambivalent: an ext4 superblock, and over its boot block a swap header."""
    run("mkfs.ext4", "-q", path)
    write(path, 1024, struct.pack("<III", 1, SIZE // 4096 - 1, 0))
    write(path, 4086, b"SWAPSPACE2")


class TestContent:
    @beasts
    def test_whatever_blkid_knows_is_refused_then_erased_by_force(self, zoo: Zoo, name: str, tmp_path: Path) -> None:
        kind = BEASTS[name].type
        reasons = refused(zoo.ask_for(name))
        owner = f"carries {kind} (" if kind else 'in the rustord pool "theirs"'
        assert any(owner in reason for reason in reasons)
        assert all("--force" in reason for reason in reasons)

        path = zoo.copy(name, tmp_path / "copy.img")
        told: list[str] = []
        claim(path, force=True, announce=told.append).close()
        assert any((f"the {kind} signature at byte" if kind else "the label of") in erasure for erasure in told)
        assert signatures(path) == []
        claim(path).close()

    @beasts
    def test_what_is_damaged_is_still_theirs(self, zoo: Zoo, name: str, tmp_path: Path) -> None:
        path = zoo.copy(name, tmp_path / "copy.img")
        damage(path)
        (reason,) = refused(path)
        assert "of a kind that nobody here knows" in reason
        told: list[str] = []
        claim(path, force=True, announce=told.append).close()
        assert told[-1] == "the first and the last MiB"
        claim(path).close()

    @pytest.mark.root
    @pytest.mark.parametrize("name", ["ext4", "gpt"])
    def test_a_raw_device_is_treated_as_an_image_is(self, zoo: Zoo, name: str, make_loop: Any, tmp_path: Path) -> None:
        device = make_loop.attach(zoo.copy(name, tmp_path / "copy.img"))
        assert any(f"carries {BEASTS[name].type} (" in reason for reason in refused(device))
        claim(device, force=True).close()
        claim(device).close()

    def test_what_is_known_by_mdadm_is_what_is_refused(self, zoo: Zoo) -> None:
        """The superblocks of RAID are put together by the tests: here is who reads them."""
        if shutil.which("mdadm") is None:
            pytest.skip("there is no mdadm; `apt-get install mdadm` brings it")
        for version in ("0.90", "1.0", "1.1", "1.2"):
            assert "Array UUID" in run("mdadm", "--examine", zoo[f"md-{version}"]).replace("    UUID", "Array UUID")

    @pytest.mark.parametrize("at", [0, 4096, MIB - 1, SIZE - MIB, SIZE - 1])
    def test_data_that_nobody_knows_is_theirs(self, path: Path, at: int) -> None:
        write(path, at, b"x")
        (reason,) = refused(path)
        assert f"{path} holds data of a kind that nobody here knows, from byte {at} on" in reason
        told: list[str] = []
        claim(path, force=True, announce=told.append).close()
        assert told == ["the first and the last MiB"]
        claim(path).close()

    def test_a_device_as_it_comes_from_the_factory_is_free(self, path: Path) -> None:
        for erased in (b"\xff", b"\0"):
            write(path, 0, erased * MIB)
            write(path, SIZE - MIB, erased * MIB)
            claim(path).close()

    def test_an_image_file_with_a_filesystem(self, image: Path) -> None:
        run("mkfs.ext4", "-q", "-L", "holiday", image)
        (reason,) = refused(image)
        assert f'{image} carries ext4 (filesystem, label "holiday", uuid "' in reason
        claim(image, force=True).close()
        claim(image).close()

    def test_several_things_at_once(self, path: Path) -> None:
        make_two_things(path)
        reasons = refused(path)
        assert len(reasons) == 3
        for word in ("ext4", "swap", "blkid cannot decide"):
            assert any(word in reason for reason in reasons), word
        claim(path, force=True).close()
        claim(path).close()

    def test_force_says_beforehand_what_goes_and_leaves_the_rest(self, path: Path) -> None:
        run("mkfs.ext4", "-q", path)
        write(path, 20 * MIB, b"the middle")
        before = digest(path)

        def announce(erasure: str) -> None:
            assert digest(path) == before
            told.append(erasure)

        told: list[str] = []
        claim(path, force=True, announce=announce).close()
        assert told == ["the ext4 signature at byte 1080", "the first and the last MiB"]
        with path.open("rb") as file:
            assert file.read(MIB) == bytes(MIB)
            file.seek(20 * MIB)
            assert file.read(10) == b"the middle"

    def test_without_blkid_or_wipefs_nothing_is_taken(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        which = shutil.which
        for missing in ("blkid", "wipefs"):
            monkeypatch.setattr(shutil, "which", lambda name, path, gone=missing: None if name == gone else which(name))
            reasons = refused(image, force=True)
            assert any(f"without {missing}; install util-linux" in reason for reason in reasons)

    @pytest.mark.parametrize(("program", "script"), [("blkid", "exit 4"), ("wipefs", "exit 1"), ("blkid", "sleep 60")])
    def test_a_probe_that_fails_proves_nothing(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, script: str
    ) -> None:
        fake = tmp_path / program
        fake.write_text(f"#!/bin/sh\nexec {script}\n" if script.startswith("sleep") else f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(claim_module, "_PROBE_SECONDS_MAX", 1)
        (reason,) = refused(image, force=True)
        assert "cannot be told" in reason or "hangs" in reason


class TestUse:
    """What force never sets aside."""

    @pytest.mark.parametrize("name", ["with a space", "of a script with CRLF\r", "\f\x85\u2028"])
    def test_mounted(self, loop_device: Path, tmp_path: Path, name: str) -> None:
        run("mkfs.ext4", "-q", loop_device)
        where = tmp_path / name
        where.mkdir()
        run("mount", "-o", "ro", loop_device, where)
        try:
            reasons = refused(loop_device, force=True)
        finally:
            run("umount", where)
        assert f"{loop_device} is mounted on {where}; unmount it (umount {where})" in reasons
        assert any("ext4" in reason for reason in reasons)
        claim(loop_device, force=True).close()

    def test_mounted_where_only_others_see_it(self, loop_device: Path, tmp_path: Path) -> None:
        run("mkfs.ext4", "-q", loop_device)
        script = f"mount -o ro {loop_device} {tmp_path} && echo mounted && cat"
        with _held_by("unshare", "--mount", "--propagation", "private", "sh", "-c", script) as process:
            reasons = refused(loop_device, force=True)
        hidden = f"is mounted on {tmp_path} in the mount namespace of process {process.pid}"
        assert any(hidden in reason and "nsenter" in reason for reason in reasons)

    def test_a_btrfs_is_found_though_it_is_mounted_under_another_number(self, make_loop: Any, tmp_path: Path) -> None:
        if shutil.which("mkfs.btrfs") is None or "btrfs" not in Path("/proc/filesystems").read_text():
            pytest.skip("this kernel or machine has no btrfs (`apt-get install btrfs-progs`)")
        path = make_loop(128 * MIB)
        run("mkfs.btrfs", "-q", path)
        run("mount", "-o", "ro", path, tmp_path)
        try:
            reasons = refused(path, force=True)
        finally:
            run("umount", tmp_path)
        assert any(f"{path} is mounted on {tmp_path}" in reason for reason in reasons)

    def test_swap(self, loop_device: Path) -> None:
        run("mkswap", loop_device)
        run("swapon", loop_device)
        try:
            with pytest.raises(ClaimRefused) as caught:  # its content is the kernel's, who may change it meanwhile
                claim(loop_device, force=True)
        finally:
            run("swapoff", loop_device)
        reason = f"{loop_device} is swap space in use; switch it off (swapoff {loop_device})"
        assert reason in caught.value.reasons

    def test_partitions_yield_to_force_unless_they_are_in_use(
        self, loop_device: Path, partition: Path, tmp_path: Path
    ) -> None:
        run("sfdisk", "--quiet", "--no-tell-kernel", loop_device, stdin=b"label: dos\nstart=2048,size=16384\n")
        node = tmp_path / "p1"
        major, minor = (partition / "dev").read_text().split(":")
        os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(int(major), int(minor)))
        run("mkfs.ext4", "-q", node)
        reasons = refused(loop_device)
        assert any(f"has partitions ({partition.name})" in reason for reason in reasons)

        (tmp_path / "m").mkdir()
        run("mount", "-o", "ro", node, tmp_path / "m")
        reasons = refused(loop_device, force=True)
        assert any(f"/dev/{partition.name} is mounted on {tmp_path}/m" in reason for reason in reasons)
        run("umount", tmp_path / "m")

        with node.open("rb"):
            before = digest(loop_device)
            with pytest.raises(ClaimRefused, match=f"partition {partition.name} of {loop_device} cannot be removed"):
                claim(loop_device, force=True)
            assert digest(loop_device) == before

        told: list[str] = []
        claim(loop_device, force=True, announce=told.append).close()
        assert f"partition {partition.name}" in told
        assert not partition.exists()
        claim(loop_device).close()

    def test_held_by_another_driver(self, loop_device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No device mapper is needed: the kernel tells of every holder by a link in sysfs."""
        number = loop_device.stat().st_rdev
        (tmp_path / "dev").write_text(f"{os.major(number)}:{os.minor(number)}\n")
        for holder in ("md127", "dm-3/dm"):
            (tmp_path / "holders" / holder).mkdir(parents=True)
        (tmp_path / "holders/dm-3/dm/name").write_text("vg-root\n")
        (tmp_path / "holders/dm-3/dm/uuid").write_text("LVM-QkNdLtbnA7hdkmUZd\n")
        monkeypatch.setattr(claim_module, "_sysfs", lambda device: tmp_path)
        mapped, raid = refused(loop_device, force=True)
        assert mapped == f"{loop_device} is held by dm-3 (vg-root); remove it (lvremove, or dmsetup remove vg-root)"
        assert raid == f"{loop_device} is held by md127; stop it (mdadm --stop /dev/md127)"

        (tmp_path / "holders/dm-3/dm/name").write_text("mpatha\n")
        (tmp_path / "holders/dm-3/dm/uuid").write_text("mpath-36001405a8d1cbd4a1b64c1a8d1bd5d84\n")
        path, _ = refused(loop_device, force=True)
        assert "is one path of the multipath device mpatha; name that instead (/dev/mapper/mpatha)" in path

    def test_an_image_file_under_a_loop_device(self, make_loop: Any) -> None:
        loop = make_loop(SIZE)
        (reason,) = refused(make_loop.image(loop), force=True)
        assert f"the loop device {loop} stands on" in reason
        assert f"losetup -d {loop}" in reason

    def test_a_loop_device_over_it(self, make_loop: Any) -> None:
        below = make_loop(SIZE)
        above = make_loop.attach(below)
        assert any(f"the loop device {above} stands on {below}" in reason for reason in refused(below, force=True))

    def test_locked_by_another_process(self, path: Path) -> None:
        lock = "import sys; from rustord.blockdevice import open_device as o; d = o(sys.argv[1]); print(); input()"
        with _held_by(sys.executable, "-c", lock, path) as process:
            reasons = refused(path, force=True)
        assert any(f"({process.pid})" in reason for reason in reasons)

    def test_open_for_writing_without_any_lock(self, path: Path) -> None:
        with _held_by("sh", "-c", 'exec 3<>"$0"; echo; read x', path) as process:
            (reason,) = refused(path, force=True)
        assert reason == f"sh ({process.pid}) has {path} open for writing; stop that process"

    def test_held_exclusively_by_who_knows(self, loop_device: Path) -> None:
        descriptor = os.open(loop_device, os.O_RDONLY | os.O_EXCL)
        try:
            (reason,) = refused(loop_device, force=True)
        finally:
            os.close(descriptor)
        assert f"{loop_device} is in use by" in reason


@pytest.fixture
def partition(loop_device: Path) -> Iterator[Path]:
    """Partition 1 of the loop device, as sysfs has it. It would outlive the loop device."""
    run("addpart", loop_device, "1", "2048", "16384")
    path = Path(f"/sys/block/{loop_device.name}/{loop_device.name}p1")
    yield path
    if path.exists():
        run("delpart", loop_device, "1")


@contextmanager
def _held_by(*command: str | os.PathLike[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command that says one line when it is there, and ends with its input."""
    root = Path(claim_module.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process


@pytest.fixture
def unattached_loop() -> Iterator[Path]:
    """A loop device with nothing behind it, which nobody else uses."""
    loop = LoopNumber()
    try:
        if not loop.path.exists():  # neither udevd nor devtmpfs
            os.mknod(loop.path, 0o600 | stat.S_IFBLK, os.makedev(int(LOOP_MAJOR), loop.number))
        yield loop.path
    finally:
        loop.remove()
        loop.path.unlink(missing_ok=True)


class TestRace:
    """Somebody takes the device between our looking and our taking."""

    def test_formatted_after_the_check(self, path: Path) -> None:
        assert check(path).reasons == ()
        run("mkfs.ext4", "-q", path)
        assert any("ext4" in reason for reason in refused(path))

    def test_another_device_under_the_same_name(self, make_image: Any, zoo: Zoo, tmp_path: Path) -> None:
        name = tmp_path / "disk"
        name.symlink_to(make_image(SIZE))
        assert check(name).reasons == ()
        name.unlink()
        name.symlink_to(zoo["ext4"])
        assert any("ext4" in reason for reason in refused(name))

    @pytest.mark.root
    @pytest.mark.parametrize("moment", ["_uses", "_labels", "_signatures"])
    def test_written_to_while_we_look(
        self, loop_device: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        """Who minds no lock writes a filesystem, and is gone again, when we hold the device and begin to look."""
        step = getattr(claim_module, moment)

        def after_a_stranger(device: Any) -> Any:
            strangers.append(run("dd", f"if={zoo['ext4']}", f"of={loop_device}", "bs=1M", "count=2"))
            return step(device)

        strangers: list[str] = []
        monkeypatch.setattr(claim_module, moment, after_a_stranger)
        with pytest.raises(ClaimRefused) as caught:
            claim(loop_device)
        assert len(strangers) == 1
        assert any("ext4" in reason for reason in caught.value.reasons)

    @pytest.mark.root
    def test_a_tool_that_comes_while_we_look_is_kept_out(
        self, loop_device: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks = claim_module._uses

        def after_mkfs(device: Any) -> Any:
            mkfs = subprocess.run(["mkfs.ext4", "-q", loop_device], capture_output=True, text=True, stdin=None)
            tried.append(mkfs.stderr)
            return looks(device)

        tried: list[str] = []
        monkeypatch.setattr(claim_module, "_uses", after_mkfs)
        claim(loop_device).close()
        assert "apparently in use" in tried[0]


class TestUnfit:
    """What force never sets aside, either."""

    def test_too_small(self, make_image: Any) -> None:
        (reason,) = refused(make_image(16 * MIB - 512), force=True)
        assert "16777216 bytes at least" in reason
        claim(make_image(16 * MIB)).close()

    @pytest.mark.root
    def test_a_device_without_a_medium(self, unattached_loop: Path) -> None:
        verdict = check(unattached_loop)
        assert verdict.size == 0
        assert any("only 0 bytes" in str(reason) for reason in verdict.reasons)
        with pytest.raises(ClaimRefused):
            claim(unattached_loop, force=True)

    def test_empty(self, make_image: Any) -> None:
        (reason,) = refused(make_image(0), force=True)
        assert "only 0 bytes" in reason

    def test_read_only(self, loop_device: Path) -> None:
        run("mkfs.ext4", "-q", loop_device)
        run("blockdev", "--setro", loop_device)
        try:
            reasons = refused(loop_device, force=True)
        finally:  # it would stay read-only for whoever attaches it next
            run("blockdev", "--setrw", loop_device)
        assert any("is read-only" in reason for reason in reasons)
        assert any("ext4" in reason for reason in reasons)

    def test_absent(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent", tmp_path):
            verdict = check(path)
            assert verdict.size == 0
            (reason,) = verdict.reasons
            assert str(path) in reason.what
            with pytest.raises(ClaimRefused):
                claim(path, force=True)

    def test_unreadable(self, faulty_loop: Any) -> None:
        claim(faulty_loop.path).close()  # now its ends are in the page cache
        with faulty_loop.failing():
            reasons = [str(reason) for reason in check(faulty_loop.path).reasons]
            with pytest.raises(ClaimRefused):
                claim(faulty_loop.path, force=True)
        for offset in label_offsets(16 * MIB):
            assert any(f"at byte {offset} failed: Input/output error" in reason for reason in reasons), offset
        claim(faulty_loop.path).close()


class TestOtherPools:
    @pytest.mark.parametrize("copy", [0, 1, 2])
    def test_any_copy_of_a_label_says_whose_it_is(self, path: Path, copy: int) -> None:
        write(path, label_offsets(SIZE)[copy], label().encode())
        (reason,) = refused(path)
        assert f'it is in the rustord pool "archive" (uuid {POOL})' in reason
        told: list[str] = []
        claim(path, force=True, announce=told.append).close()
        assert told == ["the label of the rustord pool", "the first and the last MiB"]
        claim(path).close()

    def test_a_damaged_label_is_still_a_label(self, path: Path) -> None:
        data = bytearray(label().encode())
        data[100] ^= 1
        write(path, 0, bytes(data))
        (reason,) = refused(path)
        assert "label of a rustord pool" in reason
        assert "checksum" in reason


class TestOurs:
    """A device of a pool that somebody took while no rustord held it."""

    def test_nobody_has_taken_it(self, image: Path) -> None:
        make_pool(image)
        with closing(open_device(image)) as device:
            require_ours(device)

    @pytest.mark.parametrize("copy", [0, 1, 2])
    @pytest.mark.parametrize("spoilt", [b"\xff", bytes(4096)])
    def test_a_label_that_is_damaged_or_gone_is_not_theirs(self, image: Path, copy: int, spoilt: bytes) -> None:
        make_pool(image)
        write(image, label_offsets(SIZE)[copy] + 100, spoilt)
        with closing(open_device(image)) as device:
            require_ours(device)

    def test_no_label_is_for_others_to_tell(self, zoo: Zoo) -> None:
        with closing(open_device(zoo["ext4"])) as device:
            require_ours(device)

    @pytest.mark.parametrize("name", sorted(BEASTS.keys() - NEED_LOOP - {"rustord"}))
    def test_taken_by_somebody(self, image: Path, zoo: Zoo, name: str) -> None:
        zoo.ask_for(name)
        make_pool(image)
        with image.open("rb") as file:
            labels = [os.pread(file.fileno(), 8192, offset) for offset in label_offsets(SIZE)]
        BEASTS[name].make(image)
        write(image, label_offsets(SIZE)[1], labels[1])  # as where mkfs does not discard everything first
        before = digest(image)
        with closing(open_device(image)) as device, pytest.raises(ClaimRefused) as caught:
            require_ours(device)
        assert any(f"carries {BEASTS[name].type} (" in reason for reason in caught.value.reasons)
        assert "wipefs --all" in caught.value.hint
        assert digest(image) == before

    def test_what_the_pool_holds_may_look_like_anything(self, image: Path) -> None:
        """VMFS has its magic number at 2 MiB: within our journal."""
        make_pool(image)
        write(image, 2 * MIB, bytes.fromhex("5ef1ab2f") + bytes(60) + b"vmfs".ljust(128, b"\0"))
        assert "VMFS" in run("wipefs", image)
        with closing(open_device(image)) as device:
            require_ours(device)


def label() -> Label:
    return Label(
        pool_uuid=parse_uuid(POOL),
        pool_name="archive",
        device_uuid=os.urandom(16),
        device_index=3,
        block_size=4096,
        block_count=SIZE // 4096,
        secret=bytes(32),
        created_ns=1,
    )
