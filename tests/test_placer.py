"""The Placers on real FreeLists: what they pick, and that it can be taken whenever enough blocks are free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import ConfigError, NoSpace
from rustord.extent import Extent
from rustord.freelist import FreeList
from rustord.placer import Contiguous, FirstFit, Mirrored, Placer, Striped


class Devices:
    """A FreeView of the given free extents by device; devices have 1,000 blocks."""

    def __init__(self, extents: dict[int, list[tuple[int, int]]]) -> None:
        self.lists = {device: FreeList(runs) for device, runs in extents.items()}

    def devices(self) -> Sequence[int]:
        return list(self.lists)

    def size(self, device: int) -> int:
        return 1000

    def free_count(self, device: int) -> int:
        return self.lists[device].free_count

    def largest(self, device: int) -> int:
        return self.lists[device].largest()

    def best_fit(self, device: int, count: int) -> int | None:
        return self.lists[device].best_fit(count)

    def first_fit(self, device: int, count: int) -> int | None:
        return self.lists[device].first_fit(count)

    def longest_first(self, device: int) -> Iterator[tuple[int, int]]:
        return self.lists[device].longest_first()

    def take(self, copies: Sequence[Sequence[Extent]]) -> None:
        """What the core does with a choice: fails for a block that is not free, or is chosen twice."""
        for copy in copies:
            for device, block, count in copy:
                self.lists[device].take(block, count)


@pytest.mark.parametrize("placer", [Contiguous(), FirstFit(), Striped(), Mirrored()], ids=lambda placer: placer.name)
def test_a_placer_has_a_name_for_the_manifest(placer: Placer) -> None:
    assert placer.name.isascii()
    assert 1 <= len(placer.name) <= 32


def test_contiguous_takes_the_shortest_run_that_is_long_enough() -> None:
    free = Devices({0: [(0, 90), (100, 5), (200, 9)]})
    assert Contiguous().place(4, free) == [[(0, 100, 4)]]
    assert Contiguous().place(9, free) == [[(0, 200, 9)]]


def test_contiguous_takes_the_emptiest_device_that_has_a_run() -> None:
    free = Devices({0: [(0, 20)], 1: [(0, 30)], 2: [(block, 5) for block in range(0, 100, 10)]})
    assert Contiguous().place(5, free)[0][0].device == 2
    assert Contiguous().place(6, free) == [[(1, 0, 6)]]


@pytest.mark.parametrize("placer", [Contiguous(), FirstFit()], ids=lambda placer: placer.name)
def test_without_a_long_run_one_device_is_taken_and_as_few_extents_as_possible(placer: Placer) -> None:
    free = Devices(
        {
            0: [(block, 2) for block in range(0, 500, 10)],
            1: [(0, 3), (10, 1), (20, 6), (30, 5), (40, 7)],
            2: [(0, 7), (10, 1)],
        }
    )
    assert placer.place(14, free) == [[(1, 20, 6), (1, 30, 1), (1, 40, 7)]]


@pytest.mark.parametrize("placer", [Contiguous(), FirstFit()], ids=lambda placer: placer.name)
def test_what_no_device_can_hold_alone_goes_on_as_few_as_possible(placer: Placer) -> None:
    free = Devices({0: [(0, 3)], 1: [(0, 4), (10, 5)], 2: [(0, 2), (10, 6)]})
    assert placer.place(11, free) == [[(1, 10, 5), (2, 10, 6)]]
    assert placer.place(16, free) == [[(1, 0, 4), (1, 10, 5), (2, 0, 1), (2, 10, 6)]]


def test_first_fit_takes_the_lowest_block_of_the_first_device_with_a_run() -> None:
    free = Devices({0: [(0, 3), (10, 9), (20, 4)], 1: [(0, 50)]})
    assert FirstFit().place(4, free) == [[(0, 10, 4)]]
    assert FirstFit().place(10, free) == [[(1, 0, 10)]]


def test_striped_alternates_and_is_one_run_on_each_device() -> None:
    free = Devices({0: [(0, 100)], 1: [(50, 200)], 2: [(0, 150)]})
    [copy] = Striped(unit_blocks=4).place(18, free)
    assert copy == [(1, 50, 4), (2, 0, 4), (0, 0, 4), (1, 54, 4), (2, 4, 2)]


def test_striped_puts_less_than_a_unit_on_the_emptiest_device() -> None:
    free = Devices({0: [(0, 100)], 1: [(0, 102)]})
    placer = Striped(unit_blocks=4)
    used = []
    for _ in range(4):
        copies = placer.place(4, free)
        free.take(copies)
        used.append([extent.device for extent in copies[0]])
    assert used == [[1], [0], [1], [0]]


def test_striped_goes_on_without_a_device_that_is_full() -> None:
    free = Devices({0: [(0, 100)], 1: [(0, 6)]})
    assert Striped(unit_blocks=4).place(20, free) == [[(0, 0, 4), (1, 0, 4), (0, 4, 4), (1, 4, 2), (0, 8, 6)]]


def test_striped_splits_a_unit_where_runs_are_short() -> None:
    free = Devices({0: [(0, 3), (10, 3), (20, 1)], 1: [(0, 9)]})
    assert Striped(unit_blocks=4).place(14, free) == [
        [(1, 0, 4), (0, 0, 3), (0, 10, 1), (1, 4, 4), (0, 11, 2)],
    ]


def test_mirrored_uses_distinct_devices_the_emptiest_first() -> None:
    free = Devices({0: [(0, 10)], 1: [(50, 30)], 2: [(0, 20), (100, 7)]})
    assert Mirrored().place(6, free) == [[(1, 50, 6)], [(2, 100, 6)]]
    assert Mirrored(copies=3).place(6, free) == [[(1, 50, 6)], [(2, 100, 6)], [(0, 0, 6)]]


def test_mirrored_prefers_whole_runs_and_scatters_only_within_a_device() -> None:
    fragments = [(0, 5), (10, 5), (20, 5), (30, 5)]
    free = Devices({0: fragments, 1: [(0, 8)], 2: [(0, 9)]})
    assert Mirrored().place(8, free) == [[(2, 0, 8)], [(1, 0, 8)]]
    [whole, scattered] = Mirrored().place(9, free)
    assert whole == [(2, 0, 9)]
    assert ({extent.device for extent in scattered}, sum(extent.count for extent in scattered)) == ({0}, 9)
    assert len(scattered) == 2


def test_mirrored_says_how_many_devices_have_room() -> None:
    free = Devices({0: [(0, 10)], 1: [(0, 3)], 2: [(0, 9)]})
    with pytest.raises(NoSpace, match=r"^3 copies of 9 blocks .* there are 2 \(of 3 ") as caught:
        Mirrored(copies=3).place(9, free)
    assert "add a device" in caught.value.hint


@pytest.mark.parametrize("placer", [Contiguous(), FirstFit(), Striped(2)], ids=lambda placer: placer.name)
@pytest.mark.parametrize("extents", [{}, {0: []}, {0: [(0, 4)], 1: [(0, 2), (4, 3)]}], ids=["none", "full", "little"])
def test_no_space_says_how_much_there_is(placer: Placer, extents: dict[int, list[tuple[int, int]]]) -> None:
    room = sum(count for runs in extents.values() for _, count in runs)
    with pytest.raises(NoSpace, match=rf"no room for 10 blocks: {room} are free on {len(extents)} devices"):
        placer.place(10, Devices(extents))


@pytest.mark.parametrize("unit_blocks", [0, -1, 2**20 + 1, 1.5, "4", True])
def test_striped_refuses_a_bad_unit(unit_blocks: int) -> None:
    with pytest.raises(ConfigError, match="stripe unit"):
        Striped(unit_blocks)


@pytest.mark.parametrize("copies", [1, 0, 17, "2", None])
def test_mirrored_refuses_a_bad_number_of_copies(copies: int) -> None:
    with pytest.raises(ConfigError, match="copies"):
        Mirrored(copies)


EXTENTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8).map(
    lambda gaps: [
        (sum(gap + count for gap, count in gaps[:index]) + gaps[index][0], gaps[index][1]) for index in range(len(gaps))
    ]
)
POOLS = st.dictionaries(st.integers(0, 4), EXTENTS, max_size=4)
PLACERS = st.one_of(
    st.just(Contiguous()), st.just(FirstFit()), st.integers(1, 9).map(Striped), st.integers(2, 3).map(Mirrored)
)


@given(placer=PLACERS, extents=POOLS, count=st.integers(1, 60))
def test_every_placer_succeeds_if_there_is_room_and_picks_each_block_once(
    placer: Placer, extents: dict[int, list[tuple[int, int]]], count: int
) -> None:
    free = Devices(extents)
    frees = [runs.free_count for runs in free.lists.values()]
    if placer.copies == 1:
        possible = sum(frees) >= count
    else:
        possible = sum(room >= count for room in frees) >= placer.copies
    if not possible:
        with pytest.raises(NoSpace):
            placer.place(count, free)
        return
    copies = placer.place(count, free)
    assert [sum(extent.count for extent in copy) for copy in copies] == [count] * placer.copies
    assert all(type(extent) is Extent for copy in copies for extent in copy)
    if placer.copies > 1:
        devices = [{extent.device for extent in copy} for copy in copies]
        assert all(len(used) == 1 for used in devices)
        assert len(set().union(*devices)) == placer.copies
    assert placer.place(count, deepcopy(free)) == copies, "placing changes nothing, and is no matter of luck"
    free.take(copies)


@given(extents=POOLS, count=st.integers(1, 60), unit_blocks=st.integers(1, 9))
def test_a_stripe_is_in_one_run_on_each_device_that_has_one(
    extents: dict[int, list[tuple[int, int]]], count: int, unit_blocks: int
) -> None:
    free = Devices(extents)
    if sum(map(free.free_count, free.devices())) < count:
        return
    [copy] = Striped(unit_blocks).place(count, free)
    for device in {extent.device for extent in copy}:
        mine = [extent for extent in copy if extent.device == device]
        share = sum(extent.count for extent in mine)
        if share <= free.largest(device):
            assert all(before.end == behind.block for before, behind in pairwise(mine))
