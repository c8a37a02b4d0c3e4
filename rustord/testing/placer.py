"""The contract of a Placer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from rustord.errors import NoSpace
from rustord.extent import Extent
from rustord.freelist import FreeList
from rustord.placer import FreeView, Placer

SEEDS = range(25)


class PlacerContract:
    """What every Placer must do. ``factory`` is what the hook offers; the fixture `options` is what it is given.

    A Placer that promises more or less than `has_room` says overrides that.
    """

    factory: Callable[[Mapping[str, object]], Placer]

    @pytest.fixture
    def options(self) -> Mapping[str, object]:
        return {}

    @pytest.fixture
    def placer(self, options: Mapping[str, object]) -> Placer:
        return self.factory(options)

    def has_room(self, placer: Placer, count: int, free: FreeView) -> bool:
        """Whether `place` must succeed: there are enough free blocks, for several copies on as many devices."""
        if placer.copies == 1:
            return sum(map(free.free_count, free.devices())) >= count
        return sum(free.free_count(device) >= count for device in free.devices()) >= placer.copies

    def test_name_can_be_recorded(self, placer: Placer) -> None:
        assert 1 <= len(placer.name) <= 32
        assert placer.name.isascii()
        assert placer.name.isprintable()

    def test_copies_is_a_number(self, placer: Placer) -> None:
        assert type(placer.copies) is int
        assert placer.copies >= 1

    @pytest.mark.parametrize("seed", SEEDS)
    def test_choices_are_whole_and_free(self, placer: Placer, seed: int) -> None:
        pool = _Pool(random.Random(seed), placer)
        for count in pool.counts():
            self._place(pool, count)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_choices_are_taken_until_there_is_no_room(self, placer: Placer, seed: int) -> None:
        rng = random.Random(seed)
        pool = _Pool(rng, placer)
        for count in [rng.choice((1, 2, 7, 30, 200)) for _ in range(30)]:
            self._place(pool, count, take=True)
        count = 1 << 16
        while count:
            if not self._place(pool, count, take=True):
                count //= 2
        assert not self.has_room(placer, 1, pool)

    def test_room_is_found_in_single_blocks(self, placer: Placer) -> None:
        scattered = FreeList((block, 1) for block in range(256, 2_256, 2))
        pool = _Pool(random.Random(0), placer, dict.fromkeys(range(placer.copies), scattered))
        assert self._place(pool, 1_000)

    def test_no_device_means_no_space(self, placer: Placer) -> None:
        pool = _Pool(random.Random(0), placer, {})
        with pytest.raises(NoSpace):
            placer.place(1, pool)

    def test_full_devices_mean_no_space(self, placer: Placer) -> None:
        pool = _Pool(random.Random(0), placer, {device: FreeList() for device in range(placer.copies + 1)})
        with pytest.raises(NoSpace):
            placer.place(1, pool)

    def _place(self, pool: _Pool, count: int, *, take: bool = False) -> bool:
        """Let the Placer choose, check it, and take what it chose if so asked; whether it found room."""
        placer = pool.placer
        copies = placer.copies
        before = pool.free_blocks()
        try:
            chosen = placer.place(count, pool)
        except NoSpace:
            assert not self.has_room(placer, count, pool), f"no room found for {count} blocks where there is some"
            return False
        assert placer.copies == copies
        assert len(chosen) == copies
        _check_copies(chosen, count, before)
        if take:
            pool.take(chosen)
        return True


def _check_copies(chosen: Sequence[Sequence[Extent]], count: int, free: set[tuple[int, int]]) -> None:
    """Each copy has ``count`` blocks; they are free, in no two extents, and no device holds parts of two copies."""
    taken: set[tuple[int, int]] = set()
    holding: dict[int, int] = {}
    for number, copy in enumerate(chosen):
        assert sum(extent.count for extent in copy) == count
        for extent in copy:
            assert isinstance(extent, Extent)
            assert extent.count >= 1
            blocks = {(extent.device, block) for block in range(extent.block, extent.end)}
            assert blocks <= free, "a block that is not free, or on a device that takes no new data"
            assert taken.isdisjoint(blocks), "a block twice"
            assert holding.setdefault(extent.device, number) == number, "two copies on one device"
            taken |= blocks


class _Pool:
    """Some devices with seeded holes, one of which (at times) takes no new data. It is the `FreeView` of the Placer."""

    def __init__(self, rng: random.Random, placer: Placer, lists: Mapping[int, FreeList] | None = None) -> None:
        self.placer = placer
        self._rng = rng
        if lists is None:
            indices = rng.sample(range(20), rng.randrange(1, placer.copies + 4))
            lists = {index: _holes(rng) for index in indices}
        readable_only = rng.choice(list(lists)) if len(lists) > placer.copies and rng.random() < 0.3 else None
        self._offered = [index for index in lists if index != readable_only]
        self._lists = lists

    def devices(self) -> Sequence[int]:
        return list(self._offered)

    def size(self, device: int) -> int:
        return 100_000

    def free_count(self, device: int) -> int:
        return self._lists[device].free_count

    def largest(self, device: int) -> int:
        return self._lists[device].largest()

    def best_fit(self, device: int, count: int) -> int | None:
        return self._lists[device].best_fit(count)

    def first_fit(self, device: int, count: int) -> int | None:
        return self._lists[device].first_fit(count)

    def longest_first(self, device: int) -> Iterator[tuple[int, int]]:
        return self._lists[device].longest_first()

    def take(self, copies: Sequence[Sequence[Extent]]) -> None:
        for device, block, count in (extent for copy in copies for extent in copy):
            self._lists[device].take(block, count)

    def free_blocks(self) -> set[tuple[int, int]]:
        """(device, block) of each block that may be chosen."""
        return {
            (device, block + offset)
            for device in self._offered
            for block, count in self._lists[device]
            for offset in range(count)
        }

    def counts(self) -> list[int]:
        """How much to ask for: a little, the sizes where something changes and their neighbours, and too much."""
        marks = [mark for device in self._offered for mark in (self.largest(device), self.free_count(device))]
        marks.append(sum(map(self.free_count, self._offered)))
        near = {mark + change for mark in marks for change in (-1, 0, 1)}
        return sorted(count for count in near | {1, 2, 255, 256, 257, self._rng.randrange(1, 2_000)} if count > 0)


def _holes(rng: random.Random) -> FreeList:
    """A FreeList that is empty, whole, or in pieces."""
    runs = rng.choice((0, 1, 3, 20, 200))
    longest = rng.choice((1, 3, 50)) if runs > 1 else 3_000
    extents = []
    block = 256
    for _ in range(runs):
        block += rng.randrange(1, 100)
        count = rng.randrange(1, longest + 1)
        extents.append((block, count))
        block += count
    return FreeList(extents)
