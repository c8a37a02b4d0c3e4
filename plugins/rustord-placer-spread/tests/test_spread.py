from __future__ import annotations

import pytest
from rustord_placer_spread import make_spread

from rustord.allocator import Allocator
from rustord.errors import ConfigError, NoSpace
from rustord.extent import Extent
from rustord.freelist import FreeList
from rustord.plugins import PluginManager
from rustord.testing import PlacerContract


class TestSpread(PlacerContract):
    factory = staticmethod(make_spread)


def pool(*devices: tuple[int, list[tuple[int, int]]]) -> Allocator:
    """Devices as (blocks in all, free runs)."""
    allocator = Allocator(make_spread({}), lambda: range(len(devices)))
    for index, (size, free) in enumerate(devices):
        allocator.add(index, FreeList(free), size)
    return allocator


def test_share_that_is_free_counts_not_how_much() -> None:
    allocator = pool((1_000, [(256, 500)]), (100, [(256, 90)]))
    assert allocator.place(10) == [[Extent(1, 256, 10)]]


def test_devices_of_different_sizes_fill_up_alike() -> None:
    allocator = pool((3_000, [(256, 3_000)]), (1_000, [(256, 1_000)]))
    for _ in range(100):
        allocator.place(20)
    shares = [allocator.free_count(device) / allocator.size(device) for device in (0, 1)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)


def test_one_run_is_worth_more_than_the_least_full_device() -> None:
    allocator = pool((100, [(256, 60), (400, 30)]), (100, [(256, 70)]))
    assert allocator.place(70) == [[Extent(1, 256, 70)]]


def test_without_a_long_run_the_least_full_device_comes_first() -> None:
    allocator = pool((100, [(256, 30)]), (100, [(256, 20), (300, 40)]))
    assert allocator.place(70) == [[Extent(1, 300, 40), Extent(1, 256, 20), Extent(0, 256, 10)]]


def test_no_space_says_how_much_is_missing() -> None:
    with pytest.raises(NoSpace, match="5 too few"):
        pool((100, [(256, 10)])).place(15)


def test_configuration_can_choose_it() -> None:
    assert PluginManager(["spread"]).make("placer", "spread").name == "spread"


def test_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="copies"):
        make_spread({"copies": 2})
