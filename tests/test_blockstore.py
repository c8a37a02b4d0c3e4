"""The BlockStore: verified reads from whatever copy is good, erasure by policy, flushes side by side, and labels."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from rustord.blockdevice import BlockDevice, Buffer, open_device
from rustord.blockstore import BlockStore, ErasePolicy, Slot, chunk_sums, read_label, write_label
from rustord.errors import Damaged, DeviceError, FormatError
from rustord.extent import Extent
from rustord.label import LABEL_BYTES, Geometry, Label, Member
from rustord.manifest import CHUNK_BYTES
from rustord.objkey import ObjKey
from rustord.record import Record, encode_record
from rustord.testing.device import MemoryDevice, VolatileDevice
from rustord.testing.recording import Recording, Sectors

MIB = 1 << 20
BLOCK = 4096
SIZE = 16 * MIB
DATA = random.Random(5).randbytes(5 * CHUNK_BYTES + 777)
COPIES = [[Extent(0, 1280, 50), Extent(1, 1300, 32)], [Extent(2, 1280, 20), Extent(2, 1400, 62)]]


class Rig:
    """Three devices with an Object on them: its first copy on devices 0 and 1, its second one on device 2."""

    def __init__(self, make_image: Callable[[int], Path], policy: ErasePolicy = "zero") -> None:
        self.devices = [VolatileDevice(open_device(make_image(SIZE))) for _ in range(3)]
        geometry = Geometry(SIZE // BLOCK, BLOCK)
        self.slots = [Slot(index, bytes([index]) * 16, geometry, device) for index, device in enumerate(self.devices)]
        self.store = BlockStore(BLOCK, self.slots, policy)
        key = ObjKey(b"u" * 15 + b"\0", "xxh3-128", b"", len(DATA))  # an even last byte: copy 0 is read first
        self.record = Record(encode_record(key, 1, 0, COPIES, chunk_sums(DATA), b"mirrored", b"", b""))
        for copy in COPIES:
            data = DATA
            for extent in copy:
                self.store.write(extent, (data[: extent.count * BLOCK],))
                data = data[extent.count * BLOCK :]

    def read(self, offset: int = 0, length: int = len(DATA)) -> bytes:
        data = self.store.read(self.record, offset, length)
        assert data is not None
        return data.tobytes()

    def read_now(self, offset: int = 0, length: int = len(DATA)) -> bytes | None:
        data = self.store.read(self.record, offset, length, wait=False)
        return None if data is None else data.tobytes()

    def damage(self, copy: int, at: int) -> None:
        """Flip a bit of the Object's byte ``at`` in one of its copies."""
        for extent in COPIES[copy]:
            if at < extent.count * BLOCK:
                byte = bytearray(1)
                offset = extent.block * BLOCK + at
                self.devices[extent.device].read(offset, (byte,))
                self.devices[extent.device].write(offset, (bytes([byte[0] ^ 4]),))
                return
            at -= extent.count * BLOCK


@pytest.fixture
def rig(make_image: Callable[[int], Path]) -> Iterator[Rig]:
    rig = Rig(make_image)
    yield rig
    rig.store.close()


EDGES = [0, 1, BLOCK - 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 50 * BLOCK - 1, 50 * BLOCK, len(DATA) - 1]


