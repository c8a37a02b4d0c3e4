"""What was written to a volume and not flushed is there when only the process was killed, and nothing wrong ever is."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest

from rustord.audit import Audit
from rustord.blockdevice import open_device
from rustord.blockstore import BlockStore
from rustord.errors import NoSpace, Unavailable
from rustord.keystore.lmdb import LmdbBackend
from rustord.membership import add_device, prepare_device, remove_device
from rustord.objkey import uuid_text
from rustord.page import CHUNK_BYTES, SLOT_COUNT, MapEntry
from rustord.pending import PENDING, Pending, circumstances, take_up
from rustord.pool import open_devices
from rustord.testing.device import VolatileDevice
from rustord.volume import Volume
from rustord.volumes import Volumes
from tests.crash.disks import Disks
from tests.simulation import MIB, Direct, Simulation, check_sound, free_count, run

CHUNKS = 24
SIZE = CHUNKS * CHUNK_BYTES


class Bench:
    """A pool with a volume "disk", ``written`` as ``model`` says."""

    def __init__(self, directory: Path) -> None:
        self.simulation = Simulation(directory, (24 * MIB, 24 * MIB))
        self.model = bytearray(SIZE)
        self._open()
        self.volumes.create("disk", SIZE)

    def _open(self) -> None:
        self.store = self.simulation.open()
        self.volumes = Volumes(self.store, Direct(self.store), self.simulation.index)

    def kill(self) -> None:
        """End the process, not the machine, and begin another one."""
        self.simulation.cut_power(lambda offset: True)
        self._open()

    @property
    def files(self) -> list[Path]:
        return sorted((self.simulation.index / PENDING).iterdir())

    @property
    def disk(self) -> Volume:
        return self.volumes.open("disk")

    def write(self, offset: int, data: bytes) -> None:
        self.disk.write(offset, memoryview(data))
        self.model[offset : offset + len(data)] = data

    def trim(self, chunk: int, count: int = 1) -> None:
        self.disk.trim(chunk * CHUNK_BYTES, count * CHUNK_BYTES)
        self.model[chunk * CHUNK_BYTES : (chunk + count) * CHUNK_BYTES] = bytes(count * CHUNK_BYTES)

    def content(self) -> bytes:
        buffer = bytearray(SIZE)
        self.disk.read(0, memoryview(buffer))
        return bytes(buffer)

    def step(self, chance: random.Random) -> None:
        """Something that users do."""
        what = chance.randrange(12)
        if what < 6:
            self.write(chance.randrange(SIZE - 200_000), chance.randbytes(chance.choice([512, 5000, 70_000, 200_000])))
        elif what < 9:
            chunk = chance.randrange(CHUNKS)
            self.trim(chunk, chance.randrange(1, CHUNKS - chunk + 1))
        elif what == 9:
            self.disk.flush()
        elif what == 10:
            self.volumes.snapshot("disk", f"snapshot{chance.getrandbits(64)}")
        else:
            disks = Disks.__new__(Disks)
            disks._store, disks._volumes = self.store, self.volumes
            disks.move()


@pytest.fixture
def bench(disk_path: Path) -> Bench:
    return Bench(disk_path)


def test_all_that_was_answered_is_there_after_a_kill(disk_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(8):
        (directory := disk_path / str(number)).mkdir()
        bench = Bench(directory)
        for _ in range(6):
            for _ in range(chance.randrange(1, 12)):
                bench.step(chance)
            bench.kill()
            assert bench.content() == bench.model
            run(bench.store)
            check_sound(bench.store)
        bench.simulation.close()


def test_to_repair_the_pool_erases_nothing_of_it(bench: Bench) -> None:
    """Before the next start no journal and no index names these blocks."""
    bench.write(CHUNK_BYTES + 5, b"answered")
    bench.disk.flush()
    bench.write(0, b"answered, and not flushed")
    bench.simulation.cut_power(lambda offset: True)
    devices = open_devices(bench.simulation.paths)
    with Audit(devices, backend=LmdbBackend(), directory=bench.simulation.index) as audit:
        assert [finding for finding in audit.findings if finding.kind == "free"] == []
        audit.mend()
    bench._open()
    assert bench.content() == bench.model
    check_sound(bench.store)


class _Killed(Exception):
    pass


def test_a_page_whose_first_chunk_found_no_room_is_known_to_the_next(bench: Bench) -> None:
    """That one is written while a flush is under way, which says where the page is, and which the kill cuts short."""
    taken = []
    with suppress(NoSpace):
        while True:
            taken.append(bench.store.allocator.run(CHUNK_BYTES // 4096))

    def write_meanwhile(*_: object) -> NoReturn:
        bench.store.allocator.release([taken.pop()])
        bench.write(0, b"answered")
        raise _Killed

    bench.disk._note = write_meanwhile
    with pytest.raises(_Killed):
        bench.disk.write(CHUNK_BYTES, memoryview(b"no room"))
    bench.kill()
    assert bench.content() == bench.model
    check_sound(bench.store)


def test_it_is_durable_as_soon_as_it_is_flushed_again(bench: Bench) -> None:
    bench.write(70_000, b"answered")
    bench.kill()
    bench.disk.flush()
    bench.simulation.cut_power()
    bench._open()
    assert bench.content() == bench.model


def test_nothing_of_it_is_kept_when_the_volume_goes(bench: Bench) -> None:
    free = free_count(bench.store)
    bench.write(0, b"x" * 3 * CHUNK_BYTES)
    bench.disk.flush()
    bench.trim(0)
    bench.write(CHUNK_BYTES, b"y" * 2 * CHUNK_BYTES)
    bench.kill()
    run(bench.store)
    for _ in range(20):
        if bench.volumes._open.get("disk"):
            bench.volumes._volumes["disk"].close()
    bench.volumes.delete("disk")
    run(bench.store)
    assert free_count(bench.store) > free
    check_sound(bench.store)
    assert bench.files == []


def test_only_what_was_flushed_counts_once_the_machine_has_been_started_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.write(0, b"flushed")
    bench.disk.flush()
    flushed = bytes(bench.model)
    bench.write(CHUNK_BYTES, b"answered")
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr("rustord.pending._BOOT_ID", tmp_path / "boot_id")
    bench.kill()
    assert bench.content() == flushed
    assert bench.files == []
    check_sound(bench.store)


def test_only_what_was_flushed_counts_if_a_disk_may_have_been_away(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.write(CHUNK_BYTES, b"answered")
    (file,) = bench.files
    file.write_bytes(file.read_bytes().replace(b": []", b": [2049, 7]", 1))
    bench.kill()
    assert bench.content() == bytes(SIZE)
    assert "its disks are others" in caplog.text


@pytest.mark.parametrize("what", ["added", "removed"])
def test_a_disk_that_had_nothing_of_it_may_come_or_go(bench: Bench, what: str) -> None:
    home = bench.store.layers.volumes["disk"].home
    paths = bench.simulation.paths
    bench.write(CHUNK_BYTES, b"answered")
    if what == "added":
        paths.append(paths[0].with_name("new.img"))
        paths[-1].write_bytes(bytes(24 * MIB))
        bench.simulation.devices.append(VolatileDevice(open_device(paths[-1]), bench.simulation.power))
        prepare_device(bench.store, bench.simulation.devices[-1])
        add_device(bench.store, bench.simulation.devices[-1])
    else:
        remove_device(bench.store, 1 - home)
        del bench.simulation.devices[1 - home], paths[1 - home]
    bench.kill()
    assert bench.content() == bench.model
    check_sound(bench.store)


def test_what_is_on_a_disk_that_came_later_does_not_count(bench: Bench) -> None:
    """It may have come twice."""
    home = bench.store.layers.volumes["disk"].home
    before = circumstances(bench.store.label.pool_uuid, bench.store.blocks)
    bench.write(CHUNK_BYTES, b"answered")
    (file,) = bench.files
    disks = {uuid_text(slot.uuid): [] for index, slot in bench.store.blocks.slots.items() if index != home}
    file.write_bytes(json.dumps({**before, "disks": disks}).encode() + file.read_bytes()[len(json.dumps(before)) :])
    bench.kill()
    assert bench.content() == bytes(SIZE)


def test_a_change_that_was_noted_in_part_was_not_answered(bench: Bench) -> None:
    bench.write(0, b"first")
    first = bytes(bench.model)
    bench.write(5 * CHUNK_BYTES, b"second")
    (file,) = bench.files
    noted = file.read_bytes()
    bench.simulation.cut_power(lambda offset: True)
    file.write_bytes(noted[:-3])
    bench._open()
    assert bench.content() == first


def test_a_volume_whose_home_the_pool_has_no_more_is_passed_over(bench: Bench) -> None:
    layer, pool_uuid = bench.store.layers.volumes["disk"], bench.store.label.pool_uuid
    others = [slot for index, slot in bench.store.blocks.slots.items() if index != layer.home]
    blocks = BlockStore(4096, others, "zero")
    folder = bench.simulation.index / PENDING
    Pending(folder / "disk", lambda: circumstances(pool_uuid, blocks)).add(MapEntry(layer.uuid, [], [(0, 0)]))
    assert take_up(folder, pool_uuid, blocks, bench.store.keystore, 100) == 100
    assert bench.files == []


@pytest.mark.parametrize("garbage", [b"", b"\n", b"{}", b'{"boot": 1}\n', b"\xff" * 100, b"[]\n" + bytes(50)])
def test_a_file_that_is_none_is_passed_over(bench: Bench, garbage: bytes) -> None:
    bench.write(0, b"flushed")
    bench.disk.flush()
    bench.simulation.cut_power(lambda offset: True)
    (bench.simulation.index / PENDING / "disk").write_bytes(garbage)
    bench._open()
    assert bench.content() == bench.model


def test_changes_during_a_flush_are_still_noted(tmp_path: Path) -> None:
    layer = b"a volume's layer"
    pending = Pending(tmp_path / "disk", lambda: {"boot": "x"})
    pending.add(MapEntry(layer, [(1, 100)], [(0, 200)]))
    pending.add(MapEntry(layer, [], [(1, 300)]))
    pending.settle(MapEntry(layer, [], [(1, 300)]))
    pending.add(MapEntry(layer, [], [(2, 400)]))
    noted = (tmp_path / "disk").read_bytes()
    assert noted.count(b"boot") == 1
    assert MapEntry(layer, [], [(1, 300)]).encode() in noted
    assert MapEntry(layer, [], [(2, 400)]).encode() in noted
    assert MapEntry(layer, [(1, 100)], [(0, 200)]).encode() not in noted
    pending.settle(MapEntry(layer, [], []))
    assert (tmp_path / "disk").read_bytes() == b""
    pending.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_no_reason_not_to_write(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bench.simulation.index / PENDING
    folder.write_bytes(b"")
    with caplog.at_level(logging.ERROR):
        bench.write(0, b"a")
        bench.write(5 * CHUNK_BYTES, b"b")
    assert caplog.text.count("cannot be written") == 1
    bench.disk.flush()
    assert bench.content() == bench.model
    folder.unlink()
    bench.write(7 * CHUNK_BYTES, b"noted again")
    bench.kill()
    assert bench.content() == bench.model


def test_what_was_noted_before_a_failure_does_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of an older note may be others' by then."""
    bench.write(0, b"first")
    write = os.write

    def tear(fd: int, data: bytes) -> int:
        return write(fd, data[:7])

    with monkeypatch.context() as patch:
        patch.setattr("rustord.pending.os.write", tear)
        bench.trim(0)
    bench.write(CHUNK_BYTES, b"second")
    assert bench.files == []
    bench.kill()
    assert bench.content() == bytes(SIZE)
    run(bench.store)
    check_sound(bench.store)


