"""HTTP/1.1 messages as values: bytes in, heads and bodies out, and back (RFC 9112). No I/O.

A head is accepted only in the form that the grammar lets a sender write it, and refused where two parsers could
disagree about it: both lengths, a repeated length, folded fields, space before a colon, bare CR or LF, a transfer
coding other than chunked. So there is nothing to smuggle a request through. A client repeats its header fields from
request to request, so their parsed form is cached by their text; parsing a head then costs about a microsecond.
"""

from __future__ import annotations

import json
import re
import time
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from rustord.errors import InvalidRequest, TooLarge
from rustord.manifest import Data

if TYPE_CHECKING:
    from rustord.wire.limits import Limits

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/1\.([01])")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: [\t -~\x80-\xff]*)?")
_OTHER_VERSION = re.compile(r".* HTTP/[0-9](\.[0-9])?")
_FIELD = re.compile(rf"({_TOKEN}):([\t -~\x80-\xff]*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;[\t -~\x80-\xff]*)?")
_ABSOLUTE = re.compile(r"https?://[^/?#]*(?=[/?])", re.IGNORECASE)

CHUNK_LINE_BYTES_MAX = 256
"""The size of a chunk and its extensions, which nobody uses."""
TRAILER_BYTES_MAX = 4096
"""Fields behind a chunked body. They are read and thrown away."""

JSON = "application/json"

HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class MethodNotAllowed(InvalidRequest):
    """The resource exists, and takes other methods; ``allowed`` names them."""

    code = "method-not-allowed"
    http_status = 405

    def __init__(self, message: str, *, allowed: tuple[str, ...], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.allowed = allowed


class RequestTimeout(InvalidRequest):
    code = "request-timeout"
    http_status = 408


class LengthRequired(InvalidRequest):
    code = "length-required"
    http_status = 411


class TargetTooLong(TooLarge):
    code = "target-too-long"
    http_status = 414


class HeadTooLarge(TooLarge):
    code = "head-too-large"
    http_status = 431


class UnknownCoding(InvalidRequest):
    code = "unknown-coding"
    http_status = 501


class UnknownVersion(InvalidRequest):
    code = "unknown-version"
    http_status = 505


class Fields(NamedTuple):
    """Header fields. ``by_name`` has lower-case names; fields that were repeated are joined with ", "."""

    by_name: dict[str, str]
    content_length: int | None
    chunked: bool
    closes: bool
    """Connection: close."""
    keeps: bool
    """Connection: keep-alive, which HTTP/1.0 needs."""
    expects_continue: bool
    conditional: bool
    """Any of If-Match, If-None-Match and Range is given."""
    has_body: bool


class RequestHead(NamedTuple):
    """``target`` is in origin form, still percent-encoded; ``end`` is where the head ended in the bytes given."""

    method: str
    target: str
    fields: Fields
    keep_alive: bool
    old: bool
    """HTTP/1.0."""
    end: int


def read_request_head(data: bytes, start: int, limits: Limits) -> RequestHead | None:
    """The head that begins at ``start``; None if more bytes are needed.

    Raises InvalidRequest (or one of its kinds in this module) if these bytes cannot become a head, ever.
    """
    if data.startswith(b"\r\n", start):  # RFC 9112, 2.2: an empty line before a request is to be ignored
        start += 2
    end = data.find(HEAD_END, start)
    if end < 0:
        _check_unfinished(data, start, limits)
        return None
    if end - start > limits.head_bytes:
        raise _head_too_large(limits)
    line, _, block = str(data[start:end], "latin-1").partition("\r\n")
    method, target, minor = _read_request_line(line, limits)
    fields = parse_fields(block)
    old = minor == "0"
    if old:
        if fields.chunked:
            raise InvalidRequest("HTTP/1.0 has no chunked bodies")
        fields = fields._replace(expects_continue=False)  # RFC 9110, 10.1.1: it knows no reply before the reply
        return RequestHead(method, target, fields, fields.keeps, True, end + 4)
    if "host" not in fields.by_name:
        raise InvalidRequest("the Host field is missing", hint="HTTP/1.1 demands one; any value will do")
    return RequestHead(method, target, fields, not fields.closes, False, end + 4)


def _check_unfinished(data: bytes, start: int, limits: Limits) -> None:
    if len(data) - start > limits.head_bytes:
        raise _head_too_large(limits)
    line, newline, _ = data[start:].partition(b"\n")
    if newline:
        if not line.endswith(b"\r"):
            raise InvalidRequest("a line of the head does not end in CR LF")
        _read_request_line(str(line[:-1], "latin-1"), limits)
    elif len(line) > limits.target_bytes + 32:
        raise TargetTooLong(f"the request line is longer than {limits.target_bytes} bytes", hint="ask for less at once")


def _head_too_large(limits: Limits) -> HeadTooLarge:
    return HeadTooLarge(f"the head exceeds {limits.head_bytes} bytes", hint="send fewer or shorter header fields")


def _read_request_line(line: str, limits: Limits) -> tuple[str, str, str]:
    method, target, minor = _parse_request_line(line)
    if len(target) > limits.target_bytes:
        raise TargetTooLong(f"the target has {len(target)} bytes", hint=f"at most {limits.target_bytes} are read")
    if target[0] != "/":
        target = _ABSOLUTE.sub("", target, count=1)  # RFC 9112, 3.2.2: must be understood, though only proxies get it
    return method, target, minor


@lru_cache(maxsize=256)
def _parse_request_line(line: str) -> tuple[str, str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if _OTHER_VERSION.fullmatch(line):
            raise UnknownVersion("only HTTP/1.1 and HTTP/1.0 are spoken here")
        raise InvalidRequest(f"{line[:80]!r} is not a request line")
    method, target, minor = match.groups()
    return method, target, minor


@lru_cache(maxsize=256)
def parse_fields(block: str) -> Fields:
    """The fields of a head, given as its lines joined by CR LF, without the last CR LF. Raises InvalidRequest."""
    by_name: dict[str, str] = {}
    for line in block.split("\r\n") if block else ():
        match = _FIELD.fullmatch(line)
        if match is None:
            raise InvalidRequest(
                f"{line[:80]!r} is not a header field", hint="fields are 'Name: value', and never folded"
            )
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in by_name:
            if name in ("content-length", "transfer-encoding", "host"):
                raise InvalidRequest(f"the field {match[1]} is repeated")
            value = f"{by_name[name]}, {value}"
        by_name[name] = value
    connection = {option.strip().lower() for option in by_name.get("connection", "").split(",")}
    content_length, chunked = _content_length(by_name), _is_chunked(by_name)
    return Fields(
        by_name,
        content_length,
        chunked,
        "close" in connection,
        "keep-alive" in connection,
        by_name.get("expect", "").lower() == "100-continue",
        not by_name.keys().isdisjoint(("if-match", "if-none-match", "range")),
        chunked or bool(content_length),
    )


def _content_length(by_name: dict[str, str]) -> int | None:
    text = by_name.get("content-length")
    if text is None:
        return None
    if _LENGTH.fullmatch(text) is None:
        raise InvalidRequest(f"{text[:80]!r} is not a Content-Length", hint="it is the number of bytes that follow")
    return int(text)


def _is_chunked(by_name: dict[str, str]) -> bool:
    coding = by_name.get("transfer-encoding")
    if coding is None:
        return False
    if "content-length" in by_name:
        raise InvalidRequest("Content-Length and Transfer-Encoding are both given", hint="send one of them")
    if coding.lower() != "chunked":
        raise UnknownCoding(f"the transfer coding {coding[:80]!r} is unknown here", hint="send the data as it is")
    return True


class Chunked:
    """Decodes one chunked body (RFC 9112, 7.1). ``done`` is set once its last byte has been seen."""

    def __init__(self) -> None:
        self.done = False
        self._line = b""
        """What has come of a line: a chunk's size, or the trailer."""
        self._left = 0
        """Bytes of data left in this chunk."""
        self._read = self._read_size

    def feed(self, data: bytes) -> tuple[list[memoryview], bytes]:
        """The pieces of the body in ``data``, and the bytes behind its end. Raises InvalidRequest or TooLarge."""
        pieces: list[memoryview] = []
        view, at = memoryview(data), 0
        while at < len(data) and not self.done:
            if self._left:
                piece = view[at : at + self._left]
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
                if not self._left:
                    self._read = self._read_data_end
            else:
                at = self._read_line(data, at)
        return pieces, data[at:]

    def _read_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at) + 1
        self._line += data[at : end or len(data)]
        if len(self._line) > CHUNK_LINE_BYTES_MAX:
            raise TooLarge(f"a line of more than {CHUNK_LINE_BYTES_MAX} bytes in a chunked body")
        if not end:
            return len(data)
        if not self._line.endswith(b"\r\n"):
            raise InvalidRequest("a line of the chunked body does not end in CR LF")
        line, self._line = self._line[:-2], b""
        self._read(line)
        return end

    def _read_size(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise InvalidRequest(f"{line[:80]!r} is not the size of a chunk")
        self._left = int(match[1], 16)
        if not self._left:
            self._trailer_bytes = 0
            self._read = self._read_trailer

    def _read_data_end(self, line: bytes) -> None:
        if line:
            raise InvalidRequest("a chunk is longer than its size")
        self._read = self._read_size

    def _read_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if not line:
            self.done = True
        elif self._trailer_bytes > TRAILER_BYTES_MAX:
            raise TooLarge(f"a trailer of more than {TRAILER_BYTES_MAX} bytes")
        elif _FIELD.fullmatch(str(line, "latin-1")) is None:
            raise InvalidRequest(f"{line[:80]!r} is not a trailer field")


class ReplyHead(NamedTuple):
    """What a client reads first. ``end`` is where the head ended in the bytes given."""

    status: int
    fields: Fields
    end: int


def read_reply_head(data: bytes | bytearray) -> ReplyHead | None:
    """The head of the reply that ``data`` begins with; None if more bytes are needed. Raises InvalidRequest."""
    end = data.find(HEAD_END)
    if end < 0:
        return None
    line, _, block = str(data[:end], "latin-1").partition("\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise InvalidRequest(f"{line[:80]!r} is not the status line of an HTTP reply")
    return ReplyHead(int(match[1]), parse_fields(block), end + 4)


STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@lru_cache(maxsize=1024)
def http_date(unix_s: int) -> str:
    """Seconds since 1970-01-01 UTC as an HTTP date (RFC 9110, 5.6.7)."""
    year, month, day, hour, minute, second, weekday, _, _ = time.gmtime(unix_s)
    return f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04} {hour:02}:{minute:02}:{second:02} GMT"


@lru_cache(maxsize=2)
def date_line(unix_s: int) -> bytes:
    """The Date field that every reply begins with."""
    return f"Date: {http_date(unix_s)}\r\n".encode("ascii")


class Reply(NamedTuple):
    """``fields`` are whole header lines; ``length`` is Content-Length where it is not that of ``body``."""

    status: int
    fields: bytes = b""
    body: Data = b""
    length: int | None = None

    def head(self, date: bytes) -> bytes:
        """Status line and fields; ``date`` is the line to put first, ``Connection`` included where there is one."""
        if self.status in (204, 304):
            return b"%b%b%b\r\n" % (STATUS_LINES[self.status], date, self.fields)
        length = len(self.body) if self.length is None else self.length
        return b"%b%b%bContent-Length: %d\r\n\r\n" % (STATUS_LINES[self.status], date, self.fields, length)


def content(type_: str, body: bytes, more: str = "") -> Reply:
    """A reply with a body of media type ``type_``; ``more`` are further header lines."""
    return Reply(200, f"Content-Type: {type_}\r\n{more}".encode("ascii"), body)


def json_reply(value: object, status: int = 200) -> Reply:
    body = json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
    return content(JSON, body)._replace(status=status)
