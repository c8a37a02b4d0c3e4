"""What systemd and the daemon say to one another. systemd itself is played by the test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


@needs_analyze
def test_units_are_valid(tmp_path: Path) -> None:
    for unit in UNITS.glob("rustord.*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/rustord", sys.executable))
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
def test_service_is_sandboxed() -> None:
    security = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(UNITS / "rustord.service")]
    done = subprocess.run(security, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:]