@contextmanager
def read_only() -> Iterator[None]:
    """As a filesystem is that has had an error."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        for what in ("os.write", "os.ftruncate", "Path.unlink"):
            patch.setattr(f"rustord.pending.{what}", refuse)
        yield


@pytest.mark.parametrize("is_repaired", [False, True])
def test_what_would_make_a_note_wrong_that_nobody_can_take_away_is_not_made_durable(
    bench: Bench, *, is_repaired: bool
) -> None:
    """Once the filesystem can be written again, the next opening would take up the note."""
    bench.write(0, b"x" * CHUNK_BYTES)
    with read_only():
        bench.disk.flush()
        flushed = bytes(bench.model)
        bench.trim(0)
        bench.write(0, b"y" * CHUNK_BYTES)
        for _ in range(2):
            with pytest.raises(Unavailable, match="Read-only file system"):
                bench.disk.flush()
    if is_repaired:
        bench.disk.flush()
        run(bench.store)
        flushed = bytes(bench.model)
    bench.kill()
    assert bench.content() == flushed
    run(bench.store)
    check_sound(bench.store)


def test_a_volume_can_be_deleted_whose_notes_nobody_can_take_away(bench: Bench) -> None:
    free = free_count(bench.store)
    bench.write(0, b"x" * CHUNK_BYTES)
    bench.volumes._volumes["disk"].close()
    with read_only():
        bench.volumes.delete("disk")
    run(bench.store)
    assert free_count(bench.store) == free + SLOT_COUNT
    bench.simulation.cut_power(lambda offset: True)
    bench._open()
    assert (bench.volumes.names(), bench.files) == ([], [])
    check_sound(bench.store)
