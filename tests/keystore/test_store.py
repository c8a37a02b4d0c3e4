"""The KeyStore: the same answers before, during and after a checkpoint, and again after a replay."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from rustord.blockdevice import BlockDevice, open_device
from rustord.errors import NoSpace, PoolError, RustordError, Unavailable
from rustord.extent import Extent
from rustord.journal import NOTHING, Entry, Kind, decode_record_ids
from rustord.keystore import store as store_module
from rustord.keystore.lmdb import LmdbBackend
from rustord.keystore.ring import Ring
from rustord.keystore.store import KeyStore
from rustord.label import Geometry
from rustord.objkey import ObjKey
from rustord.record import RECORD_ID, Grave, Record, RecordId, encode_record

MIB = 1 << 20
POOL = b"p" * 16
GEOMETRY = Geometry(16 * MIB // 4096, 4096)


class Backend(LmdbBackend):
    """LMDB, whose commits can be made to fail, or to let something happen in their middle."""

    def __init__(self) -> None:
        super().__init__()
        self.error: RustordError | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        self.meanwhile()
        if self.error is not None:
            raise self.error
        super().commit(puts, deletes)


class Keys:
    """A KeyStore, its backend, and the one who makes the changes that an ObjectStore would make."""

    def __init__(self, device: BlockDevice, directory: Path) -> None:
        self.backend = Backend()
        self.backend.open(directory)
        self.store = KeyStore(self.backend, POOL, directory)
        self.ring = Ring(device, b"d" * 16, GEOMETRY, bytes(32))
        batches = self.store.add_ring(0, self.ring)
        entries = [entry for batch in batches for entry in batch.entries]
        erased = [entry for entry in entries if entry.kind is Kind.ERASED]
        self.replayed = [entry for entry in entries if entry.sequence]
        self.store.replay(self.replayed, (), erased)
        self.sequence = max([entry.sequence for entry in entries] + [self.store.indexed_sequence])
        self._erased: list[RecordId] = []

    def put(self, name: str = "", replaced: bytes = NOTHING) -> Record:
        self.sequence += 1
        key = ObjKey(self.sequence.to_bytes(16, "big"), "xxh3-128", b"digest", 0)
        copies = [[Extent(0, 1280 + self.sequence, 1)]]
        record = Record(encode_record(key, self.sequence, 0, copies, b"", b"contiguous", name.encode(), b""))
        self._change([(record, replaced)], [])
        return record

    def move(self, record: Record, *extents: Extent) -> Record:
        self.sequence += 1
        moved = Record(record.moved(self.sequence, [extents]))
        self._change([(moved, record.uuid)], [])
        return moved

    def delete(self, record: Record) -> None:
        self.sequence += 1
        self._change([], [(record, self.sequence)])

    def erase(self, *records: Record) -> None:
        self._erased += [record.id for record in records]
        self.store.learn((), (), (), [record.id for record in records], self.sequence)

    def _change(self, puts: list[tuple[Record, bytes]], deletes: list[tuple[Record, int]]) -> None:
        written, failed = self.store.journal(puts, deletes, (), {0: self._erased}, self.sequence - 1, [0])
        if failed:
            raise failed[0]
        assert written == {0}
        self._erased = []
        self.store.learn(puts, deletes, (), (), self.sequence)


@pytest.fixture
def device(make_image: Callable[[int], Path]) -> Iterator[BlockDevice]:
    device = open_device(make_image(16 * MIB))
    yield device
    device.close()


@pytest.fixture
def open_keys(device: BlockDevice, disk_path: Path) -> Iterator[Callable[[], Keys]]:
    """Opens the KeyStore, after closing the one before as a crash does: without a checkpoint."""
    opened: list[Keys] = []

    def open_again() -> Keys:
        for keys in opened:
            keys.store.close()
        opened.append(Keys(device, disk_path / "index"))
        return opened[-1]

    yield open_again
    opened[-1].store.close()


@pytest.fixture
def keys(open_keys: Callable[[], Keys]) -> Keys:
    return open_keys()


def names(store: KeyStore, prefix: str = "", limit: int = 1000) -> list[str]:
    """All names with a prefix, by pages."""
    found: list[str] = []
    while page := store.names(prefix, found[-1] if found else "", limit):
        found += [name for name, _ in page]
    return found


def uuids(store: KeyStore, limit: int = 1000) -> list[bytes]:
    found: list[bytes] = []
    while page := store.objects(found[-1] if found else b"", limit):
        found += [record.uuid for record in page]
    return found


class TestChanges:
    def test_what_is_learnt_is_found(self, keys: Keys) -> None:
        record = keys.put("greeting")
        for _ in range(2):
            assert keys.store.resolve("greeting") == record.uuid
            found = keys.store.get(record.uuid)
            assert found is not None
            assert found.raw == record.raw
            assert keys.store.resolve("greetin") is keys.store.resolve("greeting2") is None
            assert keys.store.get(bytes(16)) is None
            keys.store.checkpoint()

    def test_what_is_deleted_is_a_grave_until_it_is_erased(self, keys: Keys) -> None:
        record = keys.put("name")
        keys.delete(record)
        for _ in range(2):
            assert keys.store.get(record.uuid) is None
            assert keys.store.resolve("name") is None
            keys.store.checkpoint()
        assert keys.store.graves() == [Grave(record.id, record.extents)]
        keys.erase(record)
        keys.store.checkpoint()
        assert keys.store.graves() == []

    def test_a_name_that_was_replaced_maps_to_the_new_object(self, keys: Keys) -> None:
        old = keys.put("name")
        new = keys.put("name", old.uuid)
        for _ in range(2):
            assert keys.store.resolve("name") == new.uuid
            assert keys.store.get(old.uuid) is None
            assert names(keys.store) == ["name"]
            assert uuids(keys.store) == [new.uuid]
            keys.store.checkpoint()
        keys.delete(new)
        assert keys.store.resolve("name") is None

    def test_an_object_that_was_moved_leaves_a_grave_of_what_it_does_not_use_any_more(self, keys: Keys) -> None:
        old = keys.put("name")
        kept, new = Extent(0, 1281, 1), Extent(0, 1300, 2)
        moved = keys.move(old, kept, new)
        again = keys.move(moved, new)
        for _ in range(2):
            found = keys.store.get(old.uuid)
            assert found is not None
            assert found.raw == again.raw
            assert (keys.store.resolve("name"), uuids(keys.store)) == (old.uuid, [old.uuid])
            keys.store.checkpoint()
        assert sorted(keys.store.graves()) == [Grave(old.id, []), Grave(moved.id, [kept])]
        keys.erase(moved, old)
        keys.store.checkpoint()
        assert keys.store.graves() == []
        assert uuids(keys.store) == [old.uuid]

    def test_a_commit_that_fails_loses_nothing(self, keys: Keys) -> None:
        record = keys.put("a")
        keys.backend.error = NoSpace("the disk of the index is full")
        with pytest.raises(NoSpace):
            keys.store.checkpoint()
        other = keys.put("b")
        keys.delete(record)
        assert names(keys.store) == ["b"]
        assert keys.store.lag() > 0
        keys.backend.error = None
        keys.store.checkpoint()
        assert names(keys.store) == ["b"]
        assert uuids(keys.store) == [other.uuid]
        assert keys.store.lag() == 0

    def test_what_is_learnt_during_a_commit_is_not_lost(self, keys: Keys) -> None:
        first = keys.put("name")
        seen = []

        def meanwhile() -> None:
            keys.backend.meanwhile = lambda: None
            seen.append(keys.put("name", first.uuid))
            seen.append(keys.put("other"))
            assert names(keys.store) == ["name", "other"]

        keys.backend.meanwhile = meanwhile
        keys.store.checkpoint()
        assert uuids(keys.store) == [record.uuid for record in seen]
        keys.store.checkpoint()
        assert uuids(keys.store) == [record.uuid for record in seen]
        assert keys.store.resolve("name") == seen[0].uuid

    def test_a_cycle_waits_when_too_much_waits_for_the_index(self, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rustord.keystore.store._OVERLAY_MAX", 3)
        for _ in range(3):
            keys.put()
        keys.store.make_room()
        assert keys.store.lag() == 3
        keys.put()
        keys.store.make_room()
        assert keys.store.lag() == 0


class TestReplay:
    def test_what_no_checkpoint_took_is_replayed(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        kept, gone = keys.put("kept"), keys.put("gone")
        keys.store.checkpoint()
        after = keys.put("after")
        keys.delete(gone)
        again = open_keys()
        assert [entry.kind for entry in again.replayed] == [Kind.PUT, Kind.DELETE]
        assert names(again.store) == ["after", "kept"]
        assert uuids(again.store) == [kept.uuid, after.uuid]
        assert [grave.id.uuid for grave in again.store.graves()] == [gone.uuid]

    def test_an_erasure_ends_a_grave(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        gone = keys.put("gone")
        keys.delete(gone)
        keys.erase(gone)
        keys.put("next")  # whose batch says what was erased
        again = open_keys()
        assert again.store.graves() == []
        assert names(again.store) == ["next"]

    def test_a_move_is_replayed(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        old = keys.put("name")
        moved = keys.move(old, Extent(0, 1300, 1))
        again = open_keys()
        found = again.store.get(old.uuid)
        assert found is not None
        assert found.raw == moved.raw
        assert again.store.graves() == [Grave(old.id, old.extents)]
        again.store.replay([], (), [Entry(Kind.ERASED, 0, RECORD_ID.pack(*old.id))])
        assert uuids(again.store) == [old.uuid]  # what was erased is where it was before

    def test_a_move_that_was_never_whole_leaves_the_object_where_it_was(self, keys: Keys) -> None:
        old = keys.put("name")
        moved = Record(old.moved(9, [[*old.extents, Extent(0, 1300, 1)]]))
        keys.store.replay([Entry(Kind.PUT, 9, old.uuid + moved.raw)], {9}, [])
        found = keys.store.get(old.uuid)
        assert found is not None
        assert found.raw == old.raw
        assert keys.store.graves() == [Grave(moved.id, [Extent(0, 1300, 1)])]

    def test_a_move_that_comes_to_light_after_a_later_one_is_none(self, keys: Keys) -> None:
        old = keys.put("name")
        earlier = Record(old.moved(2, [[Extent(0, 1300, 1)]]))
        keys.sequence = 8
        later = keys.move(old, Extent(0, 1400, 1))
        keys.store.replay([Entry(Kind.PUT, 2, old.uuid + earlier.raw)], (), [])
        found = keys.store.get(old.uuid)
        assert found is not None
        assert found.raw == later.raw
        assert Grave(earlier.id, earlier.extents) in keys.store.graves()

    def test_an_erasure_ends_an_object_whose_tombstone_is_missing(self, keys: Keys) -> None:
        record = keys.put("name")
        keys.store.replay([], (), [Entry(Kind.ERASED, 0, RECORD_ID.pack(*record.id) + bytes(24))])
        assert uuids(keys.store) == []
        assert names(keys.store) == []
        assert keys.store.graves() == []

    def test_a_replay_after_a_checkpoint_has_nothing_to_do(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        keys.put("a")
        keys.store.checkpoint()
        assert open_keys().replayed == []

    def test_a_second_replay_changes_nothing(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        first = keys.put("a")
        keys.put("a", first.uuid)
        for _ in range(2):
            store = open_keys().store
            assert uuids(store) == [(2).to_bytes(16, "big")]
            assert names(store) == ["a"]

    def test_an_index_of_another_pool_is_refused(self, keys: Keys) -> None:
        with pytest.raises(PoolError, match="belongs to pool"):
            KeyStore(keys.backend, b"q" * 16, Path("index"))

    def test_a_new_index_needs_the_whole_journal(self, keys: Keys, device: BlockDevice, disk_path: Path) -> None:
        for _ in range(3):
            keys.put()
        keys.store.close()
        Keys(device, disk_path / "new").store.close()  # it reaches back to the beginning
        device.write(MIB, [bytes(4096)])
        with pytest.raises(PoolError, match="does not reach back"):
            Keys(device, disk_path / "newer")


class TestJournal:
    def test_a_full_journal_is_emptied_into_the_index(self, keys: Keys) -> None:
        for _ in range(2500):  # in a ring of 1,024
            keys.put()
        assert keys.store.journal_used() <= 1
        assert keys.store.lag() < 1100
        assert len(uuids(keys.store)) == 2500

    def test_it_is_full_for_good_while_the_index_cannot_be_written(self, keys: Keys) -> None:
        keys.backend.error = NoSpace("the disk of the index is full")
        for _ in range(1024):
            keys.put()
        with pytest.raises(NoSpace):
            keys.put()
        keys.backend.error = None
        keys.put()

    def test_what_cannot_be_erased_does_not_fill_it(self, keys: Keys, open_keys: Callable[[], Keys]) -> None:
        held = keys.put()
        keys.delete(held)
        for _ in range(2500):
            record = keys.put()
            keys.delete(record)
            keys.erase(record)
        keys.put()  # whose batch says that the last one was erased
        batches = Ring(keys.ring._device, b"d" * 16, GEOMETRY, bytes(32)).replay(None)
        said = [entry.payload for batch in batches for entry in batch.entries if entry.kind is Kind.UNERASED]
        assert RECORD_ID.pack(*held.id) in said  # for one who has the devices alone
        assert [grave.id.uuid for grave in open_keys().store.graves()] == [held.uuid]

    def test_so_much_that_is_not_erased_that_it_has_no_room_for_it_stops_nobody(self, keys: Keys) -> None:
        """As when a disk has gone, and all that had a copy there has got another one elsewhere."""
        gone = [RecordId(number.to_bytes(16, "big"), number) for number in range(1, 200_001)]
        keys.sequence = len(gone)
        keys.store.hold(gone, keys.sequence)
        last = keys.put()
        for _ in range(1100):  # once around
            last = keys.put()
        keys.store.checkpoint()
        assert keys.store.journal_used() < 0.6
        entries = [entry for _, batch in keys.ring.batches() for entry in batch.entries]
        said = {id for entry in entries if entry.kind is Kind.UNERASED for id in decode_record_ids(entry.payload)}
        assert said == {*gone[-len(said) :]}  # the newest of them
        assert len(said) > 10_000
        assert last.uuid in uuids(keys.store, 2000)

    def test_a_tombstone_stays_in_it_until_the_blocks_are_erased(self, keys: Keys) -> None:
        record = keys.put()
        keys.delete(record)
        keys.put()
        keys.store.checkpoint()
        assert keys.store.journal_used() == 2 / 1024
        keys.erase(record)
        keys.store.checkpoint()
        assert keys.store.journal_used() == 0

    def test_what_is_too_long_for_it_is_refused(self, keys: Keys) -> None:
        record = keys.put()
        refuse_what_is_too_long(keys)
        assert uuids(keys.store) == [record.uuid]

    def test_a_batch_that_is_refused_takes_no_tombstone_along(self, keys: Keys) -> None:
        keys.backend.error = NoSpace("the disk of the index is full")
        held = keys.put()
        keys.delete(held)
        while keys.store.journal_used() < 1:
            keys.put()
        keys.backend.error = None
        refuse_what_is_too_long(keys)  # but what is before the tombstone has reached the index, and is let go
        refuse_what_is_too_long(keys)  # and with it what repeats the tombstone, which is the oldest now
        for _ in range(3):
            keys.put()  # over the oldest
        entries = [entry for _, batch in keys.ring.batches() for entry in batch.entries]
        assert RECORD_ID.pack(*held.id) in {entry.payload for entry in entries if entry.kind is Kind.UNERASED}


def refuse_what_is_too_long(keys: Keys) -> None:
    key = ObjKey(bytes(16), "xxh3-128", b"", 0)
    copies = [[Extent(0, 1, 1)]]
    long = Record(encode_record(key, keys.sequence + 1, 0, copies, bytes(5 * MIB), b"", b"", b""))
    _, failed = keys.store.journal([(long, NOTHING)], [], [], {}, 1, [0])
    assert isinstance(failed[0], Unavailable)


LONG = "ü" * 240  # 480 bytes in UTF-8
TRICKY_NAMES = [
    "a", "a/", "a/b", "a/b/c", "a0", "b", "é", "日本語", "🦀", ".", "..", " ",
    LONG, LONG + "a", LONG + "b", LONG + "b" * 500, LONG + "é", LONG[:-1], LONG[:-1] + "z", "x" * 1024,
]  # fmt: skip


class TestListing:
    @pytest.mark.parametrize("limit", [1, 3, 1000])
    def test_every_name_is_listed_once_in_the_order_of_its_bytes(self, keys: Keys, limit: int, seed: int) -> None:
        shuffled = random.Random(seed).sample(TRICKY_NAMES, len(TRICKY_NAMES))
        for number, name in enumerate(shuffled):
            keys.put(name)
            if number in (5, 11):
                keys.store.checkpoint()
        for _ in range(2):
            listed = names(keys.store, limit=limit)
            assert sorted(listed) == sorted(TRICKY_NAMES)
            begins = [name.encode()[:480] for name in listed]
            assert begins == sorted(begins)
            keys.store.checkpoint()

    @pytest.mark.parametrize("prefix", ["", "a", "a/", "é", LONG, LONG + "b", LONG + "bb", "x" * 700, "nothing"])
    def test_a_prefix_selects(self, keys: Keys, prefix: str) -> None:
        for number, name in enumerate(TRICKY_NAMES):
            keys.put(name)
            if number == 9:
                keys.store.checkpoint()
        expected = {name for name in TRICKY_NAMES if name.startswith(prefix)}
        for limit in (1, 1000):
            listed = names(keys.store, prefix, limit)
            assert len(listed) == len(set(listed))
            assert set(listed) == expected

    def test_a_page_begins_strictly_behind_its_cursor_wherever_that_is(self, keys: Keys) -> None:
        for name in ("a", "b/1", "b/2", "c"):
            keys.put(name)
        assert [name for name, _ in keys.store.names(after="b")] == ["b/1", "b/2", "c"]
        assert [name for name, _ in keys.store.names("b/", after="b/1")] == ["b/2"]
        assert keys.store.names("b/", after="c") == []
        assert [name for name, _ in keys.store.names("b/", after="a")] == ["b/1", "b/2"]

    def test_the_overlay_covers_the_index(self, keys: Keys) -> None:
        records = {name: keys.put(name) for name in "abcd"}
        keys.store.checkpoint()
        keys.delete(records["b"])
        new = keys.put("c", records["c"].uuid)
        keys.put("e")
        assert names(keys.store) == ["a", "c", "d", "e"]
        assert dict(keys.store.names())["c"] == new.uuid
        assert records["b"].uuid not in uuids(keys.store)

    def test_what_is_there_all_the_time_is_listed_once_whatever_changes(self, keys: Keys, seed: int) -> None:
        lasting = {f"lasting/{number:03}": keys.put(f"lasting/{number:03}").uuid for number in range(100)}
        stop = threading.Event()

        def change() -> None:
            chance = random.Random(seed)
            there: list[Record] = []
            for turn in itertools.count():
                if stop.is_set():
                    return
                there.append(keys.put(f"lasting/{chance.randrange(100):03}+{turn}"))
                if len(there) > 20:
                    record = there.pop(chance.randrange(20))
                    keys.delete(record)
                    keys.erase(record)
                if turn % 40 == 0:
                    keys.store.checkpoint()

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(30):
                listed = names(keys.store, limit=7)
                assert listed == sorted(set(listed))
                assert [name for name in listed if "+" not in name] == list(lasting)
                seen = uuids(keys.store, limit=7)
                assert set(lasting.values()) <= set(seen)
                assert len(seen) == len(set(seen))
        finally:
            stop.set()
            changer.join()


class TestRaces:
    def test_who_reads_while_a_commit_fails_misses_nothing(self, keys: Keys) -> None:
        """What it had in hand is with what is new again, where the reader has looked already."""
        record = keys.put("name")
        keys.store.checkpoint()
        keys.delete(record)
        moved = keys.put("name")
        failing, fail = threading.Event(), threading.Event()

        def meanwhile() -> None:
            failing.set()
            fail.wait()

        def commit() -> None:
            with pytest.raises(NoSpace):
                keys.store.checkpoint()

        class Fresh(dict[bytes, bytes | None]):
            """Looked at just before the commit fails."""

            def __contains__(self, key: object) -> bool:
                found = super().__contains__(key)
                fail.set()
                thread.join()
                return found

        for look in (
            lambda: keys.store.get(moved.uuid),
            lambda: keys.store.get(record.uuid) is None,
            lambda: keys.store.resolve("name") == moved.uuid,
        ):
            failing.clear()
            fail.clear()
            keys.backend.error, keys.backend.meanwhile = NoSpace("the disk of the index is full"), meanwhile
            thread = threading.Thread(target=commit)
            thread.start()
            failing.wait()
            fresh = keys.store._fresh
            fresh.objects, fresh.names = Fresh(fresh.objects), Fresh(fresh.names)
            assert look()
        keys.backend.error, keys.backend.meanwhile = None, lambda: None
        assert keys.store.lag() == 3
        keys.store.checkpoint()
        assert keys.store.lag() == 0
        assert uuids(keys.store) == [moved.uuid]


class TestHanging:
    def test_nobody_waits_for_ever_for_a_commit_that_hangs(
        self, keys: Keys, open_keys: Callable[[], Keys], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "COMMIT_S_MAX", 0.05)
        monkeypatch.setattr(store_module, "_OVERLAY_MAX", 3)
        hanging, go_on = threading.Event(), threading.Event()

        def hang() -> None:
            hanging.set()
            go_on.wait()

        records = [keys.put(f"before {number}") for number in range(3)]
        keys.backend.meanwhile = hang
        thread = threading.Thread(target=keys.store.checkpoint)
        thread.start()
        hanging.wait()
        records += [keys.put(f"beside {number}") for number in range(4)]
        with pytest.raises(Unavailable, match="a commit has not ended for"):
            keys.store.make_room()
        assert "a commit has not ended" in keys.store.trouble()
        with pytest.raises(Unavailable), keys.store.one_commit():
            pass
        assert uuids(keys.store) == [record.uuid for record in records]
        keys.backend.meanwhile = lambda: None
        go_on.set()
        thread.join()
        keys.store.make_room()
        assert (keys.store.trouble(), keys.store.lag()) == ("", 0)
        assert uuids(open_keys().store) == [record.uuid for record in records]

    def test_a_commit_that_fails_is_told_until_one_succeeds(self, keys: Keys) -> None:
        keys.put("name")
        keys.backend.error = NoSpace("the disk of the index is full")
        with pytest.raises(NoSpace):
            keys.store.checkpoint()
        assert keys.store.trouble() == "the disk of the index is full"
        keys.backend.error = None
        keys.store.checkpoint()
        assert keys.store.trouble() == ""
