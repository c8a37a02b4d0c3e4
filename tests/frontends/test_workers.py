"""Processes that serve exports: what they do by themselves is what a volume or Object would have done, and no less."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rustord
from rustord import volume as volume_module
from rustord.blockdevice import ImageFile, openers
from rustord.change import Change, Delete
from rustord.errors import NoSpace, RustordError
from rustord.frontends import nbd as nbd_module
from rustord.frontends import workers as workers_module
from rustord.frontends.channel import Order
from rustord.frontends.workers import Worker, Workers
from rustord.layermerger import LayerMerger
from rustord.layermover import LayerMover
from rustord.membership import attach_device, detach_device
from rustord.page import CHUNK_BYTES, PAGE_CHUNKS, device_of
from rustord.record import Record
from rustord.volumes import Volumes
from rustord.wire.limits import NbdLimits
from rustord.writer import Writer
from tests.conftest import FaultyLoop
from tests.daemon import Daemon, make_pool
from tests.frontends import nbdserved as nbdserved_module
from tests.frontends.nbdserved import NbdPeer, NbdServed
from tests.frontends.served import until
from tests.simulation import check_sound, run
from tests.wire.peer import MIB, request

WRITE, FLUSH, TRIM, ZERO = 1, 3, 4, 6
BLOCK = 4096
SECONDS_MAX = 20.0


@pytest.fixture
def served(make_image: Callable[[int], Path], disk_path: Path) -> Iterator[NbdServed]:
    server = NbdServed(make_image(64 << 20), disk_path / "nbd.sock", NbdLimits(), None)
    yield server
    server.stop()


def processes(served: NbdServed) -> list[Worker]:
    assert served.server._workers is not None
    return list(served.server._workers._all)


def busy(served: NbdServed) -> list[Worker]:
    return [worker for worker in processes(served) if worker.user_count]


def volume(served: NbdServed, size: int = 8 * MIB) -> NbdPeer:
    """A session with a new volume."""
    served.volumes.create("volume", size)
    return served.connect().go("volume")


def write(peer: NbdPeer, offset: int, data: bytes) -> None:
    assert peer.one(WRITE, offset, len(data), payload=data).error == 0


def content(peer: NbdPeer, length: int) -> bytes:
    return b"".join(peer.read(offset, MIB).data for offset in range(0, length, MIB))


def disk_of(served: NbdServed) -> ImageFile:
    disk = served.store.blocks.device(0)
    assert isinstance(disk, ImageFile)
    return disk


def move(served: NbdServed, name: str) -> None:
    """Move an Object to other blocks, and have its old ones erased as soon as nobody needs them."""
    uuid = served.store.resolve(name)
    assert uuid is not None
    record = served.store.stat(uuid)

    def call(function: Callable[[], None]) -> None:
        served.writer.call(function, SECONDS_MAX)

    change: Change = served.store.relocations.prepare(record, record.extents, call=call)
    served.writer.make([change], SECONDS_MAX)
    served.store.keystore.checkpoint()
    served.writer.call(lambda: None, SECONDS_MAX)


def fill_up(served: NbdServed) -> None:
    """Have something else on every block that is free."""
    with suppress(NoSpace):
        while True:
            served.writer.call(lambda: served.store.put(b"\xff" * (4 * MIB)), SECONDS_MAX)


def test_each_export_has_a_process_and_one_is_kept_for_the_next(served: NbdServed) -> None:
    with volume(served) as first, served.connect().go("volume") as second, served.connect().go() as third:
        for peer in (first, second, third):
            assert not peer.read(0, BLOCK).error
        assert sorted(worker.user_count for worker in busy(served)) == [1, 2]
        assert len({worker.pid for worker in busy(served)}) == 2
    until(lambda: not busy(served), "they have gone")
    (left,) = processes(served)
    with served.connect().go("volume") as peer:
        assert not peer.read(0, BLOCK).error
        assert busy(served) == [left]
    served.stop()
    assert not left.is_alive


def test_what_one_session_has_written_the_others_read(served: NbdServed) -> None:
    with volume(served) as one, served.connect().go("volume") as other:
        for offset in (0, BLOCK, CHUNK_BYTES - 5, 3 * CHUNK_BYTES + 1):
            assert other.read(offset, 10).data == bytes(10)
            write(one, offset, b"0123456789")
            assert other.read(offset, 10).data == b"0123456789"
            write(other, offset, b"abcdefghij")
            assert one.read(offset, 10).data == b"abcdefghij"
        assert one.one(TRIM, 0, CHUNK_BYTES).error == 0
        assert other.read(0, BLOCK).data == bytes(BLOCK)
        write(other, 0, b"again")
        assert one.read(0, 5).data == b"again"


def test_random_ranges_are_those_of_a_file(served: NbdServed, seed: int) -> None:
    chance = random.Random(seed)
    model = bytearray(4 * MIB)
    with volume(served, len(model)) as peer:
        for _ in range(400):
            length = chance.choice([1, 512, BLOCK, CHUNK_BYTES, 3 * CHUNK_BYTES, MIB])
            offset = chance.randrange(0, len(model) - length + 1)
            what = chance.random()
            if what < 0.5:
                assert peer.read(offset, length).data == model[offset : offset + length]
            elif what < 0.9:
                model[offset : offset + length] = data = chance.randbytes(length)
                write(peer, offset, data)
            elif what < 0.95:
                first, end = -(-offset // CHUNK_BYTES) * CHUNK_BYTES, (offset + length) // CHUNK_BYTES * CHUNK_BYTES
                model[first:end] = bytes(max(0, end - first))
                assert peer.one(TRIM, offset, length).error == 0
            else:
                assert peer.one(FLUSH).error == 0
        assert content(peer, len(model)) == model


def test_a_snapshot_stays_as_it_was_and_has_what_was_not_flushed(served: NbdServed) -> None:
    with volume(served) as peer:
        write(peer, 0, b"before" * BLOCK)
        served.volumes.snapshot("volume", "snapshot")
        write(peer, 0, b"behind" * BLOCK)
        write(peer, 5 * MIB, b"more")
        with served.connect().go("snapshot") as other:
            assert other.read(0, 6 * BLOCK).data == b"before" * BLOCK
            assert other.read(5 * MIB, 4).data == bytes(4)
            assert peer.read(0, 6 * BLOCK).data == b"behind" * BLOCK


def test_blocks_that_were_given_back_are_not_read_any_more(served: NbdServed) -> None:
    with volume(served) as peer:
        write(peer, 0, b"mine" * CHUNK_BYTES)
        assert peer.read(0, 4).data == b"mine"
        assert peer.one(TRIM, 0, 4 * CHUNK_BYTES).error == 0
        assert peer.one(FLUSH).error == 0
        fill_up(served)
        assert peer.read(0, 4 * CHUNK_BYTES).data == bytes(4 * CHUNK_BYTES)


def test_a_flush_behind_a_trim_recalls_no_more_than_it_has_to(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served, 3 * PAGE_CHUNKS * CHUNK_BYTES) as peer:
        for group in range(3):
            write(peer, group * PAGE_CHUNKS * CHUNK_BYTES, b"data")
            assert peer.one(FLUSH).error == 0
        orders: list[tuple[object, ...]] = []
        order = Worker.order

        def note(worker: Worker, *arguments: Any, **others: Any) -> list[int]:
            orders.append(arguments)
            return order(worker, *arguments, **others)

        monkeypatch.setattr(Worker, "order", note)
        assert peer.one(TRIM, PAGE_CHUNKS * CHUNK_BYTES, CHUNK_BYTES).error == 0
        assert peer.one(FLUSH).error == 0
        assert [(kind, groups) for kind, _, groups in orders] == [(Order.LEAVE, [1])]
        assert peer.read(PAGE_CHUNKS * CHUNK_BYTES, 4).data == bytes(4)
        assert peer.read(2 * PAGE_CHUNKS * CHUNK_BYTES, 4).data == b"data"


def test_a_moved_object_is_followed(served: NbdServed) -> None:
    with served.connect().go() as peer:
        assert content(peer, 8 * MIB) == served.data
        move(served, "disk")
        until(lambda: open_record(served) == served.store.stat(open_record(served)[0]).id, "it is followed")
        fill_up(served)
        assert content(peer, 8 * MIB) == served.data


def open_record(served: NbdServed) -> Any:
    (connection,) = served.server._connections
    assert connection.agreement is not None
    return connection.agreement.export._reader.record.id  # type: ignore[attr-defined]


def test_the_moved_base_of_a_clone_is_read_where_it_is(served: NbdServed) -> None:
    served.volumes.clone("disk", "clone")
    with served.connect().go("clone") as peer:
        assert content(peer, 8 * MIB) == served.data
        move(served, "disk")
        until(lambda: not served.store.erasures.are_due(), "its old blocks are erased")
        fill_up(served)
        assert content(peer, 8 * MIB) == served.data


def test_a_damaged_chunk_is_not_answered(served: NbdServed) -> None:
    with served.connect().go() as peer:
        assert content(peer, 8 * MIB) == served.data
        ((_, block, _),) = served.store.stat(open_record(served)[0]).copies[0]
        disk = disk_of(served)
        disk.write(block * served.store.label.block_size + 5 * CHUNK_BYTES, (b"\xff",))
        disk.flush()
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert peer.read(5 * CHUNK_BYTES, 512).error == errno.EIO
        assert peer.read(6 * CHUNK_BYTES, 512).data == served.data[6 * CHUNK_BYTES :][:512]


def test_what_a_killed_process_has_written_is_there_and_flushed_by_the_next(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served) as peer:
        write(peer, 0, bytes(CHUNK_BYTES))
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"written in place")
        (worker,) = busy(served)
        os.kill(worker.pid, signal.SIGKILL)
        assert peer.is_ended()
    until(lambda: not busy(served), "it is known")
    flushed = []
    monkeypatch.setattr(disk_of(served), "flush", lambda: flushed.append(True))
    with served.connect().go("volume") as peer:
        assert peer.read(0, 16).data == b"written in place"
        assert peer.one(FLUSH).error == 0
    assert flushed
    assert worker not in processes(served)


def test_the_next_process_flushes_it_even_if_nobody_has_noticed_yet(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed, flushed = threading.Event(), []
    leave = Worker._leave
    with volume(served) as peer:
        write(peer, 0, bytes(CHUNK_BYTES))
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"written in place")
        monkeypatch.setattr(Worker, "_leave", lambda *arguments: (noticed.wait(SECONDS_MAX), leave(*arguments)))
        (worker,) = busy(served)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    monkeypatch.setattr(disk_of(served), "flush", lambda: flushed.append(True))
    with served.connect().go("volume") as peer:
        assert peer.one(FLUSH).error == 0
        assert flushed
        noticed.set()


def test_a_process_that_does_not_obey_is_killed(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_ORDER_S", 0.5)
    with volume(served) as peer:
        write(peer, 0, b"data")
        (worker,) = busy(served)
        os.kill(worker.pid, signal.SIGSTOP)
        served.volumes.snapshot("volume", "snapshot")
        assert peer.is_ended()
        assert not worker.is_alive
    assert "does not obey" in caplog.text
    with served.connect().go("snapshot") as other:
        assert other.read(0, 4).data == b"data"


def test_a_device_that_has_failed_is_not_written_any_more(served: NbdServed) -> None:
    with volume(served) as peer, served.connect().go("volume") as other:
        write(peer, 0, b"data")
        write(other, 0, b"more")
        disk_of(served).report(OSError(errno.EIO, "Input/output error"))
        for one in (peer, other):
            assert one.one(WRITE, 0, 4, payload=b"late").error == errno.EIO
            assert one.one(FLUSH).error == errno.EIO
            assert one.read(0, 4).data == b"more"


def test_a_flush_that_failed_in_the_process_counts_for_all(served: NbdServed) -> None:
    with volume(served) as peer:
        write(peer, 0, b"data")
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"more")
        (worker,) = busy(served)
        worker._lose(0)  # it has /dev/null in place of the disk now, which cannot be flushed
        assert peer.one(FLUSH).error == errno.EIO
        assert disk_of(served).failed
        assert peer.one(WRITE, 0, 4, payload=b"late").error == errno.EIO


@pytest.mark.parametrize("why", ["it cannot be started", "it ends at once"])
def test_without_another_process_it_goes_as_well(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    if why == "it cannot be started":
        monkeypatch.setattr(subprocess, "Popen", refuse)
    else:
        monkeypatch.setattr(sys, "executable", "/bin/false")
    with volume(served) as peer:
        write(peer, 0, b"data")
        assert peer.read(0, 4).data == b"data"
    assert "there can be no process" in caplog.text


def test_a_flush_reaches_the_disk(loop_device: Path, disk_path: Path) -> None:
    served = NbdServed(loop_device, disk_path / "nbd.sock", NbdLimits(), None)
    try:
        with volume(served) as peer:
            for data in (b"first", b"in place"):
                write(peer, 0, data)
                assert peer.one(FLUSH).error == 0
                before = counters(loop_device)
            write(peer, 0, b"in place once more")
            assert peer.one(FLUSH).error == 0
            assert all(now > then for now, then in zip(counters(loop_device), before, strict=True))
    finally:
        served.stop()


@pytest.mark.parametrize("operations", [("write",), ("flush",), ("write", "flush")])
@pytest.mark.parametrize("who", ["a client", "the daemon"])
def test_a_flush_that_has_failed_once_is_not_said_to_have_worked(
    faulty_loop: FaultyLoop, disk_path: Path, operations: tuple[str, ...], who: str
) -> None:
    """Whoever has flushed: what was written before may be lost, and a disk that says so says it only once."""
    served = NbdServed(faulty_loop.path, disk_path / "nbd.sock", NbdLimits(), None, data_blocks=8)
    try:
        with volume(served) as peer, served.connect().go("volume") as other:
            for data in (b"first", b"in place"):
                write(peer, 0, data)
                assert peer.one(FLUSH).error == 0
            write(peer, 0, b"may be lost")
            with faulty_loop.failing(*operations):
                if who == "a client":
                    assert peer.one(FLUSH).error == errno.EIO
                else:
                    with pytest.raises(RustordError):
                        served.writer.call(lambda: served.store.put(b"data"), SECONDS_MAX)
            for one in (peer, other, peer):
                assert one.one(FLUSH).error == errno.EIO
                assert one.one(WRITE, 0, 4, payload=b"late").error == errno.EIO
        with served.connect().go("volume") as peer:
            assert peer.one(WRITE, 0, 4, payload=b"late").error == errno.EIO
    finally:
        served.stop()


def test_its_flushes_are_counted(served: NbdServed) -> None:
    slot = served.store.blocks.slots[0]
    with volume(served) as peer:
        write(peer, 0, b"first")
        assert peer.one(FLUSH).error == 0
        before = sum(slot.flush_s.counts)

        def is_counted() -> bool:
            write(peer, 0, b"in place")
            assert peer.one(FLUSH).error == 0
            return sum(slot.flush_s.counts) > before + 1

        until(is_counted, "it tells how long they took")


def counters(device: Path) -> tuple[int, int]:
    """How many writes and flushes the kernel has made of a disk; see the kernel's Documentation/block/stat.rst."""
    fields = Path("/sys/class/block", device.name, "stat").read_text().split()
    return int(fields[4]), int(fields[15])


