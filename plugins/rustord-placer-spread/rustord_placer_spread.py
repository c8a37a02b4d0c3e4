"""Placement on the least full device: devices of different sizes fill up, and are worked, in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rustord.defaults import NoOptions
from rustord.errors import NoSpace
from rustord.extent import Extent
from rustord.hookspecs import Options, hookimpl
from rustord.placer import FreeView, Placer
from rustord.settings import parse_options

RUSTORD_API_VERSION = 1


@hookimpl
def rustord_placers() -> Mapping[str, Callable[[Options], Placer]]:
    return {"spread": make_spread}


def make_spread(options: Options) -> Placer:
    """A `Spread`. It takes no options: a ConfigError names one that is given."""
    parse_options(NoOptions, options, "placer")
    return Spread()


class Spread:
    """One extent, by best fit, on the device that is least full, of those that have a run which is long enough.

    Where none has, the longest runs of the least full device, then those of the next one.
    """

    name = "spread"
    copies = 1

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        devices = sorted(free.devices(), key=lambda device: free.free_count(device) / free.size(device), reverse=True)
        for device in devices:
            block = free.best_fit(device, count)
            if block is not None:
                return [[Extent(device, block, count)]]
        return [_longest_runs(devices, count, free)]


def _longest_runs(devices: Iterable[int], count: int, free: FreeView) -> list[Extent]:
    extents = []
    missing = count
    for device in devices:
        for block, length in free.longest_first(device):
            extents.append(Extent(device, block, min(length, missing)))
            missing -= extents[-1].count
            if not missing:
                return extents
    raise NoSpace(f"no room for {count} blocks: {missing} too few are free", hint="delete Objects, or add a device")
