"""The commands of scrubbing, with a daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rustord.client import Client


def damage(image: Path, content: bytes) -> None:
    """Change a byte in the middle of ``content`` where the image holds it."""
    found = image.read_bytes().index(content)
    with image.open("r+b") as file:
        file.seek(found + len(content) // 2)
        file.write(b"!")


def test_a_scrub_of_a_pool_that_is_whole(daemon: object, rustorctl: Any) -> None:
    assert "never" in rustorctl.ok("scrub", "status")
    rustorctl.ok("put", "-", "--name", "n", input="some data")
    shown = rustorctl.ok("scrub", "start", "--wait")
    assert "done" in shown
    assert "1 copies" in shown
    assert json.loads(rustorctl.ok("scrub", "status", "--json"))["copies"] == 1
    assert "done" in rustorctl.ok("scrub", "stop")


def test_what_is_lost_is_told_and_fails(daemon: Any, rustorctl: Any, pool_image: Path) -> None:
    content = bytes(range(32, 127)) * 10
    rustorctl.ok("put", "-", "--name", "precious", input=content.decode())
    damage(pool_image, content)
    done = rustorctl("scrub", "start", "--again", "--wait")
    assert done.returncode == 10
    assert "damaged and not mended" in done.stderr
    assert "(precious): bytes 0 to 949 of copy 0" in done.stdout
    assert rustorctl("get", "precious").returncode == 10
    with Client(rustorctl.environment["RUSTORD_SOCKET"]) as client:
        assert client.scrub()["lost"] == 1
        assert client.devices()[0]["bad_bytes"] == 4096
        assert client.stop_scrub()["state"] == "done"
