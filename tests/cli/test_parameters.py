"""What options take."""

from __future__ import annotations

import click
import pytest

from rustord.cli.parameters import to_size


def convert(value: str | None) -> int | None:
    option = click.Option(["--size"])
    return to_size(click.Context(click.Command("test")), option, value)


def test_a_size() -> None:
    assert convert("64 MiB") == 64 << 20
    assert convert(None) is None


@pytest.mark.parametrize("value", ["", "much", "-1"])
def test_what_is_no_size(value: str) -> None:
    with pytest.raises(click.BadParameter, match="a size is a number of bytes or a number with a unit"):
        convert(value)
