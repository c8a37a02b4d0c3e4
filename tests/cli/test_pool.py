"""Making a pool, and looking after its devices: what is refused is told, and nothing is changed then."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def content(path: Path) -> bytes:
    return path.read_bytes()


# pool create


def test_a_pool_of_new_and_of_existing_image_files(rustorctl: Command, image: Path, disk_path: Path) -> None:
    new = disk_path / "new.img"
    said = rustorctl.ok("pool", "create", "--pool-name", "two", "--size", "32 MiB", image, new)
    assert said.startswith("pool two of 2 devices, ")
    assert new.stat().st_size == 32 << 20


def test_the_pool_can_be_served_under_what_was_asked(
    rustorctl: Command, image: Path, start_daemon: Callable[..., object]
) -> None:
    made = json.loads(rustorctl.ok("pool", "create", "--pool-name", "n", "--block-size", "16384", "--json", image))
    start_daemon("--device", image)
    pool = json.loads(rustorctl.ok("pool", "status", "--json"))
    assert (pool["uuid"], pool["name"], pool["block_size"]) == (made["uuid"], "n", 16384)


def test_a_dry_run_changes_nothing(rustorctl: Command, image: Path, disk_path: Path) -> None:
    before = content(image)
    new = disk_path / "new.img"
    said = rustorctl.ok("pool", "create", "--dry-run", "--size", "1 GiB", image, new)
    assert said == f"{image}: 64.0 MiB, free, would be taken\n{new}: would be made with 1.0 GiB\n"
    assert content(image) == before
    assert not new.exists()


def test_if_one_device_is_not_free_none_is_changed(
    rustorctl: Command, pool_image: Path, image: Path, disk_path: Path
) -> None:
    new = disk_path / "new.img"
    before = content(pool_image), content(image)
    for more in ((), ("--dry-run",)):
        done = rustorctl("pool", "create", "--size", "64 MiB", *more, image, new, pool_image)
        assert (done.returncode, done.stdout) == (12, "")
        assert done.stderr.startswith(f"rustorctl: {pool_image} is not proven free\n  - ")
        assert 'the rustord pool "test"' in done.stderr
        assert "hint: nothing on it was changed; --force would erase the label" in done.stderr
    assert (content(pool_image), content(image)) == before
    assert not new.exists()


def test_force_says_what_it_erases_first_in_a_dry_run(rustorctl: Command, pool_image: Path) -> None:
    before = content(pool_image)
    said = rustorctl.ok("pool", "create", "--force", "--dry-run", pool_image)
    assert "would be taken\n  would erase the label of the rustord pool\n" in said
    assert content(pool_image) == before
    done = rustorctl("pool", "create", "--force", pool_image)
    assert done.returncode == 0
    assert done.stderr.startswith(f"{pool_image}: erasing the label of the rustord pool\n")


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["", "dry run"])
def test_a_pool_that_cannot_be_is_refused_before_anything_is_erased(
    rustorctl: Command, pool_image: Path, more: list[str]
) -> None:
    before = content(pool_image)
    done = rustorctl("pool", "create", "--force", *more, "--pool-name", "n" * 65, pool_image)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be a pool's name" in done.stderr
    assert content(pool_image) == before


def test_all_reasons_against_all_devices_are_told(rustorctl: Command, pool_image: Path, disk_path: Path) -> None:
    small = disk_path / "small.img"
    small.write_bytes(bytes(4096))
    done = rustorctl("pool", "create", pool_image, small)
    assert done.returncode == 12
    assert done.stderr.count("  - ") == 2
    assert f"{small} has only 4096 bytes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Missing argument 'DEVICE...'"),
        (["missing.img"], 3, "there is no missing.img"),
        (["--size", "64 MiB", "missing/x.img"], 74, "missing/x.img: No such file or directory"),
        (["--size", "64 Megs", "x.img"], 2, "a size is a number of bytes or a number with a unit"),
        (["--size", "9999 PiB", "x.img"], 2, "'9999 PiB' is more than a file can have"),
        (["--size", "1 MiB", "x.img"], 12, "x.img has only 1048576 bytes"),
        (["--size", "64 MiB", "x.img", "./x.img"], 2, "x.img is named twice"),
        (["--size", "64 MiB", "--block-size", "5000", "x.img"], 2, "'5000' is not one of"),
        (["--size", "64 MiB", "--pool-name", "n" * 65, "x.img"], 2, "cannot be a pool's name"),
        (["--size", "64 MiB", "--pool-name", "a\nb", "x.img"], 2, "cannot be a pool's name"),
        (["."], 12, ". is not proven free"),
    ],
)
def test_bad_input(rustorctl: Command, disk_path: Path, arguments: list[str], status: int, message: str) -> None:
    done = rustorctl("pool", "create", *arguments, cwd=disk_path)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert message in done.stderr
    assert done.stderr.startswith("rustorctl: ")
    assert not (disk_path / "x.img").exists()


def test_an_image_that_cannot_be_so_large_is_named(rustorctl: Command, disk_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = rustorctl("pool", "create", "--size", "64 MiB", "x.img", cwd=disk_path, preexec_fn=limit)
    assert (done.returncode, done.stderr) == (74, "rustorctl: x.img: File too large\n")
    assert not (disk_path / "x.img").exists()


def test_a_pool_that_is_served_is_not_taken(daemon: object, rustorctl: Command, pool_image: Path) -> None:
    done = rustorctl("pool", "create", "--force", pool_image)
    assert done.returncode == 12
    assert "rustord" in done.stderr


# status


def test_status_is_read_by_people_and_programs(daemon: object, rustorctl: Command, pool_image: Path) -> None:
    rustorctl.ok("put", "-", input="hello")
    shown = rustorctl.ok("status")
    facts = dict(line.split("  ", 1) for line in shown.split("\n\n")[0].splitlines())
    assert facts["Pool"].strip().startswith("test (")
    assert facts["State"].strip() == "ok"
    assert facts["Objects"].strip() == "1 with 5 B of data"
    assert str(pool_image) in shown
    told = json.loads(rustorctl.ok("status", "--json"))
    assert (told["state"], told["objects"], len(told["devices"])) == ("ok", 1, 1)
    assert rustorctl.ok("pool", "status").splitlines()[0] == shown.splitlines()[0]


def test_a_missing_device_is_told(
    rustorctl: Command, make_image: Callable[[int], Path], start_daemon: Callable[..., object]
) -> None:
    here, gone = make_image(64 << 20), make_image(64 << 20)
    rustorctl.ok("pool", "create", here, gone)
    start_daemon("--device", here)
    shown = rustorctl.ok("status")
    assert "State    degraded\nProblem  device 1 is missing" in shown
    assert json.loads(rustorctl.ok("status", "--json"))["devices"][1]["path"] is None


# device


def test_a_device_is_added_listed_and_removed(daemon: object, rustorctl: Command, image: Path) -> None:
    assert rustorctl.ok("device", "add", "--dry-run", image) == f"{image}: 64.0 MiB, free, would be taken\n"
    said = rustorctl.ok("device", "add", image.name, cwd=image.parent)
    assert said.startswith(f"{image} is device 1 (")
    devices = json.loads(rustorctl.ok("device", "list", "--json"))
    assert [device["path"] for device in devices][1] == str(image)
    assert str(image) in rustorctl.ok("device", "list")
    for which in ("1", "nothing"):
        done = rustorctl("device", "remove", which)
        assert done.returncode == (0 if which == "1" else 3), done
    assert len(json.loads(rustorctl.ok("device", "list", "--json"))) == 1


def test_a_device_that_is_not_free_is_refused(daemon: object, rustorctl: Command, image: Path, disk_path: Path) -> None:
    rustorctl.ok("pool", "create", "--pool-name", "other", image)
    before = content(image)
    for arguments in (["add", image], ["add", "--dry-run", image]):
        done = rustorctl("device", *arguments)
        assert done.returncode == 12
        assert 'the rustord pool "other"' in done.stderr
        assert "hint: " in done.stderr
    assert content(image) == before
    assert "would erase" in rustorctl.ok("device", "add", "--force", "--dry-run", image)
    assert content(image) == before
    assert rustorctl("device", "add", disk_path / "missing").returncode in (11, 12)
    assert rustorctl("device", "add").returncode == 2


def test_the_only_device_stays(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "-", input="hello")
    done = rustorctl("device", "remove", "0")
    assert done.returncode not in (0, 1)
    assert done.stderr.startswith("rustorctl: ")
    assert rustorctl.ok("ls", "--all") != ""
