"""The client's side of NBD, written from the specification alone, and an export in memory."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from rustord.errors import DeviceError, Forbidden, NotFound, RustordError, Unsupported
from rustord.export import Export, Kind, Run, State

MIB = 1 << 20

IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY = struct.Struct(">8sIII")


class MemoryExport:
    """An export in memory. Reads and writes that touch ``bad`` fail; ``log`` has every call that changes something."""

    key = "disk"
    kind = Kind.VOLUME
    rotational = False
    block_size = 4096

    def __init__(self, size: int = 1 << 16, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.size = size
        self.read_only = read_only
        self.bad = -1
        self.flush_failure: RustordError | None = None
        self.log: list[tuple[object, ...]] = []
        self.known = [Run(size, State.DATA)]
        self.closed = 0

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size
        if offset <= self.bad < offset + length:
            raise DeviceError("a bad sector", hint="replace the disk")

    def read(self, offset: int, buffer: memoryview) -> None:
        assert len(buffer) > 0
        self._check(offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        assert not self.read_only
        self._check(offset, len(data))
        self.data[offset : offset + len(data)] = data
        self.log.append(("write", offset, len(data)))

    def flush(self) -> None:
        self.log.append(("flush",))
        if self.flush_failure:
            raise self.flush_failure

    def trim(self, offset: int, length: int) -> None:
        assert not self.read_only
        self._check(offset, length)
        self.data[offset : offset + length] = bytes(length)
        self.log.append(("trim", offset, length))

    def zero(self, offset: int, length: int, *, keep: bool, fast: bool) -> None:
        assert not self.read_only
        self._check(offset, length)
        if fast and not keep:
            raise Unsupported("not fast")
        self.data[offset : offset + length] = bytes(length)
        self.log.append(("zero", offset, length, keep, fast))

    def runs(self, offset: int, length: int) -> Iterable[Run]:
        start = 0
        for run in self.known:
            end = start + run.length
            if end > offset:
                yield Run(end - max(start, offset), run.state)
            start = end

    def close(self) -> None:
        self.closed += 1


class Catalogue:
    """Exports by name. What is open is counted by the exports themselves."""

    def __init__(self, **exports: MemoryExport) -> None:
        self.exports = exports
        self.opened: list[str] = []

    def names(self) -> Iterable[tuple[str, str]]:
        return [(name, f"the {name} one") for name in self.exports]

    def look(self, name: str) -> tuple[Export, str]:
        if name == "secret":
            raise Forbidden("not for you")
        if name not in self.exports:
            raise NotFound("x" * 5000)
        return self.exports[name], f"the {name} one"

    def open(self, name: str) -> tuple[Export, str]:
        found = self.look(name)
        self.opened.append(name)
        return found


# What a client says


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(encoded)) + encoded


def info_request(name: str, *kinds: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds)


def context_request(name: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 0, flags: int = 0, extended: bool = False
) -> bytes:
    if extended:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def write(offset: int, data: bytes, *, cookie: int = 0, flags: int = 0, extended: bool = False) -> bytes:
    flags |= 32 if extended else 0
    return request(1, offset, len(data), cookie=cookie, flags=flags, extended=extended) + data


# What a server says


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


def option_replies(data: bytes) -> list[OptionReply]:
    """All replies to options; there must be nothing else."""
    replies = []
    while data:
        magic, number, kind, length = OPTION_REPLY.unpack_from(data)
        assert magic == bytes.fromhex("0003e889045565a9")
        assert len(data) >= OPTION_REPLY.size + length
        replies.append(OptionReply(number, kind, data[OPTION_REPLY.size : OPTION_REPLY.size + length]))
        data = data[OPTION_REPLY.size + length :]
    return replies


class Chunk(NamedTuple):
    """A simple reply (``kind`` -1), or a chunk of another one."""

    cookie: int
    kind: int
    error: int
    done: bool
    offset: int
    data: bytes


def replies(data: bytes, reads: dict[int, int] | None = None, *, extended: bool = False) -> list[Chunk]:
    """All replies; there must be nothing else. ``reads``: the length of each simple READ, by its cookie."""
    chunks = []
    while data:
        (magic,) = struct.unpack_from(">I", data)
        if magic == 0x67446698:
            assert not extended
            error, cookie = struct.unpack_from(">IQ", data, 4)
            end = 16 + (0 if error else (reads or {}).get(cookie, 0))
            chunks.append(Chunk(cookie, -1, error, True, 0, data[16:end]))
        else:
            chunk, end = _chunk(magic, data, extended=extended)
            chunks.append(chunk)
        assert len(data) >= end
        data = data[end:]
    return chunks


def _chunk(magic: int, data: bytes, *, extended: bool) -> tuple[Chunk, int]:
    if extended:
        assert magic == 0x6E8A278C
        flags, kind, cookie, _, length = struct.unpack_from(">HHQQQ", data, 4)
        start = 32
    else:
        assert magic == 0x668E33EF
        flags, kind, cookie, length = struct.unpack_from(">HHQI", data, 4)
        start = 20
    payload = data[start : start + length]
    error, offset = 0, 0
    if kind == 1:
        (offset,), payload = struct.unpack_from(">Q", payload), payload[8:]
    elif kind & 0x8000:
        error, text_length = struct.unpack_from(">IH", payload)
        payload = payload[6:]
        assert len(payload) == text_length
    return Chunk(cookie, kind, error, bool(flags & 1), offset, payload), start + length
