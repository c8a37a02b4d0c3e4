"""The picture of a device: each block counted once, in its cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rustord.devicemap import draw
from rustord.label import Geometry

MIB = 1 << 20


def expected(geometry: Geometry, free: Sequence[tuple[int, int]], cell_count: int) -> list[float]:
    blocks = {block + at for block, count in free for at in range(count)}
    bounds = [cell * geometry.block_count // cell_count for cell in range(cell_count + 1)]
    return [
        1.0 - sum(block in blocks for block in range(first, end)) / (end - first) for first, end in pairwise(bounds)
    ]


@given(st.sets(st.integers(1284, 2000), max_size=30), st.integers(1, 300))
def test_each_cell_shows_the_part_that_is_taken(blocks: set[int], cell_count: int) -> None:
    geometry = Geometry(4096, 4096)
    free = [(block, 1) for block in sorted(blocks)]
    drawn = draw(geometry, free, (), cell_count)
    assert [round(used, 9) for used in drawn.used] == [round(used, 9) for used in expected(geometry, free, cell_count)]


def test_an_empty_device_is_free_but_for_what_is_reserved() -> None:
    geometry = Geometry.of_device(16 * MIB, 4096)
    drawn = draw(geometry, geometry.data_runs, (), geometry.block_count)
    reserved = set(range(geometry.block_count)).difference(
        *(range(block, block + count) for block, count in geometry.data_runs)
    )
    assert drawn.reserved == sorted(reserved)
    assert {block for block, used in enumerate(drawn.used) if used} == reserved


def test_bad_blocks_mark_their_cells() -> None:
    assert draw(Geometry(4096, 4096), (), [(5, 1), (63, 2), (4095, 1)], 64).bad == [0, 1, 63]


def test_there_are_no_more_cells_than_blocks() -> None:
    assert len(draw(Geometry(4096, 4096), (), (), 65536).used) == 4096
