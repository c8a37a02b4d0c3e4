"""rustorctl pool map: what is used, free, reserved and bad, where it lies."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord.cli.map import characters

Command = Callable[..., Any]


def test_only_what_is_empty_looks_empty_and_only_what_is_full_looks_full() -> None:
    told = {"used": [0.0, 0.001, 0.33, 0.34, 0.999, 1.0, 1.0, 0.0], "reserved": [6], "bad": [7]}
    assert characters(told, "·░▒▓█") == "·░░▒▓█-X"
    assert characters(told, ".:=+#") == ".::=+#-X"


def test_a_device_in_the_terminal(rustorctl: Command, daemon: object, pool_image: Path) -> None:
    rustorctl.ok("put", "-", input="x" * (16 << 20))
    said = rustorctl.ok("pool", "map", env={**rustorctl.environment, "COLUMNS": "64"}).splitlines()
    cells = "".join(said[1:9])
    assert said[0].startswith(f"Device 0 ({pool_image}), 64.0 MiB; a cell is 128.0 KiB;")
    assert len(cells) == 512
    assert 120 <= cells.count("█") <= 130
    assert cells.startswith("-")
    assert cells.endswith("-")
    assert "are free in 2 runs, the longest of" in said[-1]


def test_where_the_output_is_ascii_so_is_the_picture(rustorctl: Command, daemon: object) -> None:
    environment = {**rustorctl.environment, "PYTHONIOENCODING": "ascii", "COLUMNS": "64"}
    said = rustorctl.ok("pool", "map", "0", env=environment)
    assert said.isascii()
    assert "." * 64 in said


def test_for_programs(rustorctl: Command, daemon: object) -> None:
    (told,) = json.loads(rustorctl.ok("pool", "map", "--json"))
    assert len(told["used"]) == 4096
    assert sum(told["used"]) / 4096 == pytest.approx(1 - told["free_bytes"] / told["size_bytes"], abs=1e-3)
    assert told["bad"] == []


def test_as_a_picture(rustorctl: Command, daemon: object, tmp_path: Path) -> None:
    rustorctl.ok("put", "-", input="x" * (16 << 20))
    rustorctl.ok("pool", "map", "--svg", tmp_path / "map.svg")
    root = ET.parse(tmp_path / "map.svg").getroot()
    boxes = root.findall("{http://www.w3.org/2000/svg}rect")
    assert 1000 < sum(box.get("fill-opacity") is not None for box in boxes) < 1100
    assert len(boxes) > 4096


def test_a_device_that_is_not_there(rustorctl: Command, daemon: object) -> None:
    done = rustorctl("pool", "map", "7")
    assert (done.returncode, done.stdout) == (3, "")
    assert "the pool has no device '7'" in done.stderr
