from __future__ import annotations

import gzip
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from rustord.client import Client, Info, Stored
from rustord.errors import (
    ClaimRefused,
    Damaged,
    Forbidden,
    InvalidRequest,
    NoSpace,
    NotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    RustordError,
    TooLarge,
    Unavailable,
    Unreachable,
)
from tests.client.liar import Liar
from tests.conftest import PlainUser
from tests.daemon import Daemon, make_pool

MIB = 1 << 20
NO_UUID = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def daemon(image: Path, make_daemon: Callable[..., Daemon]) -> Daemon:
    make_pool(image)
    daemon = make_daemon(image)
    daemon.start()
    return daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client


def test_an_object_is_stored_read_and_deleted(client: Client) -> None:
    stored = client.put(b"hello", name="a/ü 1", content_type="text/plain", attributes={"Kind": "ä=1 ", "k 2": ""})
    assert stored == Stored(stored.uuid, "a/ü 1", 5, "xxh3-128", stored.digest)
    assert client.get(stored.uuid) == client.get("a/ü 1") == b"hello"
    info = client.stat("a/ü 1")
    assert info == Info(stored.uuid, "a/ü 1", 5, stored.etag, "text/plain", info.modified, {"kind": "ä=1 ", "k 2": ""})
    assert client.stat(stored.uuid) == info
    assert client.manifest(stored.uuid)["uuid"] == stored.uuid
    client.delete("a/ü 1")
    for call in (client.get, client.stat, client.delete, client.manifest):
        with pytest.raises(NotFound):
            call(stored.uuid)
    assert client.put(b"").size == 0


@pytest.mark.parametrize("size", [0, 1, 4096, 262145, MIB - 1, MIB, 5 * MIB + 3])
def test_data_may_be_a_buffer_a_file_or_a_stream(client: Client, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)

    def stream() -> BinaryIO:
        reading, writing = os.pipe()

        def fill() -> None:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(data)

        threading.Thread(target=fill).start()
        return os.fdopen(reading, "rb", buffering=0)

    with path.open("rb") as file, path.open("rb", buffering=0) as raw, stream() as pipe:
        for source in (data, bytearray(data), memoryview(data), file, raw, pipe, io.BytesIO(data)):
            progress: list[int] = []
            stored = client.put(source, name="n", progress=progress.append)
            assert (stored.size, sum(progress)) == (size, size)
            assert client.get("n") == data


