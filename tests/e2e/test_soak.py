"""The soak test for some seconds, and that it would notice; `./dev soak` is the one that counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import Daemon, make_pool
from tests.soak import Sample, check_flat, soak

MIB = 1 << 20


@pytest.mark.parametrize("seconds", [3, pytest.param(300, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_soak(make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path], seed: int, seconds: float) -> None:
    images = [make_image(512 * MIB) for _ in range(2)]
    make_pool(*images)
    soak(make_daemon(*images).start(), seconds, seed)


@pytest.mark.parametrize("growing", ["memory", "descriptors"])
def test_growth_is_noticed(growing: str) -> None:
    samples = [Sample(100.0 + 5 * n, 30) if growing == "memory" else Sample(100.0, 30 + n) for n in range(60)]
    with pytest.raises(AssertionError, match=growing):
        check_flat(samples)
    check_flat(samples[:1] * 60)
