"""The commands that move Objects: a device is removed, replaced and given up; a pool is healed and rebalanced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from rustord.cli import mover, parameters
from rustord.cli.mover import wait_until_done
from rustord.client import Client
from rustord.errors import RustordError, Unavailable, Unreachable
from tests.cli.conftest import Command


@pytest.fixture
def filled(daemon: object, rustorctl: Command, image: Path) -> list[str]:
    """A pool of two devices with Objects; their names."""
    rustorctl.ok("device", "add", image)
    names = [f"name{number}" for number in range(20)]
    for name in names:
        rustorctl.ok("put", "-", "--name", name, input=name * 10_000)
    return names


def test_a_device_is_emptied_and_removed(filled: list[str], rustorctl: Command) -> None:
    said = rustorctl.ok("device", "remove", "0", "--wait")
    assert said.startswith("device 0 (")
    assert "is being emptied" in said
    assert "Objects have been moved" in said
    assert [device["index"] for device in json.loads(rustorctl.ok("device", "list", "--json"))] == [1]
    for name in filled:
        assert rustorctl.ok("get", name) == name * 10_000


def test_a_device_is_replaced(filled: list[str], rustorctl: Command, disk_path: Path) -> None:
    new = disk_path / "new.img"
    with new.open("xb") as file:
        file.truncate(64 << 20)
    assert rustorctl.ok("device", "replace", "--dry-run", "0", new) == f"{new}: 64.0 MiB, free, would be taken\n"
    assert "belongs to the pool, and the other one" in rustorctl.ok("device", "replace", "0", new, "--wait")
    assert [device["index"] for device in json.loads(rustorctl.ok("device", "list", "--json"))] == [1, 2]
    for name in filled:
        assert rustorctl.ok("get", name) == name * 10_000


def test_works_that_are_asked_for(filled: list[str], rustorctl: Command) -> None:
    for work in ("heal", "rebalance"):
        assert "have been moved" in rustorctl.ok("pool", work, "--wait")
        status = json.loads(rustorctl.ok("pool", work, "--wait", "--json"))
        assert (status["state"], status["error"]) == ("done", "")
        assert rustorctl.ok("pool", work, "--stop") == "stopped\n"
        assert f"'rustorctl pool {work} --wait'" in rustorctl.ok("pool", work)
    for name in filled:
        assert rustorctl.ok("get", name) == name * 10_000


def test_what_cannot_be_done_is_told(daemon: object, rustorctl: Command, image: Path) -> None:
    rustorctl.ok("put", "-", "--name", "name", input="hello")
    done = rustorctl("device", "remove", "0")
    assert (done.returncode, done.stdout) == (6, "")
    assert "hint: add a device first" in done.stderr
    done = rustorctl("device", "fail", "0")
    assert done.returncode == 2
    assert "no device but device 0 takes new data" in done.stderr
    assert rustorctl("device", "replace", "7", image).returncode == 3
    assert rustorctl("device", "fail", "7").returncode == 3
    assert rustorctl.ok("device", "remove", "--stop", "0").endswith("stays\n")
    assert rustorctl.ok("get", "name") == "hello"


class Stopped:
    """A client of a daemon whose mover somebody else has stopped."""

    def mover(self) -> dict[str, Any]:
        return {"state": "stopped", "job": "healing", "moved": 7}


def test_who_waits_is_told_that_somebody_stopped_it() -> None:
    with pytest.raises(RustordError, match="healing: somebody stopped it before it was done"):
        wait_until_done(cast(Client, Stopped()), as_json=False)


class StartedAgain:
    """A client of a daemon that is started again while its mover is at work."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any] | Unavailable] = [
            {"state": "running", "job": "healing", "done_bytes": 1, "total_bytes": 2, "moved": 7},
            Unreachable("nobody listens"),
            Unavailable("it is starting"),
            {"state": "done", "job": "healing", "moved": 7},
        ]

    def mover(self) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer


def test_who_waits_goes_on_waiting_while_the_daemon_is_started_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the daemon goes on with what it did."""
    monkeypatch.setattr(mover, "_POLL_S", 0)
    monkeypatch.setattr(parameters, "_POLL_S", 0)
    wait_until_done(cast(Client, StartedAgain()), as_json=False)
    assert capsys.readouterr().out == "done: 7 Objects have been moved\n"