def test_a_stream_that_does_not_block_is_sent_to_its_end(client: Client) -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    pieces = [b"slow", b"ly"]

    class Pipe(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if (data := super().read(size)) is None:  # what comes next comes only now
                os.write(writing, pieces.pop(0)) if pieces else os.close(writing)
            return data

    with Pipe(reading) as pipe:
        client.put(pipe, name="n")
    assert client.get("n") == b"slowly"


def test_what_a_file_gives_is_sent_and_not_what_it_is_made_of(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    with gzip.open(path, "wb") as packed:
        packed.write(b"hello" * 1000)
    with gzip.open(path, "rb") as unpacked, tarfile.open(tmp_path / "file.tar", "w") as archive:
        client.put(cast(BinaryIO, unpacked), name="n")
        archive.add(path, "member")
    assert client.get("n") == b"hello" * 1000
    with tarfile.open(tmp_path / "file.tar") as archive, cast(BinaryIO, archive.extractfile("member")) as member:
        client.put(member, name="n")
    assert client.get("n") == path.read_bytes()


def test_a_file_that_stands_behind_its_end_is_empty(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with path.open("rb") as file:
        file.seek(100)
        assert client.put(file, name="n").size == 0
    assert client.get("n") == b""


def test_a_file_is_sent_from_where_it_stands(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"headbody")
    with path.open("rb") as file:
        file.seek(4)
        client.put(file, name="n")
    assert client.get("n") == b"body"


def test_a_file_of_the_kernel_is_sent_whole(client: Client) -> None:
    with open("/proc/version", "rb", buffering=0) as file:
        client.put(file, name="n")
    assert client.get("n") == Path("/proc/version").read_bytes()


def test_parts_are_read_as_slices_are(client: Client) -> None:
    data = os.urandom(300_000)
    client.put(data, name="n")
    for start, end in ((0, None), (1, None), (0, 1), (100_000, 299_999), (5, sys.maxsize), (-1, None), (-10, None)):
        assert client.get("n", start=start, end=end) == data[start:end]
    with client.open("n", start=10, end=20) as part:
        assert (part.size, part.info.size) == (10, 300_000)
        assert part.read() == data[10:20]
    for start in (300_000, sys.maxsize):
        with pytest.raises(RangeNotSatisfiable) as refused:
            client.get("n", start=start)
        assert refused.value.size == 300_000
    for start, end in ((5, 5), (5, 4), (-5, 3)):
        with pytest.raises(InvalidRequest):
            client.get("n", start=start, end=end)


def test_a_download_comes_in_pieces(client: Client) -> None:
    data = os.urandom(3 * MIB + 1)
    client.put(data, name="n")
    with client.open("n") as download:
        assert b"".join(bytes(piece) for piece in download) == data
    with client.open("n") as download:
        start = bytearray(1000)
        count = download.readinto(start)
        assert bytes(start[:count]) + download.read() == data
    with client.open("n") as download:
        download.readinto(start)  # and no more
    assert client.get("n", start=-1) == data[-1:]
    client.open("n")  # forgotten
    assert client.stat("n").size == len(data)


def test_an_object_that_was_not_read_is_not_taken_for_the_next_reply(client: Client) -> None:
    client.put(b"HTTP/1.1 204 No Content\r\n\r\n", name="n")
    client.open("n")  # forgotten
    with pytest.raises(NotFound):
        client.delete("none")


def test_two_objects_that_are_open_at_once_are_not_mixed_up(client: Client) -> None:
    one, other = (client.put(letter * (5 * MIB), name=name).name for letter, name in ((b"a", "one"), (b"b", "other")))
    with client.open(one) as first, client.open(other) as second:
        with pytest.raises(InvalidRequest, match="5242880 bytes of 'one' were not read before the next request"):
            first.read()
        first.close()
        assert second.read() == b"b" * (5 * MIB)
    with client.open(one) as first:
        next(iter(first))
        assert client.stat(other).size == 5 * MIB
        with pytest.raises(InvalidRequest):
            first.read()


def test_what_comes_late_is_not_taken_for_the_next_reply(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as slow:
                slow.recv(1 << 16)
                slow.sendall(head % 1000)
                if slow.recv(1 << 16):  # the next request, in the middle of the reply
                    slow.sendall((head % 7).ljust(1000))
                    return
            with listener.accept()[0] as other:
                other.recv(1 << 16)
                other.sendall(head % 5)

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(tmp_path / "socket") as client, client.open("slow"):
            size = client.stat("other").size
        thread.join()
    assert size == 5


def test_conditions(client: Client) -> None:
    first = client.put(b"first", name="n", replace=False)
    with pytest.raises(PreconditionFailed):
        client.put(b"second", name="n", replace=False)
    with pytest.raises(PreconditionFailed):
        client.put(bytes(5 * MIB), name="n", replace=False)
    with pytest.raises(PreconditionFailed):
        client.put(b"second", name="n", if_match="other:1")
    with pytest.raises(PreconditionFailed):
        client.delete("n", if_match="other:1")
    second = client.put(b"second", name="n", if_match=first.etag)
    assert client.get("n") == b"second"
    client.delete("n", if_match=second.etag)


def test_listings_go_on_over_their_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rustord.wire.request._PAGE", 3)
    names = sorted([f"a/{index} &=ü" for index in range(8)] + ["b"])
    stored = {name: client.put(name.encode(), name=name) for name in names}
    unnamed = client.put(b"x", content_type="a/b")
    assert [entry.name for entry in client.names()] == names
    assert [entry.name for entry in client.names("a/")] == names[:8]
    assert [entry.name for entry in client.names(after=names[6])] == names[7:]
    for limit in (0, 1, 3, 4, 100):
        assert [entry.name for entry in client.names("a/", limit=limit)] == names[: min(limit, 8)]
        assert len(list(client.objects(limit=limit))) == min(limit, 10)
    listed = {entry.uuid: entry for entry in client.objects()}
    assert listed[unnamed.uuid].content_type == "a/b"
    assert listed.keys() == {entry.uuid for entry in stored.values()} | {unnamed.uuid}
    for entry in client.names():
        assert client.get(entry.uuid) == entry.name.encode()  # on the same connection, in the middle of the listing


def test_the_daemon_is_looked_after(client: Client, make_image: Callable[[int], Path]) -> None:
    assert client.pool()["state"] == "ok"
    second = make_image(64 * MIB)
    assert client.add_device(str(second), dry_run=True)["path"] == str(second)
    assert client.add_device(str(second))["index"] == 1
    with pytest.raises(RustordError) as refused:
        client.add_device(str(second))
    assert refused.value.http_status == 409
    if isinstance(refused.value, ClaimRefused):
        assert refused.value.reasons
    assert [device["index"] for device in client.devices()] == [0, 1]
    client.remove_device(str(second))
    with pytest.raises(NotFound):
        client.remove_device("/dev/none such")
    assert client.plugins()
    assert "rustord_requests" in client.metrics()


def test_refusals_arrive_whatever_was_being_sent(client: Client) -> None:
    for size in (10, 300_000, 100 * MIB):  # gathered, streamed, and announced
        with pytest.raises(TooLarge):
            client.put(bytes(size), name="n", attributes={f"k{index}": "" for index in range(65)})
    with pytest.raises(NoSpace):
        client.put(bytes(100 * MIB), name="n")
    with pytest.raises(NoSpace):
        client.put(io.BytesIO(bytes(100 * MIB)), name="n")
    with pytest.raises(InvalidRequest):
        client.get("\x01")
    assert list(client.objects()) == []


@pytest.mark.parametrize("bad", ["a\r\nX: y", 'a"b', "ü"])
def test_fields_cannot_be_smuggled_in(client: Client, bad: str) -> None:
    for call in (
        lambda: client.put(b"", content_type=bad),
        lambda: client.put(b"", name="n", if_match=bad),
        lambda: client.delete("n", if_match=bad),
    ):
        with pytest.raises(InvalidRequest):
            call()
    client.put(b"", name="n", attributes={bad: bad})
    assert client.stat("n").attributes == {bad.lower(): bad}


def test_the_longest_metadata_fits_into_a_request_whatever_is_in_it(client: Client) -> None:
    name, attributes = "ü" * 512, {f"ä{number}": "ü" * 61 + "  " for number in range(63)}
    left = 8192 - sum(len((key + value).encode()) for key, value in attributes.items())
    attributes["x"] = " " * (left - 1)
    client.put(b"", name=name, content_type="a/" + "b" * 253, attributes=attributes)
    assert client.stat(name).attributes == attributes


def test_attributes_that_would_become_one_are_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="'Kind' and 'kind'"):
        client.put(b"", name="n", attributes={"Kind": "a", "kind": "b"})
    client.put(b"", name="n", attributes={"Ü": "a", "ü": "b"})
    assert client.stat("n").attributes == {"Ü": "a", "ü": "b"}


@pytest.mark.parametrize("error", [OSError(5, "broken"), ConnectionResetError(104, "broken"), TimeoutError("broken")])
def test_a_file_that_fails_in_the_middle_leaves_nothing_behind(client: Client, error: OSError) -> None:
    """It may be a connection itself: its errors are not those of ours."""

    class Failing(io.RawIOBase):
        left = 3

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            self.left -= 1
            if not self.left:
                raise error
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    with pytest.raises(OSError, match="broken") as caught:
        client.put(Failing(), name="n")  # type: ignore[arg-type]
    assert caught.value is error
    assert list(client.objects()) == []


def test_a_file_that_shrinks_is_no_object(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MIB))

    def shrink(size: int) -> None:
        os.truncate(path, 2 * MIB)

    with path.open("rb") as file, pytest.raises(InvalidRequest, match="shorter"):
        client.put(file, name="n", progress=shrink)
    assert list(client.objects()) == []


def test_a_connection_that_was_lost_is_made_again(client: Client, daemon: Daemon) -> None:
    client.put(b"data", name="n")
    daemon.stop()
    with pytest.raises(Unreachable):
        client.get("n")
    daemon.start()
    assert client.get("n") == b"data"


def test_who_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="there is no socket"):
        Client(tmp_path / "none").pool()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
    with pytest.raises(Unreachable, match="cannot be the daemon's socket"):
        Client("x" * 200).pool()
    with pytest.raises(Unreachable, match="nobody listens") as refused:
        Client(tmp_path / "s").pool()
    assert "rustord --socket" in refused.value.hint


def test_who_asks_the_service_is_told_of_the_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rustord.client.connection.DEFAULT_SOCKET", str(tmp_path / "none"))
    with pytest.raises(Unreachable) as refused:
        Client(tmp_path / "none").pool()
    assert "systemctl status rustord" in refused.value.hint


@pytest.mark.root
def test_who_may_not_use_the_socket_is_told_so(daemon: Daemon, plain_user: PlainUser) -> None:
    path = plain_user.directory / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen()
        code = "import os\nfrom rustord.client import Client\n"  # first: our files may be closed to that user
        code += f"os.setgroups([]); os.setgid({plain_user.gid}); os.setuid({plain_user.uid})\n"
        code += f"Client({str(path)!r}).pool()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unreachable" in done.stderr
    assert "may not be used" in done.stderr


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", Unreachable),
        (b"HTTP/1.1 200 OK\r\n", Unreachable),
        (OK, Unavailable),
        (OK + b"123456789", Unavailable),
        (b"SSH-2.0-OpenSSH\r\n\r\n", RustordError),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nOops", RustordError),
        (b"X" * 100_000, RustordError),
    ],
)
def test_an_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes, error: type[RustordError]) -> None:
    with Liar(tmp_path / "s", answer) as liar, Client(liar.path) as client, pytest.raises(error):
        client.get("n")


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, InvalidRequest), (403, Forbidden), (404, NotFound), (503, Unavailable), (500, RustordError)],
)
def test_who_looks_is_refused_without_a_body(tmp_path: Path, status: int, error: type[RustordError]) -> None:
    answer = b"HTTP/1.1 %d No\r\nContent-Length: 10\r\n\r\n" % status
    with Liar(tmp_path / "s", answer) as liar, Client(liar.path) as client, pytest.raises(error) as refused:
        client.stat("n")
    assert type(refused.value) is error
    assert "'n'" in refused.value.message


