"""The Writer: changes from many threads, in cycles; and a process that is killed in the middle of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

import rustord
import rustord.writer as writer_module
from rustord.change import Change, Delete, Put
from rustord.errors import DeviceError, NoSpace, NotFound, ReadOnly, RustordError, Unavailable
from rustord.extent import Extent
from rustord.objectstore import Cycle, ObjectStore
from rustord.record import Metadata, Record
from rustord.writer import CHANGE_COUNT_MAX, Writer
from tests.simulation import MIB, Simulation, check_sound, free_blocks, live, stored

DATA = random.Random(4).randbytes(4 * MIB)
SECONDS_MAX = 30
"""What takes longer has failed."""


@pytest.fixture
def simulation(disk_path: Path) -> Iterator[Simulation]:
    simulation = Simulation(disk_path, (32 * MIB,))
    yield simulation
    if simulation.is_open:
        simulation.close()


@pytest.fixture
def store(simulation: Simulation) -> ObjectStore:
    return simulation.open()


@pytest.fixture
def writer(store: ObjectStore) -> Iterator[Writer]:
    writer = Writer(store)
    yield writer
    assert writer.close(SECONDS_MAX)


class Answers:
    """Takes the outcomes that a Writer delivers."""

    def __init__(self) -> None:
        self._outcomes: SimpleQueue[Record | RustordError] = SimpleQueue()

    def __call__(self, finished: Sequence[tuple[Change, Record | RustordError]]) -> None:
        for _, outcome in finished:
            self._outcomes.put(outcome)

    def count(self) -> int:
        return self._outcomes.qsize()

    def get(self) -> Record | RustordError:
        return self._outcomes.get(timeout=SECONDS_MAX)


def submit(writer: Writer, change: Put | Delete) -> Record | RustordError:
    """Have a change made, and wait for its outcome."""
    answers = Answers()
    writer.submit([change], answers)
    return answers.get()


def until_free(writer: Writer, expected: dict[int, list[tuple[int, int]]]) -> None:
    """Wait until these runs are free."""
    for _ in range(3000):
        if writer.call(lambda: free_blocks(writer.store)) == expected:
            return
        threading.Event().wait(0.01)
    assert free_blocks(writer.store) == expected


def test_changes_from_many_threads(store: ObjectStore, writer: Writer, seed: int) -> None:
    before = free_blocks(store)
    kept: dict[bytes, bytes] = {}

    def work(chance: random.Random) -> None:
        mine: list[tuple[bytes, bytes]] = []
        for _ in range(60):
            if mine and chance.random() < 0.4:
                uuid, _ = mine.pop(chance.randrange(len(mine)))
                assert stored(submit(writer, Delete(uuid))).uuid == uuid
                assert isinstance(submit(writer, Delete(uuid)), NotFound)
            else:
                at = chance.randrange(MIB)
                data = DATA[at : at + chance.choice([0, 10, 5000, 70_000])]
                mine.append((stored(submit(writer, Put(data))).uuid, data))
        kept.update(mine)

    threads = [threading.Thread(target=work, args=(random.Random(seed + number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.uuid: store.get(record.uuid) for record in live(store)} == kept
    check_sound(store)
    assert writer.cycle_count < writer.change_count
    for uuid in kept:
        submit(writer, Delete(uuid))
    assert free_blocks(store) == before


def test_what_arrives_together_shares_a_cycle(store: ObjectStore) -> None:
    cycles: list[int] = []
    writer = Writer(store, lambda count, seconds: cycles.append(count))
    answers = Answers()
    hold, held = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait(SECONDS_MAX)

    holder = threading.Thread(target=writer.call, args=(wait,))
    holder.start()
    assert held.wait(SECONDS_MAX)
    for number in range(CHANGE_COUNT_MAX + 100):
        writer.submit([Put(bytes([number % 256]))], answers)
    hold.set()
    outcomes = [answers.get() for _ in range(CHANGE_COUNT_MAX + 100)]
    holder.join()
    assert writer.close(SECONDS_MAX)
    assert all(isinstance(outcome, Record) for outcome in outcomes)
    assert cycles[:2] == [CHANGE_COUNT_MAX, 100]
    assert writer.change_count == sum(cycles)


def test_a_cycle_waits_for_those_whom_the_last_one_has_answered(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [0.0]  # a cycle takes minutes by the writer's clock, so that its patience outlasts this test
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + late[0]})
    monkeypatch.setattr(writer_module, "time", clock)
    monkeypatch.setattr(writer_module, "GATHER_S", 2.0 * SECONDS_MAX)
    make_cycle = store.cycle

    def cycle(changes: Iterable[Change]) -> Cycle:
        late[0] += 4.0 * SECONDS_MAX
        return make_cycle(changes)

    monkeypatch.setattr(store, "cycle", cycle)
    sizes: list[int] = []
    writer = Writer(store, lambda count, seconds: sizes.append(count))
    assert len(writer.make([Put(b"1"), Put(b"2")], SECONDS_MAX)) == 2
    answers = Answers()
    writer.submit([Put(b"3")], answers)
    while not writer._queue.empty():  # until the writer has taken it
        threading.Event().wait(0.001)
    writer.submit([Put(b"4")], answers)
    assert isinstance(answers.get(), Record)
    assert isinstance(answers.get(), Record)
    assert writer.close(SECONDS_MAX)
    assert sizes[:2] == [2, 2]


def test_changes_are_made_while_somebody_waits(writer: Writer) -> None:
    put, delete = Put(b"data"), Delete(bytes(16))
    outcomes = dict(writer.make([put, delete], SECONDS_MAX))
    assert isinstance(outcomes[put], Record)
    assert isinstance(outcomes[delete], NotFound)


def test_nobody_waits_for_changes_without_end(writer: Writer) -> None:
    hold = threading.Event()
    holder = threading.Thread(target=writer.call, args=(lambda: hold.wait(SECONDS_MAX),))
    holder.start()
    with pytest.raises(TimeoutError, match="1 changes were not made in 0 s"):
        writer.make([Put(b"data")], 0.1)
    hold.set()
    holder.join()


def test_a_function_runs_between_two_cycles(writer: Writer) -> None:
    assert writer.call(threading.current_thread).name == "writer"
    with pytest.raises(ZeroDivisionError):
        writer.call(lambda: 1 // 0)
    assert writer.is_alive()


# What the watchdog looks at


def calling(writer: Writer, work: Callable[[threading.Event], object], met: Callable[[], object]) -> None:
    """Lets the writer ``work`` until it is so; then the event is set."""
    enough = threading.Event()
    with ThreadPoolExecutor(1) as other:
        call = other.submit(writer.call, lambda: work(enough), SECONDS_MAX)
        deadline = time.monotonic() + SECONDS_MAX
        while not met() and time.monotonic() < deadline:
            time.sleep(0.01)
        enough.set()
        call.result(SECONDS_MAX)
    assert time.monotonic() < deadline, "waited in vain"


def test_who_waits_for_ever_does_not_get_on(writer: Writer) -> None:
    calling(writer, lambda enough: enough.wait(), lambda: writer.standstill_s() > 0.3)
    assert writer.standstill_s() == 0


def test_who_works_for_long_gets_on(writer: Writer) -> None:
    began = time.monotonic()

    def work(enough: threading.Event) -> None:
        while not enough.is_set():
            sum(range(10_000))

    def gets_on() -> bool:
        return time.monotonic() - began > 0.6 and writer.standstill_s() < 0.3

    calling(writer, work, gets_on)


def test_a_cycle_does_not_get_on_by_working(
    store: ObjectStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(changes: Sequence[Change]) -> Cycle:
        while writer.standstill_s() < 0.3:
            sum(range(10_000))
        return Cycle([], [])

    monkeypatch.setattr(store, "cycle", endless)
    writer.submit([Put(b"data", Metadata())], Answers())
    deadline = time.monotonic() + SECONDS_MAX
    while not writer.cycle_count:
        assert time.monotonic() < deadline, "it was never seen not to get on"
        time.sleep(0.01)


def test_a_long_object_is_erased_beside_the_cycles(
    simulation: Simulation, store: ObjectStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = free_blocks(store)
    record = stored(submit(writer, Put(DATA)))
    go = threading.Event()
    erase = store.erase
    monkeypatch.setattr(store, "erase", lambda change: (go.wait(SECONDS_MAX), erase(change)))
    answers = Answers()
    writer.submit([Delete(record.uuid)], answers)
    small = stored(submit(writer, Put(b"is not held up")))
    assert answers.count() == 0
    go.set()
    assert stored(answers.get()).uuid == record.uuid
    (extent,) = record.extents
    assert not any(simulation.read(0, extent.block, extent.count))
    submit(writer, Delete(small.uuid))
    assert free_blocks(store) == before


@pytest.mark.parametrize("length", [5000, 3 * MIB])
def test_a_reader_is_not_cut_off_by_who_replaces_the_name(store: ObjectStore, writer: Writer, length: int) -> None:
    before = free_blocks(store)
    record = stored(submit(writer, Put(DATA[:length], Metadata("name"))))
    store.pins.add(record)
    new = stored(submit(writer, Put(b"new", Metadata("name"))))
    for _ in range(5):
        submit(writer, Delete(stored(submit(writer, Put(b"x"))).uuid))
    assert store.read(record, 0, length) == DATA[:length]
    store.pins.remove(record)
    submit(writer, Delete(new.uuid))
    until_free(writer, before)


def test_an_upload_that_breaks_off_is_erased_without_further_changes(
    simulation: Simulation, store: ObjectStore, writer: Writer
) -> None:
    before = free_blocks(store)
    intake = store.upload(Put(b""), None)
    intake.write(DATA)
    (extent,) = intake.copies[0]
    intake.abort()
    until_free(writer, before)
    assert not any(simulation.read(0, extent.block, extent.count))


def test_the_index_follows_by_itself(store: ObjectStore, writer: Writer) -> None:
    for _ in range(10):
        submit(writer, Put(b"x"))
    for _ in range(3000):
        if store.keystore.lag() == 0:
            break
        threading.Event().wait(0.01)
    assert store.keystore.info()["entries"] == 12  # the state and the position are entries, too


def test_an_index_that_cannot_be_written_is_told_once(
    store: ObjectStore, writer: Writer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    def checkpoint() -> None:
        tries.append("one")
        if len(tries) < 4:
            raise NoSpace("the disk is full")

    def until(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    caplog.set_level("INFO", "rustord.writer")
    monkeypatch.setattr(store.keystore, "checkpoint", checkpoint)
    until(lambda: writer.index_problem == "the disk is full")
    until(lambda: not writer.index_problem)
    assert len(tries) >= 4
    assert [message for message in caplog.messages if "index" in message] == [
        "the index cannot be written, and is tried again: the disk is full",
        "the index is written again",
    ]


def test_closing_finishes_what_was_submitted(simulation: Simulation, store: ObjectStore) -> None:
    writer = Writer(store)
    keys = [stored(submit(writer, Put(DATA[: 2 * MIB]))) for _ in range(3)]
    answers = Answers()
    writer.submit([Delete(key.uuid) for key in keys], answers)
    writer.submit([Put(b"x") for _ in range(1000)], answers)
    assert writer.close(SECONDS_MAX)
    assert answers.count() == 1003
    assert isinstance(submit(writer, Put(b"too late")), Unavailable)
    assert not writer.is_alive()
    simulation.close()
    store = simulation.open()
    assert len(live(store)) == 1000
    check_sound(store)


def test_what_is_submitted_while_it_stops_is_answered(store: ObjectStore) -> None:
    """Somebody has seen that it runs, and comes with his changes when it has stopped."""
    writer = Writer(store)
    closing, writer._closing = writer._closing, SimpleNamespace(is_set=lambda: False)  # type: ignore[assignment]
    writer._queue.put(None)
    writer._threads[0].join(SECONDS_MAX)
    assert isinstance(submit(writer, Put(b"too late")), Unavailable)
    writer._closing = closing
    assert writer.close(SECONDS_MAX)


def test_who_cannot_be_told_stops_nobody_else(
    store: ObjectStore, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    def deliver(outcomes: object) -> None:
        raise ZeroDivisionError

    answers = Answers()
    writer.call(lambda: [writer.submit([Put(b"x")], deliver), writer.submit([Put(b"y")], answers)])
    stored(answers.get())
    stored(submit(writer, Put(b"z")))
    assert len(live(store)) == 3
    assert "could not be told" in caplog.text


def test_an_internal_error_is_answered_and_stops_changes_but_not_reads(
    store: ObjectStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stored(submit(writer, Put(b"x")))
    with monkeypatch.context() as patch:
        patch.setattr(store.keygen, "uuid", lambda: 1 // 0)
        outcome = submit(writer, Put(b"y"))
    assert isinstance(outcome, RustordError)
    assert "ZeroDivisionError" in outcome.message
    assert isinstance(submit(writer, Put(b"z")), ReadOnly)
    assert store.get(record.uuid) == b"x"


@pytest.mark.parametrize("length", [10, len(DATA)], ids=["within a cycle", "beside it"])
def test_an_erasure_that_raises_is_not_lost(
    store: ObjectStore, writer: Writer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    record = stored(submit(writer, Put(DATA[:length])))

    def erase(extents: Iterable[Extent]) -> None:
        if list(extents):
            raise ZeroDivisionError

    monkeypatch.setattr(store.blocks, "erase", erase)
    outcome = submit(writer, Delete(record.uuid))
    assert isinstance(outcome, RustordError)
    assert "ZeroDivisionError" in outcome.message
    assert "ZeroDivisionError" in store.read_only


def test_a_device_that_fails(simulation: Simulation, store: ObjectStore, writer: Writer) -> None:
    record = stored(submit(writer, Put(b"x")))
    simulation.devices[0].fail_flushes = 1
    assert isinstance(submit(writer, Put(b"y")), DeviceError)
    assert isinstance(submit(writer, Put(b"z")), RustordError)
    assert isinstance(submit(writer, Delete(record.uuid)), DeviceError)
    assert store.get(record.uuid) == b"x"


# Killed

WORKER = """
import os, random, sys, threading
from queue import SimpleQueue
import rustord
from rustord.change import Delete, Put
from rustord.record import Metadata, Record
from rustord.writer import Writer

