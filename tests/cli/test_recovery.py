"""`rustorctl pool rebuild` and `pool check` on a pool that a daemon serves."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    assert daemon.wait(timeout=60) == 0


@pytest.fixture
def pool_of_loops(make_loop: Any, rustorctl: Any) -> list[Path]:
    devices = [make_loop(), make_loop()]
    rustorctl.ok("pool", "create", *devices)
    return devices


def test_a_lost_index_comes_back(
    pool_of_loops: list[Path], rustorctl: Any, start_daemon: Command, disk_path: Path
) -> None:
    options = [text for path in pool_of_loops for text in ("--device", str(path))]
    daemon = start_daemon(*options)
    for number in range(6):
        rustorctl.ok("put", "-", "--name", f"object {number}", input="some data")
    rustorctl.ok("delete", "object 3")
    listing = rustorctl.ok("ls", "--json")
    index = disk_path / "index"
    refused = rustorctl("pool", "rebuild", "--directory", index, *pool_of_loops)
    assert (refused.returncode, refused.stdout) == (11, "")
    assert "is in use by" in refused.stderr
    stop(daemon)
    shutil.rmtree(index)
    looked = rustorctl.ok("pool", "rebuild", "--dry-run", "--directory", index, *pool_of_loops)
    assert looked.startswith("would find 5 Objects with 45 B of data, 5 names\n")
    assert not index.exists()
    made = json.loads(rustorctl.ok("pool", "rebuild", "--json", "--directory", index, *pool_of_loops))
    assert (made["objects"], made["losses"]) == (5, [])
    start_daemon(*options)
    assert rustorctl.ok("ls", "--json") == listing
    assert rustorctl.ok("get", "object 5") == "some data"


def test_what_is_refused_is_told_and_nothing_is_made(pool_image: Path, rustorctl: Any, disk_path: Path) -> None:
    other = disk_path / "other.img"
    rustorctl.ok("pool", "create", "--size", "16 MiB", other)
    for devices, status, said in (
        ([pool_image, other], 13, "belong to different pools"),
        ([pool_image, pool_image], 13, "named twice"),
        ([disk_path / "absent"], 11, "cannot be opened"),
        ([disk_path], 11, "neither a block device nor a regular file"),
    ):
        done = rustorctl("pool", "rebuild", "--directory", disk_path / "index", *devices)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert said in done.stderr
        assert "hint: " in done.stderr
    assert not (disk_path / "index").exists()


def test_the_configuration_says_which_devices(pool_image: Path, rustorctl: Any, disk_path: Path) -> None:
    file = disk_path / "rustord.toml"
    file.write_text(f'[pool]\ndevices = ["{pool_image}"]\ndirectory = "{disk_path}/made"\n')
    assert rustorctl.ok("pool", "rebuild", "--config", file).startswith("found 0 Objects")
    assert (disk_path / "made" / "data.mdb").exists()
    done = rustorctl("pool", "rebuild", "--config", file, "--without", "x")
    assert done.returncode == 2


def test_a_check_finds_damage_and_repairs_it(
    pool_of_loops: list[Path], rustorctl: Any, start_daemon: Command, disk_path: Path
) -> None:
    options = [text for path in pool_of_loops for text in ("--device", str(path))]
    daemon = start_daemon(*options)
    for number in range(3):
        rustorctl.ok("put", "-", "--name", f"object {number}", input="some data")
    listing = rustorctl.ok("ls", "--json")
    index = disk_path / "index"
    assert rustorctl.ok("pool", "check", "--online") == "nothing is wrong, as far as the daemon can tell\n"
    assert json.loads(rustorctl.ok("pool", "check", "--online", "--json")) == {"findings": []}
    assert rustorctl("pool", "check", "--online", "--data").returncode == 2
    check = ("pool", "check", "--directory", index, *pool_of_loops)
    assert "is in use by" in rustorctl(*check).stderr
    stop(daemon)
    assert rustorctl.ok(*check, "--data") == "3 Objects with 27 B of data: nothing is wrong\n"
    with pool_of_loops[1].open("r+b") as device:
        device.write(bytes(4096))
    shutil.rmtree(index)
    found = rustorctl(*check)
    assert (found.returncode, found.stderr) == (10, "")
    assert "label: the copy of the label at byte 0 of device 1 is absent\n  --repair: " in found.stdout
    assert f"index: there is no index at {index}\n  --repair: " in found.stdout
    assert found.stdout.endswith("2 things are wrong\n")
    assert not index.exists()
    declined = rustorctl(*check, "--repair", input="n\n")
    assert declined.returncode == 10
    repairs = "write labels anew, from copies that are good\n  - make the index anew, from what the devices hold\n"
    assert f"--repair will\n  - {repairs}" in declined.stdout  # older versions of click ask there, too
    mended = json.loads(rustorctl(*check, "--repair", "--yes", "--json").stdout)
    assert [finding["repaired"] for finding in mended["findings"]] == [True, True]
    assert rustorctl.ok(*check, "--data") == "3 Objects with 27 B of data: nothing is wrong\n"
    start_daemon(*options)
    assert rustorctl.ok("ls", "--json") == listing
