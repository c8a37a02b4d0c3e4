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


@pytest.mark.parametrize(
    ("placer", "found_by"),
    [
        (TooShort, "test_room_is_found_in_single_blocks"),
        (Overlapping, "test_choices_are_whole_and_free"),
        (TwoCopies, "test_choices_are_whole_and_free"),
        (NotFree, "test_choices_are_whole_and_free"),
        (OtherDevice, "test_choices_are_whole_and_free"),
        (WantsOneRun, "test_room_is_found_in_single_blocks"),
        (SameDevice, "test_choices_are_whole_and_free"),
        (LongName, "test_name_can_be_recorded"),
    ],
)
def test_contract_finds_what_is_wrong(placer: type[Placer], found_by: str) -> None:
    report = check("placer", lambda options: placer())
    assert found_by in [failure.test.partition("[")[0] for failure in report.failures]
