"""What happens to a pool while it is recorded: each scenario brings about some order of writes that must be right."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

from rustord.errors import DeviceError
from rustord.extent import Extent
from rustord.page import CHUNK_BYTES
from rustord.placer import Contiguous, FreeView, Mirrored, Placer, Striped
from tests.crash.disks import Disks
from tests.crash.story import Content, Stage, Story
from tests.simulation import MIB

DEVICE_BYTES = 16 * MIB
RING_BLOCKS = 1024
"""The journal of such a device."""


class Scenario(NamedTuple):
    """``play`` makes a pool on ``device_count`` devices and works on it; what is before `Recording.mark` is not cut."""

    play: Callable[[Stage], None]
    device_count: int = 1
    placer: Placer = Contiguous()

    @property
    def name(self) -> str:
        return f"{self.play.__name__}-{self.placer.name}-{self.device_count}"

    def __str__(self) -> str:
        return self.name


class OnFirst:
    """A Placer that uses the first device only, from the first free block on: what was freed is used again at once."""

    name = "on-first"
    copies = 1

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        device = free.devices()[0]
        block = free.first_fit(device, count)
        assert block is not None
        return [[Extent(device, block, count)]]


class OnDevice:
    """A Placer that uses one device only, which may be another one later."""

    name = "on-device"
    copies = 1

    def __init__(self, number: int) -> None:
        self.number = number

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        block = free.best_fit(self.number, count)
        assert block is not None
        return [[Extent(self.number, block, count)]]


def some(number: int, length: int, name: str = "", **attributes: str) -> Content:
    """A Content; each ``number`` has data of its own, so that what is left of it on a device can be told."""
    data = random.Random(number).randbytes(length)
    return Content(data, name, "text/plain" if name else "", tuple(attributes.items()))


def making_a_pool(stage: Stage) -> None:
    stage.create()
    store = stage.open()
    Story(stage, store).put(some(0, 100, "first"))
    store.close()


def putting(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 0), some(2, 100, "a", author="me"), some(3, 5000))
    story.put(some(4, 70_000, "b"))
    story.put(some(5, 4096 * 3))


def replacing_and_deleting(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 9000, "a"), some(2, 4096, "b"), some(3, 12_000))
    story.put(some(4, 5000, "a"))
    story.delete(story.named("b"))
    story.put(some(5, 9000), some(6, 3000, "b"))  # on blocks that have been given back
    story.change(some(7, 200, "a"), *story.uuids[:1])


def deleting_many(stage: Stage) -> None:
    """The tombstones of one cycle fill several sectors of the journal."""
    story = opened(stage)
    story.put(*(some(number, 100) for number in range(30)))
    story.delete(*story.uuids)


def using_freed_blocks_at_once(stage: Stage) -> None:
    """The index stays behind all of it, so the journal has Objects whose blocks are others' by now."""
    story = opened(stage)
    for turn in range(3):
        story.put(some(turn, 10_000, "a"), some(turn + 20, 6000))
        story.delete(story.uuids[-1])


def using_freed_blocks_after_a_crash(stage: Stage) -> None:
    """What the journal says of the time before the crash, nothing proves any more."""
    story = opened(stage)
    story.put(some(1, 9000, "a"))
    story.put(some(2, 9000, "a"))
    story = stage.restart()
    story.delete(story.named("a"))
    story.put(some(3, 5000))
    story.put(some(4, 5000, "b"))


def indexing(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 5000, "a"))
    story.checkpoint()
    story.put(some(2, 5000, "a"), some(3, 100, "b"))
    story.change(story.named("b"), turns=1)  # its blocks are not erased yet
    story.checkpoint()
    story.put(some(4, 6000, "c"))
    story.checkpoint()
    story.delete(story.named("c"))


def going_around_the_journal(stage: Stage) -> None:
    """The last batches are written over the first ones, which the index has."""
    story = nearly_around(stage, indexing=True)
    for turn in range(3):
        story.put(some(60 + turn, 5000, f"late{turn}"))
        story.delete(story.named(f"early{turn}"))
    story.checkpoint()
    story.put(some(70, 5000, "last"))


def filling_the_journal(stage: Stage) -> None:
    """The ring is full, and nothing of it is in the index yet."""
    story = nearly_around(stage, indexing=False)
    for turn in range(4):
        story.put(some(60 + turn, 5000, f"late{turn}"))


def nearly_around(stage: Stage, *, indexing: bool) -> Story:
    """A Story on a pool in whose journal all but a few blocks have been used; what was before is not cut."""
    stage.create()
    story = Story(stage, stage.open())
    story.put(*(some(number, 600, f"early{number}") for number in range(5)))
    fill_journal(story, indexing=indexing)
    stage.recording.mark()
    return story


