"""Distributions, as Prometheus wants its histograms."""

from __future__ import annotations

import math

from rustord.distribution import SECONDS, Distribution


def test_a_bucket_counts_what_is_at_most_its_bound() -> None:
    times = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        times.observe(value)
    assert times.counts == [2, 2, 1]
    assert times.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert math.isclose(times.sum, 7.5)


def test_the_bounds_for_times_ascend() -> None:
    assert list(SECONDS) == sorted(set(SECONDS))
    assert len(Distribution().counts) == len(SECONDS) + 1
