"""rustord: options, and errors at start as one message and an exit status."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord.cli import reference
from tests.cli.conftest import Command

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def rustord(socket_path: Path) -> Command:
    return Command("rustord", socket_path)


@pytest.fixture
def config(disk_path: Path, pool_image: Path) -> Path:
    path = disk_path / "rustord.toml"
    path.write_text(
        f'[pool]\ndevices = ["{pool_image}"]\ndirectory = "{disk_path}/from-file"\n'
        f'[socket]\npath = "{disk_path}/rustord.sock"\nmode = "0600"\n[log]\nlevel = "warning"\n'
    )
    return path


def test_it_prints_the_reference_and_an_example(rustord: Command) -> None:
    assert rustord.ok("--print-settings") == reference.markdown()
    assert rustord.ok("--print-example") == reference.toml()


def test_the_configuration_counts(rustorctl: Any, rustord: Command, config: Path, start_daemon: Start) -> None:
    start_daemon("--config", config)
    assert json.loads(rustorctl.ok("status", "--json"))["name"] == "test"
    assert (config.parent / "rustord.sock").stat().st_mode & 0o777 == 0o600


def test_options_take_precedence(rustord: Command, config: Path, start_daemon: Start, disk_path: Path) -> None:
    start_daemon("--config", config, "--log-level", "info")  # with --directory and --socket
    assert (disk_path / "index").exists()
    assert not (disk_path / "from-file").exists()
    assert "INFO reading the index" in (disk_path / "daemon.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_in_order_when_told(daemon: subprocess.Popen[bytes], number: signal.Signals) -> None:
    daemon.send_signal(number)
    assert daemon.wait(timeout=60) == 0


def test_errors_at_start(rustord: Command, rustorctl: Any, pool_image: Path, image: Path, disk_path: Path) -> None:
    index = ("--directory", disk_path / "index")
    wrong = disk_path / "wrong.toml"
    wrong.write_text("[log]\nlevel = 'loud'\n")
    deep = disk_path / ("d" * 120) / "rustord.sock"
    (disk_path / "file").write_text("")
    cases: list[tuple[list[str | Path], int, str]] = [
        (["--config", wrong], 78, "[log] level: 'loud' is not allowed"),
        (["--config", disk_path / "missing"], 78, "it cannot be read: No such file or directory"),
        (["--log-level", "loud"], 2, "'loud' is not one of"),
        (["--what"], 2, "No such option"),
        (["extra"], 2, "Got unexpected extra argument"),
        ([*index, "--device", image], 13, "bears no rustord label"),
        ([*index, "--device", pool_image, "--socket", deep], 78, "cannot be made"),
        ([*index, "--device", pool_image, "--socket", disk_path / "file"], 78, "is not a socket"),
    ]
    for arguments, status, message in cases:
        done = rustord(*arguments)
        errors = [line for line in done.stderr.splitlines() if line.startswith("rustord: ")]
        assert (done.returncode, len(errors)) == (status, 1), done
        assert message in done.stderr, done
        assert "Traceback" not in done.stderr, done


def test_a_second_daemon_on_the_same_pool_or_socket(
    daemon: object, rustord: Command, pool_image: Path, disk_path: Path, socket_path: Path
) -> None:
    done = rustord("--device", pool_image, "--directory", disk_path / "other", "--socket", disk_path / "other.sock")
    assert done.returncode == 11, done
    assert "rustord: " in done.stderr


def test_a_stale_socket_is_replaced(pool_image: Path, start_daemon: Start, rustorctl: Any, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(socket_path))
    start_daemon("--device", pool_image)
    assert rustorctl.ok("ls") == ""


def test_it_needs_no_standard_error(rustord: Command, config: Path, pool_image: Path) -> None:
    pool_image.unlink()
    script = f"{rustord.program} --config {config} 2>&-"
    assert subprocess.run(["sh", "-c", script], env=rustord.environment).returncode == 11
