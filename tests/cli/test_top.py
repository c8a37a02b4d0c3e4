"""rustorctl top: rates, times and devices as they are."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rustord.cli.top import Changes, Sample, picture, summary

Command = Callable[..., Any]


def sample(at: float, values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> Sample:
    return Sample(at, {}, (), (), values)


def test_a_rate_is_what_was_added_since() -> None:
    key = ("n_total", (("device", "0"),))
    assert Changes(sample(1.0, {key: 10.0}), sample(3.0, {key: 30.0})).count("n_total", device="0") == 20.0
    assert Changes(sample(1.0, {}), sample(3.0, {key: 30.0})).count("n_total", device="0") == 30.0


def test_a_daemon_that_was_restarted_begins_anew() -> None:
    key: tuple[str, tuple[()]] = ("n_total", ())
    assert Changes(sample(1.0, {key: 1000.0}), sample(2.0, {key: 7.0})).count("n_total") == 7.0


@pytest.mark.parametrize(("part", "bound"), [(0.5, 0.1), (0.9, 0.1), (0.95, 1.0), (1.0, float("inf"))])
def test_a_quantile_is_the_end_of_its_bucket(part: float, bound: float) -> None:
    counts = {"0.1": 90.0, "1.0": 95.0, "+Inf": 100.0}
    values = {("t_bucket", (("le", le),)): count for le, count in counts.items()}
    changes = Changes(sample(0.0, {}), sample(1.0, {**values, ("t_count", ()): 100.0, ("t_sum", ()): 20.0}))
    assert changes.quantile(part, "t") == bound
    assert changes.mean("t") == 0.2
    assert changes.mean("u") is None
    assert changes.quantile(part, "u") is None


def test_what_is_done_meanwhile_is_counted(rustorctl: Command, daemon: object) -> None:
    watching = rustorctl.start("top", "--json", "--interval", "0.5", stdout=subprocess.PIPE)
    assert watching.stdout is not None
    json.loads(watching.stdout.readline())
    rustorctl.ok("put", "-", "--name", "n", input="hello")
    for line in watching.stdout:
        told = json.loads(line)
        if "store_named" in told["operations"]:
            break
    assert told["operations"]["store_named"]["per_s"] * told["seconds"] == pytest.approx(1)
    assert told["operations"]["store_named"]["mean_s"] > 0
    assert told["cycle_changes"] == 1
    assert list(told["phases_s"]) == ["place", "write", "journal", "flush", "settle"]
    assert told["devices"][0]["flush_s"] > 0
    assert told["pool"]["objects"] == 1


def test_without_a_terminal_pictures_follow_one_another(rustorctl: Command, daemon: object, pool_image: Path) -> None:
    said = rustorctl.ok("top", "--count", "2", "--interval", "0.2")
    assert said.count("Pool test is ok: 0 Objects with 0 B") == 2
    assert said.count("  online  ") == 2


def test_names_cannot_move_the_cursor() -> None:
    from rich.console import Console

    before = Sample(0.0, POOL, (), (), {})
    slow = {"method": "PUT", "target": "/v1/names/\x1b[2J", "taken_s": 2.0, "phases_s": {"body": 2.0}}
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(picture(summary(before, before._replace(at=1.0, slow=[slow]))))
    text = captured.get()
    assert "\\u001b[2J" in text
    assert "\x1b[2J" not in text


POOL = {
    "name": "p",
    "uuid": "u",
    "state": "ok",
    "problems": [],
    "objects": 0,
    "data_bytes": 0,
    "free_bytes": 0,
    "size_bytes": 0,
    "journal_used": 0.0,
    "index_lag": 0,
}


def test_without_a_daemon_it_says_so(rustorctl: Command) -> None:
    done = rustorctl("top", "--count", "1")
    assert done.returncode == 8
    assert done.stderr.startswith("rustorctl: ")
