"""Scrubs: everything that lives is read, in the order of the devices; what is damaged is found, mended and told."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Delete, Put
from rustord.errors import Damaged, DeviceError
from rustord.extent import Extent
from rustord.membership import detach_device
from rustord.objectstore import ObjectStore
from rustord.objkey import uuid_text
from rustord.page import device_of
from rustord.placer import Mirrored
from rustord.record import Metadata, Record
from rustord.repair import Repairer
from rustord.scrub import Report, Scrub
from rustord.volumes import Volumes
from rustord.writer import Writer
from tests.daemon import Daemon, make_pool, until
from tests.simulation import MIB, Simulation, check_sound, live, run, stored

CHUNK = 65536
DATA = random.Random(9).randbytes(4 * CHUNK)
SIZES = (0, 10, 4000, 4096, 30_000, CHUNK, CHUNK + 1, 3 * CHUNK + 5000)


class Bench:
    """A pool that is open, with everything at work that a daemon has at work for a scrub."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.notes = simulation.index.parent / "scrub.json"
        self.open()

    def open(self) -> None:
        self.store: ObjectStore = self.simulation.open()
        self.writer = Writer(self.store)
        self.scrub = Scrub(self.store, Repairer(self.store, self.writer), self.notes)

    def end(self) -> None:
        self.scrub.close()
        assert self.writer.close()
        run(self.store)

    def restart(self) -> None:
        self.end()
        self.simulation.close()
        self.open()

    def fill(self) -> list[Record]:
        puts = [Put(DATA[:size], Metadata(f"o{size}")) for size in SIZES]
        return [stored(outcome) for outcome in run(self.store, *puts)]

    def run(self) -> Report:
        self.scrub.start()
        assert self.scrub.task.wait(60)
        return self.scrub.report

    def flip(self, device: int, offset: int, mask: int = 4) -> None:
        with self.simulation.paths[device].open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ mask]))


@pytest.fixture
def single(simulation: Simulation) -> Iterator[Bench]:
    bench = Bench(simulation)
    yield bench
    bench.end()


@pytest.fixture
def mirrored(simulate: Callable[..., Simulation]) -> Iterator[Bench]:
    bench = Bench(simulate(16 * MIB, 16 * MIB, placer=Mirrored(2)))
    yield bench
    bench.end()


def test_a_pool_that_is_whole(mirrored: Bench) -> None:
    mirrored.fill()
    assert mirrored.scrub.status()["state"] == "never"
    report = mirrored.run()
    assert (report.state, report.copies, report.damaged, report.transient) == ("done", 2 * len(SIZES), 0, 0)
    status = mirrored.scrub.status()
    assert status["done_bytes"] >= status["total_bytes"] - 2 * len(SIZES) * 4096
    assert not status["running"]


def test_an_empty_pool(single: Bench) -> None:
    assert (single.run().state, single.scrub.report.copies) == ("done", 0)


