"""Attaching, up to where the kernel takes over; what it does then is tested where there is one that can."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rustord import attachment
from rustord.attachment import Kernel, Link, attach, attached, backend_of, find, keep, open_link
from rustord.errors import DeviceError, Forbidden, InUse, InvalidRequest, NotFound, Unreachable, Unsupported
from rustord.frontends.peer import Peer
from rustord.objkey import uuid_text
from rustord.wire import netlink
from rustord.wire.api import Role
from rustord.wire.limits import NbdLimits
from rustord.wire.nbd import Flag
from tests.frontends.nbdserved import NbdServed
from tests.frontends.served import until
from tests.wire.peer import MIB

Serve = Callable[..., NbdServed]


@pytest.fixture
def serve(make_image: Callable[[int], Path], disk_path: Path) -> Iterator[Serve]:
    started: list[NbdServed] = []

    def start(roles: Callable[[Peer], Role] | None = None) -> NbdServed:
        image, path = make_image(64 << 20), disk_path / f"nbd{len(started)}.sock"
        started.append(NbdServed(image, path, NbdLimits(), roles))
        return started[-1]

    yield start
    for served in started:
        served.stop()


class FakeKernel:
    """What `Kernel` does, in /sys/block as a directory."""

    def __init__(self, system: Path) -> None:
        self.system = system
        self.losses: list[int | None] = []
        self.reconnected: list[int] = []
        self.keys: list[str] = []
        self.disconnected: list[int] = []
        self.flags = 0

    def connect(self, link: Link, backend: str) -> int:
        self.flags = link.flags
        self.show(3, backend, link.size)
        return 3

    def show(self, number: int, backend: str | None, size: int = MIB) -> None:
        directory = self.system / f"nbd{number}"
        directory.mkdir()
        (directory / "pid").write_text("1\n")
        (directory / "size").write_text(f"{size // 512}\n")
        (directory / "ro").write_text("1\n")
        if backend is not None:
            (directory / "backend").write_text(f"{backend}\n")

    def reconnect(self, number: int, link: Link, backend: str) -> None:
        self.reconnected.append(len(link.sockets))
        self.keys.append(link.key)

    def disconnect(self, number: int) -> None:
        self.disconnected.append(number)
        (self.system / f"nbd{number}" / "pid").unlink()

    def wait_for_loss(self, timeout_s: float) -> int | None:
        if not self.losses:
            (self.system / "nbd3" / "pid").unlink()
            return None
        return self.losses.pop(0)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    system = tmp_path / "sys"
    monkeypatch.setattr(attachment, "_SYSTEM", system)
    monkeypatch.setattr(attachment, "_PAUSE_S", 0.01)
    (system / "nbd0").mkdir(parents=True)  # one that is not connected
    return FakeKernel(system)


def test_the_export_is_chosen_on_every_connection(serve: Serve) -> None:
    served = serve()
    link = open_link(served.path, "disk", 3)
    assert (link.size, len(link.sockets)) == (8 * MIB, 3)
    assert Flag(link.flags) & Flag.READ_ONLY
    assert Flag(link.flags) & Flag.CAN_MULTI_CONN
    until(lambda: len(list(served.server.exports())) == 3, "all three are open")
    link.close()


def test_what_cannot_be_opened_is_told(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    with pytest.raises(NotFound, match="there is no volume and no Object named 'nothing'"):
        open_link(served.path, "nothing", 1)
    with pytest.raises(InvalidRequest):
        open_link(served.path, "n" * 4097, 1)
    with pytest.raises(Unreachable, match="nobody serves block devices on"):
        open_link(tmp_path / "nobody", "disk", 1)
    with pytest.raises(Forbidden):
        open_link(serve(lambda peer: Role.NOBODY).path, "disk", 1)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, b"NBDMAGIC" + bytes(8) + b"\0\3"])
def test_whoever_listens_there(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as client:
                client.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises((Unreachable, DeviceError)):
            open_link(tmp_path / "socket", "disk", 1)
        thread.join()


def test_a_reply_without_measure(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises((Unreachable, DeviceError)):
            open_link(tmp_path / "socket", "disk", 1)
        thread.join()


def test_what_is_attached_is_known_by_the_kernel(kernel: FakeKernel) -> None:
    assert list(attached()) == []
    kernel.show(10, "rustord:/run/rustord/nbd.sock:images/a:b", 4 * MIB)
    kernel.show(9, None)
    kernel.show(2, "qemu")
    names = [(device.path, device.name, device.size, device.read_only) for device in attached()]
    assert names == [
        ("/dev/nbd2", "", MIB, True),
        ("/dev/nbd9", "", MIB, True),
        ("/dev/nbd10", "images/a:b", 4 * MIB, True),
    ]
    assert find("images/a:b") == find("/dev/nbd10")
    for nothing in ("images/c", ""):  # what other programs have attached has no name
        with pytest.raises(NotFound, match=f"'{nothing}' is not attached"):
            find(nothing)


def test_attaching(kernel: Any, serve: Serve) -> None:
    served = serve()
    number, link, backend = attach(kernel, served.path, "disk", connections=2)
    assert (number, link.size, backend) == (3, 8 * MIB, backend_of(served.path, "disk"))
    assert find("disk").number == 3
    with pytest.raises(InUse, match="'disk' is attached already, as /dev/nbd3"):
        attach(kernel, served.path, "disk")
    with pytest.raises(NotFound):
        attach(kernel, served.path, "nothing")
    served.store.put(b"", name="empty")
    with pytest.raises(InvalidRequest, match="'empty' is empty"):
        attach(kernel, served.path, "empty")


def test_a_name_is_known_again_with_the_blanks_at_its_ends(kernel: Any, serve: Serve) -> None:
    """Else it could be attached twice, and nobody would connect it again."""
    served = serve()
    served.store.put(bytes(MIB), name=" disk ")
    number, link, _ = attach(kernel, served.path, " disk ")
    assert find(" disk ").number == number
    with pytest.raises(InUse):
        attach(kernel, served.path, " disk ")
    kernel.losses = [3]
    keep(kernel, number, link, served.path, " disk ")
    assert kernel.reconnected == [1]


def test_a_device_whose_keeper_is_gone_is_taken_over(kernel: Any, serve: Serve) -> None:
    served = serve()
    uuid = uuid_text(served.store.resolve("disk") or b"")
    attach(kernel, served.path, uuid, connections=2)
    number, link, _ = attach(kernel, served.path, uuid, connections=2, take_over=True)
    assert (number, link.size, kernel.reconnected) == (3, 8 * MIB, [2]), "it may have lost its connections meanwhile"
    kernel.losses = [3]
    keep(kernel, number, link, served.path, uuid)
    assert kernel.reconnected == [2, 2]


def test_what_may_be_another_disk_or_mode_is_not_taken_over(kernel: Any, serve: Serve) -> None:
    served = serve()
    attach(kernel, served.path, "disk")
    with pytest.raises(InUse):  # what has the name now need not be what had it then
        attach(kernel, served.path, "disk", take_over=True)


def test_what_is_writable_is_not_taken_over_as_read_only(kernel: Any, serve: Serve) -> None:
    served = serve()
    uuid = uuid_text(served.store.resolve("disk") or b"")
    attach(kernel, served.path, uuid)
    (kernel.system / "nbd3" / "ro").write_text("0\n")
    with pytest.raises(InUse):
        attach(kernel, served.path, uuid, read_only=True, take_over=True)


def test_to_attach_read_only_is_told_to_the_kernel(kernel: Any, serve: Serve) -> None:
    attach(kernel, serve().path, "disk", read_only=True)
    assert kernel.flags & Flag.READ_ONLY


def test_lost_connections_are_made_again_until_it_is_detached(kernel: Any, serve: Serve) -> None:
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk", connections=2)
    kernel.losses = [None, 3, 7, 3]
    keep(kernel, number, link, served.path, "disk")
    assert kernel.reconnected == [2, 2]


def test_it_is_tried_until_the_daemon_is_back(kernel: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    tries = 0

    def fails_twice(path: Path, name: str, count: int) -> Link:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Unreachable("nobody is there")
        return Link([], *link[1:])

    monkeypatch.setattr(attachment, "open_link", fails_twice)
    kernel.losses = [3]
    said: list[str] = []
    keep(kernel, number, link, served.path, "disk", said.append)
    assert (tries, kernel.reconnected) == (3, [0])
    assert said[1:3] == ["nobody is there; trying again"] * 2


def test_a_daemon_that_comes_back_late_is_better_than_none(
    kernel: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked of the device has failed by then; what is asked from then on need not."""
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    monkeypatch.setattr(attachment, "DEAD_S", 0)
    kernel.losses = [3]
    keep(kernel, number, link, served.path, "disk")
    assert kernel.reconnected == [1]


