"""Everything that rustorctl does, with nothing but curl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import MIB, Daemon, make_pool, until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


class Curl:
    """curl on the daemon's socket; a path stands for http://rustord/v1/ and that path."""

    def __init__(self, daemon: Daemon) -> None:
        self._command = ["curl", "--silent", "--show-error", "--max-time", "60", "--unix-socket", str(daemon.socket)]

    def run(self, path: str, *options: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        url = path if path.startswith("/") else f"/v1/{path}"
        command = [*self._command, *map(str, options), f"http://rustord{url}"]
        return subprocess.run(command, input=data, capture_output=True)

    def __call__(self, path: str, *options: str | Path, data: bytes = b"") -> bytes:
        """The body of a reply, which must say that all went well."""
        done = self.run(path, "--fail-with-body", *options, data=data)
        assert done.returncode == 0, done
        return done.stdout

    def status(self, path: str, *options: str | Path, data: bytes = b"") -> int:
        return int(self.run(path, "--output", "/dev/null", "--write-out", "%{http_code}", *options, data=data).stdout)

    def headers(self, path: str, *options: str) -> dict[str, str]:
        """The headers of the reply to HEAD, by their names in lower case."""
        lines = self(path, "--head", *options).decode().splitlines()[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], make_image: Callable[..., Path]) -> Daemon:
    image = make_image(64 * MIB)
    make_pool(image)
    started: Daemon = make_daemon(image).start()
    return started


@pytest.fixture
def curl(daemon: Daemon) -> Curl:
    return Curl(daemon)


def test_an_object_comes_and_goes(curl: Curl) -> None:
    stored = json.loads(curl("objects", "--data-binary", "hello"))
    assert stored["size"] == 5
    assert curl(f"objects/{stored['uuid']}") == b"hello"
    assert curl(f"objects/{stored['uuid']}", "--request", "DELETE") == b""
    assert curl.status(f"objects/{stored['uuid']}") == 404


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 5 * MIB])
@pytest.mark.parametrize("known", [True, False])
def test_a_file_is_stored_under_a_name(curl: Curl, tmp_path: Path, size: int, known: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    if known:
        curl("names/dir/file.bin", "--upload-file", path)
    else:
        curl("names/dir/file.bin", "--upload-file", "-", data=path.read_bytes())
    curl("names/dir/file.bin", "--output", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_download_that_broke_off_is_continued(curl: Curl, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    curl("names/file", "--upload-file", "-", data=data)
    (tmp_path / "back").write_bytes(data[:1_000_000])
    curl("names/file", "--continue-at", "-", "--output", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert curl("names/file", "--range", "10-19") == data[10:20]
    assert curl("names/file", "--range", "-7") == data[-7:]
    assert curl.status("names/file", "--range", f"{len(data)}-") == 416


def test_metadata_is_kept(curl: Curl) -> None:
    options = ("--header", "Content-Type: text/plain", "--header", "Rustor-Meta-Colour: gr%C3%BCn")
    stored = json.loads(curl("names/n", *options, "--upload-file", "-", data=b"x"))
    headers = curl.headers("names/n")
    assert headers["content-type"] == "text/plain"
    assert headers["rustor-uuid"] == stored["uuid"]
    assert headers["rustor-meta-colour"].lower() == "gr%c3%bcn"
    assert headers["content-length"] == "1"
    assert headers["accept-ranges"] == "bytes"
    assert headers["etag"] == f'"{stored["algorithm"]}:{stored["digest"]}"'


def test_conditions_are_heeded(curl: Curl) -> None:
    def put(data: str, *options: str) -> int:
        return curl.status("names/n", "--request", "PUT", "--data-binary", data, *options)

    assert put("one", "--header", "If-None-Match: *") == 201
    assert put("two", "--header", "If-None-Match: *") == 412
    etag = curl.headers("names/n")["etag"]
    assert curl.status("names/n", "--header", f"If-None-Match: {etag}") == 304
    assert put("two", "--header", f"If-Match: {etag}") == 200
    assert put("three", "--header", f"If-Match: {etag}") == 412
    assert curl.status("names/n", "--request", "DELETE", "--header", f"If-Match: {etag}") == 412
    assert curl("names/n") == b"two"


def test_names_are_listed_page_by_page(curl: Curl) -> None:
    names = [f"dir/{number:02}" for number in range(5)] + ["other"]
    for name in names:
        curl(f"names/{name}", "--upload-file", "-", data=b"x")
    page = curl("names?prefix=dir/&limit=3", "--dump-header", "-").decode()
    head, _, lines = page.partition("\r\n\r\n")
    assert [json.loads(line)["name"] for line in lines.splitlines()] == names[:3]
    after = next(line.partition(": ")[2] for line in head.splitlines() if line.lower().startswith("rustor-next"))
    rest = curl(f"names?prefix=dir/&limit=3&after={after}").decode()
    assert [json.loads(line)["name"] for line in rest.splitlines()] == names[3:5]
    assert len(curl("objects").splitlines()) == len(names)


def test_pool_devices_plugins_metrics_and_the_api_can_be_asked_for(curl: Curl, make_image: Callable[..., Path]) -> None:
    assert json.loads(curl("pool"))["state"] == "ok"
    new = str(make_image(16 * MIB))
    asked = json.dumps({"path": new, "dry_run": True})
    assert json.loads(curl("devices", "--json", asked))["would_erase"] == []
    added = json.loads(curl("devices", "--json", json.dumps({"path": new})))
    assert [device["path"] for device in json.loads(curl("devices"))][1] == new
    curl(f"devices/{added['uuid']}", "--request", "DELETE")
    assert len(json.loads(curl("devices"))) == 1
    assert json.loads(curl("plugins"))[0]["name"] == "rustord"
    assert b"rustord_objects 0.0" in curl("/metrics")
    assert json.loads(curl("openapi.json"))["openapi"].startswith("3.")


def test_an_error_is_told_in_words(curl: Curl) -> None:
    done = curl.run("names/nothing", "--fail-with-body", "--include")
    assert done.returncode == 22
    head, _, body = done.stdout.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 404 ")
    assert "Content-Type: application/problem+json" in head
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (404, "not-found")
    assert problem["hint"]


def test_an_upload_that_is_interrupted_leaves_nothing(daemon: Daemon) -> None:
    free = daemon.pool()["free_bytes"]
    command = [
        "curl",
        "--silent",
        "--unix-socket",
        str(daemon.socket),
        "--upload-file",
        "-",
        "http://rustord/v1/names/n",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as upload:
        assert upload.stdin is not None
        upload.stdin.write(bytes(3 * MIB))
        upload.stdin.flush()
        until(lambda: daemon.pool()["free_bytes"] < free, "some of it has been written")
        upload.kill()
    until(lambda: daemon.pool()["free_bytes"] == free, "its blocks are free again")
    assert daemon.request("GET", "/v1/names/n").status == 404