class TestReading:
    @pytest.mark.parametrize("start", EDGES)
    def test_any_range(self, rig: Rig, start: int) -> None:
        for end in (*EDGES, len(DATA)):
            if start <= end:
                assert rig.read(start, end - start) == DATA[start:end]
                assert rig.read_now(start, end - start) == DATA[start:end]

    def test_a_range_reads_only_its_chunks(self, rig: Rig) -> None:
        for copy in (0, 1):
            rig.damage(copy, 0)
        assert rig.read(CHUNK_BYTES, 10) == DATA[CHUNK_BYTES : CHUNK_BYTES + 10]

    def test_every_flipped_byte_of_a_chunk_is_noticed(self, rig: Rig) -> None:
        for at in range(5 * CHUNK_BYTES, len(DATA), 7):
            rig.damage(0, at)
            assert rig.read_now(5 * CHUNK_BYTES, 700) is None
            assert rig.read(5 * CHUNK_BYTES, 700) == DATA[5 * CHUNK_BYTES :][:700]
            rig.damage(0, at)

    @pytest.mark.parametrize("copy", [0, 1])
    def test_a_damaged_copy_gives_way_to_the_other(self, rig: Rig, copy: int) -> None:
        rig.damage(copy, 3 * CHUNK_BYTES)
        assert rig.read() == DATA

    def test_two_copies_that_are_damaged_in_different_places_make_one(self, rig: Rig) -> None:
        rig.damage(0, CHUNK_BYTES)
        rig.damage(1, 4 * CHUNK_BYTES)
        assert rig.read() == DATA

    def test_no_copy_is_right(self, rig: Rig) -> None:
        rig.damage(0, 100)
        rig.damage(1, CHUNK_BYTES - 1)
        with pytest.raises(Damaged, match=r"bytes 0 to 65535, .* any of 2 copies"):
            rig.read()
        assert rig.read(CHUNK_BYTES, CHUNK_BYTES) == DATA[CHUNK_BYTES : 2 * CHUNK_BYTES]

    @pytest.mark.parametrize("gone", [0, 1, 2])
    def test_a_device_that_fails_to_read_is_replaced_by_the_other_copy(self, rig: Rig, gone: int) -> None:
        rig.devices[gone].fail_reads = True
        assert rig.read() == DATA

    @pytest.mark.parametrize("gone", [0, 1, 2])
    def test_a_missing_device_is_not_even_tried(self, rig: Rig, gone: int) -> None:
        rig.store.retire(rig.slots[gone], "it was pulled out")
        assert rig.read() == DATA
        assert rig.read_now() == DATA

    def test_each_chunk_comes_from_a_device_that_is_there(self, rig: Rig) -> None:
        rig.store.retire(rig.slots[1], "it was pulled out")
        rig.damage(1, 0)
        assert rig.read() == DATA

    @pytest.mark.parametrize("damaged", [0, 1])
    def test_a_copy_that_cannot_be_asked_is_not_called_damaged(self, rig: Rig, damaged: int) -> None:
        rig.damage(damaged, 0)
        rig.store.retire(rig.slots[COPIES[1 - damaged][0].device], "it was pulled out")
        with pytest.raises(DeviceError, match=r"cannot be read: device .* is missing: it was pulled out"):
            rig.read(0, 10)

    def test_an_object_whose_devices_are_missing_says_which(self, rig: Rig) -> None:
        rig.store.retire(rig.slots[2], "it was pulled out")
        rig.store.retire(rig.slots[0], "it burnt")
        with pytest.raises(DeviceError, match=r"device 0 .* is missing: it burnt"):
            rig.read(0, 10)

    def test_the_copies_share_the_load(self, rig: Rig) -> None:
        turns = set()
        for last in (0, 1):
            key = ObjKey(bytes(15) + bytes([last]), "xxh3-128", b"", len(DATA))
            record = Record(encode_record(key, 1, 0, COPIES, chunk_sums(DATA), b"", b"", b""))
            turns.add(rig.store.preferred(record))
        assert turns == {0, 1}

    def test_an_empty_object(self, rig: Rig) -> None:
        raw = encode_record(ObjKey(bytes(16), "xxh3-128", b"", 0), 1, 0, [[Extent(0, 1280, 1)]], b"", b"", b"", b"")
        for wait in (True, False):
            data = rig.store.read(Record(raw), 0, 0, wait=wait)
            assert data is not None
            assert data.tobytes() == b""

    def test_one_copy_is_verified_by_itself(self, rig: Rig) -> None:
        rig.damage(1, 2 * CHUNK_BYTES)
        assert rig.store.verify(rig.record, 0, 0, len(DATA))
        assert not rig.store.verify(rig.record, 1, 0, len(DATA))
        assert rig.store.verify(rig.record, 1, 3 * CHUNK_BYTES, CHUNK_BYTES)