def fill_journal(story: Story, *, indexing: bool) -> None:
    """Have all but a few blocks of the journal used."""
    ring = story.store.keystore._rings[0]
    number = count(100)
    while ring.block < RING_BLOCKS - 60:  # records of 8 KiB, 20 in a batch
        story.put(*(some(next(number), 10, f"often{turn}", pad="x" * 8000) for turn in range(20)))
        if indexing:
            story.checkpoint()
    while ring.block < RING_BLOCKS - 3:
        story.put(some(next(number), 10, "often"))


def uploading(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 3000, "a"))
    story.upload(some(2, 200_000, "a"), piece=130_000)
    story.upload(some(3, 140_000), declare=True)
    story.upload(some(4, 140_000, "b"), abort=True)
    story.put(some(5, 140_000))


def closing_and_opening(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 5000, "a"))
    story.change(*story.uuids, turns=1)
    story.reopen()
    story.put(some(2, 5000, "a"))
    story.reopen()
    story.put(some(3, 5000, "a"))
    story.store.close()


def crashing_often(stage: Stage) -> None:
    """Openings that find much to do: no index, a grave, a torn last batch."""
    story = opened(stage)
    for turn in range(3):
        story.put(some(turn, 8000, "a"), some(turn + 20, 100_000))
        story.change(story.uuids[-1], turns=1)
        story = stage.restart(lose_index=turn == 1)


def adding_a_device(stage: Stage) -> None:
    story = opened(stage)
    story.put(some(1, 5000, "a"))
    story.add()
    story.put(*(some(number, 9000) for number in range(2, 5)))
    story.reopen()
    story.put(some(6, 3000, "a"))


def removing_a_device(stage: Stage) -> None:
    stage.placer = OnFirst()
    story = opened(stage)
    story.put(some(1, 5000, "a"), some(2, 5000))
    story.remove(1)
    story.put(some(3, 3000, "a"))
    story.reopen()


def failing_flush(stage: Stage) -> None:
    """The flush of one of two devices fails: what was on it is taken back."""
    story = opened(stage)
    story.put(some(1, 5000, "a"), some(2, 9000, "b"))
    stage.devices[1].fail_flushes = 1
    story.put(some(3, 6000, "a"), some(4, 100))
    story.took_back()
    story.put(some(5, 100, "c"))
    story.change(story.named("b"))


def failing_to_take_back(stage: Stage) -> None:
    """Both devices of an Object fail, one when it is stored and one when that is to be undone; the others go on."""
    story = opened(stage)
    story.put(some(1, 5000, "a"), some(2, 5000))
    first, second = (stage.devices[extent.device] for extent in story.store.stat(story.named("a")).extents)
    second.fail_flushes = 1
    story.change(some(3, 5000, "b"), turns=1)
    first.fail_flushes = 1
    story.change()
    story.put(some(4, 5000, "b"))
    story.put(some(5, 5000))


def deleting_and_putting_at_once(stage: Stage) -> None:
    """Each cycle stores something while the one before it is still erasing."""
    story = opened(stage)
    story.put(some(1, 9000), some(2, 9000), some(3, 9000, "a"))
    for turn in range(3):
        first = story.store.cycle(story.asked(story.uuids[0]))
        story.learn(first)
        story.learn(story.store.cycle([*first.following, *story.asked(some(10 + turn, 9000), some(20 + turn, 500))]))


def failing_flush_of_one(stage: Stage) -> None:
    """A device fails whose Objects are on no other; the other device goes on."""
    placer = stage.placer = OnDevice(1)
    story = opened(stage)
    story.put(some(1, 5000, "a"), some(2, 9000, "b"))
    stage.devices[1].fail_flushes = 1
    story.put(some(3, 6000), some(4, 100))
    placer.number = 0
    for turn in range(3):
        story.put(some(5 + turn, 100))


def failing_erasure(stage: Stage) -> None:
    """The only device fails when an erasure is to be flushed."""
    story = opened(stage)
    story.put(some(1, 5000, "a"), some(2, 9000, "b"))
    story.change(story.named("a"), turns=1)
    stage.devices[0].fail_flushes = 1
    story.change()
    story.checkpoint()


def moving(stage: Stage) -> None:
    """Objects go to other blocks; some are replaced, deleted or moved again while the index does not know of it."""
    story = opened(stage)
    story.put(some(1, 9000, "a"), some(2, 70_000, "b"), some(3, 100))
    story.move(story.named("a"))
    story.put(some(4, 5000, "c"))
    story.move(story.named("b"))
    story.move(story.named("b"))
    story.checkpoint()
    story.put(some(5, 5000, "a"))
    story.move(story.named("a"))
    story.delete(story.named("a"))
    story.put(some(6, 9000))
    story.checkpoint()
    story.put(some(7, 9000))