image, index, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = rustord.open(image, directory=index)
writer = Writer(store)

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())  # short enough to be written whole

def change(change):
    answer = SimpleQueue()
    writer.submit([change], lambda finished: answer.put(finished[0][1]))
    return answer.get()

def work(number):
    chance = random.Random(seed * 100 + number)
    mine = []
    for turn in range(10**9):
        if len(mine) > 15 or (mine and chance.random() < 0.3):
            uuid = mine.pop(chance.randrange(len(mine)))
            say("deleting", uuid.hex())
            outcome = change(Delete(uuid))
            if isinstance(outcome, Record):
                say("deleted", uuid.hex())
            continue
        size = chance.choice([0, 100, 4000, 5000, 70_000, 300_000])
        word = f"{seed}/{number}/{turn}"
        name = f"name{number}/{chance.randrange(3)}" if chance.random() < 0.3 else ""
        data = random.Random(word).randbytes(size)
        put = Put(data, Metadata(name, "", {"word": word}))
        if chance.random() < 0.3:
            upload = store.upload(put, chance.choice([size, None]))
            for at in range(0, size, 50_000):
                upload.write(data[at : at + 50_000])
            if chance.random() < 0.3:
                upload.abort()
                continue
        say("putting", name or "-", word)
        record = change(put)
        say("put", record.uuid.hex(), name or "-", word, str(size))
        if not name:
            mine.append(record.uuid)

