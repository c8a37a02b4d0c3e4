"""Sizes and durations are read as people write them, exactly, and what is printed can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustord.quantity import duration_text, human_size, parse_duration, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096 B", 4096),
        ("64 MiB", 64 << 20),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("1.5 K", 1536),
        ("100G", 100 << 30),
        ("2T", 2 << 40),
        (" 1 GiB ", 1 << 30),
        ("1.5 GB", 1_500_000_000),
        ("0.5 KiB", 512),
        ("1 kB", 1000),
        ("8 PiB", 8 << 50),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_size_is_exact(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "-1", "1 mib", "64 m", "64Mi", "1e3", "1.5", "0.3 B", "1 2", "1 MiBs", "٣", "9" * 30, "1.0000001 MB"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="byte"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_a_printed_size_is_read_back(size: int) -> None:
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1_536 << 20, "1.5 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_a_size_for_a_person(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("30 s", 30), ("250 ms", 0.25), ("5min", 300), ("1.5 h", 5400), ("1 d", 86400)]
)
def test_a_duration_needs_its_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "-1 s", "1 week", "s", "1 S", "nan s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number with a unit"):
        parse_duration(text)


@given(st.integers(0, 10**9))
def test_a_printed_duration_is_read_back(milliseconds: int) -> None:
    assert parse_duration(duration_text(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)