def test_many_sessions_flush_side_by_side(served: NbdServed) -> None:
    """Each finds its own bytes again, whatever the others do to the map at the same time."""
    served.volumes.create("volume", 16 * MIB)

    def work(number: int) -> None:
        with served.connect().go("volume") as peer:
            for turn in range(20):
                offset = number * MIB + turn % 16 * CHUNK_BYTES
                write(peer, offset, bytes((number + turn,)) * BLOCK)
                assert peer.one(FLUSH).error == 0
                assert peer.read(offset, BLOCK).data == bytes((number + turn,)) * BLOCK

    with ThreadPoolExecutor(8) as threads:
        assert len([*threads.map(work, range(8))]) == 8


def test_nothing_is_left_of_it(served: NbdServed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    before = len(os.listdir("/proc/self/fd"))
    served.volumes.create("volume", MIB)
    for _ in range(20):
        with served.connect().go("volume") as peer:
            write(peer, 0, b"data")
    until(lambda: not busy(served), "they have gone")
    (left,) = processes(served)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # what its orders go through
    assert len(os.listdir(f"/proc/{left.pid}/fd")) < 10
    assert not caplog.records


def tenancy_of(served: NbdServed) -> Any:
    """What the only process has been granted, by its only export."""
    (worker,) = busy(served)
    (tenancy,) = worker._tenancies.values()
    return tenancy


def recall_and_tell_later(grantor: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """A thread that recalls, and has the answer, of which it has told nobody yet."""
    tell, is_told = grantor.dirtied, threading.Event()

    def tell_later(devices: Any) -> None:
        monkeypatch.setattr(grantor, "dirtied", tell)
        is_told.set()
        threading.Event().wait(0.5)  # for who does not wait for this
        tell(devices)

    monkeypatch.setattr(grantor, "dirtied", tell_later)
    recalling = threading.Thread(target=grantor.gates[0].recall)
    recalling.start()
    assert is_told.wait(SECONDS_MAX)
    return recalling


def test_a_flush_is_for_what_somebody_is_about_to_be_told(served: NbdServed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread recalls at the same time, and has the answer, of which it has told nobody yet."""
    with volume(served) as peer:
        write(peer, 0, bytes(CHUNK_BYTES))
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"written in place")
        grantor = tenancy_of(served).grantor
        recalling, flushed = recall_and_tell_later(grantor, monkeypatch), []
        flush = disk_of(served).flush
        monkeypatch.setattr(disk_of(served), "flush", lambda: (flushed.append(True), flush()))
        assert peer.one(FLUSH).error == 0
        assert flushed
        recalling.join()


def test_who_recalls_second_knows_what_the_first_one_was_told(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served) as peer:
        write(peer, 0, bytes(CHUNK_BYTES))
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"written in place")
        grantor = tenancy_of(served).grantor
        recalling, dirty = recall_and_tell_later(grantor, monkeypatch), []
        with grantor.gates[0].shut():
            dirty += grantor._dirty
        assert dirty
        recalling.join()


def test_who_is_told_what_a_dead_process_could_write_to_minds_no_grant(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served) as peer:
        write(peer, 0, b"data")
        tenancy = tenancy_of(served)
        look = tenancy.worker.devices

        def grant_meanwhile(handles: Any) -> Any:
            for handle in handles:
                tenancy._writable |= {handle + 1}
                yield from look((0,))

        monkeypatch.setattr(tenancy.worker, "devices", grant_meanwhile)
        os.kill(tenancy.worker.pid, signal.SIGKILL)
        tenancy.worker.wait()
        assert peer.is_ended()
        tenancy._recall(last=False)
        monkeypatch.undo()


def test_an_order_that_was_not_obeyed_is_never_taken_for_another(served: NbdServed) -> None:
    worker = Worker()
    try:
        assert worker.order(Order.RECALL, 1, False) == []
        os.kill(worker.pid, signal.SIGSTOP)
        worker._orders.settimeout(0.2)
        assert worker.handle(0, disk_of(served)) == -1
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
        worker._orders.settimeout(SECONDS_MAX)
        with pytest.raises(ConnectionError):
            worker.order(Order.RECALL, 1, False)
    finally:
        worker.close()


def test_a_process_that_ended_while_it_had_nothing_to_do_is_forgotten(served: NbdServed) -> None:
    with volume(served) as peer:
        write(peer, 0, b"data")
    until(lambda: not busy(served), "they have gone")
    (idle,) = processes(served)
    os.kill(idle.pid, signal.SIGKILL)
    idle.wait()
    with served.connect().go("volume") as peer:
        assert peer.read(0, 4).data == b"data"
        assert processes(served) == busy(served)
        assert idle._orders.fileno() == -1
        assert not [key for key in disk_of(served).lost if key[0] is idle]  # type: ignore[index]


def test_a_chunk_is_never_writable_where_the_base_has_it(served: NbdServed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session writes to it for the first time while the places are being looked up."""
    served.volumes.clone("disk", "clone")
    clone = served.volumes.open("clone")
    look = served.store.layers.places

    def look_early(*arguments: Any) -> Any:
        monkeypatch.undo()
        places = look(*arguments)
        clone.write(0, memoryview(b"first"))
        return places

    monkeypatch.setattr(served.store.layers, "places", look_early)
    (place,) = clone.grant(0, 1)
    (now,) = clone.grant(0, 1)
    assert place is not None
    assert not place.writable or place == now
    assert now is not None
    assert now.writable
    clone.close()


def test_a_device_that_came_back_does_not_hide_what_was_written_before(served: NbdServed) -> None:
    with volume(served) as peer:
        write(peer, 0, b"data")
        opened = served.volumes.open("volume")
        assert opened._dirty == {0: disk_of(served)}
        gone = SimpleNamespace(failed="the device has gone")
        opened.dirtied([(0, gone)])  # type: ignore[list-item]
        assert peer.one(FLUSH).error == errno.EIO
        opened._dirty.clear()
        opened.close()


def test_once_nobody_else_changes_it_places_are_granted_again(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served) as peer:
        write(peer, 0, b"data")
        grantor = tenancy_of(served).grantor
        with grantor.gates[0].kept():
            assert peer.read(0, 4).data == b"data"
        assert peer.read(0, 4).data == b"data"
        monkeypatch.setattr(grantor, "read", None)
        assert peer.read(0, 4).data == b"data"


def test_what_is_done_for_a_dead_process_the_next_one_learns(
    served: NbdServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with volume(served) as peer, served.connect().go("volume") as other:
        write(peer, 0, bytes(CHUNK_BYTES))
        opened = tenancy_of(served).grantor
        trim, is_begun, is_due = opened.trim, threading.Event(), threading.Event()

        def trim_later(offset: int, length: int) -> None:
            is_begun.set()
            assert is_due.wait(SECONDS_MAX)
            trim(offset, length)

        monkeypatch.setattr(opened, "trim", trim_later)
        peer.send(request(TRIM, 0, CHUNK_BYTES))
        assert is_begun.wait(SECONDS_MAX)
        (worker,) = busy(served)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert other.is_ended()
        with served.connect().go("volume") as next_one:
            write(next_one, 0, b"held in place")
            is_due.set()
            assert peer.is_ended()
            write(next_one, 0, b"written behind")
            assert next_one.one(FLUSH).error == 0
            opened.gates[0].recall()
            assert next_one.read(0, 14).data == b"written behind"


@pytest.fixture
def two(make_image: Callable[[int], Path], disk_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NbdServed]:
    """A server whose pool has two devices; its volume has chunk 0 on the second one, which can go without the map."""
    images = [make_image(64 << 20) for _ in range(2)]
    open_pool = rustord.open
    monkeypatch.setattr(nbdserved_module, "make_pool", lambda image: make_pool(*images))
    monkeypatch.setattr(rustord, "open", lambda image, **how: open_pool(images, **how))
    server = NbdServed(images[0], disk_path / "nbd.sock", NbdLimits(), None)
    server.volumes.create("volume", MIB)
    home = server.store.layers.volumes["volume"].home
    with server.connect().go("volume") as peer:
        write(peer, 0, b"moved" + bytes(CHUNK_BYTES - 5))
        assert peer.one(FLUSH).error == 0
    LayerMover(server.store, server.volumes).run({home: 1e6}, lambda length: None, slots=False)
    until(lambda: not busy(server), "it has gone")
    yield server
    server.stop()


def away_and_back(served: NbdServed) -> None:
    layer = served.store.layers.volumes["volume"]
    index = device_of(layer.get(0))
    assert index != layer.home
    path = served.store.blocks.device(index).path
    served.writer.call(lambda: detach_device(served.store, index))
    served.writer.call(lambda: attach_device(served.store, path))


def test_a_device_that_was_away_and_is_back_is_written_to(two: NbdServed) -> None:
    with two.connect().go("volume") as peer, two.connect().go("volume") as other:
        write(peer, 100, b"before")
        assert peer.one(FLUSH).error == 0
        for turn in range(3):
            away_and_back(two)
            assert other.read(0, 5).data == b"moved"
            assert other.read(100, 6).data == b"before"
            for offset in (200, 300):
                write(peer, offset, bytes((turn,)) * 6)
                assert other.read(offset, 6).data == bytes((turn,)) * 6
            assert peer.one(FLUSH).error == 0


def test_what_was_not_flushed_when_a_device_went_is_not_forgotten(two: NbdServed) -> None:
    with two.connect().go("volume") as peer, two.connect().go("volume") as other:
        write(peer, 0, b"data")
        assert peer.one(FLUSH).error == 0
        write(peer, 0, b"lost")
        away_and_back(two)
        write(other, 0, b"more")
        for one in (peer, other):
            assert one.one(FLUSH).error == errno.EIO


def test_no_process_outlives_a_daemon_that_is_killed(
    make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path]
) -> None:
    make_pool(image := make_image(64 << 20))
    daemon = make_daemon(image).start()
    body = json.dumps({"name": "volume", "size": MIB})
    assert daemon.request("POST", "/v1/volumes", body).status == 201
    path = daemon.socket.with_name("nbd.sock")
    with NbdPeer(path).go("volume") as peer:
        write(peer, 0, bytes(MIB))
        assert peer.one(FLUSH).error == 0
        written, is_over = [b""], threading.Event()

        def go_on() -> None:
            with suppress(AssertionError, OSError):
                for turn in range(1 << 30):
                    data = turn.to_bytes(8, "big") * 512
                    write(peer, 0, data)
                    written[0] = data
            is_over.set()

        threading.Thread(target=go_on).start()
        until(lambda: written[0] > bytes(7) + b"\x20", "it writes")
        held = [one.pid for one in openers(str(image)) if one.name == "rustord-nbd"]
        assert len(held) == 1
        daemon.end()
        assert is_over.wait(SECONDS_MAX)
    until(lambda: not openers(str(image)), "the device is given back")
    daemon.start()
    with NbdPeer(path).go("volume") as peer:
        assert peer.read(0, BLOCK).data >= written[0]


def test_behind_the_end_there_are_no_more_processes(served: NbdServed) -> None:
    workers = Workers()
    workers.leave("volume", workers.enter("volume"))
    workers.close()
    with pytest.raises(OSError, match="shutdown"):
        workers.enter("volume")
    assert not workers._all


class Owner(threading.Thread):
    """Does to a range that it has for itself whatever may be done, in two sessions that come again when they are cut.

    It holds ``quiet`` while ``model`` is not what the volume has there.
    """

    def __init__(self, served: NbdServed, chance: random.Random, model: bytearray, begin: int, end: int) -> None:
        super().__init__(name=f"owner {begin}")
        self.quiet = threading.Lock()
        self.problem: BaseException | None = None
        self.count = 0
        self.is_over = False
        self._served = served
        self._chance = chance
        self._model = model
        self._range = begin, end
        self._peers: list[NbdPeer | None] = [None, None]

    def run(self) -> None:
        try:
            while not self.is_over:
                with self.quiet:
                    self._do_something()
                self.count += 1
            self._try(0, lambda peer: peer.one(FLUSH).error)
        except BaseException as error:
            self.problem = error
        for peer in self._peers:
            if peer is not None:
                peer.sock.close()

    def _do_something(self) -> None:
        chance, model, (begin, end) = self._chance, self._model, self._range
        length = chance.choice([1, 512, BLOCK, BLOCK, CHUNK_BYTES, 3 * CHUNK_BYTES, MIB])
        offset = chance.randrange(begin, end - length + 1)
        if chance.random() < 0.5:
            offset -= offset % BLOCK if offset % BLOCK <= offset - begin else 0
        which, what = chance.randrange(2), chance.random()
        if what < 0.4:
            got = self._try(which, lambda peer: peer.read(offset, length).data or b"an error")
            expected = model[offset : offset + length]
            if got != expected:
                wrong = next(i for i in range(length) if got[i : i + 1] != expected[i : i + 1])
                raise AssertionError(f"{offset}+{length}: wrong from {offset + wrong} on, in session {which}")
        elif what < 0.75:
            data = chance.randbytes(length)
            self._check(which, lambda peer: peer.one(WRITE, offset, length, payload=data).error)
            model[offset : offset + length] = data
        elif what < 0.85:
            first, last = -(-offset // CHUNK_BYTES) * CHUNK_BYTES, (offset + length) // CHUNK_BYTES * CHUNK_BYTES
            self._check(which, lambda peer: peer.one(TRIM, offset, length).error)
            model[first:last] = bytes(max(0, last - first))
        elif what < 0.92:
            self._check(which, lambda peer: peer.one(ZERO, offset, length).error)
            model[offset : offset + length] = bytes(length)
        else:
            self._check(which, lambda peer: peer.one(FLUSH).error)

    def _check(self, which: int, ask: Callable[[NbdPeer], int]) -> None:
        assert self._try(which, ask) == 0

    def _try(self, which: int, ask: Callable[[NbdPeer], Any]) -> Any:
        """Ask until there is an answer: to do the same twice does no harm."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            try:
                peer = self._peers[which]
                if peer is None:
                    self._peers[which] = peer = self._served.connect()
                    peer.go("volume")
                return ask(peer)
            except (AssertionError, OSError):
                assert time.monotonic() < deadline, "there is no answer"
                if (peer := self._peers[which]) is not None:
                    peer.sock.close()
                self._peers[which] = None


class Here(dict[int, float]):
    """A `rustord.layermover.Quota` that has what is moved off a device put on the same one."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.mark.parametrize("base", ["read", "deleted"])
def test_whatever_happens_at_the_same_time(
    make_image: Callable[[int], Path],
    disk_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seed: int,
    base: str,
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(nbd_module, "_FOLLOW_S", 0.05)
    monkeypatch.setattr(volume_module, "_PENDING_MAX", 100)
    image = make_image(512 << 20)
    served = NbdServed(image, disk_path / "nbd.sock", NbdLimits(), None)
    try:
        expected = _do_it_all(served, chance, monkeypatch, base)
    finally:
        served.stop()
    monkeypatch.undo()
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR and "frontends" in record.name]
    assert not faults
    with rustord.open(image, directory=disk_path / "nbd.index") as store:
        writer = Writer(store)
        volumes = Volumes(store, writer)
        found = memoryview(bytearray(8 * MIB))
        opened = volumes.open("volume")
        opened.read(0, found)
        opened.close()
        assert found == expected.pop("volume")
        for name, data in expected.items():
            uuid = store.resolve(name)
            assert uuid is not None
            assert store.get(uuid) == data, name
        volumes.close()
        assert writer.close()
        store.keystore.checkpoint()
        run(store)
        check_sound(store)


def _do_it_all(
    served: NbdServed, chance: random.Random, monkeypatch: pytest.MonkeyPatch, base: str
) -> dict[str, bytes | bytearray]:
    model = bytearray(served.data)
    for name in ("volume", "clone"):
        served.volumes.clone("disk", name)
    merger, mover = LayerMerger(served.store, served.volumes), LayerMover(served.store, served.volumes)
    workers = served.server._workers
    assert workers is not None
    enter = workers.enter

    def enter_or_not(key: str) -> Worker:
        if key == "volume" and chance.random() < 0.1:
            raise OSError(errno.EAGAIN, "no process")
        return enter(key)

    monkeypatch.setattr(workers, "enter", enter_or_not)
    bounds = [0, 2 * MIB + 1000, 4 * MIB - 777, 6 * MIB + CHUNK_BYTES, 8 * MIB]
    owners = [Owner(served, random.Random(chance.random()), model, *bounds[i : i + 2]) for i in range(4)]
    readers = [Reader(served, name, served.data) for name in ("clone", "disk")[: 1 + (base == "read")]]
    for thread in (*owners, *readers):
        thread.start()
    snapshots: dict[str, bytes] = {}

    def snapshot() -> None:
        name = f"snapshot{len(served.store.names())}-{chance.random()}"
        with ExitStack() as quiet:
            for owner in owners:
                quiet.enter_context(owner.quiet)
            snapshots[name] = bytes(model)
            served.volumes.snapshot("volume", name)

    def snapshot_meanwhile() -> None:
        """Of what, nobody knows, but it must stay that."""
        name = f"unknown-{chance.random()}"
        uuid = served.volumes.snapshot("volume", name).uuid
        snapshots[name] = served.store.get(uuid)

    def forget() -> None:
        if snapshots:
            name = chance.choice(list(snapshots))
            uuid = served.store.resolve(name)
            assert uuid is not None
            data = snapshots.pop(name)
            if chance.random() < 0.5:
                with served.connect().go(name) as peer:
                    assert content(peer, len(data)) == data, name
                until(lambda: uuid not in served.store.pins._exports, "it is closed")
            assert served.store.get(uuid) == data, name
            ((_, outcome),) = served.writer.make([Delete(uuid)], SECONDS_MAX)
            assert isinstance(outcome, Record)
        merger.run()

    def move_chunks() -> None:
        mover.run(Here({0: chance.choice([100, 1000, 100_000])}), lambda length: None)
        assert mover.problem is None

    def move_base() -> None:
        if (uuid := served.store.resolve("disk")) is None:
            return
        if base == "deleted" and chance.random() < 0.3:
            ((_, outcome),) = served.writer.make([Delete(uuid)], SECONDS_MAX)
            assert isinstance(outcome, Record)
        else:
            move(served, "disk")

    def kill() -> None:
        for worker in busy(served):
            if chance.random() < 0.7:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    def evict() -> None:
        os.posix_fadvise(disk_of(served).fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    log: list[str] = []
    try:
        for _ in range(40):
            act = chance.choice([snapshot, snapshot_meanwhile, forget, forget, move_chunks, move_base, kill, evict])
            log.append(act.__name__)
            act()
            counts = [owner.count for owner in owners]
            until(
                lambda counts=counts: (
                    any(owner.problem for owner in owners)  # type: ignore[misc]
                    or sum(owner.count for owner in owners) >= sum(counts) + 30
                ),
                "they get on",
            )
            if problem := next((thread.problem for thread in (*owners, *readers) if thread.problem), None):
                raise problem
    except BaseException as error:
        error.add_note(f"after {log}")
        raise
    finally:
        for thread in (*owners, *readers):
            thread.is_over = True
        for thread in (*owners, *readers):
            thread.join(SECONDS_MAX * 2)
            assert not thread.is_alive()
    for thread in (*owners, *readers):
        if thread.problem:
            raise thread.problem
    monkeypatch.setattr(workers, "enter", enter)
    with served.connect().go("volume") as peer:
        assert content(peer, len(model)) == model
        assert peer.one(FLUSH).error == 0
        assert not served.volumes._volumes["volume"]._dirty
    return {"volume": model, **snapshots}


class Reader(threading.Thread):
    """Compares what nobody writes to, again and again."""

    def __init__(self, served: NbdServed, name: str, data: bytes) -> None:
        super().__init__(name="reader")
        self.problem: BaseException | None = None
        self.is_over = False
        self._served, self._name, self._data = served, name, data

    def run(self) -> None:
        try:
            while not self.is_over:
                with suppress(OSError), self._served.connect() as peer:
                    self._compare(peer)
        except BaseException as error:
            self.problem = error

    def _compare(self, peer: NbdPeer) -> None:
        try:
            peer.go(self._name)
            got = content(peer, len(self._data))
        except AssertionError:  # it was cut
            return
        assert got == self._data