def test_it_reads_in_the_order_of_the_device(single: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    records = single.fill()
    run(single.store)
    single.writer.call(lambda: single.store.delete(records[0].uuid))
    single.writer.call(lambda: single.store.put(b"its blocks are taken by one with a later uuid"))
    read: list[int] = []
    examine = single.scrub.repairer.examine

    def note(record: Record, copies: list[int], pace: Callable[[int], None]) -> object:
        read.append(record.copies[copies[0]][0].block)
        return examine(record, copies, pace=pace)

    monkeypatch.setattr(single.scrub.repairer, "examine", note)
    single.run()
    assert read == sorted(record.copies[0][0].block for record in live(single.store))
    assert read != [record.copies[0][0].block for record in live(single.store)]


def test_more_copies_than_are_put_in_order_at_once(single: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.scrub._WINDOW_COUNT_MAX", 3)
    monkeypatch.setattr("rustord.scrub._PAGE_COUNT", 2)
    single.fill()
    assert single.run().copies == len(SIZES)


def test_one_scrub_finds_every_flip_and_a_mirrored_pool_heals(mirrored: Bench, seed: int) -> None:
    for turn in range(8):
        if turn == 0:
            mirrored.fill()
        records = {record.uuid: mirrored.store.get(record.uuid) for record in live(mirrored.store)}
        chance = random.Random(seed + turn)
        flipped = 0
        for record in live(mirrored.store):
            (device, block, count), *_ = chance.choice(record.copies)
            mirrored.flip(device, chance.randrange(block * 4096, (block + count) * 4096), 1 << chance.randrange(8))
            flipped += 1
        mirrored.scrub.start(again=True)
        assert mirrored.scrub.task.wait(60)
        report = mirrored.scrub.report
        assert (report.state, report.lost) == ("done", 0)
        assert len({entry["uuid"] for entry in report.damaged_objects}) == flipped
        assert report.damaged == report.mended >= flipped
        assert {record.uuid: mirrored.store.get(record.uuid) for record in live(mirrored.store)} == records
        mirrored.restart()
        check_sound(mirrored.store)
        assert mirrored.run().damaged == 0


def test_what_is_lost_is_listed_with_its_ranges(single: Bench) -> None:
    records = single.fill()
    record = records[-1]
    single.flip(0, record.extents[0].block * 4096 + CHUNK + 5)
    report = single.run()
    assert (report.damaged, report.mended, report.lost) == (1, 0, 1)
    (entry,) = report.damaged_objects
    assert (entry["uuid"], entry["name"], entry["state"]) == (uuid_text(record.uuid), record.name, "lost")
    assert entry["ranges"] == [{"copy": 0, "what": "data", "start": CHUNK, "end": 2 * CHUNK}]
    assert report.bad_extents == [{"device": 0, "block": record.extents[0].block + 16, "count": 16}]
    json.dumps(single.scrub.status())


def test_it_goes_on_after_a_stop_and_a_restart(single: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    single.fill()
    blocks = sorted(record.copies[0][0].block for record in live(single.store))
    read: list[int] = []
    reached, may_go_on = threading.Event(), threading.Event()
    examine = Repairer.examine

    def note(self: Repairer, record: Record, copies: list[int], pace: Callable[[int], None]) -> object:
        if len(read) in (3, 6) and not may_go_on.is_set():
            reached.set()
            assert may_go_on.wait(20)
        health = examine(self, record, copies, pace=pace)
        read.append(record.copies[copies[0]][0].block)
        return health

    monkeypatch.setattr(Repairer, "examine", note)
    single.scrub.start()
    assert reached.wait(20)
    stopping = threading.Thread(target=single.scrub.stop)  # somebody asks for it
    stopping.start()
    while not single.scrub.task._stopping.is_set():
        pass
    may_go_on.set()
    stopping.join()
    assert single.scrub.report.state == "stopped"
    assert read == blocks[:3]
    single.restart()
    single.scrub.resume()  # what was stopped stays so
    assert not single.scrub.task.is_running
    reached.clear()
    may_go_on.clear()
    single.scrub.start()
    assert reached.wait(20)
    ending = threading.Thread(target=single.scrub.close)  # the daemon ends
    ending.start()
    while not single.scrub.task._stopping.is_set():
        pass
    may_go_on.set()
    ending.join()
    single.restart()
    single.scrub.resume()
    assert single.scrub.task.wait(60)
    assert single.scrub.report.state == "done"
    assert read == blocks
    assert single.scrub.report.copies == len(blocks)


def test_it_goes_on_after_a_crash(single: Bench) -> None:
    single.fill()
    single.scrub.report = Report("running", block=10, copies=2)
    single.scrub._note()
    single.scrub.report = Report()
    single.restart()
    single.scrub.resume()
    assert single.scrub.task.wait(60)
    assert (single.scrub.report.state, single.scrub.report.copies) == ("done", 2 + len(SIZES))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"state": 1}', "\0", json.dumps({**Report().__dict__, "block": "x"})]
)
def test_notes_that_say_nothing_are_begun_anew(single: Bench, text: str) -> None:
    single.notes.write_text(text)
    single.fill()
    single.restart()
    assert single.scrub.report == Report()
    assert single.run().copies == len(SIZES)


def test_notes_that_cannot_be_written_end_nothing(single: Bench, caplog: pytest.LogCaptureFixture) -> None:
    single.notes.with_name("scrub.json.new").mkdir()
    single.fill()
    assert single.run().state == "done"
    assert "cannot be noted" in caplog.text


def test_it_runs_beside_changes_and_takes_nothing_for_damage(mirrored: Bench, seed: int) -> None:
    chance = random.Random(seed)
    done = threading.Event()
    uuids: list[bytes] = []
    count = 0

    def change() -> None:
        nonlocal count
        while not done.is_set():
            count += 1
            size = chance.choice(SIZES)
            uuids.append(mirrored.writer.call(lambda size=size: mirrored.store.put(DATA[:size])).uuid)  # type: ignore[misc]
            if len(uuids) > 20:
                uuid = uuids.pop(chance.randrange(len(uuids)))
                mirrored.writer.call(lambda uuid=uuid: mirrored.store.delete(uuid))  # type: ignore[misc]

    mirrored.fill()
    changing = threading.Thread(target=change)
    changing.start()
    try:
        while count < 400:
            mirrored.scrub.start(again=True)
            assert mirrored.scrub.task.wait(60)
            report = mirrored.scrub.report
            assert (report.state, report.damaged, report.transient) == ("done", 0, 0), report
    finally:
        done.set()
        changing.join()
    assert mirrored.store.blocks.slots[0].bad.runs == ()


def test_what_is_seen_of_an_object_that_is_deleted_meanwhile_counts_for_nothing(
    single: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = (stored(outcome) for outcome in run(single.store, Put(DATA, Metadata("o"))))
    reread = single.store.blocks.reread_copy
    asked = 0

    def late(copy: Sequence[Extent], at: int, length: int) -> bytes:
        nonlocal asked
        asked += 1
        if asked <= 2:
            return bytes(length)  # its blocks are being erased
        if asked == 3:  # another Object with the same data has them
            single.writer.call(lambda: single.store.delete(record.uuid))
        return DATA[at : at + length] or reread(copy, at, length)

    monkeypatch.setattr(single.store.blocks, "reread_copy", late)
    report = single.run()
    assert asked > 3
    assert (report.damaged, report.transient, single.scrub.repairer.transient) == (0, 0, 0)


def test_missing_devices_are_counted_and_the_rest_is_read(mirrored: Bench) -> None:
    mirrored.fill()
    mirrored.end()
    mirrored.simulation.close()
    mirrored.store = mirrored.simulation.open(without={1})
    mirrored.writer = Writer(mirrored.store)
    mirrored.scrub = Scrub(mirrored.store, Repairer(mirrored.store, mirrored.writer), mirrored.notes)
    report = mirrored.run()
    assert (report.state, report.copies, report.unread, report.damaged) == ("done", 2 * len(SIZES), len(SIZES), 0)


def freeze(bench: Bench, size: int) -> tuple[Volumes, Record]:
    """An Object that was a volume, with data in its second and third chunk."""
    volumes = Volumes(bench.store, bench.writer)
    volumes.create("disk", size)
    with closing(volumes.open("disk")) as volume:
        volume.write(CHUNK, DATA[: 2 * CHUNK])
        volume.flush()
    return volumes, volumes.freeze("disk", "frozen")


def test_an_object_that_was_a_volume(single: Bench) -> None:
    volumes, record = freeze(single, 4 * CHUNK)
    content = bytes(CHUNK) + DATA[: 2 * CHUNK] + bytes(CHUNK)
    assert (single.run().copies, single.scrub.report.damaged) == (1, 0)
    (footer,) = record.extents
    single.flip(0, footer.end * 4096 - 1)
    single.scrub.start(again=True)
    assert single.scrub.task.wait(60)
    assert single.scrub.report.mended == 1
    assert single.store.get(record.uuid) == content
    at = single.simulation.paths[0].read_bytes().index(DATA[CHUNK : 2 * CHUNK])
    single.flip(0, at + 5)
    single.scrub.start(again=True)
    assert single.scrub.task.wait(60)
    assert single.scrub.report.lost == 1
    assert single.scrub.report.bad_extents == [{"device": 0, "block": at // 4096, "count": 16}]
    with pytest.raises(Damaged, match=f"bytes {2 * CHUNK} to {3 * CHUNK - 1}, "):
        single.store.get(record.uuid)
    single.writer.call(lambda: single.store.delete(record.uuid))
    volumes.close()
    single.restart()
    check_sound(single.store)
    assert not single.store.allocator._free[0].contains(at // 4096, 1)


def test_of_an_object_that_was_a_volume_the_medium_counts(single: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes, record = freeze(single, 4 * CHUNK)
    cached = single.simulation.paths[0].read_bytes()
    single.flip(0, cached.index(DATA[CHUNK : 2 * CHUNK]) + 5)

    def read(offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = cached[offset : offset + len(buffer)]
            offset += len(buffer)

    monkeypatch.setattr(single.store.blocks.slots[0].device, "read", read)
    assert single.store.get(record.uuid) == bytes(CHUNK) + DATA[: 2 * CHUNK] + bytes(CHUNK)
    assert single.run().damaged == 1
    volumes.close()


def test_an_object_below_a_snapshot_that_is_damaged_ends_no_scrub(single: Bench) -> None:
    volumes = Volumes(single.store, single.writer)
    image = single.store.stat(single.writer.call(lambda: single.store.put(DATA, name="image")).uuid)
    volumes.clone("image", "disk")
    snapshot = volumes.snapshot("disk", "snapshot")
    volumes.close()
    single.restart()
    single.flip(0, image.extents[0].block * 4096 + 3 * CHUNK)
    report = single.run()
    assert (report.state, report.copies, report.lost) == ("done", 2, 2)
    assert {damaged["uuid"] for damaged in report.damaged_objects} == {uuid_text(image.uuid), uuid_text(snapshot.uuid)}
    assert report.bad_extents == [{"device": 0, "block": image.extents[0].block + 48, "count": 16}]


def test_a_snapshot_that_is_deleted_meanwhile_ends_no_scrub(single: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes, record = freeze(single, 40 * CHUNK)

    def delete_first(length: int) -> None:
        if single.store.keystore.get(record.uuid):
            single.writer.make([Delete(record.uuid)], 60)

    monkeypatch.setattr(single.scrub, "_pace", delete_first)
    report = single.run()
    assert (report.state, report.damaged) == ("done", 0)
    volumes.close()


def test_a_snapshot_whose_data_is_away_is_not_lost(simulate: Callable[..., Simulation]) -> None:
    """Its footer is elsewhere; its blocks are as good as before when the device is back."""
    bench = Bench(simulate(16 * MIB, 16 * MIB))
    volumes = Volumes(bench.store, bench.writer)
    image = bench.store.stat(bench.writer.call(lambda: bench.store.put(DATA, name="image")).uuid)
    volumes.clone("image", "disk")
    with closing(volumes.open("disk")) as volume:
        volume.write(0, b"written")
        volume.flush()
    snapshot = volumes.snapshot("disk", "snapshot")
    (chunk,) = (address for _, address in bench.store.layers.numbered(snapshot.layer).chunks())
    away = {*image.devices, device_of(chunk)} - snapshot.devices
    assert len(away) == 1, "nothing of it is anywhere else"
    bench.writer.call(lambda: detach_device(bench.store, *away))
    report = bench.run()
    assert (report.state, report.lost, report.bad_extents) == ("done", 0, [])
    assert report.unread >= 1
    volumes.close()
    bench.end()


def test_a_second_start_changes_nothing(single: Bench) -> None:
    single.fill()
    single.scrub.task.bytes_s_max = 1
    single.scrub.start()
    began = single.scrub.report
    single.scrub.start(again=True)
    assert single.scrub.report is began
    assert single.scrub.stop()["state"] == "stopped"


def test_a_device_that_answers_with_errors(simulate: Callable[..., Simulation], faulty_loop: Any) -> None:
    """A real device, whose errors come from the kernel: the mirror goes on, and is whole when the device is well again.

    What cannot be mended now, since the device takes no new blocks either, is mended by the next scrub.
    """
    bench = Bench(simulate(faulty_loop.path, 16 * MIB, placer=Mirrored(2)))
    try:
        contents = {record.uuid: DATA[: record.size] for record in bench.fill()}
        with faulty_loop.failing():
            report = bench.run()
            assert (report.state, report.lost) == ("done", 0)
            found = {part["what"] for entry in report.damaged_objects for part in entry["ranges"]}
            assert found == {"data", "footer"}  # though all of it is in the page cache
            for uuid, content in contents.items():
                assert bench.store.get(uuid) == content
        bench.end()
        bench.simulation.cut_power()
        bench.open()
        assert bench.run().lost == 0
        bench.end()
        check_sound(bench.store)
        assert {uuid: bench.store.get(uuid) for uuid in contents} == contents
    finally:
        bench.end()
        bench.simulation.close()  # before the device goes


def test_a_single_copy_on_a_device_that_answers_with_errors(
    simulate: Callable[..., Simulation], faulty_loop: Any
) -> None:
    bench = Bench(simulate(faulty_loop.path))
    try:
        record = bench.fill()[-1]
        bench.restart()
        with open(faulty_loop.path, "rb") as file:  # so that nothing is in the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with faulty_loop.failing():
            with pytest.raises(DeviceError) as caught:
                bench.store.read(record, 0, record.size)
            where = f"Object {uuid_text(record.uuid)}, bytes 0 to 65535, cannot be read: "
            assert caught.value.message.startswith(where)
            assert "Input/output error" in caught.value.message
        assert bench.store.get(record.uuid) == DATA[: record.size]
    finally:
        bench.end()
        bench.simulation.close()  # before the device goes


class TestDaemon:
    def test_it_goes_on_when_the_daemon_is_started_again(
        self, make_daemon: Callable[..., Daemon], make_image: Callable[..., Path]
    ) -> None:
        image = make_image(64 * MIB)
        make_pool(image)
        daemon = make_daemon(image, config="[scrub]\nrate = '1 MiB'\n").start()
        for _ in range(10):
            daemon.put(DATA * 4)
        assert daemon.request("POST", "/v1/scrub").status == 202
        until(lambda: daemon.request("GET", "/v1/scrub").json()["copies"] > 0, "something has been read")
        daemon.restart()
        report = daemon.request("GET", "/v1/scrub").json()
        assert (report["running"], report["state"]) == (True, "running")
        assert 0 < report["copies"] < 10
        daemon.reload("[scrub]\nrate = '1 GiB'\n")
        until(lambda: daemon.request("GET", "/v1/scrub").json()["state"] == "done", "it is done")
        report = daemon.request("GET", "/v1/scrub").json()
        assert (report["copies"], report["damaged"], report["rate_bytes_s"]) == (10, 0, 1 << 30)
        daemon.restart()
        assert not daemon.request("GET", "/v1/scrub").json()["running"]
        assert daemon.request("POST", "/v1/scrub?again=maybe").status == 400

    def test_a_mirror_heals_while_it_is_read(
        self, make_daemon: Callable[..., Daemon], make_image: Callable[..., Path]
    ) -> None:
        images = [make_image(64 * MIB), make_image(64 * MIB)]
        make_pool(*images)
        daemon = make_daemon(*images, config="[placer]\npolicy = 'mirrored'\n").start()
        uuids = [daemon.put(DATA) for _ in range(4)]
        for number, image in enumerate(images):
            for start in [found.start() for found in re.finditer(re.escape(DATA[:64]), image.read_bytes())]:
                with image.open("r+b") as file:
                    file.seek(start + (2 * number + 1) * CHUNK)
                    file.write(b"damaged")
        for uuid in uuids:
            assert daemon.get(uuid) == DATA

        def mended() -> int:
            found = re.search(rb"\nrustord_mended_total ([0-9]+)", daemon.request("GET", "/metrics").body)
            assert found is not None
            return int(found[1])

        until(lambda: mended() >= 4, "each Object that was read is mended")
        daemon.request("POST", "/v1/scrub")
        until(lambda: daemon.request("GET", "/v1/scrub").json()["state"] == "done", "it is done")
        until(lambda: mended() == 8, "both copies of each are")
        assert [device["bad_bytes"] for device in daemon.devices()] == [4 * CHUNK, 4 * CHUNK]
        assert daemon.pool()["state"] == "ok"
        for uuid in uuids:
            assert daemon.get(uuid) == DATA


class TestFlips:
    """Bytes of a small pool flipped in turn: the right bytes, or an error that names the Object and the range.

    By default some bytes are flipped; with --long, all that mean anything (the rest of a pool is free or unused).
    """

    @pytest.mark.timeout(3600)
    def test_of_what_lives(
        self, single: Bench, seed: int, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)  # every flip is logged
        contents = {record.uuid: DATA[: record.size] for record in single.fill()}
        single.store.blocks.on_damage = lambda record, start, end: None  # it would be mended while we flip it back
        every = [
            (record, offset)
            for record in live(single.store)
            for extent in record.extents
            for offset in range(extent.block * 4096, extent.end * 4096)
        ]
        chance = random.Random(seed)
        for record, offset in every if request.config.option.long else chance.sample(every, 600):
            mask = 1 << chance.randrange(8)
            single.flip(0, offset, mask)
            at = offset - record.extents[0].block * 4096
            start = min(at, max(record.size - 1, 0)) // CHUNK * CHUNK
            try:
                found_data = single.store.read(record, start, min(CHUNK, record.size - start))
                assert found_data == contents[record.uuid][start : start + CHUNK]
                assert at >= record.size, "a flipped byte of data was not noticed"
            except Damaged as error:
                found = re.match(rf"Object {uuid_text(record.uuid)}, bytes (\d+) to (\d+), ", error.message)
                assert found is not None
                assert int(found[1]) <= at <= int(found[2])
                assert at < record.size
            single.flip(0, offset, mask)
        for uuid, content in contents.items():
            assert single.store.get(uuid) == content

    def test_one_scrub_finds_all_that_are_in_what_lives(self, single: Bench, seed: int) -> None:
        single.fill()
        chance = random.Random(seed)
        flipped = set()
        for record in live(single.store):
            ((_, block, count),) = record.extents
            for at in {chance.randrange(count * 4096) for _ in range(3)}:
                single.flip(0, block * 4096 + at, 1 << chance.randrange(8))
                flipped.add(block + at // 4096)
        single.run()
        assert all(single.store.blocks.slots[0].bad.within(block, 1) for block in flipped)
        assert {entry["uuid"] for entry in single.scrub.report.damaged_objects} == {
            uuid_text(record.uuid) for record in live(single.store)
        }

    @pytest.mark.timeout(3600)
    def test_of_labels_journals_and_tables(self, single: Bench, seed: int, request: pytest.FixtureRequest) -> None:
        records = single.fill()
        single.store.condemn([Extent(0, block, 1) for block in range(3000, 3200, 2)])
        geometry = single.store.blocks.slots[0].geometry
        single.end()
        single.simulation.close()
        areas = [(offset, 8192) for offset in geometry.label_offsets]
        areas += [(offset, 4096) for offset in geometry.bad_table_offsets]
        areas += [(geometry.journal_offset, 20 * 4096)]
        path = single.simulation.paths[0]
        image = path.read_bytes()
        every = [offset for start, length in areas for offset in range(start, start + length) if image[offset]]
        chance = random.Random(seed)
        offsets = every if request.config.option.long else chance.sample(every, 30)
        offsets += [chance.randrange(geometry.size) for _ in range(30)]
        pristine = path.with_suffix(".pristine")
        shutil.copyfile(path, pristine)
        lives = {offset for record in records for e in record.extents for offset in range(e.block * 4096, e.end * 4096)}
        for offset in offsets:
            if offset in lives:
                continue
            single.flip(0, offset, 1 << chance.randrange(8))
            store = single.simulation.open()
            assert {record.uuid: store.get(record.uuid) for record in live(store)} == {
                record.uuid: DATA[: record.size] for record in records
            }
            assert len(store.blocks.slots[0].bad.runs) == 100
            check_sound(store)
            single.simulation.close()
            shutil.copyfile(pristine, path)
        single.open()

    @pytest.mark.timeout(3600)
    def test_of_one_device_of_a_mirrored_pool_after_a_crash(
        self, mirrored: Bench, seed: int, request: pytest.FixtureRequest
    ) -> None:
        records = mirrored.fill()
        mirrored.end()
        mirrored.simulation.cut_power()
        index = mirrored.simulation.index
        paths = [*mirrored.simulation.paths, index / "data.mdb"]
        pristine = [path.with_suffix(".pristine") for path in paths]
        for path, copy in zip(paths, pristine, strict=True):
            shutil.copyfile(path, copy)
        used = max(extent.end for record in records for extent in record.extents) * 4096
        chance = random.Random(seed)
        for _ in range(400 if request.config.option.long else 40):
            device = chance.randrange(2)
            offset = chance.choice([chance.randrange(used), chance.randrange(1 << 20, (1 << 20) + 4 * 4096)])
            mirrored.flip(device, offset, 1 << chance.randrange(8))
            mirrored.open()
            assert {record.uuid: mirrored.store.get(record.uuid) for record in live(mirrored.store)} == {
                record.uuid: DATA[: record.size] for record in records
            }
            assert mirrored.run().lost == 0
            mirrored.end()
            check_sound(mirrored.store)
            mirrored.simulation.close()
            for path, copy in zip(paths, pristine, strict=True):
                shutil.copyfile(copy, path)
            mirrored.notes.unlink()
        mirrored.open()
