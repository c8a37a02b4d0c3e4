from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import InvalidRequest
from rustord.wire import netlink
from rustord.wire.netlink import Message, read_attributes, read_messages, read_u16, read_u32


def test_a_request_to_connect() -> None:
    attributes = netlink.u64(netlink.SIZE_BYTES, 1 << 40) + netlink.socket_list([5, 7]) + netlink.text(10, "rustord:x")
    told = netlink.message(31, netlink.CONNECT, 9, attributes)
    assert struct.unpack_from("=IHHII", told) == (len(told), 31, 5, 9, 0)
    (message,) = read_messages(told)
    assert (message.family, message.command) == (31, netlink.CONNECT)
    assert message.attributes[netlink.SIZE_BYTES] == struct.pack("=Q", 1 << 40)
    assert message.attributes[netlink.BACKEND_IDENTIFIER] == b"rustord:x\0"
    # As in nbd-netlink.h: NBD_ATTR_SOCKETS { NBD_SOCK_ITEM { NBD_SOCK_FD = 5 } NBD_SOCK_ITEM { NBD_SOCK_FD = 7 } }
    item = struct.pack("=HHHHI", 12, 0x8001, 8, 1, 5), struct.pack("=HHHHI", 12, 0x8001, 8, 1, 7)
    assert message.attributes[netlink.SOCKETS] == item[0] + item[1]


def test_what_the_kernel_answers() -> None:
    failed = struct.pack("=IHHIIi", 20, netlink.ERROR, 0, 9, 1, -16)
    dead = struct.pack("=IHHIIBBHHHI", 28, 31, 0, 0, 0, netlink.LINK_DEAD, 1, 0, 8, netlink.INDEX, 3)
    assert list(read_messages(failed + dead)) == [
        Message(netlink.ERROR, 0, {}, 9, 16),
        Message(31, netlink.LINK_DEAD, {netlink.INDEX: struct.pack("=I", 3)}, 0),
    ]
    assert (read_u32(struct.pack("=I", 3)), read_u16(struct.pack("=H", 3))) == (3, 3)


@given(st.binary(max_size=100))
def test_garbage_is_an_error(data: bytes) -> None:
    for read in (lambda: list(read_messages(data)), lambda: read_attributes(data)):
        with suppress(InvalidRequest):
            read()
    for number in (read_u32, read_u16):
        if len(data) not in (2, 4):
            with pytest.raises(InvalidRequest):
                number(data)
