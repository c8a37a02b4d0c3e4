from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.errors import InvalidRequest, RustordError
from rustord.wire.http1 import (
    CHUNK_LINE_BYTES_MAX,
    TRAILER_BYTES_MAX,
    Chunked,
    Reply,
    RequestHead,
    content,
    date_line,
    http_date,
    json_reply,
    read_reply_head,
    read_request_head,
)
from rustord.wire.limits import Limits

LIMITS = Limits()
GET = b"GET /v1/objects HTTP/1.1\r\nHost: a\r\n\r\n"


def head(data: bytes) -> RequestHead:
    found = read_request_head(data, 0, LIMITS)
    assert found is not None
    return found


def with_fields(*lines: str) -> bytes:
    return "\r\n".join(["PUT /v1/names/a HTTP/1.1", "Host: a", *lines, "", ""]).encode("latin-1")


def test_a_head_is_read_whole() -> None:
    found = head(with_fields("Content-Length: 12", "Rustor-Meta-Colour:  blue\t", "Accept: a", "accept: b"))
    assert (found.method, found.target, found.old) == ("PUT", "/v1/names/a", False)
    assert found.fields.content_length == 12
    assert found.fields.by_name["rustor-meta-colour"] == "blue"
    assert found.fields.by_name["accept"] == "a, b"
    assert found.fields.has_body
    assert found.keep_alive


@pytest.mark.parametrize("data", [GET, with_fields("Content-Length: 5"), b"\r\n" + GET])
def test_a_head_is_found_at_every_split_and_before_anything(data: bytes) -> None:
    for split in range(len(data)):
        assert read_request_head(data[:split], 0, LIMITS) is None
    for tail in (b"", b"x", GET):
        assert head(data + tail).end == len(data)
    assert read_request_head(b"body" + data, 4, LIMITS) == head(data)._replace(end=len(data) + 4)


@pytest.mark.parametrize(
    ("lines", "keep_alive"),
    [
        (["GET / HTTP/1.1", "Host: a"], True),
        (["GET / HTTP/1.1", "Host: a", "Connection: Close"], False),
        (["GET / HTTP/1.1", "Host: a", "Connection: x, close"], False),
        (["GET / HTTP/1.0"], False),
        (["GET / HTTP/1.0", "Connection: Keep-Alive"], True),
    ],
)
def test_a_connection_is_kept_as_the_version_and_the_field_say(lines: list[str], keep_alive: bool) -> None:
    assert head("\r\n".join([*lines, "", ""]).encode()).keep_alive is keep_alive


def test_an_old_client_is_not_told_to_go_on() -> None:
    """It would take that for the reply (RFC 9110, 10.1.1)."""
    fields = "Host: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    told = {minor: head(f"PUT / HTTP/1.{minor}\r\n{fields}".encode()).fields.expects_continue for minor in (0, 1)}
    assert told == {0: False, 1: True}


def test_an_absolute_target_is_understood() -> None:
    assert head(b"GET HTTP://localhost:80/v1/pool?a=b HTTP/1.1\r\nHost: a\r\n\r\n").target == "/v1/pool?a=b"