@pytest.mark.parametrize("size", [MIB, 8 * MIB, 16 * MIB])
def test_another_disk_does_not_take_its_place(kernel: Any, serve: Serve, size: int) -> None:
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    until(lambda: not served.server._connections, "nobody has it open")
    served.store.put(bytes(size), name="disk")
    with pytest.raises(NotFound):
        attachment._reconnect(kernel, number, link, served.path, "disk")
    assert kernel.reconnected == []


def test_nor_does_a_volume_of_its_name(kernel: Any, serve: Serve) -> None:
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    served.volumes.create("disk", 8 * MIB)
    attachment._reconnect(kernel, number, link, served.path, "disk")
    assert kernel.keys == [link.key]


@pytest.mark.parametrize("instead", ["a shorter one", "an Object"])
def test_nor_does_what_is_there_instead_of_a_volume(kernel: Any, serve: Serve, instead: str) -> None:
    served = serve()
    served.volumes.create("data", 8 * MIB)
    number, link, _ = attach(kernel, served.path, "data")
    until(lambda: not served.server._connections, "nobody has it open")
    served.volumes.delete("data")
    if instead == "an Object":
        served.store.put(bytes(8 * MIB), name="data")
    else:
        served.volumes.create("data", MIB)
    with pytest.raises(DeviceError, match="'data' is not what was attached: that was data, 8388608 bytes"):
        attachment._reconnect(kernel, number, link, served.path, "data")
    assert kernel.reconnected == []


