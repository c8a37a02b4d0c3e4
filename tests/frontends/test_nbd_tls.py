"""NBD on TCP: beyond this machine only with certificates, of both sides."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rustord.errors import ConfigError
from rustord.frontends.nbd import listen_tcp, server_tls
from rustord.objectexport import ObjectExport
from rustord.wire.api import Role
from rustord.wire.limits import NbdLimits
from tests.frontends.nbdserved import NbdServed
from tests.frontends.served import SECONDS_MAX
from tests.wire.peer import info_request, option, option_replies, request

LIST, STARTTLS, GO = 3, 5, 7
READ, WRITE, FLUSH = 0, 1, 3
TLS_REQD = 0x80000005

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="there is no openssl; `apt-get install openssl` brings it"
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority (ca), a server and a client that it knows, and a stranger."""
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    for name in ("ca", "stranger"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("server", "client"):
        extension = ("-addext", "subjectAltName=IP:127.0.0.1")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
        openssl(*new, *signed, *extension, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    return directory


@pytest.fixture
def served(make_image: Callable[[int], Path], disk_path: Path) -> Iterator[NbdServed]:
    server = NbdServed(
        *(make_image(64 << 20), disk_path / "nbd.sock", NbdLimits(handshake_s=3.0)),
        lambda peer: Role.ADMIN,
        Role.WRITER,
    )
    yield server
    server.stop()


def context(certificates: Path) -> ssl.SSLContext:
    made = server_tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    assert made is not None
    return made


def client_context(certificates: Path, name: str) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=certificates / "ca.pem")
    if name:
        made.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return made


def greet(sock: socket.socket) -> None:
    sock.settimeout(SECONDS_MAX)
    assert receive(sock, 18).startswith(b"NBDMAGIC")
    sock.sendall(struct.pack(">I", 3))


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, "the connection ended"
        data += part
    return data


def ask(sock: socket.socket, number: int, data: bytes = b"") -> int:
    """The kind of the last reply to an option."""
    sock.sendall(option(number, data))
    while True:
        head = receive(sock, 20)
        (reply,) = option_replies(head + receive(sock, int.from_bytes(head[16:], "big")))
        if reply.kind == 1 or reply.kind >> 31:
            return reply.kind


def test_who_comes_with_tls_and_who_comes_without_share_a_volume(served: NbdServed, certificates: Path) -> None:
    served.volumes.create("volume", 8 << 20)
    port = served.listen(context(certificates))

    def once(sock: socket.socket, command: int, offset: int, data: bytes = b"", *, length: int = 0) -> bytes:
        sock.sendall(request(command, offset, length or len(data), cookie=1) + data)
        head = receive(sock, 16)
        assert head[4:8] == bytes(4)
        return receive(sock, length)

    with served.connect().go("volume") as peer, socket.create_connection(("127.0.0.1", port)) as raw:
        once(peer.sock, WRITE, 0, b"one")
        greet(raw)
        assert ask(raw, STARTTLS) == 1
        with client_context(certificates, "client").wrap_socket(raw, server_hostname="127.0.0.1") as secured:
            assert ask(secured, GO, info_request("volume")) == 1
            for offset in (0, 1 << 20, 5 << 20):
                for one, other in ((secured, peer.sock), (peer.sock, secured)):
                    data = os.urandom(100)
                    once(one, WRITE, offset, data)
                    assert once(other, READ, offset, length=100) == data
                    once(other, FLUSH, 0)
            for offset in (0, 1 << 20):
                once(secured, WRITE, offset, b"one writes, the other flushes")
                once(peer.sock, FLUSH, 0)
                volume = served.volumes.open("volume")
                assert not volume._dirty
                volume.close()
        once(peer.sock, WRITE, 0, b"alone")
        assert once(peer.sock, READ, 0, length=5) == b"alone"


def test_with_a_certificate_all_is_as_ever(served: NbdServed, certificates: Path) -> None:
    port = served.listen(context(certificates))
    with socket.create_connection(("127.0.0.1", port)) as plain:
        greet(plain)
        assert ask(plain, LIST) == TLS_REQD
        assert ask(plain, GO, info_request("disk")) == TLS_REQD
        assert ask(plain, STARTTLS) == 1
        wrap = client_context(certificates, "client").wrap_socket
        with wrap(plain, server_hostname="127.0.0.1") as sock:
            assert ask(sock, STARTTLS) >> 31
            assert ask(sock, LIST) == 1
            assert ask(sock, GO, info_request("disk")) == 1
            sock.sendall(request(0, 4096, 1 << 20, cookie=1) + request(0, 0, 512, cookie=2))
            assert receive(sock, 16 + (1 << 20))[16:] == served.data[4096 : 4096 + (1 << 20)]
            assert receive(sock, 16 + 512)[16:] == served.data[:512]
            (told,) = served.server.exports()
            assert str(told["client"]).startswith("127.0.0.1 port ")
    assert served.works()


def test_what_is_answered_while_the_server_ends_is_secured_too(
    served: NbdServed, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ObjectExport.read

    def read_at_the_end(export: ObjectExport, offset: int, buffer: memoryview) -> None:
        for connection in served.server._connections:
            connection.leave()
        read(export, offset, buffer)

    port = served.listen(context(certificates))
    with socket.create_connection(("127.0.0.1", port)) as raw:
        greet(raw)
        assert ask(raw, STARTTLS) == 1
        with client_context(certificates, "client").wrap_socket(raw, server_hostname="127.0.0.1") as sock:
            assert ask(sock, GO, info_request("disk")) == 1
            monkeypatch.setattr(ObjectExport, "read", read_at_the_end)
            sock.sendall(request(READ, 4096, 4096, cookie=1))
            assert receive(sock, 16 + 4096)[16:] == served.data[4096:8192]
            assert sock.recv(1) == b""


def test_who_does_not_get_on_with_tls_makes_room(
    make_image: Callable[[int], Path], disk_path: Path, certificates: Path
) -> None:
    limits = NbdLimits(negotiating=1, handshake_s=10 * SECONDS_MAX)
    served = NbdServed(make_image(64 << 20), disk_path / "nbd.sock", limits, None)
    try:
        with socket.create_connection(("127.0.0.1", served.listen(context(certificates)))) as sock:
            greet(sock)
            assert ask(sock, STARTTLS) == 1
            assert served.works()
            assert sock.recv(1) == b"", "it is not only left out of account"
    finally:
        served.stop()


@pytest.mark.parametrize("name", ["", "stranger"])
def test_who_has_no_certificate_of_ours_stays_outside(served: NbdServed, certificates: Path, name: str) -> None:
    port = served.listen(context(certificates))
    with socket.create_connection(("127.0.0.1", port)) as plain:
        greet(plain)
        assert ask(plain, STARTTLS) == 1
        wrap = client_context(certificates, name).wrap_socket
        refused = pytest.raises((ssl.SSLError, ConnectionError, AssertionError))
        with refused, wrap(plain, server_hostname="127.0.0.1") as sock:
            ask(sock, LIST)
    assert served.works()


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_tls_ends(served: NbdServed, certificates: Path, said: bytes) -> None:
    port = served.listen(context(certificates))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        greet(sock)
        assert ask(sock, STARTTLS) == 1
        sock.sendall(said)
        with suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    assert served.works()


def test_on_this_machine_it_goes_without(served: NbdServed) -> None:
    port = served.listen(None)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        greet(sock)
        assert ask(sock, GO, info_request("disk")) == 1
        sock.sendall(request(0, 0, 512))
        assert receive(sock, 528)[16:] == served.data[:512]


def test_beyond_this_machine_it_does_not(certificates: Path) -> None:
    for address in ("192.0.2.1:10809", "0.0.0.0:0", "[::]:0"):
        with pytest.raises(ConfigError, match="there is no TLS"):
            listen_tcp(address, None)
    listen_tcp("0.0.0.0:0", context(certificates)).close()
    listen_tcp("127.0.0.1:0", None).close()
    for address in ("192.0.2.1:10809", "127.0.0.1:99999", "300.0.0.1:1"):
        with pytest.raises(ConfigError):
            listen_tcp(address, context(certificates))


def test_files_that_are_missing_or_wrong(certificates: Path, tmp_path: Path) -> None:
    server, key, authority = (certificates / name for name in ("server.pem", "server.key", "ca.pem"))
    assert server_tls(None, None, None) is None
    for given in ((server, None, None), (server, key, None), (None, key, authority)):
        with pytest.raises(ConfigError, match="TLS needs all of"):
            server_tls(*given)
    (tmp_path / "wrong").write_text("this is no certificate")
    for given in ((tmp_path / "wrong", key, authority), (server, tmp_path / "nothing", authority)):
        with pytest.raises(ConfigError):
            server_tls(*given)
    with pytest.raises(ConfigError, match="cannot be used for TLS"):
        server_tls(server, key, tmp_path / "wrong")
