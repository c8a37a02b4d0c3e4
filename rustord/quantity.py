"""Quantities as people write and read them: sizes in bytes and durations in seconds."""

from __future__ import annotations

import re

_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}
_DECIMAL = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_LETTERS = {unit[0]: factor for unit, factor in _BINARY.items()}
"""As truncate, qemu-img, lvcreate and systemd read them."""
_SIZE_UNITS = {"": 1, "B": 1, **_LETTERS, **_BINARY, **_DECIMAL}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_QUANTITY = re.compile(r"(\d{1,19}(?:\.\d{1,6})?) ?([A-Za-z]{0,3})", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4096``, ``64 MiB``, ``64M`` (the same) or ``1.5 GB``.

    Raises ValueError that says what is allowed.
    """
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2] not in _SIZE_UNITS:
        raise ValueError("a size is a number of bytes or a number with a unit, such as 4096, 64M, '64 MiB' or '1.5 GB'")
    whole, _, fraction = found[1].partition(".")
    # Integers throughout: a float would round sizes beyond 2**53.
    factor: int = 10 ** len(fraction)
    scaled, rest = divmod(int(whole + fraction) * _SIZE_UNITS[found[2]], factor)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return scaled


def size_text(size: int) -> str:
    """``size`` bytes exactly, in the largest binary unit that divides it: what `parse_size` reads back."""
    for unit, factor in reversed(_BINARY.items()):
        if size and size % factor == 0:
            return f"{size // factor} {unit}"
    return str(size)


def human_size(size: int) -> str:
    """``size`` bytes rounded to three digits or so, for a person: ``0 B``, ``4.0 KiB``, ``1.4 TiB``."""
    if size < 1024:
        return f"{size} B"
    # Rounding comes first: 1,048,570 bytes are 1.0 MiB, not 1024.0 KiB.
    unit, factor = next(
        ((unit, factor) for unit, factor in _BINARY.items() if round(size / factor, 1) < 1024), ("PiB", _BINARY["PiB"])
    )
    return f"{size / factor:.1f} {unit}"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``30 s``, ``250 ms`` or ``5 min``. Raises ValueError that says what is allowed."""
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2] not in _DURATION_UNITS:
        raise ValueError("a duration is a number with a unit (ms, s, min, h or d), such as '30 s'")
    return float(found[1]) * _DURATION_UNITS[found[2]]


def duration_text(seconds: float) -> str:
    """``seconds`` in the largest unit that keeps it a whole number: what `parse_duration` reads back."""
    for unit, factor in reversed(_DURATION_UNITS.items()):
        count = round(seconds / factor)
        if count and abs(count * factor - seconds) < 1e-9:
            return f"{count} {unit}"
    return f"{seconds:g} s"
