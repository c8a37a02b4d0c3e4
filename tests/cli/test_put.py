"""put: one file, standard input, many; whatever cannot be stored is told, and the rest is stored."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rustord.objkey import is_uuid

Command = Callable[..., Any]


@pytest.fixture
def tree(disk_path: Path) -> Path:
    """A directory with files in it, and with what is none."""
    root = disk_path / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "a.txt").write_text("a")
    (root / "sub" / "b ü.tar.gz").write_bytes(b"b" * 100_000)
    (root / "sub" / "c").write_bytes(b"")
    return root


def test_put_prints_the_uuid_alone(daemon: object, rustorctl: Command, tree: Path) -> None:
    said = rustorctl.ok("put", tree / "a.txt")
    assert is_uuid(said.removesuffix("\n"))
    assert rustorctl.ok("ls") == ""  # it has no name unless one is given


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.json", "application/json"), ("x.tar.gz", "application/gzip"), ("x.unknown", "application/octet-stream")],
)
def test_the_content_type_is_guessed_from_the_name(daemon: object, rustorctl: Command, name: str, kind: str) -> None:
    rustorctl.ok("put", "-", "--name", name, input="{}")
    assert json.loads(rustorctl.ok("stat", name, "--json"))["content_type"] in (kind, "")
    rustorctl.ok("put", "-", "--name", name, "--content-type", "a/b", input="{}")
    assert json.loads(rustorctl.ok("stat", name, "--json"))["content_type"] == "a/b"


def test_a_name_is_replaced_or_kept_by_no_clobber(daemon: object, rustorctl: Command) -> None:
    first = rustorctl.ok("put", "-", "--name", "n", input="first").strip()
    second = rustorctl.ok("put", "-", "--name", "n", input="second").strip()
    assert rustorctl.ok("get", "n") == "second"
    assert rustorctl("get", first).returncode == 3
    done = rustorctl("put", "-", "--name", "n", "--no-clobber", input="third")
    assert (done.returncode, done.stdout) == (4, "")
    assert rustorctl.ok("get", second) == "second"


def test_the_content_type_is_guessed_from_the_file_if_the_name_does_not_tell(
    daemon: object, rustorctl: Command, tree: Path
) -> None:
    for name, kind in (("docs/read", "text/plain"), ("docs/read.json", "application/json")):
        rustorctl.ok("put", tree / "a.txt", "--name", name)
        assert json.loads(rustorctl.ok("stat", name, "--json"))["content_type"] == kind


def test_a_directory_with_all_its_files(daemon: object, rustorctl: Command, tree: Path) -> None:
    lines = rustorctl.ok("put", "-r", tree, "--prefix", "backup/").splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        f"{tree}/a.txt",
        f"{tree}/sub/b ü.tar.gz",
        f"{tree}/sub/c",
    ]
    assert rustorctl.ok("ls").splitlines() == ["backup/a.txt", "backup/sub/b ü.tar.gz", "backup/sub/c"]
    assert rustorctl("get", "backup/sub/b ü.tar.gz", text=False).stdout == b"b" * 100_000
    again = [json.loads(line) for line in rustorctl.ok("put", "-r", tree, "--prefix", "backup/", "--json").splitlines()]
    assert [entry["file"] for entry in again] == [line.split("  ", 1)[1] for line in lines]
    assert len(rustorctl.ok("ls", "--all").splitlines()) == 3


def test_several_files_get_names_by_a_prefix_only(daemon: object, rustorctl: Command, tree: Path) -> None:
    assert len(rustorctl.ok("put", tree / "a.txt", tree / "sub/c").splitlines()) == 2
    assert rustorctl.ok("ls") == ""
    rustorctl.ok("put", tree / "a.txt", tree / "sub/c", "--prefix", "p-")
    assert rustorctl.ok("ls").splitlines() == ["p-a.txt", "p-c"]


def test_one_bad_file_does_not_keep_the_others(daemon: object, rustorctl: Command, tree: Path) -> None:
    (tree / "0-dangling").symlink_to("nowhere")
    (tree / "1-loop").symlink_to("sub")
    (tree / os.fsdecode(b"2-\xff")).write_text("x")
    (tree / ("3-" + "ab" * 16)).write_text("looks like no uuid")
    (tree / ("ab" * 16)).write_text("looks like one")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "4-socket"))
        done = rustorctl("put", "-r", tree)
    assert done.returncode == 74  # the first one's
    assert done.stdout.count("\n") == 4
    assert rustorctl.ok("ls").splitlines() == ["3-" + "ab" * 16, "a.txt", "sub/b ü.tar.gz", "sub/c"]
    said = done.stderr
    assert f"rustorctl: {tree}/0-dangling: No such file or directory\n" in said
    assert f"rustorctl: {tree}/1-loop is left out: it is not a file\n" in said
    assert "is not UTF-8\n" in said
    assert f"rustorctl: {tree}/4-socket is left out: it is not a file\n" in said
    assert "would be taken for a uuid\n" in said


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["put"], 2, "Missing argument"),
        (["put", "a.txt", "sub/c", "--name", "n"], 2, "--name is for one FILE"),
        (["put", "-r", "sub", "--name", "n"], 2, "--name is for one FILE"),
        (["put", "-", "--prefix", "p"], 2, "standard input has no name of its own"),
        (["put", "a.txt", "--meta", "novalue"], 2, "is not of the form KEY=VALUE"),
        (["put", "a.txt", "--meta", "=x"], 2, "is not of the form KEY=VALUE"),
        (["put", "a.txt", "--meta", "a=1", "--meta", "a=2"], 2, "'a' is given twice"),
        (["put", "a.txt", "--jobs", "0"], 2, "Invalid value for '-j'"),
        (["put", "a.txt", "--name", "01a20494-9118-72f4-ac06-6a00b9c9c0d0"], 2, "would be taken for a uuid"),
        (["put", "a.txt", "--name", ""], 2, "--name is empty"),
        (["put", "a.txt", "--name", "x" * 1025], 2, "the name has 1025 bytes"),
        (["put", "a.txt", "--name", "a\nb"], 2, "has a control character"),
        (["put", "a.txt", "--content-type", "a\r\nb: c"], 2, "cannot be sent"),
        (["put", "a.txt", "--meta", "k=" + "v" * 9000], 2, ""),
        (["put", "missing"], 74, "missing: No such file or directory"),
        (["put", "sub"], 74, "sub: Is a directory"),
        (["put", "-r", "missing"], 74, "missing: No such file or directory"),
    ],
)
def test_bad_input(
    daemon: object, rustorctl: Command, tree: Path, arguments: list[str], status: int, message: str
) -> None:
    done = rustorctl(*arguments, cwd=tree)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert message in done.stderr
    assert done.stderr.startswith("rustorctl: ")
    assert "Traceback" not in done.stderr
    assert rustorctl.ok("ls", "--all") == ""


def test_a_file_whose_name_is_no_text_can_be_stored_under_another(
    daemon: object, rustorctl: Command, tree: Path
) -> None:
    path = tree / os.fsdecode(b"\xff")
    path.write_text("x")
    told = json.loads(rustorctl.ok("put", path, "--name", "x", "--json"))
    assert (told["name"], told["file"]) == ("x", str(path))
    assert rustorctl.ok("put", path, tree / "a.txt").splitlines()[0].endswith("\\udcff")


def test_two_files_that_would_have_one_name_are_refused(daemon: object, rustorctl: Command, tree: Path) -> None:
    other = tree.with_name("other")
    (other / "sub").mkdir(parents=True)
    (other / "sub" / "c").write_bytes(b"other")
    for files in (["-r", tree, other], ["-p", "sub/", tree / "sub" / "c", other / "sub" / "c"]):
        done = rustorctl("put", *files)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{tree}/sub/c and {other}/sub/c would both be named 'sub/c'" in done.stderr
    assert rustorctl.ok("ls") == ""


def test_no_standard_input(daemon: object, rustorctl: Command) -> None:
    script = f"exec {rustorctl.program} put - <&-"  # type: ignore[attr-defined]
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=rustorctl.environment)  # type: ignore[attr-defined]
    assert (done.returncode, done.stderr) == (74, "rustorctl: standard input: Bad file descriptor\n")


def test_a_file_of_the_kernel_is_stored_though_it_claims_to_be_empty(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "/proc/version", "--name", "version")
    assert rustorctl.ok("get", "version") == Path("/proc/version").read_text()


def test_more_than_fits(daemon: object, rustorctl: Command, disk_path: Path) -> None:
    with (disk_path / "large").open("wb") as file:
        file.truncate(80 << 20)
    done = rustorctl("put", disk_path / "large")
    assert (done.returncode, done.stdout) == (6, "")
    with (disk_path / "large").open("rb") as file:
        done = rustorctl("put", "-r", disk_path / "large", "/dev/stdin", stdin=file)
    assert (done.returncode, done.stdout) == (6, "")
    assert rustorctl.ok("ls", "--all") == ""


def test_an_interrupted_upload_leaves_nothing(daemon: object, rustorctl: Command) -> None:
    process = rustorctl.start("put", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # type: ignore[attr-defined]
    process.stdin.write(bytes(3 << 20))
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stdout.read() == b""
    assert rustorctl.ok("ls", "--all") == ""


def test_an_interrupt_ends_several_uploads_too(daemon: object, rustorctl: Command, tree: Path) -> None:
    process = rustorctl.start("put", "/dev/stdin", tree / "a.txt", stdin=subprocess.PIPE)  # type: ignore[attr-defined]
    process.stdin.write(bytes(1 << 20))
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(BrokenPipeError):  # it reads on until it notices, but not to the end
        process.stdin.write(bytes(60 << 20))
    assert process.wait(timeout=30) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_several_uploads_that_wait(
    rustorctl: Command, socket_path: Path, tree: Path, number: int
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(socket_path))
        silent.listen()
        process = rustorctl.start("put", "/dev/stdin", tree / "a.txt", stdin=subprocess.PIPE)  # type: ignore[attr-defined]
        connections = [silent.accept()[0] for _ in range(2)]  # neither the one nor the other will ever go on
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
        for connection in connections:
            connection.close()
