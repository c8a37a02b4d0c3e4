"""How many checksums an Object has."""

from __future__ import annotations

import pytest

from rustord.manifest import CHUNK_BYTES, chunk_count


@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 0), (1, 1), (CHUNK_BYTES - 1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (1 << 40, 1 << 24)],
)
def test_the_last_chunk_may_be_short(size: int, count: int) -> None:
    assert chunk_count(size) == count
