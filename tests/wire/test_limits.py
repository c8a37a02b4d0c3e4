from __future__ import annotations

from urllib.parse import quote

from rustord.change import ATTRIBUTE_BYTES_MAX, NAME_BYTES_MAX
from rustord.wire.limits import Limits


def test_the_longest_names_fit_into_a_target() -> None:
    name = quote("ü" * (NAME_BYTES_MAX // 2), safe="")
    assert len(f"/v1/names?prefix={name}&after={name}&limit=10000") < Limits().target_bytes


def test_all_attributes_fit_into_a_head_with_the_longest_name() -> None:
    """Also if all of their characters have to be percent-encoded."""
    assert 3 * (NAME_BYTES_MAX + ATTRIBUTE_BYTES_MAX) + 64 * len("Rustor-Meta-: \r\n") < Limits().head_bytes


def test_streams_stay_below_the_memory_that_is_promised() -> None:
    limits = Limits()
    assert limits.uploads * limits.upload_piece_bytes + limits.downloads * limits.download_piece_bytes <= 64 << 20
