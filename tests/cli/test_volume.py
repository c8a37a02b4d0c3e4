"""The commands for volumes, with a daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CHUNK = 65536


def test_a_volume_from_an_object_and_back(daemon: object, rustorctl: Any, tmp_path: Path) -> None:
    image = bytes(range(256)) * 1024
    (tmp_path / "image").write_bytes(image)
    rustorctl.ok("put", tmp_path / "image", "--name", "image")
    made = json.loads(rustorctl.ok("volume", "clone", "image", "disk", "--json"))
    assert (made["name"], made["size"], made["own_bytes"], made["shared_bytes"]) == ("disk", 4 * CHUNK, 0, 4 * CHUNK)
    assert "disk" in rustorctl.ok("volume", "ls")
    grown = json.loads(rustorctl.ok("volume", "resize", "disk", "--size", "1MiB", "--json"))
    assert grown["size"] == 1 << 20
    taken = json.loads(rustorctl.ok("volume", "snapshot", "disk", "--as", "before", "--json"))
    assert taken["name"] == "before"
    rustorctl.ok("delete", "image")
    rustorctl.ok("volume", "freeze", "disk", "--as", "after")
    for name in ("before", "after"):
        rustorctl.ok("get", name, "-o", tmp_path / name)
        assert (tmp_path / name).read_bytes() == image + bytes((1 << 20) - len(image))
    assert json.loads(rustorctl.ok("volume", "ls", "--json")) == []
    rustorctl.ok("delete", "before", "after")
    assert json.loads(rustorctl.ok("status", "--json"))["objects"] == 0


def test_a_volume_is_made_shown_and_deleted(daemon: object, rustorctl: Any) -> None:
    rustorctl.ok("volume", "create", "disk", "--size", "100GiB")
    shown = rustorctl.ok("volume", "stat", "disk")
    assert "100.0 GiB" in shown
    assert "0 times" in shown
    rustorctl.ok("volume", "delete", "disk")
    assert rustorctl("volume", "stat", "disk").returncode == 3


def test_what_is_wrong_is_told(daemon: object, rustorctl: Any) -> None:
    rustorctl.ok("volume", "create", "disk", "--size", "1MiB")
    for status, arguments in (
        (4, ("create", "disk", "--size", "1MiB")),
        (2, ("create", "a/b", "--size", "1MiB")),
        (2, ("create", "large", "--size", "100TiB")),
        (2, ("create", "disk2", "--size", "much")),
        (3, ("clone", "0190b8f0-0000-7000-8000-000000000000", "new")),
        (3, ("clone", "nothing", "new")),
        (3, ("delete", "nothing")),
        (3, ("freeze", "nothing")),
        (3, ("snapshot", "nothing")),
        (3, ("resize", "nothing", "--size", "1MiB")),
    ):
        done = rustorctl("volume", *arguments)
        assert done.returncode == status, done
        assert done.stderr.startswith(("rustorctl:", "Usage:")), done
    assert [volume["name"] for volume in json.loads(rustorctl.ok("volume", "ls", "--json"))] == ["disk"]


def test_a_name_that_says_nothing_is_refused_in_plain_words(daemon: object, rustorctl: Any) -> None:
    rustorctl.ok("volume", "create", "disk", "--size", "1MiB")
    uuid = "0190b8f0-0000-7000-8000-000000000000"
    for status, message, arguments in (
        (2, "--as': it is empty", ("snapshot", "disk", "--as", "")),
        (2, "--as': it is empty", ("freeze", "disk", "--as", "")),
        (2, f"--as': '{uuid}' would be taken for a uuid", ("snapshot", "disk", "--as", uuid)),
        (2, "'NAME': it is empty", ("stat", "")),
        (2, "'NAME': it is empty", ("delete", "")),
        (2, "is not UTF-8\nhint: names and attributes are text", ("create", b"\xff", "--size", "1MiB")),
        (3, "there is no Object named ''", ("clone", "", "new")),
        (3, "clone a snapshot of it", ("clone", "disk", "new")),
    ):
        done = rustorctl("volume", *map(os.fsdecode, arguments))
        assert (done.returncode, message in done.stderr) == (status, True), done
    assert [volume["name"] for volume in json.loads(rustorctl.ok("volume", "ls", "--json"))] == ["disk"]
    assert rustorctl.ok("ls", "--all") == ""


def test_who_makes_a_volume_in_a_mirrored_pool_is_told_that_it_is_kept_once(
    disk_path: Path, rustorctl: Any, start_daemon: Any
) -> None:
    devices = [disk_path / "one.img", disk_path / "two.img"]
    rustorctl.ok("pool", "create", "--pool-name", "test", "--size", "64 MiB", *devices)
    config = disk_path / "rustord.toml"
    config.write_text('[placer]\npolicy = "mirrored"\n')
    start_daemon("--config", config, "--device", devices[0], "--device", devices[1])
    done = rustorctl("volume", "create", "disk", "--size", "1 MiB", "--json")
    assert (done.returncode, json.loads(done.stdout)["name"]) == (0, "disk")
    assert "a volume once" in done.stderr
