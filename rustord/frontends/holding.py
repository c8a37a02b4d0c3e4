"""Holding: the places that have been granted to a process which serves an export, and what it does there by itself.

What is held is read and written without asking; for all else the process that has the pool is called (see
`rustord.lease`). A chunk that has a checksum is compared with it once, and then relied on as long as it stays in the
page cache, as in `rustord.objectreader`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from time import monotonic, perf_counter
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from rustord.blockdevice import BlockDevice
from rustord.errors import RustordError
from rustord.export import Kind, Run
from rustord.frontends.channel import FAST, KEEP, Call, Channel, decode_runs
from rustord.gate import Gate
from rustord.lease import Place
from rustord.page import CHUNK_BYTES, PAGE_CHUNKS

# A place is one number: the handle that a device has between the two processes, a sector, and two bits.
_UNKNOWN: Final = 0
_ZEROS: Final = 4  # nowhere: no chunk is in the second sector of a device
_WRITABLE: Final = 1
_CHECKED: Final = 2
_SECTOR_BYTES = 512
_SECTOR_SHIFT, _HANDLE_SHIFT = 2, 48
_SECTOR_MASK = (1 << _HANDLE_SHIFT - _SECTOR_SHIFT) - 1
_STEP = CHUNK_BYTES // _SECTOR_BYTES << _SECTOR_SHIFT
"""From the place of a chunk to that of one right behind it."""
_PAGES_MAX = 8192
"""Of 16 MiB each: what is held takes no more than 40 MiB, and that only if 128 GiB are in use."""
_AROUND_PAGES = 1
"""When a chunk has left the page cache, what is near it is compared again: of its own page and so many around."""
_TELL_S = 1.0
"""How often the other process is told how long flushes took."""
_UNVERIFIED = bytes(PAGE_CHUNKS)


class Places:
    """What is granted of some chunks, as numbers: where they are, and their checksums."""

    __slots__ = ("sums", "where")

    def __init__(self, where: array[int], sums: array[int]) -> None:
        self.where = where
        self.sums = sums

    @classmethod
    def none(cls, count: int) -> Places:
        return cls(array("Q", bytes(8 * count)), array("Q", bytes(8 * count)))

    @classmethod
    def of(cls, places: Iterable[Place | None], handle: Callable[[int, BlockDevice], int]) -> Places:
        """``handle`` tells that of the device in a slot, or -1."""
        where, sums = array("Q"), array("Q")
        for place in places:
            where.append(_number(place, handle))
            sums.append(int.from_bytes(place.checksum, "big") if place else 0)
        return cls(where, sums)

    def writable_handles(self) -> set[int]:
        """Those of the devices that may be written to."""
        return {place >> _HANDLE_SHIFT for place in self.where if place & _WRITABLE}

    def encode(self) -> bytes:
        return self.where.tobytes() + self.sums.tobytes()

    @classmethod
    def decode(cls, data: memoryview) -> Places:
        both = array("Q")
        both.frombytes(data)
        return cls(both[: len(both) // 2], both[len(both) // 2 :])


def _number(place: Place | None, handle: Callable[[int, BlockDevice], int]) -> int:
    if place is None:
        return _UNKNOWN
    if place.device is None:
        return _ZEROS
    number = handle(place.slot, place.device)
    if number < 0:
        return _UNKNOWN
    bits = place.writable * _WRITABLE | bool(place.checksum) * _CHECKED
    return number << _HANDLE_SHIFT | place.offset // _SECTOR_BYTES << _SECTOR_SHIFT | bits


class _Page(Places):
    """Of `PAGE_CHUNKS` chunks; which of them have been compared with their checksums."""

    __slots__ = ("verified",)

    def __init__(self) -> None:
        none = Places.none(PAGE_CHUNKS)
        super().__init__(none.where, none.sums)
        self.verified = bytearray(PAGE_CHUNKS)


class Version(NamedTuple):
    """What a reply is out of date by, once it differs from what it was before the call."""

    dropped: int
    """Counts how often places were given up: a reply may name one of them."""
    changed: int
    """Counts how often others took the place of those: a reply may not know them yet."""


class Holding:
    """Shared by the sessions of an export, and by who recalls it. ``fds`` are the devices by handle."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._gate = Gate()
        self._pages: dict[int, _Page] = {}
        self._version = Version(0, 0)
        self._learning = Lock()
        """Of the two."""
        self._dirty: set[int] = set()
        self._syncing: set[int] = set()
        self._must_call = True
        """The other process may have something to flush."""
        self._dirtying = Lock()
        """Of the three."""
        self._flushing = Lock()
        self._took = array("Q")
        self._told_at = monotonic()

    # What the other process says

    def recall(self) -> list[int]:
        """Hold nothing any more. Returns the devices that have been written to and may not be flushed."""
        with self._gate.shut(), self._learning:
            self._drop(list(self._pages))
        with self._dirtying:
            dirty, self._dirty = self._dirty | self._syncing, set()
            self._must_call = True
        return sorted(dirty)

    def leave(self, numbers: Iterable[int]) -> None:
        """Hold nothing any more of groups of chunks, and be done with what is under way there."""
        with self._gate.shut(), self._learning:
            self._drop(numbers)

    @property
    def version(self) -> Version:
        """To be asked before a call whose reply is for `learn` or `renew`."""
        return self._version

    def learn(self, version: Version, first: int, places: Places) -> None:
        """Hold the places of the chunks from ``first`` on, which are whole pages, unless that is out of date."""
        with self._learning:
            if version == self._version:
                self._set(first, places)

    def renew(self, version: Version, first: int, end: int, places: Places) -> None:
        """Hold new places for chunks to which another process has written for us."""
        with self._learning:
            if version.dropped != self._version.dropped or self.lacks(first, end):
                self._drop(range(*pages_of(first, end)))
            else:
                self._set(first, places)
                self._version = self._version._replace(changed=self._version.changed + 1)

    def drop(self, first: int, end: int) -> None:
        """Ask again for the places of these chunks."""
        with self._learning:
            begin, stop = pages_of(first, end)
            self._drop([number for number in self._pages if begin <= number < stop])

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._pages.pop(number, None)
        self._version = self._version._replace(dropped=self._version.dropped + 1)

    def _set(self, first: int, places: Places) -> None:
        if len(self._pages) >= _PAGES_MAX:
            self._pages.clear()
        at, count = 0, len(places.where)
        while at < count:
            number, begin = divmod(first + at, PAGE_CHUNKS)
            stop = min(begin + count - at, PAGE_CHUNKS)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = _Page()
            page.verified[begin:stop] = _UNVERIFIED[begin:stop]
            page.sums[begin:stop] = places.sums[at : at + stop - begin]
            page.where[begin:stop] = places.where[at : at + stop - begin]
            at += stop - begin

    def lacks(self, first: int, end: int) -> bool:
        """Whether it has not been asked about some of these chunks."""
        return not all(number in self._pages for number in range(*pages_of(first, end)))

    # What we do ourselves

    def read(self, offset: int, buffer: memoryview) -> bool:
        """Whether ``buffer`` has been filled, and not only in part."""
        with self._gate:
            chunk, skip = divmod(offset, CHUNK_BYTES)
            if skip + len(buffer) <= CHUNK_BYTES:
                page = self._pages.get(chunk // PAGE_CHUNKS)
                if page is None:
                    return False
                place = page.where[chunk % PAGE_CHUNKS]
                if place & _CHECKED and not page.verified[chunk % PAGE_CHUNKS]:
                    return self._compare(place, chunk, skip, buffer)
                return self._fill(place, chunk, skip, buffer)
            return all(
                self._compare(place, chunk, skip, buffer[begin:stop])
                if place & _CHECKED and not self._are_verified(chunk, skip + stop - begin)
                else self._fill(place, chunk, skip, buffer[begin:stop])
                for place, chunk, skip, begin, stop in self._runs(offset, len(buffer))
            )

    def _fill(self, place: int, chunk: int, skip: int, buffer: memoryview) -> bool:
        """Read from ``place``, that of a chunk, ``skip`` bytes further on."""
        if place <= _ZEROS:
            if place == _ZEROS:
                buffer[:] = bytes(len(buffer))
            return place == _ZEROS
        at = (place >> _SECTOR_SHIFT & _SECTOR_MASK) * _SECTOR_BYTES + skip
        try:
            if not place & _CHECKED:
                return os.preadv(self._fds[place >> _HANDLE_SHIFT], (buffer,), at) == len(buffer)
            if os.preadv(self._fds[place >> _HANDLE_SHIFT], (buffer,), at, os.RWF_NOWAIT) == len(buffer):
                return True
        except OSError:
            pass
        if place & _CHECKED:
            self._distrust(chunk)
        return False

    def _are_verified(self, chunk: int, length: int) -> bool:
        return all(
            self._pages[number].verified[number_in_page]
            for number, number_in_page in map(_in_page, range(chunk, chunk + -(-length // CHUNK_BYTES)))
        )

    def _compare(self, place: int, chunk: int, skip: int, buffer: memoryview) -> bool:
        """The same by whole chunks, which have to match their checksums."""
        count = -(-(skip + len(buffer)) // CHUNK_BYTES)
        length = count * CHUNK_BYTES
        chunks = buffer if length == len(buffer) else memoryview(bytearray(length))
        if not self._fill(place, chunk, 0, chunks):
            return False
        for number in range(count):
            page_number, in_page = _in_page(chunk + number)
            page = self._pages[page_number]
            if xxh3_64_intdigest(chunks[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]) != page.sums[in_page]:
                return False
            page.verified[in_page] = 1
        if chunks is not buffer:
            buffer[:] = chunks[skip : skip + len(buffer)]
        return True

    def _distrust(self, chunk: int) -> None:
        number = chunk // PAGE_CHUNKS
        for near in range(number - _AROUND_PAGES, number + _AROUND_PAGES + 1):
            if near in self._pages:
                self._pages[near].verified[:] = _UNVERIFIED

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(place, its chunk, bytes to skip there, begin, end) of each part of a range that lies in one piece."""
        at = 0
        while at < length:
            first, skip = divmod(offset + at, CHUNK_BYTES)
            begin, chunk = at, first
            place = following = self._where(chunk)
            at += CHUNK_BYTES - skip
            while at < length:
                chunk += 1
                following += _STEP if place > _ZEROS else 0
                if self._where(chunk) != following:
                    break
                at += CHUNK_BYTES
            yield place, first, skip, begin, min(at, length)

    def _where(self, chunk: int) -> int:
        page = self._pages.get(chunk // PAGE_CHUNKS)
        return _UNKNOWN if page is None else page.where[chunk % PAGE_CHUNKS]

    def write(self, offset: int, data: memoryview) -> bool:
        """Whether all of ``data`` has been written in place."""
        with self._gate:
            chunk, skip = divmod(offset, CHUNK_BYTES)
            if skip + len(data) <= CHUNK_BYTES:
                return self._write(self._where(chunk), skip, data)
            runs = [*self._runs(offset, len(data))]
            if not all(place & _WRITABLE for place, *_ in runs):
                return False
            return all(self._write(place, skip, data[begin:stop]) for place, _, skip, begin, stop in runs)

    def _write(self, place: int, skip: int, data: memoryview) -> bool:
        if not place & _WRITABLE:
            return False
        handle = place >> _HANDLE_SHIFT
        at = (place >> _SECTOR_SHIFT & _SECTOR_MASK) * _SECTOR_BYTES + skip
        try:
            return os.pwritev(self._fds[handle], (data,), at) == len(data)
        except OSError:
            return False
        finally:
            with self._dirtying:
                self._dirty.add(handle)

    def flush(self, channel: Channel) -> None:
        """Make durable all that was written through any session before. Raises OSError or RustordError."""
        with self._flushing:
            with self._dirtying:
                self._syncing, self._dirty = self._dirty, set()
                must_call, self._must_call = self._must_call, False
            try:
                if must_call or not all(self._sync(handle, channel) for handle in self._syncing):
                    must_call = bool(channel.call(Call.FLUSH, data=array("H", self._syncing).tobytes())[0])
            except BaseException:
                must_call = True
                with self._dirtying:
                    self._dirty |= self._syncing
                raise
            finally:
                with self._dirtying:
                    self._syncing = set()
                    self._must_call |= must_call
            if self._took and monotonic() - self._told_at > _TELL_S:
                channel.tell(Call.TOOK, self._took.tobytes())
                self._took, self._told_at = array("Q"), monotonic()

    def _sync(self, handle: int, channel: Channel) -> bool:
        began = perf_counter()
        try:
            os.fdatasync(self._fds[handle])
        except OSError as error:
            # To flush it once more would say that all is well: the kernel tells of a lost write only once.
            channel.call(Call.FAIL, handle, error.errno or 0)
            return False
        self._took.extend((handle, round((perf_counter() - began) * 1e6)))
        return True

    def called(self) -> None:
        """The other process has been told to change something, and has to flush it."""
        with self._dirtying:
            self._must_call = True


def chunks_of(offset: int, length: int) -> tuple[int, int]:
    """The first of the chunks that a range touches, and the one behind the last."""
    return offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES + 1


def pages_of(first: int, end: int) -> tuple[int, int]:
    """The same for the pages that chunks are in."""
    return first // PAGE_CHUNKS, (end - 1) // PAGE_CHUNKS + 1


def _in_page(chunk: int) -> tuple[int, int]:
    return divmod(chunk, PAGE_CHUNKS)


class HeldExport:
    """The `rustord.export.Export` of one session."""

    def __init__(
        self, holding: Holding, channel: Channel, key: str, kind: Kind, size: int, *, read_only: bool, rotational: bool
    ) -> None:
        self.key = key
        self.kind = kind
        self.size = size
        self.read_only = read_only
        self.rotational = rotational
        self.block_size = CHUNK_BYTES
        self._holding = holding
        self._channel = channel

    def read(self, offset: int, buffer: memoryview) -> None:
        if self._holding.read(offset, buffer):
            return
        if not (self._ask(*chunks_of(offset, len(buffer))) and self._holding.read(offset, buffer)):
            self._channel.call(Call.READ, offset, len(buffer), into=buffer)

    def _ask(self, first: int, end: int) -> bool:
        """Ask for the places of chunks, unless that has been done; whether it was."""
        holding = self._holding
        if not holding.lacks(first, end):
            return False
        begin, stop = pages_of(first, end)
        version = holding.version
        try:
            reply = self._channel.call(Call.GRANT, begin * PAGE_CHUNKS, (stop - begin) * PAGE_CHUNKS)
        except RustordError:  # whoever is called next says what is wrong
            return False
        holding.learn(version, begin * PAGE_CHUNKS, Places.decode(reply))
        return True

    def write(self, offset: int, data: memoryview) -> None:
        holding = self._holding
        if holding.write(offset, data):
            return
        first, end = chunks_of(offset, len(data))
        if self._ask(first, end) and holding.write(offset, data):
            return
        version = holding.version
        try:
            reply = self._channel.call(Call.WRITE, offset, len(data), data)
        except BaseException:
            holding.drop(first, end)
            raise
        else:
            holding.renew(version, first, end, Places.decode(reply))
        finally:
            holding.called()

    def flush(self) -> None:
        if not self.read_only:
            self._holding.flush(self._channel)

    def trim(self, offset: int, length: int) -> None:
        self._change(Call.TRIM, offset, length)

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        self._change(Call.ZERO, offset, length, KEEP * keep | FAST * fast)

    def _change(self, call: Call, offset: int, length: int, flags: int = 0) -> None:
        try:
            self._channel.call(call, offset, length, flags=flags)
        finally:
            self._holding.drop(*chunks_of(offset, length))
            self._holding.called()

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        while length > 0:
            for run in decode_runs(self._channel.call(Call.RUNS, offset, length)):
                yield run
                offset += run.length
                length -= run.length

    def close(self) -> None:
        """The other process has it open."""
