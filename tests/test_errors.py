"""The tree of errors: what clients and scripts rely on is stable, and the drawing is right."""

from __future__ import annotations

import errno
import re

import pytest

from rustord import errors
from rustord.errors import ClaimRefused, RangeNotSatisfiable, RustordError


def all_errors() -> list[type[RustordError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RustordError)]


def test_the_drawing_shows_the_tree() -> None:
    path: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│ ├└─]*)([A-Z]\w+)", line):
            del path[len(found[1]) // 4 :]
            drawn[found[2]] = path[-1] if path else "Exception"
            path.append(found[2])
    assert drawn == {error.__name__: error.__mro__[1].__name__ for error in all_errors()}


def test_each_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in all_errors()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("error", all_errors())
def test_what_the_edges_tell_is_in_range(error: type[RustordError]) -> None:
    assert 400 <= error.http_status <= 599
    assert error.nbd_error in errno.errorcode
    assert 1 <= error.exit_status < 126  # above: what shells mean by it


def test_an_error_says_what_and_what_to_do() -> None:
    error = RustordError("it broke", hint="mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")
    assert RangeNotSatisfiable("too far", size=7).size == 7
    assert ClaimRefused("not free", reasons=["mounted", "swap"]).reasons == ("mounted", "swap")