def moving_slowly(stage: Stage) -> None:
    """Other changes come in between copying and moving, and the index knows of copies; two of them are given up."""
    story = opened(stage)
    story.put(some(1, 9000, "a"), some(2, 70_000, "b"), some(3, 5000, "c"), some(4, 5000, "d"))
    moves = {name: story.copy(story.named(name)) for name in "abc"}
    story.checkpoint()
    story.put(some(5, 9000, "a"))  # the other one is gone
    story.move(story.named("d"))
    moves["b"].source.abort()
    story.follow([moves["a"], moves["c"]])
    story.checkpoint()
    story.delete(story.named("b"))
    story.delete(story.named("c"))
    late = story.copy(story.named("d"))
    story.delete(story.named("d"))
    story.put(some(6, 70_000))
    story.follow([late])


def copying_while_the_journal_goes_around(stage: Stage) -> None:
    """What says that blocks are being filled stands at the end of the ring, and is to be overwritten."""
    story = nearly_around(stage, indexing=True)
    story.put(some(50, 9000, "moved"))
    move = story.copy(story.named("moved"))
    story.put(*(some(80 + turn, 10, f"often{turn}", pad="x" * 8000) for turn in range(20)))
    fill_journal(story, indexing=True)
    stage.recording.mark()
    story.put(some(60, 5000, "late"))
    story.checkpoint()
    story.put(some(61, 5000, "late"))
    move.source.abort()
    story.change()
    story.put(some(62, 5000, "late"))


def condemning(stage: Stage) -> None:
    """Blocks that are bad are never used again; their table fills several sectors."""
    story = opened(stage)
    story.condemn(*(Extent(0, block, 1) for block in range(2200, 2300, 2)))
    stage.recording.mark()
    story.put(some(1, 9000, "a"))
    story.condemn(Extent(0, 1300, 2))
    story.put(some(2, 9000))
    story.condemn(Extent(0, 2500, 1), Extent(0, 1310, 1))
    story.reopen()
    story.condemn(Extent(0, 1302, 1))


def writing_a_volume(stage: Stage) -> None:
    disks = Disks(opened(stage))
    disks.create("disk", 4)
    disks.write("disk", 500, some(1, 3000).data)
    disks.flush("disk")
    disks.write("disk", 70_000, some(2, 70_000).data)
    disks.write("disk", 1000, some(3, 5000).data)  # in place
    disks.flush("disk")
    disks.trim("disk", 1)
    disks.flush("disk")
    disks.delete("disk")


def moving_a_volume(stage: Stage) -> None:
    """Chunks go to other blocks, both of a volume that is written and of what it was before a snapshot."""
    disks = Disks(opened(stage))
    disks.create("disk", 3)
    disks.write("disk", 500, some(1, 90_000).data)
    disks.flush("disk")
    disks.move()
    disks.write("disk", 70_000, some(2, 3000).data)
    disks.snapshot("disk", Content(disks.newest("disk"), "snapshot"))
    disks.write("disk", 0, some(3, CHUNK_BYTES).data)
    disks.flush("disk")
    disks.move()
    disks.trim("disk", 0)
    disks.flush("disk")


def moving_a_volume_between_devices(stage: Stage) -> None:
    """Its map stays on one device while its chunks go to another one and back; meanwhile it is written and trimmed."""
    disks = Disks(opened(stage))
    disks.create("disk", 3)
    disks.write("disk", 0, some(1, 2 * CHUNK_BYTES).data)
    disks.flush("disk")
    home = disks.home("disk")
    disks.move(home)
    disks.write("disk", 70_000, some(2, 3000).data)
    disks.flush("disk")
    disks.trim("disk", 0)
    disks.write("disk", 140_000, some(3, 3000).data)
    disks.flush("disk")
    disks.move(1 - home)
    disks.snapshot("disk", Content(disks.newest("disk"), "snapshot"))
    disks.move(home)
    disks.write("disk", 0, some(4, 3000).data)
    disks.flush("disk")


def freezing_and_cloning(stage: Stage) -> None:
    """A volume becomes an Object without a byte being moved, and volumes share that until the last is gone."""
    story = opened(stage)
    disks = Disks(story)
    data = some(1, 70_000).data
    disks.create("disk", 3)
    disks.write("disk", 0, data)
    disks.freeze("disk", Content(data + bytes(3 * CHUNK_BYTES - len(data)), "image"))
    disks.clone("image", "copy")
    disks.write("copy", 65_000, some(2, 3000).data)
    disks.flush("copy")
    story.delete(story.named("image"))
    disks.write("copy", 10_000, some(3, 3000).data)
    disks.flush("copy")


