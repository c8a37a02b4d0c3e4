"""The FreeList, by example and against a model: a set of blocks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rustord.freelist import BLOCKS_MAX, FreeList

LONG = 2**23
"""From this count on, runs are indexed in another way."""


def test_an_empty_list_has_nothing_to_give() -> None:
    free = FreeList()
    assert (list(free), len(free), free.free_count, free.largest()) == ([], 0, 0, 0)
    assert free.best_fit(1) is None
    assert free.first_fit(1) is None
    assert list(free.longest_first()) == []
    assert not free.contains(0, 1)


def test_loading_joins_extents_that_touch() -> None:
    free = FreeList([(0, 2), (2, 3), (10, 1), (11, 1), (20, 4)])
    assert list(free) == [(0, 5), (10, 2), (20, 4)]
    assert (len(free), free.free_count, free.largest()) == (3, 11, 5)


@pytest.mark.parametrize(
    "extents",
    [[(5, 2), (6, 1)], [(5, 2), (1, 1)], [(5, 2), (5, 2)], [(5, 0)], [(5, -1)], [(-1, 1)], [(BLOCKS_MAX, 1)]],
)
def test_loading_refuses_what_is_no_list_of_extents(extents: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="free extent"):
        FreeList(extents)


def test_best_fit_is_the_shortest_run_that_is_long_enough_and_the_lowest_of_these() -> None:
    free = FreeList([(0, 9), (20, 4), (30, 6), (40, 4)])
    assert [free.best_fit(count) for count in (1, 4, 5, 6, 7, 9, 10)] == [20, 20, 30, 30, 0, 0, None]


def test_first_fit_is_the_lowest_run_that_is_long_enough() -> None:
    free = FreeList([(0, 2), (20, 4), (30, 9), (40, 4)])
    assert [free.first_fit(count) for count in (1, 2, 3, 5, 9, 10)] == [0, 0, 20, 30, 30, None]


def test_first_fit_finds_the_lowest_run_behind_many_short_ones() -> None:
    free = FreeList([*((block, 1) for block in range(0, 1000, 2)), (1000, 7), (1010, 5), (1020, 6), (1030, 5)])
    assert [free.first_fit(count) for count in (1, 2, 6, 7, 8)] == [0, 1000, 1000, 1000, None]
    free.take(1000, 7)
    assert [free.first_fit(count) for count in (2, 5, 6, 7)] == [1010, 1010, 1020, None]


def test_a_bad_block_is_never_free_again() -> None:
    free = FreeList([(0, 10), (20, 10)])
    free.take(4, 4)
    free.condemn(2, 20)  # of these, 4 to 7 are taken, 10 to 19 are not ours
    assert list(free) == [(0, 2), (22, 8)]
    assert (free.free_count, free.lost_count) == (10, 6)
    free.release(4, 4)
    assert (list(free), free.free_count, free.lost_count) == ([(0, 2), (22, 8)], 10, 10)
    free.take(22, 8)
    free.condemn(25, 1)
    free.release(22, 8)
    assert (list(free), free.free_count, free.lost_count) == ([(0, 2), (22, 3), (26, 4)], 9, 11)
    free.condemn(0, 40)
    assert (list(free), free.free_count, free.lost_count) == ([], 0, 20)


def test_longest_first_descends() -> None:
    free = FreeList([(0, 2), (10, 4), (20, 3), (30, LONG), (30 + 2 * LONG, LONG + 1)])
    assert list(free.longest_first()) == [(30 + 2 * LONG, LONG + 1), (30, LONG), (10, 4), (20, 3), (0, 2)]


def test_taking_leaves_what_is_before_and_behind() -> None:
    free = FreeList([(10, 10)])
    free.take(10, 2)
    free.take(18, 2)
    free.take(14, 1)
    assert list(free) == [(12, 2), (15, 3)]
    free.take(12, 2)
    assert (list(free), free.free_count) == ([(15, 3)], 3)


@pytest.mark.parametrize(
    ("block", "count"),
    [
        *[(9, 1), (9, 2), (10, 11), (19, 2), (20, 1), (0, 100), (12, 0), (12, -1), (30, 0), (-5, 5), (-5, 20)],
        *[(BLOCKS_MAX - 1, 2), (BLOCKS_MAX, 1), (2**63, 1), (2**70, 1), (10, 2**70), (-(2**70), 1)],
    ],
)
def test_taking_what_is_not_all_free_changes_nothing(block: int, count: int) -> None:
    free = FreeList([(10, 10)])
    assert not free.contains(block, count)
    with pytest.raises(ValueError, match=r"free|out of range"):  # BTrees 4.3 has words of its own for large numbers
        free.take(block, count)
    assert (list(free), free.free_count, free.best_fit(10)) == ([(10, 10)], 10, 10)


@pytest.mark.parametrize(
    ("block", "count", "runs"),
    [
        (0, 5, [(0, 5), (10, 10), (30, 5)]),
        (8, 2, [(8, 12), (30, 5)]),
        (20, 3, [(10, 13), (30, 5)]),
        (20, 10, [(10, 25)]),
        (22, 3, [(10, 10), (22, 3), (30, 5)]),
        (35, 1, [(10, 10), (30, 6)]),
        (BLOCKS_MAX - 1, 1, [(10, 10), (30, 5), (BLOCKS_MAX - 1, 1)]),
    ],
)
def test_released_blocks_are_joined_with_their_neighbours(block: int, count: int, runs: list[tuple[int, int]]) -> None:
    free = FreeList([(10, 10), (30, 5)])
    free.release(block, count)
    assert (list(free), free.free_count) == (runs, 15 + count)
    assert sorted(free.longest_first()) == runs


@pytest.mark.parametrize(
    ("block", "count"),
    [
        *[(10, 1), (9, 2), (15, 1), (19, 1), (19, 2), (20, 11), (5, 100), (25, 0), (25, -1), (-1, 1)],
        *[(BLOCKS_MAX, 1), (BLOCKS_MAX - 1, 2), (2**70, 1)],
    ],
)
def test_releasing_what_is_free_or_no_block_changes_nothing(block: int, count: int) -> None:
    free = FreeList([(10, 10), (30, 5)])
    with pytest.raises(ValueError, match="block"):
        free.release(block, count)
    assert (list(free), free.free_count) == ([(10, 10), (30, 5)], 15)
    assert list(free.longest_first()) == [(10, 10), (30, 5)]


def test_a_whole_device_of_the_largest_size_is_taken_and_released() -> None:
    free = FreeList([(0, BLOCKS_MAX)])
    assert (free.largest(), free.best_fit(BLOCKS_MAX), free.best_fit(BLOCKS_MAX + 1)) == (BLOCKS_MAX, 0, None)
    free.take(0, BLOCKS_MAX)
    assert (free.largest(), free.free_count, list(free)) == (0, 0, [])
    free.release(1, BLOCKS_MAX - 1)
    free.release(0, 1)
    assert list(free) == [(0, BLOCKS_MAX)]


def test_best_fit_compares_true_lengths_of_runs_that_are_very_long() -> None:
    free = FreeList([(0, LONG + 2), (2 * LONG, LONG), (4 * LONG, LONG + 1), (6 * LONG, LONG - 1), (8 * LONG, LONG)])
    answers = [free.best_fit(count) for count in (1, LONG - 1, LONG, LONG + 1, LONG + 2, LONG + 3)]
    assert answers == [6 * LONG, 6 * LONG, 2 * LONG, 4 * LONG, 0, None]
    free.take(2 * LONG, 1)
    assert (free.best_fit(LONG), free.best_fit(LONG - 1)) == (8 * LONG, 2 * LONG + 1)


def test_the_longest_run_that_the_tree_holds_may_end_at_the_last_block() -> None:
    free = FreeList([(BLOCKS_MAX - LONG + 1, LONG - 1)])
    assert free.best_fit(LONG - 1) == BLOCKS_MAX - LONG + 1
    free.take(BLOCKS_MAX - 1, 1)
    assert list(free.longest_first()) == [(BLOCKS_MAX - LONG + 1, LONG - 2)]


UNITS = 48
UNIT_COUNTS = st.sampled_from([1, LONG // 4])
"""Blocks in a unit of the model: so the same rules meet runs on both sides of `LONG`."""


class FreeListModel(RuleBasedStateMachine):
    """A FreeList beside a set of units; the units are all that either one can tell."""

    @initialize(unit_count=UNIT_COUNTS, units=st.sets(st.integers(0, UNITS - 1)), origin=st.sampled_from([0, 7]))
    def load(self, unit_count: int, units: set[int], origin: int) -> None:
        self.unit_count, self.units, self.origin = unit_count, units, origin
        self.free = FreeList((origin + unit * unit_count, unit_count) for unit in sorted(units))

    def runs(self) -> list[tuple[int, int]]:
        """The model's runs as (block, count)."""
        heads = [unit for unit in sorted(self.units) if unit - 1 not in self.units]
        tails = [unit for unit in sorted(self.units) if unit + 1 not in self.units]
        return [
            (self.origin + head * self.unit_count, (tail + 1 - head) * self.unit_count)
            for head, tail in zip(heads, tails, strict=True)
        ]

    @rule(unit=st.integers(0, UNITS - 1), length=st.integers(0, 12))
    def take(self, unit: int, length: int) -> None:
        block, count = self.origin + unit * self.unit_count, length * self.unit_count
        wanted = set(range(unit, unit + length))
        possible = bool(wanted) and wanted <= self.units
        assert self.free.contains(block, count) == possible
        if possible:
            self.free.take(block, count)
            self.units -= wanted
        else:
            with pytest.raises(ValueError, match="free"):
                self.free.take(block, count)

    @rule(length=st.integers(1, 12), lowest=st.booleans())
    def allocate(self, length: int, lowest: bool) -> None:
        count = length * self.unit_count
        block = self.free.first_fit(count) if lowest else self.free.best_fit(count)
        if block is not None:
            self.free.take(block, count)
            unit = (block - self.origin) // self.unit_count
            self.units -= set(range(unit, unit + length))

    @rule(unit=st.integers(0, UNITS - 1), length=st.integers(0, 12))
    def release(self, unit: int, length: int) -> None:
        block, count = self.origin + unit * self.unit_count, length * self.unit_count
        wanted = set(range(unit, unit + length))
        if wanted and not wanted & self.units:
            self.free.release(block, count)
            self.units |= wanted
        else:
            with pytest.raises(ValueError, match="block"):
                self.free.release(block, count)

    @invariant()
    def they_agree(self) -> None:
        runs = self.runs()
        assert list(self.free) == runs
        assert len(self.free) == len(runs)
        assert self.free.free_count == sum(count for _, count in runs)
        assert self.free.largest() == max((count for _, count in runs), default=0)
        longest = list(self.free.longest_first())
        assert sorted(longest) == runs
        assert [count for _, count in longest] == sorted((count for _, count in runs), reverse=True)

    @invariant()
    def they_would_give_the_same(self) -> None:
        for length in range(1, 13):
            count = length * self.unit_count - (self.unit_count > 1)
            fitting = [(run_count, block) for block, run_count in self.runs() if run_count >= count]
            assert self.free.best_fit(count) == (min(fitting)[1] if fitting else None)
            assert self.free.first_fit(count) == min((block for _, block in fitting), default=None)


TestFreeListModel = FreeListModel.TestCase