class TestFlushing:
    def test_all_devices_that_failed_are_told(self, rig: Rig) -> None:
        rig.devices[0].fail_flushes = 1
        rig.devices[2].fail_flushes = 1
        assert set(rig.store.flush([0, 1, 2])) == {0, 2}
        assert [device.flush_count for device in rig.devices] == [0, 1, 0]
        assert [slot.state for slot in rig.slots] == ["failed", "online", "failed"]
        assert "a flush failed" in rig.slots[0].reason
        assert rig.store.writable_indices() == [1]

    def test_a_failed_device_is_not_asked_again(self, rig: Rig) -> None:
        rig.devices[0].strict = False  # as a kernel, it would say yes the second time
        rig.devices[0].fail_flushes = 1
        assert set(rig.store.flush([0])) == {0}
        assert set(rig.store.flush([0])) == {0}
        with pytest.raises(DeviceError, match="takes no writes"):
            rig.store.write(Extent(0, 1280, 1), (b"x",))
        with pytest.raises(DeviceError, match="takes no writes"):
            rig.store.erase([Extent(0, 1280, 1)])
        assert rig.read() == DATA

    def test_nothing_to_flush(self, rig: Rig) -> None:
        assert rig.store.flush([]) == {}

    def test_each_flush_is_timed(self, rig: Rig) -> None:
        rig.store.flush([0, 1])
        assert [sum(slot.flush_s.counts) for slot in rig.slots] == [1, 1, 0]


def content(rig: Rig, extent: Extent) -> bytes:
    data = bytearray(extent.count * BLOCK)
    rig.devices[extent.device].read(extent.block * BLOCK, (data,))
    return bytes(data)


class TestErasing:
    def test_zero(self, rig: Rig) -> None:
        before = content(rig, Extent(0, 1281, 49))
        rig.store.erase([Extent(0, 1280, 1), Extent(2, 1400, 62)])
        assert content(rig, Extent(0, 1280, 1)) == bytes(BLOCK)
        assert content(rig, Extent(2, 1400, 62)) == bytes(62 * BLOCK)
        assert content(rig, Extent(0, 1281, 49)) == before

    @pytest.mark.parametrize("policy", ["discard", "none"])
    def test_whatever_the_policy_the_footer_goes(self, make_image: Callable[[int], Path], policy: ErasePolicy) -> None:
        rig = Rig(make_image, policy)
        extent = COPIES[0][0]
        before = content(rig, extent)
        rig.store.erase([extent])
        after = content(rig, extent)
        assert after[-BLOCK:] == bytes(BLOCK)
        assert (after[:-BLOCK] == before[:-BLOCK]) == (policy == "none")
        rig.store.close()


UUIDS = [b"a" * 16, b"b" * 16]


