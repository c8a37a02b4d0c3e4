"""Holding: the places that have been granted to a process which serves an export, and what it does there by itself.

What is held is read and written without asking; for all else the process that has the pool is called (see
`rustord.lease`). A chunk that has a checksum is compared with it once, and then relied on as long as it stays in the
page cache, as in `rustord.objectreader`.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from time import monotonic, perf_counter
from typing import Final

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


_NOTHING = _Page()


class Question:
    """Where some chunks are, which the other process has been asked, and has not answered.

    With ``changes`` it has also been told to change them. An answer that ``is_void`` may be out of date.
    """

    __slots__ = ("changes", "end", "first", "is_void")

    def __init__(self, first: int, end: int, *, changes: bool) -> None:
        self.first = first
        self.end = end
        self.changes = changes
        self.is_void = False


class Holding:
    """Shared by the sessions of an export, and by who recalls it. ``fds`` are the devices by handle.

    Those that are files have to be as long as ``sizes`` tell, where that is not 0.
    """

    def __init__(self, fds: list[int], sizes: Sequence[int] = ()) -> None:
        self._fds = fds
        self._sizes = sizes
        self._gate = Gate()
        self._pages: dict[int, _Page] = {}
        self._questions: list[Question] = []
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
            self._pages.clear()
            self._void(0, 1 << 62)
        with self._dirtying:
            dirty, self._dirty = self._dirty | self._syncing, set()
            self._must_call = True
        return sorted(dirty)

    def leave(self, groups: Iterable[int]) -> None:
        """Hold nothing any more of groups of chunks, and be done with what is under way there."""
        with self._gate.shut(), self._learning:
            for number in groups:
                self._drop(number * PAGE_CHUNKS, (number + 1) * PAGE_CHUNKS)

    def lacks(self, first: int, end: int) -> bool:
        """Whether nothing has been learnt of some of these chunks, be it that they have to be asked for each time."""
        return not all(number in self._pages for number in range(*pages_of(first, end)))

    def ask(self, first: int, end: int, *, changes: bool = False) -> Question:
        """Something is about to be asked, which ends with `learn`. Without ``changes`` it is about whole pages."""
        question = Question(first, end, changes=changes)
        with self._learning:
            self._questions.append(question)
        return question

    def learn(self, question: Question, places: Places | None) -> None:
        """Hold what has been answered. None: no places, and what was held of the chunks is out of date."""
        with self._learning:
            self._questions.remove(question)
            if places is None or (question.changes and question.is_void):
                self._drop(question.first, question.end)
            elif question.changes:
                self._void(question.first, question.end, changes=False)
                self._set(question.first, places, are_whole=False)
            elif not question.is_void:
                self._set(question.first, places, are_whole=True)

    def _drop(self, first: int, end: int) -> None:
        begin, stop = pages_of(first, end)
        for number in [number for number in self._pages if begin <= number < stop]:
            del self._pages[number]
        self._void(first, end)

    def _void(self, first: int, end: int, *, changes: bool = True) -> None:
        """Answers that are on their way may name what is given up; or, without ``changes``, not know what is new."""
        for question in self._questions:
            if question.first < end and first < question.end and (changes or not question.changes):
                question.is_void = True

    def _set(self, first: int, places: Places, *, are_whole: bool) -> None:
        if len(self._pages) >= _PAGES_MAX:
            self._pages.clear()
        at, count = 0, len(places.where)
        while at < count:
            number, begin = divmod(first + at, PAGE_CHUNKS)
            stop = min(begin + count - at, PAGE_CHUNKS)
            page = self._pages.get(number)
            if page is None and are_whole:
                page = self._pages[number] = _Page()
            if page is not None:
                page.verified[begin:stop] = _UNVERIFIED[begin:stop]
                page.sums[begin:stop] = places.sums[at : at + stop - begin]
                page.where[begin:stop] = places.where[at : at + stop - begin]
            at += stop - begin

    # What we do ourselves

    def read(self, offset: int, buffer: memoryview) -> bool:
        """Whether ``buffer`` has been filled, and not only in part."""
        with self._gate:
            chunk, skip = divmod(offset, CHUNK_BYTES)
            if skip + len(buffer) <= CHUNK_BYTES:
                page = self._pages.get(chunk // PAGE_CHUNKS, _NOTHING)
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
            self._page(number).verified[number % PAGE_CHUNKS]
            for number in range(chunk, chunk + -(-length // CHUNK_BYTES))
        )

    def _compare(self, place: int, chunk: int, skip: int, buffer: memoryview) -> bool:
        """The same by whole chunks, which have to match their checksums."""
        length = -(-(skip + len(buffer)) // CHUNK_BYTES) * CHUNK_BYTES
        chunks = buffer if length == len(buffer) else memoryview(bytearray(length))
        if not self._fill(place, chunk, 0, chunks):
            return False
        for number, at in enumerate(range(0, length, CHUNK_BYTES), chunk):
            page, in_page = self._page(number), number % PAGE_CHUNKS
            if xxh3_64_intdigest(chunks[at : at + CHUNK_BYTES]) != page.sums[in_page]:
                return False
            page.verified[in_page] = 1
        if chunks is not buffer:
            buffer[:] = chunks[skip : skip + len(buffer)]
        return True

    def _distrust(self, chunk: int) -> None:
        number = chunk // PAGE_CHUNKS
        for near in range(number - _AROUND_PAGES, number + _AROUND_PAGES + 1):
            self._page(near * PAGE_CHUNKS).verified[:] = _UNVERIFIED

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

    def _page(self, chunk: int) -> _Page:
        """What is held of a chunk's page, which others may drop at any time."""
        return self._pages.get(chunk // PAGE_CHUNKS, _NOTHING)

    def _where(self, chunk: int) -> int:
        return self._page(chunk).where[chunk % PAGE_CHUNKS]

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
            is_whole = os.pwritev(self._fds[handle], (data,), at) == len(data)
        except OSError as error:
            if error.errno == errno.EBADF:  # the device has gone: nothing more has been written to it
                return False
            is_whole = False
        with self._dirtying:
            self._dirty.add(handle)
        return is_whole

    def flush(self, channel: Channel) -> None:
        """Make durable all that was written through any session before. Raises OSError or RustordError."""
        with self._flushing:
            with self._learning:  # what is being changed may have been granted and written by somebody else already
                is_changing = any(question.changes for question in self._questions)
            with self._dirtying:
                self._syncing, self._dirty = self._dirty, set()
                must_call, self._must_call = self._must_call or is_changing, False
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
            if self._sizes and os.fstat(self._fds[handle]).st_size < self._sizes[handle]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))  # see `rustord.blockdevice.ImageFile.flush`
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
        """Ask for the places of chunks, unless that has been done; whether there is an answer."""
        holding = self._holding
        if not holding.lacks(first, end):
            return False
        begin, stop = pages_of(first, end)
        question = holding.ask(begin * PAGE_CHUNKS, stop * PAGE_CHUNKS)
        places = None
        try:
            places = Places.decode(self._channel.call(Call.GRANT, question.first, question.end - question.first))
        except RustordError:  # whoever is called next says what is wrong
            return False
        finally:
            holding.learn(question, places)
        return True

    def write(self, offset: int, data: memoryview) -> None:
        holding = self._holding
        if holding.write(offset, data):
            return
        if not (self._ask(*chunks_of(offset, len(data))) and holding.write(offset, data)):
            self._change(Call.WRITE, offset, len(data), data)

    def flush(self) -> None:
        if not self.read_only:
            self._holding.flush(self._channel)

    def trim(self, offset: int, length: int) -> None:
        self._change(Call.TRIM, offset, length)

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        self._change(Call.ZERO, offset, length, flags=KEEP * keep | FAST * fast)

    def _change(self, call: Call, offset: int, length: int, data: bytes | memoryview = b"", *, flags: int = 0) -> None:
        """Have it changed by the other process, which has to flush it then."""
        question = self._holding.ask(*chunks_of(offset, length), changes=True)
        places = None
        try:
            reply = self._channel.call(call, offset, length, data, flags=flags)
            places = Places.decode(reply) if reply else None
        finally:
            self._holding.called()  # first: see `Holding.flush`
            self._holding.learn(question, places)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        while length > 0:
            for run in decode_runs(self._channel.call(Call.RUNS, offset, length)):
                yield run
                offset += run.length
                length -= run.length

    def close(self) -> None:
        """The other process has it open."""
