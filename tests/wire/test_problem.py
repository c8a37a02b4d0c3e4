from __future__ import annotations

import json

import pytest

from rustord.errors import ClaimRefused, NotFound, RangeNotSatisfiable, RustordError
from rustord.wire.http1 import MethodNotAllowed
from rustord.wire.problem import error_classes, problem, read_problem

SPECIAL = (ClaimRefused, RangeNotSatisfiable, MethodNotAllowed)


def an_error(kind: type[RustordError]) -> RustordError:
    if kind is ClaimRefused:
        return ClaimRefused("what", reasons=["a", "ü"], hint="why")
    if kind is RangeNotSatisfiable:
        return RangeNotSatisfiable("what", size=7, hint="why")
    if kind is MethodNotAllowed:
        return MethodNotAllowed("what", allowed=("GET", "PUT"), hint="why")
    return kind("what", hint="why")


def test_every_error_arrives_as_what_it_was() -> None:
    for kind in error_classes():
        error = an_error(kind)
        reply = problem(error)
        assert reply.status == kind.http_status
        arrived = read_problem(reply.status, bytes(reply.body))
        assert type(arrived) is kind
        assert vars(arrived) == vars(error)


def test_every_error_has_a_code_of_its_own() -> None:
    kinds = list(error_classes())
    assert len(kinds) == len(set(kinds)) == len({kind.code for kind in kinds})


def test_a_problem_says_what_it_is() -> None:
    reply = problem(NotFound("no Object a", hint="look elsewhere"))
    assert reply.fields == b"Content-Type: application/problem+json\r\n"
    assert json.loads(bytes(reply.body)) == {
        "type": "urn:rustord:error:not-found",
        "title": "Not found",
        "status": 404,
        "detail": "no Object a",
        "code": "not-found",
        "hint": "look elsewhere",
    }
    assert b"Content-Range: bytes */7\r\n" in problem(an_error(RangeNotSatisfiable)).fields
    assert b"Allow: GET, PUT\r\n" in problem(an_error(MethodNotAllowed)).fields


def test_a_problem_can_quote_what_is_no_unicode() -> None:
    assert json.loads(bytes(problem(NotFound("\udcff")).body))["code"] == "not-found"


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'"code"', b"\xff"])
def test_what_is_no_problem_is_an_error_all_the_same(body: bytes) -> None:
    assert "502" in read_problem(502, body).message
    assert read_problem(500, b'{"code": "new", "detail": "d"}').message == "d"
