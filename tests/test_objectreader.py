"""What a small read costs once the chunk has been compared: a small read."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence

import pytest

from rustord.blockdevice import BlockDevice, Buffer, ImageFile
from rustord.manifest import CHUNK_BYTES
from rustord.objectexport import ObjectExport
from rustord.objectreader import ObjectReader
from rustord.objectstore import ObjectStore
from rustord.volumes import Volumes
from rustord.writer import Writer

MIB = 1 << 20
PAGE = 4096
DATA = os.urandom(MIB)


@pytest.fixture
def writer(store: ObjectStore) -> Iterator[Writer]:
    writer = Writer(store)
    yield writer
    assert writer.close()


@pytest.fixture
def volumes(store: ObjectStore, writer: Writer) -> Volumes:
    return Volumes(store, writer)


@pytest.fixture
def reads(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what is read from the device."""
    lengths: list[int] = []

    def note(name: str) -> None:
        original = getattr(ImageFile, name)

        def read(self: BlockDevice, offset: int, buffers: Sequence[Buffer]) -> bool:
            lengths.append(sum(map(len, buffers)))
            answer: bool = original(self, offset, buffers)
            return answer

        monkeypatch.setattr(ImageFile, name, read)

    note("read")
    note("read_now")
    return lengths


def test_a_page_of_a_compared_chunk_is_read_alone(store: ObjectStore, reads: list[int]) -> None:
    reader = ObjectReader(store.blocks, store.stat(store.put(DATA).uuid))
    page = memoryview(bytearray(PAGE))
    for expected in (CHUNK_BYTES, PAGE, PAGE):
        reads.clear()
        assert reader.read_now(PAGE, page)
        assert (bytes(page), reads) == (DATA[PAGE : 2 * PAGE], [expected])


def test_so_is_one_of_a_frozen_volume(store: ObjectStore, volumes: Volumes, reads: list[int]) -> None:
    volumes.create("disk", MIB)
    volume = volumes.open("disk")
    volume.write(0, memoryview(DATA))
    volume.close()
    frozen = ObjectExport(store, store.pins.begin_export(volumes.freeze("disk").uuid))
    page = memoryview(bytearray(PAGE))
    frozen.read(PAGE, page)
    reads.clear()
    frozen.read(2 * PAGE, page)
    assert (bytes(page), reads) == (DATA[2 * PAGE : 3 * PAGE], [PAGE])
    frozen.close()


def test_and_one_that_a_clone_has_from_its_image(store: ObjectStore, volumes: Volumes, reads: list[int]) -> None:
    store.put(DATA, name="image")
    volumes.clone("image", "disk")
    volume = volumes.open("disk")
    page = memoryview(bytearray(PAGE))
    volume.read(PAGE, page)
    reads.clear()
    volume.read(2 * PAGE, page)
    assert (bytes(page), reads) == (DATA[2 * PAGE : 3 * PAGE], [PAGE])
    volume.close()


def test_an_image_that_is_moved_again_and_again_reads_as_ever(
    store: ObjectStore, writer: Writer, volumes: Volumes, seed: int
) -> None:
    """What was compared before a move is not taken for granted where the Object has left: that is erased by then."""
    image = store.put(DATA, name="image")
    volumes.clone("image", "disk")
    volume = volumes.open("disk")
    random_, ended = random.Random(seed), threading.Event()
    wrong: list[int] = []

    def look() -> None:
        page = memoryview(bytearray(PAGE))
        while not ended.is_set():
            offset = random_.randrange(MIB // PAGE) * PAGE
            volume.read(offset, page)
            if page != DATA[offset : offset + PAGE]:
                wrong.append(offset)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(20):
            record = store.stat(image.uuid)
            ((_, outcome),) = writer.make([store.relocations.prepare(record, record.extents, call=writer.call)], 60)
            assert not isinstance(outcome, Exception), outcome
            store.keystore.checkpoint()
            writer.call(lambda: None)  # now the writer sees that the old blocks are due
    finally:
        ended.set()
        for reader in readers:
            reader.join()
        volume.close()
    assert not wrong
