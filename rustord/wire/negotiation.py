"""Negotiation: the handshake of an NBD connection, from the server's side; fixed newstyle. No I/O.

Options are answered one by one. What is unknown or malformed is answered, too, and the stream stays in sync; what is no
NBD at all, or asks for more than a client ever needs, ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import NamedTuple, Protocol

from rustord.errors import InvalidRequest, RustordError, TooLarge
from rustord.export import Export, Shape
from rustord.wire.nbd import (
    BLOCK_SIZE_INFO,
    CLIENT_FLAGS,
    EXPORT_INFO,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    PAYLOAD_BYTES_MAX,
    STRING_BYTES_MAX,
    Info,
    Opt,
    Rep,
    error_text,
    option_error,
    option_reply,
    transmission_flags,
)

OPTION_BYTES_MAX = 32 << 10
"""Data of one option: the longest name, and more contexts than there are."""
OPTION_COUNT_MAX = 128
"""Options of one connection. A client needs ten, a person who tries out what a server knows some more."""
ALLOCATION = "base:allocation"
ALLOCATION_ID = 1

_U32 = struct.Struct(">I")
_U16 = struct.Struct(">H")


class Directory(Protocol):
    """The exports that there are. Every method may raise RustordErrors, which the client is told."""

    def names(self) -> Iterable[tuple[str, str]]:
        """Names with descriptions: all, or as many as a person would read."""

    def look(self, name: str) -> tuple[Shape, str]:
        """What can be told of an export, and its description."""

    def open(self, name: str) -> tuple[Export, str]:
        """The export itself, and its description; the caller closes it."""


class State(Enum):
    """How far a `Negotiation` has come."""

    OPTIONS = auto()
    TLS = auto()
    """The client begins with TLS now; then call `Negotiation.secured`."""
    AGREED = auto()
    """The transmission begins."""
    ENDED = auto()
    """The connection is to be closed."""


class Agreement(NamedTuple):
    """What the transmission goes by."""

    name: str
    export: Export
    structured: bool
    extended: bool
    """64-bit headers; ``structured`` is set, too."""
    allocation: bool
    """BLOCK_STATUS tells of base:allocation."""


class _Refused(Exception):
    """An option is answered with an error."""

    def __init__(self, kind: Rep, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Negotiation:
    """The handshake of one connection: feed it what comes, send what it yields, until ``state`` says what is next.

    ``agreed`` is set in the state AGREED; its export is open then. ``rest`` is what came behind the last option.
    """

    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)

    def __init__(self, directory: Directory, *, tls: bool = False) -> None:
        """``tls``: nothing but STARTTLS is allowed until `secured`."""
        self.state = State.OPTIONS
        self.agreed: Agreement | None = None
        self.rest = b""
        self._directory = directory
        self._tls_known = self._tls_missing = tls
        self._zeroes = True
        self._greeted = False
        self._option_count = 0
        self._forget_agreements()

    def _forget_agreements(self) -> None:
        self._structured = self._extended = False
        self._allocation_of: str | None = None

    def secured(self) -> None:
        """TLS is in use now. What was agreed on before counts no more: anybody may have said it."""
        assert self.state is State.TLS
        self._forget_agreements()
        self._tls_missing = False
        self.state = State.OPTIONS

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what has come, and yield the replies of each option as soon as it has been looked at."""
        self.rest += data
        if not self._greeted and len(self.rest) >= CLIENT_FLAGS.size:
            self._take_flags()
        while self.state is State.OPTIONS and self._greeted and len(self.rest) >= OPTION.size:
            magic, option, length = OPTION.unpack_from(self.rest)
            if magic != IHAVEOPT or length > OPTION_BYTES_MAX or self._option_count == OPTION_COUNT_MAX:
                self.state = State.ENDED
                return
            end = OPTION.size + length
            if len(self.rest) < end:
                return
            content, self.rest = self.rest[OPTION.size : end], self.rest[end:]
            self._option_count += 1
            yield from self._answer(option, content)

    def _take_flags(self) -> None:
        (flags,) = CLIENT_FLAGS.unpack_from(self.rest)
        self.rest = self.rest[CLIENT_FLAGS.size :]
        self._greeted = True
        self._zeroes = not flags & FLAG_C_NO_ZEROES
        if flags & ~(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
            self.state = State.ENDED

    def _answer(self, option: int, data: bytes) -> Iterator[bytes]:
        try:
            if option == Opt.ABORT:
                yield option_reply(option, Rep.ACK)
                self.state = State.ENDED
            elif self._tls_missing and option == Opt.EXPORT_NAME:
                self.state = State.ENDED  # it knows no errors
            elif self._tls_missing and option != Opt.STARTTLS:
                raise _Refused(Rep.ERR_TLS_REQD, "this server wants TLS first")
            elif option == Opt.EXPORT_NAME:
                yield from self._export_name(data)
            else:
                yield from self._negotiate(option, data)
        except _Refused as refused:
            yield option_reply(option, refused.kind, str(refused).encode())
        except TooLarge as error:
            yield option_reply(option, Rep.ERR_TOO_BIG, error_text(error))
        except RustordError as error:
            yield option_reply(option, option_error(error), error_text(error))

    def _negotiate(self, option: int, data: bytes) -> Iterator[bytes]:
        if option in (Opt.INFO, Opt.GO):
            yield from self._info(option, data)
        elif option in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
            yield from self._meta_context(option, data)
        elif option not in (Opt.LIST, Opt.STARTTLS, Opt.STRUCTURED_REPLY, Opt.EXTENDED_HEADERS):
            raise _Refused(Rep.ERR_UNSUP, f"option {option} is not known here")
        elif data:
            raise _Refused(Rep.ERR_INVALID, "this option takes no data")
        elif option == Opt.LIST:
            for name, description in self._directory.names():
                encoded = name.encode()
                yield option_reply(option, Rep.SERVER, _U32.pack(len(encoded)) + encoded + description.encode())
            yield option_reply(option, Rep.ACK)
        else:
            self._agree(option)
            yield option_reply(option, Rep.ACK)

    def _agree(self, option: int) -> None:
        if option == Opt.STARTTLS:
            if not self._tls_known:
                raise _Refused(Rep.ERR_POLICY, "this server has no certificate")
            if not self._tls_missing:
                raise _Refused(Rep.ERR_INVALID, "TLS is in use already")
            # What came in the clear behind it would be taken for something said inside of TLS.
            self.state = State.ENDED if self.rest else State.TLS
        elif self._extended:
            kind = Rep.ERR_INVALID if option == Opt.EXTENDED_HEADERS else Rep.ERR_EXT_HEADER_REQD
            raise _Refused(kind, "extended headers are agreed on already")
        elif option == Opt.EXTENDED_HEADERS:
            self._structured = self._extended = True
        elif self._structured:
            raise _Refused(Rep.ERR_INVALID, "structured replies are agreed on already")
        else:
            self._structured = True

    # Exports

    def _export_name(self, data: bytes) -> Iterator[bytes]:
        try:
            if self._extended:  # its reply would leave open what is agreed on
                raise InvalidRequest("EXPORT_NAME cannot follow EXTENDED_HEADERS")
            export = self._open(_name(data))[0]
        except RustordError:
            self.state = State.ENDED  # there is no other way to say no
            return
        flags = transmission_flags(export, structured=self._structured)
        yield EXPORT_INFO.pack(export.size, flags) + bytes(124 if self._zeroes else 0)

    def _open(self, name: str) -> tuple[Export, str]:
        export, description = self._directory.open(name)
        allocation = self._structured and self._allocation_of == name
        self.agreed = Agreement(name, export, self._structured, self._extended, allocation)
        self.state = State.AGREED
        return export, description

    def _info(self, option: int, data: bytes) -> Iterator[bytes]:
        name, at = _string(data, 0)
        (count,) = _unpack(_U16, data, at)
        asked = data[at + _U16.size :]
        if len(asked) != count * _U16.size:
            raise _Refused(Rep.ERR_INVALID, f"{len(asked)} bytes do not hold {count} information requests")
        wanted = {kind for (kind,) in _U16.iter_unpack(asked)}
        export: Shape
        export, description = self._open(name) if option == Opt.GO else self._directory.look(name)
        flags = transmission_flags(export, structured=self._structured)
        infos = [_U16.pack(Info.EXPORT) + EXPORT_INFO.pack(export.size, flags)]
        if Info.NAME in wanted:
            infos.append(_U16.pack(Info.NAME) + name.encode())
        if Info.DESCRIPTION in wanted:
            infos.append(_U16.pack(Info.DESCRIPTION) + description.encode())
        if Info.BLOCK_SIZE in wanted:
            infos.append(BLOCK_SIZE_INFO.pack(Info.BLOCK_SIZE, 1, export.block_size, PAYLOAD_BYTES_MAX))
        if Info.KEY in wanted:
            infos.append(_U16.pack(Info.KEY) + export.key.encode())
        yield b"".join(option_reply(option, Rep.INFO, info) for info in infos) + option_reply(option, Rep.ACK)

    def _meta_context(self, option: int, data: bytes) -> Iterator[bytes]:
        if not self._structured:
            raise _Refused(Rep.ERR_INVALID, "contexts need structured replies")
        setting = option == Opt.SET_META_CONTEXT
        if setting:
            self._allocation_of = None
        name, at = _string(data, 0)
        (count,) = _unpack(_U32, data, at)
        at += _U32.size
        queries = []
        for _ in range(count):  # each takes four bytes or more, so `data` bounds them
            query, at = _string(data, at)
            queries.append(query)
        if at != len(data):
            raise _Refused(Rep.ERR_INVALID, "there is more than the queries that are announced")
        self._directory.look(name)
        everything = not setting and (not queries or "base:" in queries)
        if everything or ALLOCATION in queries:
            if setting:
                self._allocation_of = name
            yield option_reply(option, Rep.META_CONTEXT, _U32.pack(ALLOCATION_ID) + ALLOCATION.encode())
        yield option_reply(option, Rep.ACK)


def _unpack(form: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if len(data) - at < form.size:
        raise _Refused(Rep.ERR_INVALID, "the option's data is too short")
    return form.unpack_from(data, at)


def _string(data: bytes, at: int) -> tuple[str, int]:
    """A string behind its length, and where it ends."""
    (length,) = _unpack(_U32, data, at)
    start = at + _U32.size
    if length > len(data) - start:
        raise _Refused(Rep.ERR_INVALID, "a string is longer than the option's data")
    return _name(data[start : start + length]), start + length


def _name(encoded: bytes) -> str:
    if len(encoded) > STRING_BYTES_MAX:
        raise TooLarge(f"a string of {len(encoded)} bytes", hint=f"the most is {STRING_BYTES_MAX}")
    try:
        text = encoded.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("a string is not UTF-8") from None
    if "\0" in text:
        raise InvalidRequest("a string holds a zero byte")
    return text