def cloning_an_object(stage: Stage) -> None:
    """What a clone builds on stays when the Object is deleted, and goes with the clone."""
    story = opened(stage)
    story.put(some(1, 2 * CHUNK_BYTES, "image"))
    disks = Disks(story)
    disks.clone("image", "copy")
    story.delete(story.named("image"))
    disks.write("copy", 3000, some(2, 3000).data)
    disks.flush("copy")
    story.put(some(3, 9000))
    disks.delete("copy")


def deleting_a_clone_after_a_crash(stage: Stage) -> None:
    """What a clone had copied, and not flushed, is to be gone with the clone and its base."""
    story = opened(stage)
    story.put(some(1, 3 * CHUNK_BYTES, "image"))
    disks = Disks(story)
    disks.clone("image", "copy")
    for chunk in range(3):
        disks.write("copy", chunk * CHUNK_BYTES + 3000, some(2 + chunk, 3000).data)
    story = stage.restart()
    Disks(story).delete("copy")
    story.delete(story.named("image"))
    story.put(some(9, 3000))


def keeping_a_map(stage: Stage) -> None:
    """The journal has gone around since, so that the slots alone have the map of a volume if the index is lost."""
    story = opened(stage)
    disks = Disks(story)
    disks.create("disk", 3)
    disks.write("disk", 0, some(1, 3000).data)
    disks.flush("disk")
    story = stage.restart()
    fill_journal(story, indexing=True)
    stage.recording.mark()
    disks = Disks(story)
    for turn in range(3):
        story.put(some(60 + turn, 5000, f"late{turn}"))
        disks.write("disk", (turn + 1) * 50_000, some(70 + turn, 3000).data)
        disks.flush("disk")
        story.checkpoint()


def failing_to_make_a_volume(stage: Stage) -> None:
    """The pool goes on with it all the same; later the journal does not tell of it any more."""
    story = opened(stage)
    disks = Disks(story)
    disks.create("disk", 2)
    stage.devices[0].fail_flushes = 1
    with suppress(DeviceError):
        disks.create("other", 2)
    story.reopen()
    disks = Disks(story)
    disks.write("other", 70_000, some(1, 3000).data)
    disks.flush("other")
    disks.settle()
    story.put(*(some(number, 3000) for number in range(2, 6)))  # on blocks that seem to be free
    fill_journal(story, indexing=True)
    stage.recording.mark()
    disks.write("other", 1000, some(7, 3000).data)
    disks.flush("other")
    story.put(some(8, 5000, "last"))
    story.checkpoint()


def opened(stage: Stage) -> Story:
    """A Story on a new pool, which is not itself to be cut."""
    stage.create()
    stage.recording.mark()
    return Story(stage, stage.open())


def _scenarios() -> Any:
    yield Scenario(making_a_pool)
    yield Scenario(making_a_pool, 2, Mirrored(2))
    for play in (putting, replacing_and_deleting, indexing, uploading):
        yield Scenario(play)
        yield Scenario(play, 2, Mirrored(2))
    yield Scenario(replacing_and_deleting, 2, Striped(2))
    yield Scenario(putting, 2, Striped(2))
    yield Scenario(using_freed_blocks_after_a_crash, 1, OnFirst())
    for play in (using_freed_blocks_at_once, going_around_the_journal, closing_and_opening, crashing_often):
        yield Scenario(play, 1, OnFirst())
    yield Scenario(crashing_often, 2, Mirrored(2))
    yield Scenario(adding_a_device)
    yield Scenario(adding_a_device, 2, Mirrored(2))
    yield Scenario(removing_a_device, 2)
    yield Scenario(deleting_many)
    yield Scenario(moving)
    yield Scenario(moving, 3, Mirrored(2))
    yield Scenario(moving_slowly)
    yield Scenario(moving_slowly, 2, Striped(1))
    yield Scenario(copying_while_the_journal_goes_around)
    yield Scenario(condemning)
    yield Scenario(writing_a_volume)
    yield Scenario(writing_a_volume, 2, Striped(2))
    yield Scenario(moving_a_volume)
    yield Scenario(moving_a_volume, 2)
    yield Scenario(moving_a_volume_between_devices, 2)
    yield Scenario(freezing_and_cloning)
    yield Scenario(cloning_an_object, 2, Mirrored(2))
    yield Scenario(deleting_a_clone_after_a_crash)
    yield Scenario(keeping_a_map)
    yield Scenario(failing_to_make_a_volume)
    yield Scenario(deleting_and_putting_at_once, 1, OnFirst())
    yield Scenario(filling_the_journal, 1, OnFirst())
    yield Scenario(failing_flush, 2, Mirrored(2))
    yield Scenario(failing_flush_of_one, 2)
    yield Scenario(failing_to_take_back, 4, Mirrored(2))
    yield Scenario(failing_erasure)


SCENARIOS: list[Scenario] = list(_scenarios())