MALFORMED = {
    "both lengths": with_fields("Content-Length: 1", "Transfer-Encoding: chunked"),
    "both lengths, the other way round": with_fields("Transfer-Encoding: chunked", "Content-Length: 1"),
    "a repeated length": with_fields("Content-Length: 1", "Content-Length: 1"),
    "a list of lengths": with_fields("Content-Length: 1, 1"),
    "a signed length": with_fields("Content-Length: +1"),
    "a negative length": with_fields("Content-Length: -1"),
    "a hexadecimal length": with_fields("Content-Length: 0x10"),
    "an empty length": with_fields("Content-Length:"),
    "a length of other digits": with_fields("Content-Length: \xb2"),
    "an endless length": with_fields("Content-Length: " + "9" * 30),
    "a folded field": with_fields("X: a", " b"),
    "a field folded by a tab": with_fields("X: a", "\tb"),
    "a space before the colon": with_fields("Content-Length : 1"),
    "a space before the name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "no colon": with_fields("nonsense"),
    "no name": with_fields(": x"),
    "a NUL": with_fields("X: a\0b"),
    "a bare CR in a field": with_fields("X: a\rContent-Length: 1"),
    "a bare LF in a field": with_fields("X: a\nContent-Length: 1"),
    "a bare LF behind the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LFs": b"GET / HTTP/1.1\nHost: a\n\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tab": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "a space behind": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "a target that is not ASCII": b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": with_fields("Host: b"),
    "two empty lines before": b"\r\n\r\n" + GET,
    "chunks in HTTP/1.0": b"PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a repeated coding": with_fields("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_two_parsers_could_read_differently_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        head(data)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (with_fields("Transfer-Encoding: gzip, chunked"), "unknown-coding"),
        (with_fields("Transfer-Encoding: xchunked"), "unknown-coding"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "unknown-version"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "unknown-version"),
        (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", "unknown-version"),
        (b"GET /" + b"a" * LIMITS.target_bytes + b" HTTP/1.1\r\nHost: a\r\n\r\n", "target-too-long"),
        (b"GET /" + b"a" * (LIMITS.target_bytes + 100), "target-too-long"),
        (with_fields("X: " + "a" * LIMITS.head_bytes), "head-too-large"),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 6000, "head-too-large"),
    ],
)
def test_other_refusals_have_statuses_of_their_own(data: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_request_head(data, 0, LIMITS)
    assert refused.value.code == code


def test_a_malformed_request_line_is_refused_before_its_head_ends() -> None:
    for data in (b"GET / HTTP/1.1\n", b"nonsense\r\n"):
        with pytest.raises(InvalidRequest):
            read_request_head(data, 0, LIMITS)


@given(st.binary(max_size=200))
def test_garbage_is_a_head_or_none_or_refused(data: bytes) -> None:
    for candidate in (data, b"GET / HTTP/1.1\r\nHost: a\r\n" + data + b"\r\n\r\n", data + b"\r\n\r\n"):
        try:
            found = read_request_head(candidate, 0, LIMITS)
        except InvalidRequest:
            continue
        assert found is None or found.end <= len(candidate)


# Chunks

BODY = b"hello, world" * 9
CHUNKS = b"4\r\n" + BODY[:4] + b"\r\n00A;x=y\r\n" + BODY[4:14] + b"\r\n%x\r\n" % len(BODY[14:]) + BODY[14:] + b"\r\n"
END = b"0\r\nTrailer: x\r\n\r\n"


def decoded(*parts: bytes) -> tuple[bytes, bytes, bool]:
    """The body, what is left behind it, and whether it has ended."""
    chunked = Chunked()
    body, left = b"", b""
    for part in parts:
        pieces, left = chunked.feed(left + part) if chunked.done else chunked.feed(part)
        body += b"".join(pieces)
    return body, left, chunked.done


def test_chunks_are_decoded_at_every_split() -> None:
    data = CHUNKS + END
    assert decoded(data + b"GET") == (BODY, b"GET", True)
    assert decoded(*(data[at : at + 1] for at in range(len(data)))) == (BODY, b"", True)
    for split in range(len(data)):
        assert decoded(data[:split], data[split:] + b"more") == (BODY, b"more", True)
        assert decoded(data[:split])[2] is False


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b" 1\r\n",
        b"1\n",
        b"1 2\r\n",
        b"1\r\naX\r\n",
        b"1\r\na\n",
        b"1\r\nab\r\n",
        b"1;\0\r\n",
        b"1" * 16 + b"\r\n",
        b"1;" + b"x" * CHUNK_LINE_BYTES_MAX,
        b"0\r\nnonsense\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
        b"0\r\n" + b"Trailer: x\r\n" * (TRAILER_BYTES_MAX // 10 + 1) + b"\r\n",
    ],
)
def test_malformed_chunks_are_refused_at_every_split(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decoded(data)
    with pytest.raises(InvalidRequest):
        decoded(*(data[at : at + 1] for at in range(len(data))))


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_garbage_for_chunks_is_decoded_or_refused(parts: list[bytes]) -> None:
    try:
        body, left, _ = decoded(*parts)
    except InvalidRequest:
        return
    assert len(body) + len(left) <= sum(map(len, parts))


# Replies


def test_a_reply_is_read_back() -> None:
    for reply in (content("text/plain", b"hello", "X: y\r\n"), json_reply({"a": 1}, 201), Reply(200, length=99)):
        data = reply.head(date_line(0))
        for split in range(len(data)):
            assert read_reply_head(data[:split]) is None
        read = read_reply_head(data + b"body")
        assert read is not None
        assert (read.status, read.end) == (reply.status, len(data))
        assert read.fields.content_length == (len(reply.body) if reply.length is None else reply.length)
        assert read.fields.by_name["date"] == "Thu, 01 Jan 1970 00:00:00 GMT"


@pytest.mark.parametrize("status", [204, 304])
def test_a_reply_that_has_no_body_says_no_length(status: int) -> None:
    assert b"Content-Length" not in Reply(status).head(b"")


def test_a_reply_that_is_none_is_refused() -> None:
    with pytest.raises(RustordError):
        read_reply_head(b"SSH-2.0-OpenSSH\r\n\r\n")


@given(st.integers(0, 253402300799))
def test_dates_are_those_of_the_standard_library(unix_s: int) -> None:
    assert http_date(unix_s) == formatdate(unix_s, usegmt=True)
