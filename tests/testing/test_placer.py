"""The in-tree Placers keep the contract, and the contract finds Placers that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from rustord import defaults
from rustord.errors import NoSpace
from rustord.extent import Extent
from rustord.placer import Contiguous, FreeView, Mirrored, Placer
from rustord.testing import PlacerContract, check

OFFERED = defaults.rustord_placers()


class TestContiguous(PlacerContract):
    factory = staticmethod(OFFERED["contiguous"])


class TestFirstFit(PlacerContract):
    factory = staticmethod(OFFERED["first-fit"])


class TestStriped(PlacerContract):
    factory = staticmethod(OFFERED["striped"])

    @pytest.fixture(params=[1, 7, 256])
    def options(self, request: pytest.FixtureRequest) -> Mapping[str, object]:
        return {"unit_blocks": request.param}


class TestMirrored(PlacerContract):
    factory = staticmethod(OFFERED["mirrored"])

    @pytest.fixture(params=[2, 3])
    def options(self, request: pytest.FixtureRequest) -> Mapping[str, object]:
        return {"copies": request.param}


class Wrong(Contiguous):
    """Spoils what Contiguous chose."""

    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        raise NotImplementedError

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        return [list(copy) for copy in self.spoil(super().place(count, free)[0], count, free)]


class TooShort(Wrong):
    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        return [[extents[0]]]


class Overlapping(Wrong):
    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        first = extents[0]
        return [[first._replace(count=1)] * first.count + extents[1:]]


class TwoCopies(Wrong):
    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        return [extents, extents]


class NotFree(Wrong):
    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        return [[extent._replace(block=extent.block + 1) for extent in extents]]


class OtherDevice(Wrong):
    def spoil(self, extents: list[Extent], count: int, free: FreeView) -> Sequence[Sequence[Extent]]:
        return [[extent._replace(device=extent.device + 1) for extent in extents]]


class WantsOneRun(Contiguous):
    """Gives up where there is room, in pieces."""

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        if all(free.best_fit(device, count) is None for device in free.devices()):
            raise NoSpace("no run is long enough")
        return super().place(count, free)


class SameDevice(Mirrored):
    """Puts both copies on one device."""

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        for device in free.devices():
            block = free.best_fit(device, 2 * count)
            if block is not None:
                return [[Extent(device, block, count)], [Extent(device, block + count, count)]]
        return super().place(count, free)


class LongName(Contiguous):
    name = "x" * 33


class CopiesInWords(Contiguous):
    """Counts its copies as somebody who reads a configuration without looking."""

    copies = True


class NoDeviceIsNoProblem(Contiguous):
    """Thinks that there always is a device."""

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        return super().place(count, free) if free.devices() else [[]]


class FullIsNoProblem(Contiguous):
    """Takes a full device for one that has room at its start."""

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        if free.devices() and not any(map(free.free_count, free.devices())):
            return [[Extent(next(iter(free.devices())), 0, count)]]
        return super().place(count, free)


class KeepsTheLast(Contiguous):
    """Never gives out the last block of all."""

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        if sum(map(free.free_count, free.devices())) == count == 1:
            raise NoSpace("one block is kept")
        return super().place(count, free)


WHOLE, TAKEN = "test_choices_are_whole_and_free", "test_choices_are_taken_until_there_is_no_room"
SINGLE = "test_room_is_found_in_single_blocks"
BROKEN: list[tuple[type[Placer], set[str]]] = [
    (TooShort, {WHOLE, TAKEN, SINGLE}),
    (Overlapping, {WHOLE, TAKEN}),
    (TwoCopies, {WHOLE, TAKEN, SINGLE}),
    (NotFree, {WHOLE, TAKEN, SINGLE}),
    (OtherDevice, {WHOLE, TAKEN, SINGLE}),
    (WantsOneRun, {WHOLE, TAKEN, SINGLE}),
    (SameDevice, {WHOLE, TAKEN}),
    (KeepsTheLast, {TAKEN}),
    (LongName, {"test_name_can_be_recorded"}),
    (CopiesInWords, {"test_copies_is_a_number"}),
    (NoDeviceIsNoProblem, {"test_no_device_means_no_space"}),
    (FullIsNoProblem, {WHOLE, TAKEN, "test_full_devices_mean_no_space"}),
]


@pytest.mark.parametrize(("placer", "found_by"), BROKEN)
def test_contract_finds_what_is_wrong_and_nothing_else(placer: type[Placer], found_by: set[str]) -> None:
    report = check("placer", lambda options: placer())
    assert {failure.test.partition("[")[0] for failure in report.failures} == found_by


def test_every_test_of_the_contract_finds_something() -> None:
    tests = {name for name in vars(PlacerContract) if name.startswith("test_")}
    assert set().union(*(found_by for _, found_by in BROKEN)) == tests
