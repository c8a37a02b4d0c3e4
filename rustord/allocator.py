"""Allocator: the FreeLists of all devices, and the Placer that chooses from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from rustord.errors import DeviceError, NoSpace, PluginError, RustordError
from rustord.extent import COUNT_MAX, Extent, extend
from rustord.freelist import FreeList
from rustord.placer import Contiguous, Placer


class Allocator:
    """Gives out blocks and takes them back; the only one that changes a FreeList.

    It is the `FreeView` that a Placer asks, and validates each choice before anything is written: a block that is not
    free is never given out, whatever a Placer says. Any thread may call it.
    """

    def __init__(
        self,
        placer: Placer,
        writable: Callable[[], Sequence[int]],
        refusals: Callable[[], Sequence[str]] = lambda: (),
        leaving: Callable[[], Sequence[int]] = lambda: (),
    ) -> None:
        """``writable`` tells the devices that take new data now, ``refusals`` why the others do not, ``leaving`` which
        of them are being emptied."""
        self.placer = placer
        self._mover = Contiguous()
        self._writable = writable
        self._refusals = refusals
        self._leaving = leaving
        self._free: dict[int, FreeList] = {}
        self._sizes: dict[int, int] = {}
        self._offered: Sequence[int] = ()
        self._lock = threading.Lock()

    def add(self, device: int, free: FreeList, size: int) -> None:
        """Offer a device of ``size`` data blocks."""
        with self._lock:
            self._free[device] = free
            self._sizes[device] = size

    def remove(self, device: int) -> None:
        """Offer the device no more."""
        with self._lock:
            del self._free[device]
            del self._sizes[device]

    def place(self, count: int) -> list[list[Extent]]:
        """Blocks for ``count`` blocks of content, once for each copy. Raises NoSpace, or PluginError for a bad choice.

        DeviceError says that there would be devices enough if some of them were not missing or failed. Nothing has
        changed when it raises.
        """
        (placed,) = self.place_each((count,))
        if isinstance(placed, RustordError):
            raise placed
        return placed

    def place_each(self, counts: Iterable[int]) -> list[list[list[Extent]] | RustordError]:
        """The same for each of ``counts`` in turn, with what `place` would raise in place of its blocks."""
        outcomes: list[list[list[Extent]] | RustordError] = []
        with self._lock:
            self._offered = [index for index in self._writable() if index in self._free]
            for count in counts:
                try:
                    outcomes.append(self._place(count))
                except RustordError as error:
                    outcomes.append(error)
        return outcomes

    def _place(self, count: int) -> list[list[Extent]]:
        if len(self._offered) < len(self._free):
            self._check_set_aside(count * self.placer.copies)
        try:
            chosen = self.placer.place(count, self)
        except NoSpace:
            if len(self._offered) < self.placer.copies and (refusals := self._refusals()):
                raise self._degraded(refusals) from None
            raise
        except (Exception, SystemExit) as error:
            raise self._blame(f"failed: {error!r}") from error
        return self._take(chosen, count, self.placer.copies)

    def place_on(self, count: int, may: Callable[[int], bool]) -> list[Extent]:
        """``count`` blocks for one copy of an Object that moves, on devices that ``may`` allows.

        A Placer of single copies chooses them; one of several cannot be asked for one, which goes where it fits best.
        Raises NoSpace, or PluginError for a bad choice; nothing has changed then.
        """
        with self._lock:
            self._offered = [index for index in self._writable() if index in self._free and may(index)]
            if not self._offered:
                raise NoSpace("no device may take what has to move", hint="add a device")
            placer = self.placer if self.placer.copies == 1 else self._mover
            try:
                chosen = placer.place(count, self)
            except NoSpace:
                raise
            except (Exception, SystemExit) as error:
                raise self._blame(f"failed: {error!r}") from error
            (extents,) = self._take(chosen, count, placer.copies)
            return _split(extents)

    def run(self, count: int, device: int = -1, avoid: Collection[int] = (), *, is_new: bool = False) -> Extent:
        """``count`` blocks in one run: on ``device`` if it has one, else on the emptiest that has, but for ``avoid``.

        For what no Placer is asked about, since it is no Object; ``is_new`` if it is data that comes in as that of one
        does. Raises NoSpace.
        """
        with self._lock:
            self._offered = [index for index in self._writable() if index in self._free and index not in avoid]
            if is_new and len(self._offered) < len(self._free):
                self._check_set_aside(count)
            for index in sorted(self._offered, key=lambda index: (index != device, -self._free[index].free_count)):
                block = self._free[index].best_fit(count)
                if block is not None:
                    self._free[index].take(block, count)
                    return Extent(index, block, count)
        raise NoSpace(
            f"no {count} free blocks in a row on any device that may take them",
            hint="delete Objects or volumes, trim what a volume does not use, or add a device",
        )

    def _check_set_aside(self, count: int) -> None:
        """Raise NoSpace if ``count`` more blocks of new data would take the room of what is on devices that leave.

        There was room for that when they began to leave, and there is until they are gone, whatever comes in meanwhile.
        """
        leaving = [index for index in self._leaving() if index in self._free]
        needed = sum(self._sizes[index] - self.free_count(index) - self.lost_count(index) for index in leaving)
        free = sum(map(self.free_count, self._offered))
        if needed and free - count < needed:
            raise NoSpace(
                f"no room for {count} blocks: {free} are free, of which {needed} are set aside for what is on device "
                f"{' and '.join(map(str, leaving))}",
                hint="wait until that is empty, keep it with 'rustorctl device remove --stop', or add a device",
            )

    def _take(self, chosen: Sequence[Sequence[Extent]], count: int, copy_count: int) -> list[list[Extent]]:
        taken: list[Extent] = []
        longest = 0
        try:
            copies = [list(copy) for copy in chosen]  # it is asked once: the next time it might say something else
            if len(copies) != copy_count:
                raise ValueError(f"{len(copies)} copies instead of {copy_count}")
            for copy in copies:
                missing = count
                for extent in copy:
                    device, block, length = extent.device, extent.block, extent.count
                    if device not in self._offered:
                        raise ValueError(f"device {device} takes no new data")
                    self._free[device].take(block, length)
                    taken.append(extent)
                    missing -= length
                    longest = max(longest, length)
                if missing:
                    raise ValueError(f"{count - missing} blocks instead of {count}")
            if len(copies) > 1:
                _check_apart(copies)
        except Exception as error:
            self._give_back(taken)
            raise self._blame(f"chose blocks that it may not: {error!r}") from error
        return copies if longest <= COUNT_MAX else [_split(copy) for copy in copies]

    def _degraded(self, refusals: Sequence[str]) -> DeviceError:
        need, have = self.placer.copies, len(self._offered)
        return DeviceError(
            f"new data needs {need} device{'s' * (need > 1)}, and {have or 'none'} can take it: {'; '.join(refusals)}",
            hint="bring the device back, or add another one",
        )

    def _blame(self, what: str) -> PluginError:
        return PluginError(
            f"the placer {self.placer.name!r} {what}",
            hint="nothing was written; choose another placer in rustord.toml, or mend the plugin",
        )

    def release(self, extents: Iterable[Extent]) -> None:
        """Take blocks back; they must have been erased, or never written."""
        with self._lock:
            self._give_back(extents)

    def _give_back(self, extents: Iterable[Extent]) -> None:
        for device, block, count in extents:
            if device in self._free:
                self._free[device].release(block, count)

    def condemn(self, extents: Iterable[Extent]) -> None:
        """Never give out these blocks again, whether they are free now or only later."""
        with self._lock:
            for device, block, count in extents:
                if device in self._free:
                    self._free[device].condemn(block, count)

    def is_empty(self, device: int) -> bool:
        """Whether nothing is on the device: each of its blocks is free, or would be if it were not bad; or it left."""
        with self._lock:
            free = self._free.get(device)
            return free is None or free.free_count + free.lost_count == self._sizes[device]

    def free_runs(self, device: int) -> list[tuple[int, int]]:
        """The runs of free blocks of a device as (block, count), as they are now."""
        with self._lock:
            return list(self._free[device])

    def lost_count(self, device: int) -> int:
        """Blocks that are bad, and that nothing is on."""
        free = self._free.get(device)
        return 0 if free is None else free.lost_count

    def fragments(self) -> int:
        """How many runs of free blocks there are."""
        return sum(len(free) for free in self._free.values())

    # What a Placer may ask (called by it from within `place`)

    def devices(self) -> Sequence[int]:
        """The devices that take new data now."""
        return self._offered

    def free_count(self, device: int) -> int:
        free = self._free.get(device)
        return 0 if free is None else free.free_count  # who counts may have seen one that joins, or has just left

    def largest(self, device: int) -> int:
        return self._free[device].largest()

    def size(self, device: int) -> int:
        """Blocks for data on the device in all, free or not."""
        return self._sizes.get(device, 0)

    def best_fit(self, device: int, count: int) -> int | None:
        return self._free[device].best_fit(count)

    def first_fit(self, device: int, count: int) -> int | None:
        return self._free[device].first_fit(count)

    def longest_first(self, device: int) -> Iterator[tuple[int, int]]:
        return self._free[device].longest_first()


def _split(copy: Iterable[Extent]) -> list[Extent]:
    """The same blocks in extents that are no longer than one may be."""
    split: list[Extent] = []
    extend(split, copy)
    return split


def _check_apart(copies: Iterable[Iterable[Extent]]) -> None:
    """Raise ValueError if a device has parts of two copies: it would take both with it."""
    seen: set[int] = set()
    for copy in copies:
        devices = {extent.device for extent in copy}
        if shared := seen & devices:
            raise ValueError(f"two copies on device {shared.pop()}")
        seen |= devices
