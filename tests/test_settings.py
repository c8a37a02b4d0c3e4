"""Settings as plugins use them: options are checked and told like any other key."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rustord import settings
from rustord.errors import ConfigError
from rustord.settings import Kind, parse_options, setting


@dataclasses.dataclass(frozen=True)
class Options:
    unit: int = setting(settings.size(4096, 1 << 30, power_of_two=True), 1 << 20, "How much at once.")
    eager: bool = setting(settings.boolean(), False, "Whether to hurry.")

    def __post_init__(self) -> None:
        if self.eager and self.unit > 1 << 24:
            raise ValueError("an eager one takes at most 16 MiB at once")


def test_options_are_read_and_have_defaults() -> None:
    assert parse_options(Options, {"unit": "64 KiB"}, "placer") == Options(unit=65536)
    assert parse_options(Options, {}, "placer") == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"units": 1}, "[placer.options] units: there is no such setting"),
        ({"unit": 5000}, "[placer.options] unit: 5000 is not allowed"),
        ({"unit": 2048}, "[placer.options] unit: 2048 is not allowed"),
        ({"eager": 1}, "[placer.options] eager: 1 is not allowed"),
        ({"eager": True, "unit": "32 MiB"}, "[placer.options]: an eager one takes at most 16 MiB at once"),
    ],
)
def test_options_that_make_no_sense_are_told(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(Options, given, "placer")
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (settings.text("x"), 'a "quoted" \\ word \u2028 é'),
        (settings.texts("x"), ("a", "b c")),
        (settings.choice("a", "b"), "b"),
        (settings.integer(-5, 5), -5),
        (settings.boolean(), True),
        (settings.size(0, 1 << 40), 3 << 20),
        (settings.size(0, 1 << 40), 12345),
        (settings.duration(0, 1e6), 0.25),
        (settings.file_mode(), 0o640),
        (settings.options("x"), {"a": 1, "b": "c"}),
    ],
)
def test_what_is_written_is_read_back(kind: Kind, value: Any) -> None:
    assert kind.parse(tomllib.loads(f"key = {kind.write(value)}")["key"]) == value


def test_a_credential_is_what_systemd_handed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "password").write_text("open sesame\n")
    assert settings.credential("password") == "open sesame"
    with pytest.raises(ConfigError, match="there is no credential 'other'") as caught:
        settings.credential("other")
    assert "LoadCredential=other:" in caught.value.hint
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="there is no credential 'password'"):
        settings.credential("password")
