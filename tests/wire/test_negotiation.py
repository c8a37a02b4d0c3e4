from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.wire.negotiation import OPTION_COUNT_MAX, Negotiation, State
from tests.wire.peer import (
    Catalogue,
    MemoryExport,
    OptionReply,
    context_request,
    info_request,
    option,
    option_replies,
    string,
)

FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
ACK, SERVER, INFORMATION, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, _, TOO_BIG, EXT_REQD = range(0x80000001, 0x8000000B)


class Talk:
    """A negotiation, and what it has answered."""

    def __init__(self, *, flags: int = FIXED | NO_ZEROES, tls: bool = False) -> None:
        self.disk = MemoryExport(1 << 20)
        self.cd = MemoryExport(2048, read_only=True)
        self.catalogue = Catalogue(disk=self.disk, cd=self.cd)
        self.negotiation = Negotiation(self.catalogue, tls=tls)
        self.say(struct.pack(">I", flags))

    def say(self, data: bytes) -> bytes:
        return b"".join(self.negotiation.feed(data))

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        replies = option_replies(self.say(option(number, data)))
        assert all(reply.option == number for reply in replies)
        return replies

    def kinds(self, number: int, data: bytes = b"") -> list[int]:
        return [reply.kind for reply in self.ask(number, data)]

    @property
    def state(self) -> State:
        return self.negotiation.state


@pytest.fixture
def talk() -> Talk:
    return Talk()


def infos(replies: list[OptionReply]) -> dict[int, bytes]:
    assert replies[-1].kind == ACK
    assert all(reply.kind == INFORMATION for reply in replies[:-1])
    return {int.from_bytes(reply.data[:2], "big"): reply.data[2:] for reply in replies[:-1]}


def test_the_greeting() -> None:
    assert Negotiation.greeting == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF])
def test_unknown_flags_end_the_connection(flags: int) -> None:
    assert Talk(flags=flags).state is State.ENDED


def test_export_name_opens_at_once() -> None:
    for flags, zeroes in ((0, 124), (NO_ZEROES, 0)):
        talk = Talk(flags=flags)
        reply = talk.say(option(EXPORT_NAME, b"disk") + b"behind")
        assert (len(reply), reply[:8]) == (10 + zeroes, (1 << 20).to_bytes(8, "big"))
        assert talk.negotiation.agreed is not None
        assert talk.negotiation.agreed[:1] + talk.negotiation.agreed[2:] == ("disk", False, False, False)
        assert (talk.state, talk.negotiation.rest) == (State.AGREED, b"behind")


@pytest.mark.parametrize("name", [b"", b"nothing", b"\xff", b"secret", b"disk\0", b"n" * 4097])
def test_export_name_knows_no_other_no_than_the_end(name: bytes) -> None:
    talk = Talk()
    assert talk.say(option(EXPORT_NAME, name)) == b""
    assert (talk.state, talk.catalogue.opened) == (State.ENDED, [])


def test_go_opens_and_tells_what_is_asked(talk: Talk) -> None:
    told = infos(talk.ask(GO, info_request("cd", 1, 2, 3, 77)))
    assert set(told) == {0, 1, 2, 3}
    assert struct.unpack(">QH", told[0]) == (2048, 0b101_0000_0111)
    assert (told[1], told[2]) == (b"cd", b"the cd one")
    assert struct.unpack(">III", told[3]) == (1, 4096, 32 << 20)
    assert (talk.state, talk.catalogue.opened) == (State.AGREED, ["cd"])


def test_go_without_information_requests(talk: Talk) -> None:
    assert set(infos(talk.ask(GO, info_request("disk")))) == {0}


def test_what_is_found_by_again_is_told_to_who_knows_that(talk: Talk) -> None:
    talk.catalogue.exports["cd"].key = "01a2"
    assert infos(talk.ask(GO, info_request("cd", 0x8000)))[0x8000] == b"01a2"


def test_info_opens_nothing(talk: Talk) -> None:
    assert set(infos(talk.ask(INFO, info_request("disk", 3)))) == {0, 3}
    assert (talk.state, talk.catalogue.opened) == (State.OPTIONS, [])
    assert talk.kinds(GO, info_request("disk"))[-1] == ACK


