"""What is printed about the settings is complete, true, and what the repository holds."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord.cli import reference
from rustord.config import Config, load
from rustord.settings import settings_of

ROOT = Path(__file__).parents[2]


def all_settings() -> list[tuple[str, str]]:
    """(table, key) of every setting."""
    found = [("", name) for name, _ in settings_of(Config)]
    for field in dataclasses.fields(Config):
        inner = field.metadata.get("table") or field.metadata.get("tables")
        found += [(field.name, name) for name, _ in settings_of(inner)] if inner else []
    return found


def test_every_setting_is_documented() -> None:
    assert len(all_settings()) > 20
    for _, setting in settings_of(Config):
        assert setting.doc.endswith(".")
    text = reference.markdown()
    for table, key in all_settings():
        assert f"**`{key}`**" in text, (table, key)


@pytest.mark.parametrize(
    ("path", "make", "option"),
    [
        ("rustord/SETTINGS.md", reference.markdown, "--print-settings"),
        ("packaging/rustord.toml", reference.toml, "--print-example"),
    ],
)
def test_the_printed_settings_are_up_to_date(path: str, make: Callable[[], str], option: str) -> None:
    assert (ROOT / path).read_text() == make(), f"run: rustord {option} > {path}"


def test_every_setting_of_the_example_exists_and_shows_its_default(tmp_path: Path) -> None:
    path = tmp_path / "rustord.toml"
    example = reference.toml()
    path.write_text(example)
    assert load(path) == Config(sources=(path,))
    lines = example.splitlines()
    live = [line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in lines]
    text = "\n".join(line for line in live if not line.endswith("= "))  # a default that is "nothing" has no value
    path.write_text(text)
    config = load(path)
    assert dataclasses.replace(config, sources=(), device=()) == Config()
    given: dict[str, Any] = tomllib.loads("\n".join(f"{line} 0" if line.endswith("= ") else line for line in live))
    shown = {("", key) for key, value in given.items() if not isinstance(value, dict) and key != "device"}
    for table, values in given.items():
        values = values[0] if table == "device" else values
        shown |= {(table, key) for key in values} if isinstance(values, dict) else set()
    assert shown == set(all_settings())