def test_a_volume_that_has_grown_meanwhile_takes_its_place(kernel: Any, serve: Serve) -> None:
    """Which it may while it is attached; the kernel goes on with the size that it was told."""
    served = serve()
    served.volumes.create("data", MIB)
    number, link, _ = attach(kernel, served.path, "data")
    served.volumes.resize("data", 2 * MIB)
    kernel.losses = [3]
    said: list[str] = []

    def detach(text: str) -> None:
        said.append(text)
        if "trying again" in text:
            (kernel.system / "nbd3" / "pid").unlink()

    keep(kernel, number, link, served.path, "data", detach)
    assert said == ["/dev/nbd3 has lost a connection", "/dev/nbd3 is connected again"]


def test_what_is_not_mounted_may_go(tmp_path: Path) -> None:
    file = tmp_path / "device"
    file.touch()
    attachment.check_unused(str(file))


@pytest.mark.parametrize("losses", [[None, None], [3, None]])
def test_who_is_told_to_end_detaches_what_nobody_uses_any_more(
    kernel: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch, losses: list[int | None]
) -> None:
    """What is mounted stays, and is connected again, until it has been unmounted."""
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    used = [True, *[True for loss in losses if loss], True, False]
    kernel.losses = [*losses, None, None]

    def check_unused(path: str) -> None:
        assert path == "/dev/nbd3"
        if used.pop(0):
            raise InUse("mounted")

    monkeypatch.setattr(attachment, "check_unused", check_unused)
    keep(kernel, number, link, served.path, "disk", is_to_end=lambda: True)
    assert (kernel.disconnected, used) == ([3], [])
    assert kernel.reconnected == [1 for loss in losses if loss]


def test_who_is_told_to_end_when_it_is_detached_leaves_the_next_one_alone(kernel: Any, serve: Serve) -> None:
    served = serve()
    number, link, _ = attach(kernel, served.path, "disk")
    (kernel.system / "nbd3" / "backend").write_text(backend_of(served.path, "another") + "\n")
    keep(kernel, number, link, served.path, "disk", is_to_end=lambda: True)
    assert kernel.disconnected == []


FAMILY = 30


class KernelSocket(socket.socket):
    """In place of one to the kernel."""

    def bind(self, address: Any) -> None:
        """It is connected."""


@pytest.fixture
def netlinked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kernel, socket.socket]]:
    """A `Kernel`, and the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(Kernel, "_find_family", lambda self: (FAMILY, []))
    with theirs:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", lambda *_: KernelSocket(fileno=ours.detach()))
            kernel = Kernel()
        with kernel:
            yield kernel, theirs


def told(family: int, body: bytes, sequence: int = 0) -> bytes:
    return netlink.HEADER.pack(netlink.HEADER.size + len(body), family, 0, sequence, 0) + body


def test_a_connection_that_is_lost_while_others_are_made_is_not_forgotten(
    netlinked: tuple[Kernel, socket.socket],
) -> None:
    kernel, theirs = netlinked
    lost = [told(FAMILY, bytes([netlink.LINK_DEAD, 1, 0, 0]) + netlink.u32(netlink.INDEX, n)) for n in (3, 4)]
    done = told(netlink.ERROR, bytes(4), 1)
    for said in (lost[0], lost[1], done):
        theirs.send(said)
    kernel.reconnect(3, Link([], MIB, 0, "disk"), "rustord:socket:disk")
    theirs.send(lost[0])
    assert [kernel.wait_for_loss(0.01) for _ in range(4)] == [3, 4, 3, None]


def test_an_answer_that_comes_late_counts_for_nothing_else(netlinked: tuple[Kernel, socket.socket]) -> None:
    kernel, theirs = netlinked
    kernel._socket.settimeout(0.01)
    with pytest.raises(DeviceError):
        kernel.disconnect(3)
    late = told(netlink.ERROR, bytes(4), 1)
    connected = told(FAMILY, bytes([netlink.CONNECT, 1, 0, 0]) + netlink.u32(netlink.INDEX, 5), 2)
    for said in (late, connected, told(netlink.ERROR, bytes(4), 2)):
        theirs.send(said)
    assert kernel.connect(Link([], MIB, 0, "disk"), "rustord:socket:disk") == 5


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has nbd")
@pytest.mark.parametrize("has_modprobe", [True, False])
def test_without_an_nbd_client_in_the_kernel_other_ways_are_shown(
    monkeypatch: pytest.MonkeyPatch, has_modprobe: bool
) -> None:
    if not has_modprobe:
        monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported) as raised:
        Kernel()
    assert "nbdfuse" in raised.value.hint
    assert "qemu-img" in raised.value.hint