def test_a_reply_is_read_though_the_rest_of_the_body_was_not_taken(tmp_path: Path) -> None:
    answer = b'{"code": "no-space", "detail": "full"}'
    head = b"HTTP/1.1 507 Full\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(answer)
    for data in (bytes(900_000), io.BytesIO(bytes(20 * MIB))):
        with Liar(tmp_path / "s", head + answer) as liar, Client(liar.path) as client:
            with pytest.raises(NoSpace, match="full"):
                client.put(data)
            liar.path.unlink()


def test_a_download_that_is_cut_is_not_the_object(tmp_path: Path) -> None:
    with Liar(tmp_path / "s", OK + b"12345") as liar, Client(liar.path) as client, client.open("n") as download:
        assert download.readinto(bytearray(5)) == 5
        with pytest.raises(Unavailable, match="5 bytes before the end"):
            download.read()


def test_damage_is_told_as_damage(client: Client, daemon: Daemon, image: Path) -> None:
    uuid = client.put(bytes(10_000), name="n").uuid
    ((extent,),) = client.manifest(uuid)["copies"]
    with image.open("r+b") as device:
        device.seek(extent["block"] * 4096 + 77)
        device.write(b"\1")
    with pytest.raises(Damaged):
        client.get("n")


def test_a_silent_daemon_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with Client(tmp_path / "s", timeout_s=0.1) as client, pytest.raises(Unreachable, match="silent"):
            client.pool()


