"""Extents: joining and cutting runs of blocks keeps every block, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rustord.extent import COUNT_MAX, Extent, block_count, cut, extend, trim, without

extents = st.builds(Extent, st.integers(0, 3), st.integers(0, 50), st.integers(1, 10))


def blocks(copy: list[Extent]) -> list[tuple[int, int]]:
    """(device, block) of every block, in order."""
    return [(device, block + at) for device, block, count in copy for at in range(count)]


def test_an_extent_ends_behind_its_last_block() -> None:
    assert Extent(0, 7, 3).end == 10


def test_extents_that_adjoin_become_one() -> None:
    copy = [Extent(0, 10, 2)]
    extend(copy, [Extent(0, 12, 3), Extent(1, 15, 1), Extent(1, 16, 1), Extent(1, 18, 1), Extent(0, 19, 1)])
    assert copy == [Extent(0, 10, 5), Extent(1, 15, 2), Extent(1, 18, 1), Extent(0, 19, 1)]


def test_an_extent_is_no_longer_than_its_count_can_say() -> None:
    copy = [Extent(0, 10, COUNT_MAX - 1)]
    extend(copy, [Extent(0, 9 + COUNT_MAX, 2 * COUNT_MAX)])
    assert copy == [
        Extent(0, 10, COUNT_MAX),
        Extent(0, 10 + COUNT_MAX, COUNT_MAX),
        Extent(0, 10 + 2 * COUNT_MAX, COUNT_MAX - 1),
    ]


@given(st.lists(extents), st.lists(extents))
def test_extending_keeps_every_block_in_order(copy: list[Extent], more: list[Extent]) -> None:
    before = blocks(copy)
    extend(copy, more)
    assert blocks(copy) == before + blocks(more)


@given(st.lists(extents, min_size=1), st.data())
def test_trimming_cuts_the_last_blocks_off(copy: list[Extent], data: st.DataObject) -> None:
    before = blocks(copy)
    count = data.draw(st.integers(0, block_count(copy)))
    cut = trim(copy, count)
    assert blocks(copy) == before[: len(before) - count]
    assert sorted(blocks(cut)) == sorted(before[len(before) - count :])


@given(st.lists(extents), st.lists(extents))
def test_cutting_tells_what_is_the_others(copy: list[Extent], more: list[Extent]) -> None:
    others = without_overlap(more)
    pieces = cut(copy, others)
    taken = set(blocks(others))
    assert [block for piece, _ in pieces for block in blocks([piece])] == blocks(copy)
    assert all((block in taken) == is_other for piece, is_other in pieces for block in blocks([piece]))
    assert blocks(without(copy, others)) == [block for block in blocks(copy) if block not in taken]


def without_overlap(extents: list[Extent]) -> list[Extent]:
    chosen: list[Extent] = []
    for extent in extents:
        if not set(blocks([extent])) & set(blocks(chosen)):
            chosen.append(extent)
    return chosen
