"""NBD: the numbers and structures of the protocol, in the specification's names.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with its extension of 64-bit requests ("extended
headers"). All integers are big-endian. The handshake is in `rustord.wire.negotiation`, what follows it in
`rustord.wire.transmission`.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag

from rustord.errors import Forbidden, InvalidRequest, NotFound, RustordError, Unavailable
from rustord.export import Shape

# The handshake

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags"""
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""IHAVEOPT, option, length of its data"""
OPTION_REPLY = struct.Struct(">QIII")
"""magic, option, type of reply, length of its data"""
EXPORT_INFO = struct.Struct(">QH")
"""size, transmission flags"""
BLOCK_SIZE_INFO = struct.Struct(">HIII")
"""INFO_BLOCK_SIZE, least, best, greatest"""

FLAG_FIXED_NEWSTYLE = FLAG_C_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = FLAG_C_NO_ZEROES = 2

STRING_BYTES_MAX = 4096
"""Of any string, the name of an export too."""


class Opt(IntEnum):
    """Options."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """Types of replies to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(IntEnum):
    """What a client may ask of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3
    KEY = 0x8000
    """The `rustord.export.Export.key`. Not of the specification; who does not ask for it is not told."""


class Flag(IntFlag):
    """Transmission flags: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# The transmission

REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

REQUEST = struct.Struct(">IHHQQI")
"""magic, flags, command, cookie, offset, length"""
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
"""The same with a length of 64 bits."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""magic, error, cookie; with the data of a READ behind it"""
STRUCTURED_CHUNK = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, length of the payload"""
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
"""magic, flags, type, cookie, offset of the request, length of the payload"""

REPLY_FLAG_DONE = 1

PAYLOAD_BYTES_MAX = 32 << 20
"""The longest READ or WRITE; what the specification asks a server to take."""


class Cmd:
    """Commands. Plain numbers, as below: an enumeration would cost a small request a third of its time."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag:
    """Flags of commands."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Reply:
    """Types of chunks of a reply."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001


_ERRORS = frozenset(
    (
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.EOPNOTSUPP,
        errno.ESHUTDOWN,
    )
)
"""All that a reply may tell of; Linux's numbers are the protocol's."""


def error_number(error: RustordError) -> int:
    """What a client is told of an error in place of the data."""
    return error.nbd_error if error.nbd_error in _ERRORS else errno.EIO


def error_text(error: RustordError) -> bytes:
    """The same for people, short enough for any client."""
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    return text.encode("utf-8", "backslashreplace")[:1024].decode("utf-8", "ignore").encode()


def option_error(error: RustordError) -> Rep:
    """How an option is refused because of ``error``."""
    if isinstance(error, NotFound):
        return Rep.ERR_UNKNOWN
    if isinstance(error, Forbidden):
        return Rep.ERR_POLICY
    if isinstance(error, InvalidRequest):
        return Rep.ERR_INVALID
    return Rep.ERR_SHUTDOWN if isinstance(error, Unavailable) else Rep.ERR_PLATFORM


def option_reply(option: int, kind: Rep, data: bytes = b"") -> bytes:
    """A reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def transmission_flags(export: Shape, *, structured: bool) -> Flag:
    """What can be done with ``export``. A flush is one of the whole pool, so connections may share an export."""
    flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE
    if export.read_only:
        flags |= Flag.READ_ONLY
    else:
        flags |= Flag.SEND_FUA | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
    if export.rotational:
        flags |= Flag.ROTATIONAL
    if structured:
        flags |= Flag.SEND_DF
    return flags
