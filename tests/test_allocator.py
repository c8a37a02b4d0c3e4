"""The Allocator: whatever a Placer says, no block is given out that is not free."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rustord.allocator import Allocator
from rustord.errors import DeviceError, NoSpace, PluginError
from rustord.extent import COUNT_MAX, Extent
from rustord.freelist import FreeList
from rustord.placer import Contiguous, FreeView, Mirrored, Placer, Striped

BLOCKS = 1000
FIRST = 100


def make(placer: Placer, devices: int = 2, writable: Sequence[int] | None = None) -> Allocator:
    allocator = Allocator(placer, lambda: list(range(devices)) if writable is None else writable)
    for device in range(devices):
        allocator.add(device, FreeList([(FIRST, BLOCKS)]), BLOCKS)
    return allocator


def free(allocator: Allocator, devices: int = 2) -> list[int]:
    return [allocator.free_count(device) for device in range(devices)]


class Hostile:
    """A Placer that answers as it is told."""

    name = "hostile"

    def __init__(self, answer: Callable[[FreeView], Any], copies: int = 1) -> None:
        self.copies = copies
        self._answer = answer

    def place(self, count: int, free: FreeView) -> Any:
        return self._answer(free)


def raises(error: Exception) -> Callable[[FreeView], Any]:
    def answer(free: FreeView) -> Any:
        raise error

    return answer


HOSTILE_ANSWERS: dict[str, Callable[[FreeView], Any]] = {
    "nothing": lambda free: None,
    "no copies": lambda free: [],
    "too many copies": lambda free: [[Extent(0, 100, 10)], [Extent(1, 100, 10)]],
    "no extents": lambda free: [[]],
    "too few blocks": lambda free: [[Extent(0, 100, 9)]],
    "too many blocks": lambda free: [[Extent(0, 100, 11)]],
    "an overlap": lambda free: [[Extent(0, 100, 6), Extent(0, 105, 4)]],
    "the same twice": lambda free: [[Extent(0, 100, 5), Extent(0, 100, 5)]],
    "taken blocks": lambda free: [[Extent(0, 150, 10)]],
    "the label": lambda free: [[Extent(0, 0, 10)]],
    "behind the end": lambda free: [[Extent(0, FIRST + BLOCKS - 5, 10)]],
    "a block that no device has": lambda free: [[Extent(0, 1 << 62, 10)]],
    "a negative block": lambda free: [[Extent(0, -10, 10)]],
    "an empty extent": lambda free: [[Extent(0, 100, 10), Extent(0, 120, 0)]],
    "a negative count": lambda free: [[Extent(0, 100, 12), Extent(0, 112, -2)]],
    "an unknown device": lambda free: [[Extent(7, 100, 10)]],
    "plain tuples": lambda free: [[(0, 100, 10)]],
    "a fraction": lambda free: [[Extent(0, 100.5, 10)]],  # type: ignore[arg-type]
    "an error": raises(RuntimeError("boom")),
    "a lookup error": raises(KeyError(3)),
}


@pytest.mark.parametrize("answer", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS.keys())
def test_a_hostile_placer_is_contained(answer: Callable[[FreeView], Any]) -> None:
    allocator = make(Hostile(answer))
    allocator._free[0].take(150, 10)
    before = [list(allocator._free[device]) for device in range(2)]
    with pytest.raises(PluginError, match="'hostile'"):
        allocator.place(10)
    assert [list(allocator._free[device]) for device in range(2)] == before


def test_an_answer_is_read_once() -> None:
    allocator = make(Hostile(lambda free: [(extent for extent in [Extent(0, 100, 10)])]))
    assert allocator.place(10) == [[Extent(0, 100, 10)]]


def test_two_copies_may_not_share_a_block() -> None:
    allocator = make(Hostile(lambda free: [[Extent(0, 100, 10)], [Extent(0, 109, 10)]], copies=2))
    with pytest.raises(PluginError):
        allocator.place(10)
    assert free(allocator) == [BLOCKS, BLOCKS]


def test_a_device_that_takes_no_data_is_not_offered_and_may_not_be_chosen() -> None:
    allocator = make(Hostile(lambda free: [[Extent(0, 100, 10)]]), writable=[1])
    with pytest.raises(PluginError, match="device 0 takes no new data"):
        allocator.place(10)
    offered = make(Contiguous(), writable=[1]).place(10)
    assert [extent.device for copy in offered for extent in copy] == [1]


def test_no_space_is_not_the_placer_s_fault() -> None:
    allocator = make(Contiguous())
    with pytest.raises(NoSpace):
        allocator.place(2 * BLOCKS + 1)
    assert free(allocator) == [BLOCKS, BLOCKS]


def test_a_view_cannot_be_changed_by_changing_the_answer() -> None:
    answer = [[Extent(0, 100, 10)]]
    placed = make(Hostile(lambda free: answer)).place(10)
    answer[0].append(Extent(0, 200, 10))
    assert placed == [[Extent(0, 100, 10)]]


def test_what_is_given_back_can_be_given_out_again() -> None:
    allocator = make(Mirrored(2))
    placed = allocator.place(BLOCKS)
    assert free(allocator) == [0, 0]
    allocator.release(extent for copy in placed for extent in copy)
    assert free(allocator) == [BLOCKS, BLOCKS]
    assert allocator.fragments() == 2


def test_blocks_of_a_removed_device_are_forgotten() -> None:
    allocator = make(Contiguous(), writable=[0, 1])
    placed = allocator.place(10)[0]
    allocator.remove(placed[0].device)
    allocator.release(placed)
    assert [extent.device for extent in allocator.place(10)[0]] == [1 - placed[0].device]


def test_the_view_tells_what_there_is() -> None:
    seen: list[Any] = []

    def answer(free: FreeView) -> Any:
        seen.append((free.devices(), free.size(0), free.free_count(0), free.largest(0)))
        seen.append((free.best_fit(0, 10), free.first_fit(0, 10), list(free.longest_first(0))))
        return [[Extent(0, 100, 10)]]

    make(Hostile(answer)).place(10)
    assert seen == [([0, 1], BLOCKS, BLOCKS, BLOCKS), (100, 100, [(100, BLOCKS)])]


@pytest.mark.parametrize("placer", [Contiguous(), Striped(16), Mirrored(2)], ids=lambda placer: placer.name)
def test_many_threads_never_get_the_same_block(placer: Placer, seed: int) -> None:
    allocator = make(placer)
    held: list[Extent] = []

    def work(chance: random.Random) -> None:
        mine: list[Extent] = []
        for _ in range(150):
            if chance.random() < 0.6:
                try:
                    mine += [extent for copy in allocator.place(chance.randrange(1, 40)) for extent in copy]
                except NoSpace:
                    chance.shuffle(mine)
                    allocator.release(mine[:5])
                    del mine[:5]
            elif mine:
                allocator.release([mine.pop(chance.randrange(len(mine)))])
        held.extend(mine)

    threads = [threading.Thread(target=work, args=(random.Random(seed + number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = {(device, block + at) for device, block, count in held for at in range(count)}
    assert len(taken) == sum(extent.count for extent in held)
    assert sum(free(allocator)) == 2 * BLOCKS - len(taken)
    allocator.release(held)
    assert [list(allocator._free[device]) for device in range(2)] == [[(FIRST, BLOCKS)]] * 2


def test_a_run_that_is_longer_than_an_extent_can_be_is_several() -> None:
    allocator = Allocator(Contiguous(), lambda: [0])
    allocator.add(0, FreeList([(FIRST, 3 * COUNT_MAX)]), 3 * COUNT_MAX)
    (copy,) = allocator.place(COUNT_MAX + 5)
    assert [extent.count for extent in copy] == [COUNT_MAX, 5]
    assert allocator.place_on(2 * COUNT_MAX - 5, lambda device: True)[0].count == COUNT_MAX
    assert allocator.free_count(0) == 0


def test_who_finds_no_device_is_told_why() -> None:
    full = Allocator(Mirrored(2), lambda: [0], lambda: ["device 1 is missing: not found"])
    full.add(0, FreeList([(FIRST, BLOCKS)]), BLOCKS)
    with pytest.raises(DeviceError, match="needs 2 devices, and 1 can take it: device 1 is missing: not found"):
        full.place(10)
    with pytest.raises(NoSpace, match="no device may take"):
        full.place_on(1, lambda device: device != 0)


def test_a_device_that_has_just_left_has_nothing_free() -> None:
    allocator = make(Contiguous())
    allocator.remove(1)
    assert free(allocator) == [BLOCKS, 0]


def test_what_is_on_a_device_that_leaves_keeps_its_room_elsewhere() -> None:
    leaving: list[int] = []
    allocator = Allocator(Contiguous(), lambda: [i for i in (0, 1, 2) if i not in leaving], leaving=lambda: leaving)
    for device in range(3):
        allocator.add(device, FreeList([(FIRST, BLOCKS)]), BLOCKS)
    for count in (400, 200, 200):
        allocator.place(count)
    leaving.append(0)  # with 400 blocks, and the two others have 800 free on each
    assert free(allocator, 3) == [600, 800, 800]
    (first,) = allocator.place(700)
    with pytest.raises(NoSpace, match="900 are free, of which 400 are set aside for what is on device 0"):
        allocator.place(501)
    assert sum(extent.count for extent in allocator.place_on(400, lambda device: device != 0)) == 400
    allocator.release([Extent(0, FIRST, 400)])
    allocator.place(500)
    assert free(allocator, 3) == [1000, 0, 0]
    allocator.release(first)