for number in range(4):
    threading.Thread(target=work, args=(number,), daemon=True).start()
threading.Event().wait()
"""


class Witness:
    """What the worker said, and so what a store must hold that is opened after it was killed."""

    def __init__(self) -> None:
        self.objects: dict[bytes, tuple[str, str, int]] = {}
        self.deleted: set[bytes] = set()
        self.deleting: set[bytes] = set()
        self.putting: set[tuple[str, str]] = set()

    def hear(self, line: str) -> None:
        word, *rest = line.split()
        if word == "putting":
            self.putting.add((rest[0], rest[1]))
        elif word == "put":
            name = rest[1]
            self.putting.remove((name, rest[2]))
            if name != "-":
                for uuid, what in list(self.objects.items()):
                    if what[0] == name:
                        del self.objects[uuid]
                        self.deleted.add(uuid)
            self.objects[bytes.fromhex(rest[0])] = (name, rest[2], int(rest[3]))
        elif word == "deleting":
            self.deleting.add(bytes.fromhex(rest[0]))
        else:
            del self.objects[bytes.fromhex(rest[0])]
            self.deleted.add(bytes.fromhex(rest[0]))

    def check(self, store: ObjectStore) -> None:
        """Assert what P1 promises, and go on from what the store holds."""
        check_sound(store)
        found = {record.uuid: record for record in live(store)}
        for uuid, record in found.items():
            word = record.attributes["word"]
            assert store.get(uuid) == random.Random(word).randbytes(record.size)
            assert uuid not in self.deleted
            assert uuid in self.objects or (record.name or "-", word) in self.putting
            assert not record.name or store.resolve(record.name) == uuid
        replaced = {record.name for uuid, record in found.items() if uuid not in self.objects and record.name}
        for uuid, (name, word, size) in self.objects.items():
            if uuid in found:
                assert (found[uuid].attributes["word"], found[uuid].size) == (word, size)
            else:
                assert uuid in self.deleting or name in replaced
        self.objects = {
            uuid: (record.name or "-", record.attributes["word"], record.size) for uuid, record in found.items()
        }
        self.putting.clear()
        self.deleting.clear()


@pytest.mark.parametrize("lose_index", [False, True], ids=["", "and the index lost"])
def test_killed_at_random_moments(disk_path: Path, seed: int, lose_index: bool) -> None:
    simulation = Simulation(disk_path, (64 * MIB,))
    image, index = os.fspath(simulation.paths[0]), os.fspath(simulation.index)
    chance = random.Random(seed)
    witness = Witness()
    for turn in range(3 if lose_index else 8):
        command = [sys.executable, "-c", WORKER, image, index, str(seed + turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for _ in range(chance.randrange(20, 700 if not lose_index else 200)):
                line = worker.stdout.readline()
                assert line, "the worker ended by itself"
                witness.hear(line)
            worker.send_signal(signal.SIGKILL)
            for line in worker.stdout:
                witness.hear(line)
        if lose_index:
            simulation.lose_index()
        with rustord.open(image, directory=index) as store:
            witness.check(store)
    assert len(witness.objects) + len(witness.deleted) > 30


def test_a_call_that_nobody_waits_for_any_more_is_not_made(writer: Writer) -> None:
    """Who asked for it has gone on: he may have given back the blocks of which it speaks."""
    began, hold = threading.Event(), threading.Event()
    made: list[int] = []

    def wait() -> None:
        began.set()
        hold.wait(SECONDS_MAX)

    holder = threading.Thread(target=writer.call, args=(wait,))
    holder.start()
    assert began.wait(SECONDS_MAX)
    with pytest.raises(TimeoutError):
        writer.call(lambda: made.append(1), 0.05)
    hold.set()
    holder.join(SECONDS_MAX)
    writer.call(lambda: None)
    assert not made


def test_a_call_that_comes_too_late_is_told_so(store: ObjectStore) -> None:
    writer = Writer(store)
    assert writer.close()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="stopping"):
        writer.call(lambda: None, SECONDS_MAX)
    assert time.monotonic() - began < SECONDS_MAX / 2


def test_what_a_cycle_journalled_that_failed_is_found_at_the_next_start(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = simulation.open()
    before = store.put(b"before", name="before")
    store.keystore.checkpoint()
    writer = Writer(store)

    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(store.journals, "learn", fail)
        outcomes = writer.make([Delete(before.uuid), Put(b"x", Metadata("name"))], SECONDS_MAX)
    assert all("internal error" in str(outcome) for _, outcome in outcomes)
    assert isinstance(writer.make([Put(b"more")], SECONDS_MAX)[0][1], ReadOnly)
    assert writer.close(SECONDS_MAX)
    simulation.close()
    store = simulation.open()
    assert [name for name, _ in store.names()] == ["name"]
    check_sound(store)
    simulation.close()
    assert simulation.audit() == []
