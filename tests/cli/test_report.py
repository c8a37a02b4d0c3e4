"""rustorctl report: what is needed, and no secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]

SECRET = "host=db password=hunter2"


def configuration(path: Path) -> Path:
    path.write_text(f"[keystore]\nbackend = 'postgres'\noptions = {{ dsn = '{SECRET}' }}\n")
    return path


def test_it_tells_of_the_daemon_and_keeps_secrets(rustorctl: Command, daemon: object, tmp_path: Path) -> None:
    rustorctl.ok("put", "-", "--name", "private-name", input="private data")
    said = rustorctl.ok("report", "--config", configuration(tmp_path / "rustord.toml"))
    for part in ("== versions", "rustord ", '"backend": "postgres"', '"dsn": "..."', "== pool", '"objects": 1'):
        assert part in said
    assert "rustord_requests_total" in said
    for secret in ("hunter2", "private"):
        assert secret not in said


def test_it_works_without_a_daemon_and_with_a_wrong_configuration(rustorctl: Command, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[pol]\n")
    done = rustorctl("report", "-o", tmp_path / "report.txt", "--config", wrong)
    assert (done.returncode, done.stdout) == (0, "")
    text = (tmp_path / "report.txt").read_text()
    assert text.count("not available: ") >= 5
    assert "pol" in text