LONG: dict[str, Callable[[Client], object]] = {
    "delete": lambda client: client.delete("large"),
    "delete a volume": lambda client: client.delete_volume("large"),
    "freeze": lambda client: client.freeze_volume("large"),
    "snapshot": lambda client: client.snapshot_volume("large"),
    "check": lambda client: client.check(),
}


@pytest.mark.parametrize("work", LONG)
def test_who_asks_for_what_may_take_hours_waits_for_it(tmp_path: Path, work: str) -> None:
    """A terabyte is read to be hashed, or overwritten; a daemon that ends meanwhile closes the connection."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ThreadPoolExecutor() as threads:
        listener.bind(str(path))
        listener.listen()
        with Client(path, timeout_s=0.1) as client, Client(path, timeout_s=0.3) as other:
            asked = threads.submit(LONG[work], client)
            with listener.accept()[0] as sock:
                sock.recv(1 << 16)
                with pytest.raises(Unreachable, match="silent"):
                    other.stat("small")
                body = b'{"code": "not-found", "detail": "it is not there"}'
                sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                with pytest.raises(NotFound):
                    asked.result()


def test_it_is_quick_to_import() -> None:
    """Commands use it, and have a tenth of a second in all."""
    code = "import sys; import rustord.client; print('\\n'.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert not loaded & {"asyncio", "http.client", "ssl", "email", "msgpack", "lmdb", "BTrees", "dataclasses"}
