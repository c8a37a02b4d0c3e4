"""get, delete, stat and ls, against a daemon on an image file; and get against one that breaks off."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\nContent-Type: text/plain\r\n\r\n" + bytes(1_000_000)


@pytest.fixture
def files(disk_path: Path) -> Path:
    directory = disk_path / "files"
    directory.mkdir()
    return directory


# get


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3_000_000])
def test_what_was_put_is_got_by_uuid_and_by_name(daemon: object, rustorctl: Command, files: Path, size: int) -> None:
    data = os.urandom(size)
    (files / "in").write_bytes(data)
    uuid = rustorctl.ok("put", "--name", "a/b ü", files / "in").strip()
    assert rustorctl("get", uuid, text=False).stdout == data
    rustorctl.ok("get", "a/b ü", "-o", files / "out")
    assert (files / "out").read_bytes() == data


@pytest.mark.parametrize(
    ("part", "expected"), [("0-0", "0"), ("2-4", "234"), ("7-", "789"), ("-3", "789"), ("5-99", "56789")]
)
def test_a_part_is_got_as_http_counts(daemon: object, rustorctl: Command, part: str, expected: str) -> None:
    rustorctl.ok("put", "-", "--name", "digits", input="0123456789")
    assert rustorctl.ok("get", "digits", "--range", part) == expected


@pytest.mark.parametrize("part", ["", "5", "3-2", "a-b", "-0", "-", "1-2,4-5", "1-2-3"])
def test_what_is_no_range_is_refused_unasked(rustorctl: Command, part: str) -> None:
    done = rustorctl("get", "digits", "--range", part)
    assert done.returncode == 2
    assert done.stderr.startswith("rustorctl: Invalid value for '--range'")


def test_a_range_behind_the_end(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "-", "--name", "digits", input="0123456789")
    done = rustorctl("get", "digits", "--range", "10-")
    assert (done.returncode, done.stdout) == (5, "")
    assert "begins beyond the end" in done.stderr


def test_an_unknown_object(daemon: object, rustorctl: Command, files: Path) -> None:
    for key in ("nothing", "01a20494-9118-72f4-ac06-6a00b9c9c0d0"):
        for arguments in (["get", key, "-o", files / "out"], ["stat", key], ["delete", key]):
            done = rustorctl(*arguments)
            assert done.returncode == 3, done
            assert done.stderr.startswith("rustorctl: "), done
            assert "hint: " in done.stderr, done
    assert list(files.iterdir()) == []


def test_a_key_that_is_no_text(daemon: object, rustorctl: Command) -> None:
    done = rustorctl("get", os.fsdecode(b"\xff\xfe"))
    assert done.returncode == 2
    assert "is not UTF-8" in done.stderr


def test_a_file_keeps_its_mode_and_a_link_its_target(daemon: object, rustorctl: Command, files: Path) -> None:
    rustorctl.ok("put", "-", "--name", "new", input="new")
    (files / "old").write_text("old")
    (files / "old").chmod(0o640)
    (files / "link").symlink_to("old")
    rustorctl.ok("get", "new", "-o", files / "link")
    assert (files / "link").is_symlink()
    assert (files / "old").read_text() == "new"
    assert (files / "old").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("target", ["missing/out", "."])
def test_a_file_that_cannot_be_made(daemon: object, rustorctl: Command, files: Path, target: str) -> None:
    rustorctl.ok("put", "-", "--name", "new", input="new")
    done = rustorctl("get", "new", "-o", files / target)
    assert done.returncode == 74
    assert done.stderr.startswith(f"rustorctl: {files / target}: ")


def test_a_file_may_have_as_long_a_name_as_there_can_be(daemon: object, rustorctl: Command, files: Path) -> None:
    rustorctl.ok("put", "-", "--name", "new", input="new")
    name = "\u6f22" * 85
    rustorctl.ok("get", "new", "-o", files / name)
    assert [(path.name, path.read_text()) for path in files.iterdir()] == [(name, "new")]


def test_a_full_disk_leaves_the_file_as_it_was(daemon: object, rustorctl: Command, files: Path) -> None:
    rustorctl.ok("put", "-", "--name", "big", input="x" * 300_000)
    (files / "out").write_text("old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = rustorctl("get", "big", "-o", files / "out", preexec_fn=limit)
    assert (done.returncode, done.stderr) == (74, f"rustorctl: {files / 'out'}: File too large\n")
    assert [path.name for path in files.iterdir()] == ["out"]
    assert (files / "out").read_text() == "old"


def test_full_and_closed_standard_output(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "-", "--name", "big", input="x" * 300_000)
    with open("/dev/full", "w") as full:
        done = rustorctl("get", "big", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (74, "rustorctl: standard output: No space left on device\n")
    script = f'{rustorctl.program} get big >&-; echo "status $?"'  # type: ignore[attr-defined]
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=rustorctl.environment)  # type: ignore[attr-defined]
    assert shell.stderr == "rustorctl: standard output: Bad file descriptor\n"
    script = f'{rustorctl.program} get big | head -c 1; echo " ${{PIPESTATUS[0]}}"'  # type: ignore[attr-defined]
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=rustorctl.environment)  # type: ignore[attr-defined]
    assert (shell.stdout, shell.stderr) == ("x 141\n", "")


@contextmanager
def half_a_reply(path: Path, then: threading.Event) -> Iterator[threading.Event]:
    """A daemon that sends half of an Object, waits for ``then`` and breaks off; yields what says that it was sent."""
    sent = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(HALF)
                sent.set()
                then.wait(60)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sent
        then.set()
        thread.join()


def test_a_reply_that_breaks_off_is_an_error(rustorctl: Command, socket_path: Path, files: Path) -> None:
    (files / "out").write_text("old")
    at_once = threading.Event()
    at_once.set()
    with half_a_reply(socket_path, at_once):
        done = rustorctl("get", "big", "-o", files / "out")
    assert done.returncode == 8
    assert done.stderr.startswith("rustorctl: the daemon broke off 1000000 bytes before the end of the Object\nhint: ")
    assert [path.name for path in files.iterdir()] == ["out"]
    assert (files / "out").read_text() == "old"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_get_leaves_nothing(
    rustorctl: Command, socket_path: Path, files: Path, number: signal.Signals, status: int
) -> None:
    with half_a_reply(socket_path, threading.Event()) as sent:
        process = rustorctl.start("get", "big", "-o", files / "out", stderr=subprocess.PIPE)  # type: ignore[attr-defined]
        assert sent.wait(30)
        deadline = time.monotonic() + 30
        while not list(files.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, b"")
    assert list(files.iterdir()) == []


def test_standard_output_that_does_not_block_gets_all(daemon: object, rustorctl: Command, files: Path) -> None:
    data = os.urandom(3 << 20)
    (files / "big").write_bytes(data)
    rustorctl.ok("put", files / "big", "--name", "big")
    reading, writing = os.pipe2(os.O_NONBLOCK)
    process = rustorctl.start("get", "big", stdout=writing, stderr=subprocess.PIPE)  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while select.select([], [writing], [], 0)[1]:  # until it is full
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), True)
        assert pipe.readall() == data
    assert (process.wait(timeout=30), process.stderr.read()) == (0, b"")


def test_nobody_listens(rustorctl: Command, socket_path: Path) -> None:
    for arguments in (["get", "x"], ["ls"], ["status"], ["put", "-"], ["device", "list"], ["plugin", "list"]):
        done = rustorctl(*arguments)
        assert (done.returncode, done.stdout) == (8, ""), done
        assert done.stderr.startswith(f"rustorctl: there is no socket {socket_path}\nhint: "), done


# delete


def test_delete_several_goes_on_behind_an_unknown_one(daemon: object, rustorctl: Command) -> None:
    uuid = rustorctl.ok("put", "-", input="one").strip()
    rustorctl.ok("put", "-", "--name", "two", input="two")
    done = rustorctl("delete", uuid, "nothing", "two")
    assert (done.returncode, done.stdout) == (3, "")
    assert "nothing" in done.stderr
    assert rustorctl.ok("ls", "--all") == ""


# stat


def test_stat_shows_all_that_is_known(daemon: object, rustorctl: Command) -> None:
    put = json.loads(
        rustorctl.ok("put", "-", "-n", "x.txt", "-m", "author=Zoë", "-m", "empty=", "--json", input="hello")
    )
    told = json.loads(rustorctl.ok("stat", "x.txt", "--json"))
    assert told["uuid"] == put["uuid"]
    assert told["content_type"] == "text/plain"
    assert told["attributes"] == {"author": "Zoë", "empty": ""}
    assert [extent["index"] for copy in told["copies"] for extent in copy] == [0]
    shown = dict(line.split("  ", 1) for line in rustorctl.ok("stat", put["uuid"]).splitlines())
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["Meta author"] == "Zoë"
    assert shown["Size"] == "5 (5 B)"
    assert shown["Hash"] == f"{put['algorithm']} {put['digest']}"


def test_stat_of_what_was_frozen_names_its_layer(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("volume", "create", "disk", "--size", "1 MiB")
    rustorctl.ok("volume", "freeze", "disk")
    (data, footer), *_ = json.loads(rustorctl.ok("stat", "disk", "--json"))["copies"]
    assert (data["block"], data["count"], "index" in data) == (0, 256, False)
    assert (footer["index"], "layer" in footer) == (0, False)
    assert f"layer {data['layer']} blocks 0-255, device 0 blocks " in rustorctl.ok("stat", "disk")


# ls


def test_ls_by_prefix_long_json_and_all(daemon: object, rustorctl: Command) -> None:
    for name in ("logs/1.txt", "logs/2.txt", "other"):
        rustorctl.ok("put", "-", "--name", name, input=name)
    nameless = rustorctl.ok("put", "-", input="no name").strip()
    assert rustorctl.ok("ls") == "logs/1.txt\nlogs/2.txt\nother\n"
    assert rustorctl.ok("ls", "logs/") == "logs/1.txt\nlogs/2.txt\n"
    assert rustorctl.ok("ls", "none") == ""
    entries = [json.loads(line) for line in rustorctl.ok("ls", "--json").splitlines()]
    assert [(entry["name"], entry["size"]) for entry in entries] == [
        ("logs/1.txt", 10),
        ("logs/2.txt", 10),
        ("other", 5),
    ]
    long = rustorctl.ok("ls", "-l", "logs/").splitlines()
    assert long[0].split() == ["UUID", "SIZE", "CREATED", "TYPE", "NAME"]
    assert [line.split()[-2:] for line in long[1:]] == [["text/plain", "logs/1.txt"], ["text/plain", "logs/2.txt"]]
    everything = rustorctl.ok("ls", "--all").splitlines()
    assert nameless in everything
    assert len(everything) == 4
    assert rustorctl("ls", "--all", "logs/").returncode == 2


def test_more_names_than_fit_on_a_page(daemon: object, rustorctl: Command, files: Path) -> None:
    for number in range(2100):
        (files / f"{number:04}").touch()
    rustorctl.ok("put", "-r", files, "--jobs", "8", timeout=110)
    assert rustorctl.ok("ls").split() == [f"{number:04}" for number in range(2100)]
    assert len(rustorctl.ok("ls", "-l").splitlines()) == 2100 + 3


def test_stat_of_what_is_no_name(daemon: object, rustorctl: Command) -> None:
    for name in ("", "x" * 1025, "\n"):
        done = rustorctl("stat", name)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert "it is no name" in done.stderr


def test_a_name_that_the_terminal_cannot_show(daemon: object, rustorctl: Command) -> None:
    rustorctl.ok("put", "-", "--name", "日本 ü", input="x")
    rustorctl.ok("put", "-", "--name", "z", input="x")
    environment = {**rustorctl.environment, "PYTHONIOENCODING": "latin-1"}  # type: ignore[attr-defined]
    done = rustorctl("ls", env=environment, text=False)
    assert (done.returncode, done.stdout) == (0, b"z\n\\u65e5\\u672c \xfc\n"), done
