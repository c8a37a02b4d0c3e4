"""Placer: decides how an Object's data is broken up, and picks free blocks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import repeat
from typing import Protocol

from rustord.errors import ConfigError, NoSpace
from rustord.extent import Extent, extend


class FreeView(Protocol):
    """What a Placer may ask about free blocks. It stays as it is for as long as the Placer's ``place`` runs.

    A device goes by its index in the pool, the other numbers are in blocks. `rustord.freelist.FreeList` says more.
    """

    def devices(self) -> Sequence[int]:
        """The devices that take new data now."""

    def size(self, device: int) -> int:
        """How many blocks for data the device has, free or not."""

    def free_count(self, device: int) -> int:
        """How many blocks are free."""

    def largest(self, device: int) -> int:
        """The count of the longest free run, 0 if nothing is free."""

    def best_fit(self, device: int, count: int) -> int | None:
        """First block of the shortest free run of at least ``count`` blocks; None if there is none."""

    def first_fit(self, device: int, count: int) -> int | None:
        """Lowest block from which on ``count`` blocks are free; None if there is none."""

    def longest_first(self, device: int) -> Iterator[tuple[int, int]]:
        """The free runs as (block, count), the longest first."""


class Placer(Protocol):
    """A placement policy."""

    @property
    def name(self) -> str:
        """Recorded as the layout of each Manifest; 1 to 32 ASCII characters."""

    @property
    def copies(self) -> int:
        """How many copies `place` returns, always."""

    def place(self, count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        """Free blocks for ``count`` (at least 1) blocks of data: one list of extents a copy, each of ``count`` blocks.

        The data fills the extents in their order. No block may be in two of them. Raises NoSpace.
        """


class Contiguous:
    """One extent, by best fit, on the device with the most free blocks among those with a run that is long enough.

    Where no run is, as few devices as possible, and on these as few extents as possible.
    """

    name = "contiguous"
    copies = 1

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        for device in _emptiest_first(free):
            block = free.best_fit(device, count)
            if block is not None:
                return [[Extent(device, block, count)]]
        return [_scattered(count, free)]


class FirstFit:
    """One extent, as far to the front of the first device as possible; where no run is long enough, as `Contiguous`."""

    name = "first-fit"
    copies = 1

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        for device in free.devices():
            block = free.first_fit(device, count)
            if block is not None:
                return [[Extent(device, block, count)]]
        return [_scattered(count, free)]


class Striped:
    """Units of ``unit_blocks`` blocks on all devices in turn, the one with the most free blocks first.

    On each device the units follow one another, in one run if there is one that is long enough. A device that is full
    is left out from there on. What is no longer than a unit is placed as by `Contiguous`.
    """

    name = "striped"
    copies = 1

    def __init__(self, unit_blocks: int = 256) -> None:
        """Raises ConfigError unless ``unit_blocks`` is 1 to 2**20."""
        self.unit_blocks = _checked("stripe unit in blocks", unit_blocks, 1, 2**20)
        self._whole = Contiguous()

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        if count <= self.unit_blocks:
            return self._whole.place(count, free)
        turns = self._turns(count, free)
        shares: dict[int, int] = {}
        for device, unit in turns:
            shares[device] = shares.get(device, 0) + unit
        # The extents of each device, in order but backwards: the next one is popped.
        ahead = {device: _on_device(device, share, free)[::-1] for device, share in shares.items()}
        copy: list[Extent] = []
        for device, unit in turns:
            extend(copy, _pop(ahead[device], unit))
        return [copy]

    def _turns(self, count: int, free: FreeView) -> list[tuple[int, int]]:
        """(device, blocks) of each unit in the order of the data."""
        room = {device: free.free_count(device) for device in _emptiest_first(free)}
        if sum(room.values()) < count:
            raise _no_space(count, free)
        turns = []
        while count:
            for device in room:
                unit = min(self.unit_blocks, room[device], count)
                if unit:
                    turns.append((device, unit))
                    room[device] -= unit
                    count -= unit
        return turns


class Mirrored:
    """``copies`` copies on as many devices, each placed as by `Contiguous`; whole runs before scattered ones."""

    name = "mirrored"

    def __init__(self, copies: int = 2) -> None:
        """Raises ConfigError unless ``copies`` is 2 to 16."""
        self.copies = _checked("number of copies", copies, 2, 16)

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        placed: list[list[Extent]] = []
        fragmented = []
        for device in _emptiest_first(free):
            block = free.best_fit(device, count)
            if block is not None:
                placed.append([Extent(device, block, count)])
                if len(placed) == self.copies:
                    return placed
            elif free.free_count(device) >= count:
                fragmented.append(device)
        if len(placed) + len(fragmented) < self.copies:
            raise NoSpace(
                f"{self.copies} copies of {count} blocks need as many devices with room for one, and there are "
                f"{len(placed) + len(fragmented)} (of {len(free.devices())} that take data)",
                hint="add a device, or delete Objects",
            )
        return placed + [_on_device(device, count, free) for device in fragmented[: self.copies - len(placed)]]


def _emptiest_first(free: FreeView) -> list[int]:
    """The devices, that with the most free blocks first."""
    devices = list(free.devices())
    if len(devices) > 1:
        devices.sort(key=free.free_count, reverse=True)
    return devices


def _on_device(device: int, count: int, free: FreeView) -> list[Extent]:
    """``count`` of the device's free blocks, of which it has as many: in one run, or else in its longest ones."""
    block = free.best_fit(device, count)
    return _longest_runs([device], count, free) if block is None else [Extent(device, block, count)]


def _scattered(count: int, free: FreeView) -> list[Extent]:
    """``count`` free blocks on as few devices as possible, on these in as few extents as possible."""
    devices = _emptiest_first(free)
    alone = [_longest_runs([device], count, free) for device in devices if free.free_count(device) >= count]
    if alone:
        return min(alone, key=len)
    room = 0
    for used, device in enumerate(devices, 1):
        room += free.free_count(device)
        if room >= count:
            return _longest_runs(devices[:used], count, free)
    raise _no_space(count, free)


def _longest_runs(devices: Iterable[int], count: int, free: FreeView) -> list[Extent]:
    """The first ``count`` blocks of the devices' longest runs, by device and block, so that they are written forwards.

    The devices have as many.
    """
    extents: list[Extent] = []
    runs = merge(*(zip(repeat(device), free.longest_first(device)) for device in devices), key=_shortness)
    for device, (block, run_count) in runs:
        extents.append(Extent(device, block, min(run_count, count)))
        count -= extents[-1].count
        if not count:
            break
    return sorted(extents)


def _shortness(run: tuple[int, tuple[int, int]]) -> int:
    """Sort key of a (device, (block, count)): the longest first."""
    return -run[1][1]


def _pop(ahead: list[Extent], count: int) -> Iterator[Extent]:
    """Remove the next ``count`` blocks from ``ahead``, whose next extent is the last one."""
    while count:
        device, block, length = ahead.pop()
        used = min(length, count)
        yield Extent(device, block, used)
        if used < length:
            ahead.append(Extent(device, block + used, length - used))
        count -= used


def _checked(what: str, value: int, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{value!r} is no {what}", hint=f"it is a number from {least} to {most}")
    return value


def _no_space(count: int, free: FreeView) -> NoSpace:
    devices = free.devices()
    return NoSpace(
        f"no room for {count} blocks: {sum(map(free.free_count, devices))} are free on {len(devices)} devices",
        hint="delete Objects, or add a device",
    )