def label(device: BlockDevice, generation: int = 1) -> Label:
    return Label(
        pool_uuid=b"p" * 16,
        pool_name="",
        device_uuid=UUIDS[0],
        device_index=0,
        block_size=BLOCK,
        block_count=device.size // BLOCK,
        secret=bytes(32),
        created_ns=0,
        generation=generation,
        members=(Member(UUIDS[0], 0, device.size // BLOCK, generation),),
    )


@pytest.fixture(params=["image", pytest.param("raw", marks=pytest.mark.root)])
def device(request: pytest.FixtureRequest, make_image: Callable[[int], Path]) -> Iterator[BlockDevice]:
    path = make_image(SIZE + 512) if request.param == "image" else request.getfixturevalue("make_loop")(SIZE)
    with closing(open_device(path)) as device:
        yield device


OFFSETS = [0, 8 * MIB, 15 * MIB]


class Ordered(VolatileDevice):
    """Notes for each write where it went, and how many flushes came before it."""

    def __init__(self, below: BlockDevice) -> None:
        super().__init__(below)
        self.writes: list[tuple[int, int]] = []

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.writes.append((offset, self.flush_count))
        super().write(offset, buffers)


class TestLabels:
    def test_a_blank_device_has_none(self, device: BlockDevice) -> None:
        assert read_label(device) is None

    @pytest.mark.parametrize("size", [0, 512, LABEL_BYTES - 512, LABEL_BYTES, MIB // 2, MIB, 3 * MIB])
    def test_a_blank_device_of_any_size_has_none(self, make_image: Callable[[int], Path], size: int) -> None:
        with closing(open_device(make_image(size))) as small:
            assert read_label(small) is None

    def test_it_stands_in_three_places(self, device: BlockDevice) -> None:
        written = label(device)
        write_label(device, written)
        data = written.encode()
        for offset in OFFSETS:
            found = bytearray(len(data))
            device.read(offset, (found,))
            assert found == data

    @pytest.mark.parametrize("bad", [[0], [1], [2], [0, 1], [0, 2], [1, 2]], ids=str)
    @pytest.mark.parametrize("damage", [b"\0" * 4096, b"\xff" * 4096, b"\x01"], ids=["zeros", "ones", "a byte"])
    def test_any_good_copy_will_do(self, device: BlockDevice, bad: list[int], damage: bytes) -> None:
        written = label(device)
        write_label(device, written)
        for number in bad:
            device.write(OFFSETS[number] + 200 * (len(damage) == 1), (damage,))
        assert read_label(device) == written

    def test_three_bad_copies_are_damage_not_absence(self, device: BlockDevice) -> None:
        write_label(device, label(device))
        for offset in OFFSETS:
            device.write(offset + 200, (b"\x01",))
        with pytest.raises(FormatError, match="checksum"):
            read_label(device)

    def test_what_cannot_be_read_is_not_called_damaged(self, device: BlockDevice) -> None:
        write_label(device, label(device))
        device.close()
        with pytest.raises(DeviceError):
            read_label(device)

    def test_firmware_that_zeroes_the_first_blocks_loses_nothing(self, device: BlockDevice) -> None:
        written = label(device)
        write_label(device, written)
        device.zero(0x1000, 0x3000)
        assert read_label(device) == written

    def test_an_update_that_a_crash_cut_short_leaves_the_newer_one(self, device: BlockDevice) -> None:
        write_label(device, label(device, generation=1))
        device.write(0, (label(device, generation=2).encode(),))
        found = read_label(device)
        assert found is not None
        assert found.generation == 2

    def test_a_crash_after_a_crash_leaves_the_newest_label_there_was(self, seed: int) -> None:
        """Though the first one has left only one, and the next ones come while the others are being mended."""
        chance = random.Random(seed)
        media = [medium for medium in self.crashed({}, 1, chance) if self.generation(medium)]
        for generation in (2, 3):
            crashed = [(self.generation(medium), self.crashed(medium, generation, chance)) for medium in media]
            assert all(self.generation(left) >= before for before, found in crashed for left in found)
            media = chance.sample([left for _, found in crashed for left in found], 60)

    def crashed(self, medium: Sectors, generation: int, chance: random.Random) -> list[Sectors]:
        """What a crash may leave of the device while a label is written."""
        recording = Recording({0: medium})
        device = VolatileDevice(MemoryDevice(SIZE, medium), record=recording)
        write_label(device, label(device, generation=generation))
        return [state.media[0] for state in recording.states(chance, 1)]

    def generation(self, medium: Sectors) -> int:
        """Of the newest label; 0 if no copy is good."""
        try:
            found = read_label(MemoryDevice(SIZE, medium))
        except FormatError:
            return 0
        return 0 if found is None else found.generation

    def test_an_update_writes_the_first_copy_durably_before_the_others(self, device: BlockDevice) -> None:
        write_label(device, label(device, generation=1))
        ordered = Ordered(device)
        write_label(ordered, label(device, generation=2))
        assert ordered.writes == [(0, 0), (8 * MIB, 1), (15 * MIB, 2)]
        assert ordered.flush_count == 3

    def test_a_foreign_copy_is_refused(self, device: BlockDevice) -> None:
        write_label(device, label(device))
        foreign = replace(label(device, generation=9), device_uuid=UUIDS[1], pool_uuid=b"q" * 16)
        device.write(OFFSETS[2], (foreign.encode(),))
        with pytest.raises(FormatError, match="different devices or pools"):
            read_label(device)


def test_a_device_that_comes_and_goes_takes_no_more_of_us_each_time(make_image: Callable[[int], Path]) -> None:
    """But who reads from it at that moment finds nothing else in its place."""
    image = make_image(SIZE)
    slot = Slot(0, bytes(16), Geometry(SIZE // BLOCK, BLOCK), open_device(image))
    store = BlockStore(BLOCK, [slot])
    reader = store.device(0)
    store.retire(slot, "it was removed")
    with pytest.raises(DeviceError, match="it was removed"):
        reader.read(0, [bytearray(BLOCK)])
    del reader
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        slot.device = open_device(image)
        slot.device.reread(0, [bytearray(BLOCK)])
        store.retire(slot, "it was removed")
    assert len(os.listdir("/proc/self/fd")) == open_files
    store.close()