def test_the_same_information_asked_for_a_thousand_times_is_told_once(talk: Talk) -> None:
    assert len(talk.ask(INFO, info_request("disk", *[2] * 10000))) == 3


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", INVALID),
        (b"\0\0\0", INVALID),
        (string("disk"), INVALID),
        (string("disk") + b"\0", INVALID),
        (string("disk") + b"\0\1", INVALID),
        (string("disk") + b"\0\0\0", INVALID),
        (b"\0\0\0\5disk\0\0", INVALID),
        (b"\xff\xff\xff\xffdisk\0\0", INVALID),
        (string(b"\xff\xfe") + b"\0\0", INVALID),
        (info_request("di\0sk"), INVALID),
        (info_request("n" * 4097), TOO_BIG),
        (info_request("n" * 4096), UNKNOWN),
        (info_request(""), UNKNOWN),
        (info_request("secret"), POLICY),
    ],
)
def test_a_refusal_leaves_the_stream_in_sync(talk: Talk, number: int, data: bytes, kind: int) -> None:
    replies = talk.ask(number, data)
    assert [reply.kind for reply in replies] == [kind]
    assert len(replies[0].data) <= 1024
    assert talk.catalogue.opened == []
    assert talk.kinds(GO, info_request("disk"))[-1] == ACK


def test_list(talk: Talk) -> None:
    assert [(reply.kind, reply.data) for reply in talk.ask(LIST)] == [
        (SERVER, string("disk") + b"the disk one"),
        (SERVER, string("cd") + b"the cd one"),
        (ACK, b""),
    ]
    assert talk.kinds(LIST, b"x") == [INVALID]


def test_abort(talk: Talk) -> None:
    assert talk.kinds(ABORT) == [ACK]
    assert talk.state is State.ENDED


@pytest.mark.parametrize("number", [0, 4, 12, 77, 0xFFFFFFFF])
def test_unknown_options_are_answered(talk: Talk, number: int) -> None:
    assert talk.kinds(number, b"whatever") == [UNSUP]
    assert talk.kinds(LIST)[-1] == ACK


def test_what_is_no_option_ends_the_connection(talk: Talk) -> None:
    assert talk.say(b"GET / HTTP/1.1\r\n\r\n") == b""
    assert talk.state is State.ENDED


@pytest.mark.parametrize("length", [(32 << 10) + 1, 0xFFFFFFFF])
def test_an_option_without_measure_ends_the_connection(talk: Talk, length: int) -> None:
    talk.say(b"IHAVEOPT" + struct.pack(">II", LIST, length))
    assert talk.state is State.ENDED


def test_options_without_end_end_the_connection(talk: Talk) -> None:
    for _ in range(OPTION_COUNT_MAX):
        assert talk.kinds(77) == [UNSUP]
    assert talk.say(option(77)) == b""
    assert talk.state is State.ENDED


# Agreements


def agreed(talk: Talk, name: str = "disk") -> tuple[bool, bool, bool]:
    talk.ask(GO, info_request(name))
    assert talk.negotiation.agreed is not None
    return talk.negotiation.agreed[2:]


def test_structured_replies(talk: Talk) -> None:
    assert talk.kinds(STRUCTURED, b"x") == [INVALID]
    assert talk.kinds(STRUCTURED) == [ACK]
    assert talk.kinds(STRUCTURED) == [INVALID]
    assert agreed(talk) == (True, False, False)


def test_extended_headers(talk: Talk) -> None:
    assert talk.kinds(EXTENDED, b"x") == [INVALID]
    assert talk.kinds(EXTENDED) == [ACK]
    assert talk.kinds(EXTENDED) == [INVALID]
    assert talk.kinds(STRUCTURED) == [EXT_REQD]
    assert agreed(talk) == (True, True, False)


def test_extended_headers_after_structured_replies(talk: Talk) -> None:
    assert talk.kinds(STRUCTURED) + talk.kinds(EXTENDED) == [ACK, ACK]
    talk.say(option(EXPORT_NAME, b"disk"))
    assert talk.state is State.ENDED


def test_contexts_need_structured_replies(talk: Talk) -> None:
    assert talk.kinds(LIST_META, context_request("disk")) == [INVALID]
    assert talk.kinds(SET_META, context_request("disk", "base:allocation")) == [INVALID]


@pytest.mark.parametrize(
    ("queries", "listed", "chosen"),
    [
        ((), True, False),
        (("base:allocation",), True, True),
        (("base:",), True, False),
        (("qemu:x", "base:allocation", ""), True, True),
        (("base:other", "nonsense"), False, False),
    ],
)
def test_contexts(talk: Talk, queries: tuple[str, ...], listed: bool, chosen: bool) -> None:
    talk.ask(STRUCTURED)
    assert talk.kinds(LIST_META, context_request("disk", *queries)) == [META] * listed + [ACK]
    replies = talk.ask(SET_META, context_request("disk", *queries))
    assert [reply.kind for reply in replies] == [META] * chosen + [ACK]
    if chosen:
        assert replies[0].data == b"\0\0\0\1base:allocation"
    assert agreed(talk) == (True, False, chosen)


