"""Netlink: the messages by which the kernel's own NBD client is told what to connect to. No I/O.

Generic netlink (linux/genetlink.h) and its family "nbd" (linux/nbd-netlink.h). Integers are in the byte order of the
machine.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rustord.errors import InvalidRequest

HEADER = struct.Struct("=IHHII")
"""length, type, flags, sequence, port"""
COMMAND = struct.Struct("=BBH")
"""command, version, reserved"""
ATTRIBUTE = struct.Struct("=HH")
"""length, type"""

CONTROL = 0x10
"""The family that knows the others."""
ERROR = 2
REQUEST, ACK = 1, 4
GET_FAMILY = 3
FAMILY_ID, FAMILY_NAME, GROUPS = 1, 2, 7
GROUP_NAME, GROUP_ID = 1, 2

CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD, STATUS = 1, 2, 3, 4, 5
INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, TIMEOUT, SERVER_FLAGS, CLIENT_FLAGS, SOCKETS, DEAD_CONN_TIMEOUT = range(1, 9)
BACKEND_IDENTIFIER = 10
_SOCKET_ITEM, _SOCKET_FD = 1, 1
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF


class Message(NamedTuple):
    """``error`` is an errno, for a message that says how the request ``sequence`` went (0: well)."""

    family: int
    command: int
    attributes: Mapping[int, bytes]
    sequence: int
    error: int = 0


def attribute(kind: int, data: bytes) -> bytes:
    """An attribute with its padding."""
    length = ATTRIBUTE.size + len(data)
    return ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def socket_list(descriptors: list[int]) -> bytes:
    """The attribute that hands connected sockets over."""
    items = [attribute(_SOCKET_ITEM | _NESTED, u32(_SOCKET_FD, descriptor)) for descriptor in descriptors]
    return attribute(SOCKETS | _NESTED, b"".join(items))


def message(family: int, command: int, sequence: int, attributes: bytes) -> bytes:
    """A request that is to be acknowledged."""
    length = HEADER.size + COMMAND.size + len(attributes)
    return HEADER.pack(length, family, REQUEST | ACK, sequence, 0) + COMMAND.pack(command, 1, 0) + attributes


def read_messages(data: bytes) -> Iterator[Message]:
    """What the kernel says. Raises InvalidRequest for what is no netlink."""
    while data:
        if len(data) < HEADER.size:
            raise InvalidRequest("a netlink message is cut off")
        length, kind, _, sequence, _ = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            raise InvalidRequest("a netlink message is cut off")
        body = data[HEADER.size : length]
        if kind == ERROR:
            if len(body) < 4:
                raise InvalidRequest("a netlink message is cut off")
            yield Message(kind, 0, {}, sequence, -struct.unpack_from("=i", body)[0])
        elif len(body) >= COMMAND.size:
            yield Message(kind, body[0], read_attributes(body[COMMAND.size :]), sequence)
        data = data[(length + 3) & ~3 :]


def read_attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type. Raises InvalidRequest for what holds none."""
    found = {}
    while data:
        if len(data) < ATTRIBUTE.size:
            raise InvalidRequest("a netlink attribute is cut off")
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            raise InvalidRequest("a netlink attribute is cut off")
        found[kind & _TYPE_MASK] = data[ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def read_u16(data: bytes) -> int:
    """Raises InvalidRequest unless it is one."""
    if len(data) != 2:
        raise InvalidRequest("a netlink attribute has the wrong length")
    value: int = struct.unpack("=H", data)[0]
    return value


def read_u32(data: bytes) -> int:
    """Raises InvalidRequest unless it is one."""
    if len(data) != 4:
        raise InvalidRequest("a netlink attribute has the wrong length")
    value: int = struct.unpack("=I", data)[0]
    return value
