from __future__ import annotations

import errno

import pytest

from rustord import errors
from rustord.errors import Damaged, Forbidden, InvalidRequest, NoSpace, NotFound, ReadOnly, RustordError, Unavailable
from rustord.wire.nbd import Flag, Rep, error_number, error_text, option_error, option_reply, transmission_flags
from tests.wire.peer import MemoryExport, option_replies


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Damaged("x"), errno.EIO),
        (NotFound("x"), errno.EIO),  # the protocol knows no ENOENT
        (NoSpace("x"), errno.ENOSPC),
        (ReadOnly("x"), errno.EPERM),
        (InvalidRequest("x"), errno.EINVAL),
        (Unavailable("x"), errno.ESHUTDOWN),
    ],
)
def test_errors_have_numbers_that_the_protocol_knows(error: RustordError, number: int) -> None:
    assert error_number(error) == number


def test_every_error_has_such_a_number() -> None:
    known = {1, 5, 12, 22, 28, 75, 95, 108}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, RustordError):
            assert error_number(kind.__new__(kind)) in known


def test_texts_are_short_and_still_utf8() -> None:
    text = error_text(NotFound("ä" * 5000, hint="h"))
    assert len(text) <= 1024
    assert text.decode() == "ä" * 512
    assert error_text(NotFound("gone", hint="look")) == b"gone (look)"


def test_options_are_refused_by_kind() -> None:
    assert option_error(NotFound("x")) is Rep.ERR_UNKNOWN
    assert option_error(Forbidden("x")) is Rep.ERR_POLICY
    assert option_error(InvalidRequest("x")) is Rep.ERR_INVALID
    assert option_error(Unavailable("x")) is Rep.ERR_SHUTDOWN
    assert option_error(Damaged("x")) is Rep.ERR_PLATFORM


def test_a_reply_to_an_option() -> None:
    assert option_replies(option_reply(7, Rep.ACK, b"abc")) == [(7, 1, b"abc")]


def test_flags_say_what_can_be_done() -> None:
    flags = transmission_flags(MemoryExport(), structured=True)
    assert flags == 0b1101_1110_1101 | Flag.SEND_FAST_ZERO
    flags = transmission_flags(MemoryExport(read_only=True), structured=False)
    assert flags == Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_FLUSH | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE
    turning = MemoryExport()
    turning.rotational = True  # type: ignore[misc]
    assert transmission_flags(turning, structured=False) & Flag.ROTATIONAL