def test_contexts_are_those_of_one_export_and_of_the_last_request(talk: Talk) -> None:
    talk.ask(EXTENDED)
    talk.ask(SET_META, context_request("cd", "base:allocation"))
    assert agreed(talk) == (True, True, False)
    for last in (context_request("disk"), context_request("nothing", "base:allocation"), b"bad"):
        talk = Talk()
        talk.ask(STRUCTURED)
        talk.ask(SET_META, context_request("disk", "base:allocation"))
        talk.ask(SET_META, last)
        assert agreed(talk) == (True, False, False)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", INVALID),
        (string("disk"), INVALID),
        (string("disk") + b"\xff\xff\xff\xff", INVALID),
        (string("disk") + b"\0\0\0\1\xff\xff\xff\xffbase", INVALID),
        (context_request("disk") + b"x", INVALID),
        (context_request("nothing"), UNKNOWN),
        (context_request("disk", "q" * 4097), TOO_BIG),
    ],
)
def test_bad_contexts(talk: Talk, data: bytes, kind: int) -> None:
    talk.ask(STRUCTURED)
    for number in (LIST_META, SET_META):
        assert talk.kinds(number, data) == [kind]
    assert talk.kinds(LIST)[-1] == ACK


# TLS


def test_without_a_certificate_there_is_no_tls(talk: Talk) -> None:
    assert talk.kinds(STARTTLS) == [POLICY]


def test_nothing_is_said_before_tls() -> None:
    talk = Talk(tls=True)
    for number in (LIST, INFO, GO, STRUCTURED, 77):
        assert talk.kinds(number, info_request("disk")) == [TLS_REQD]
    assert talk.kinds(STARTTLS, b"x") == [INVALID]
    assert talk.kinds(STARTTLS) == [ACK]
    assert talk.state is State.TLS
    talk.negotiation.secured()
    assert talk.kinds(STARTTLS) == [INVALID]
    assert agreed(talk) == (False, False, False)
    talk = Talk(tls=True)
    assert talk.say(option(EXPORT_NAME, b"disk")) == b""
    assert talk.state is State.ENDED
    assert Talk(tls=True).kinds(ABORT) == [ACK]


def test_nothing_is_taken_into_tls() -> None:
    talk = Talk(tls=True)
    talk.say(option(STARTTLS) + option(LIST))
    assert talk.state is State.ENDED


# Every split, and garbage


def conversation() -> bytes:
    return b"".join(
        (
            option(77, b"?"),
            option(LIST),
            option(STRUCTURED),
            option(SET_META, context_request("disk", "base:allocation")),
            option(INFO, b"bad"),
            option(GO, info_request("disk", 1, 3)),
            b"the first request",
        )
    )


def test_it_does_not_matter_how_the_bytes_come() -> None:
    whole, data = Talk(), conversation()
    said = whole.say(data)
    for size in (1, 2, 3, 7, 16, 100):
        talk = Talk()
        assert b"".join(talk.say(data[at : at + size]) for at in range(0, len(data), size)) == said
        assert talk.negotiation.rest == whole.negotiation.rest == b"the first request"
        assert talk.state is State.AGREED


@given(st.binary(max_size=400), st.booleans())
def test_garbage_ends_or_is_waited_for(data: bytes, tls: bool) -> None:
    talk = Talk(tls=tls)
    option_replies(talk.say(data))
    assert talk.state in (State.OPTIONS, State.ENDED)


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=40) | st.just(info_request("disk"))), max_size=30))
def test_whatever_options_come_each_is_answered(options: list[tuple[int, bytes]]) -> None:
    talk = Talk()
    for number, data in options:
        if number == EXPORT_NAME:
            continue
        if talk.state is not State.OPTIONS:
            break
        replies = talk.ask(number, data)
        assert replies[-1].kind == ACK or replies[-1].kind >= UNSUP
        assert all(0 < reply.kind < UNSUP and reply.kind != ACK for reply in replies[:-1])


@given(st.binary(max_size=60))
def test_decoders_of_options_take_anything(data: bytes) -> None:
    for number in (INFO, GO, LIST_META, SET_META):
        talk = Talk()
        talk.ask(STRUCTURED)
        talk.ask(number, data)
