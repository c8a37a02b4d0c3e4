"""Attachment: an export as /dev/nbdN, through the kernel's own NBD client.

We connect and choose the export; then the kernel has the sockets, and speaks the protocol itself. When they break (the
daemon is started again) it holds what programs ask of the device for `DEAD_S`, and tells whoever listens; `keep` then
connects anew. Nothing of this needs the daemon's help but its socket.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from rustord.errors import (
    DeviceError,
    Forbidden,
    InUse,
    InvalidRequest,
    NotFound,
    RustordError,
    Unreachable,
    Unsupported,
)
from rustord.wire import netlink
from rustord.wire.nbd import (
    CLIENT_FLAGS,
    EXPORT_INFO,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Flag,
    Info,
    Opt,
    Rep,
)

DEAD_S = 600
"""How long the kernel holds requests while the daemon is away, before they fail."""
CONNECTIONS_MAX = 16
_TIMEOUT_S = 30.0
_NETLINK_GENERIC, _SOL_NETLINK, _ADD_MEMBERSHIP = 16, 270, 1
"""linux/netlink.h; Python has no names for them."""
_SYSTEM = Path("/sys/block")
_PAUSE_S = 0.5
_LONG_PAUSE_S = 10.0  # when no request is held any more
_OPTION_BYTES_MAX = 64 << 10


class Attached(NamedTuple):
    """A device of the kernel's NBD client. ``backend`` is what it was told to call it; "" if another program did."""

    path: str
    backend: str
    size: int
    read_only: bool

    @property
    def number(self) -> int:
        """N of /dev/nbdN."""
        return int(self.path[len("/dev/nbd") :])

    @property
    def name(self) -> str:
        """The export's, if it is one of ours; else ""."""
        ours = _BACKEND.fullmatch(self.backend)
        return ours[2] if ours else ""


class Link(NamedTuple):
    """Connected sockets, and what they lead to: ``key`` will mean that or nothing, whatever its name comes to mean."""

    sockets: list[socket.socket]
    size: int
    flags: int
    key: str

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


_REFUSALS: dict[int, type[RustordError]] = {
    Rep.ERR_UNKNOWN: NotFound,
    Rep.ERR_POLICY: Forbidden,
    Rep.ERR_INVALID: InvalidRequest,
    Rep.ERR_TOO_BIG: InvalidRequest,
}
_BACKEND = re.compile(r"rustord:([^:]+):(.*)", re.DOTALL)


def backend_of(path: Path, name: str) -> str:
    """What the kernel calls an attachment of ours."""
    return f"rustord:{path}:{name}"


def attached() -> Iterator[Attached]:
    """All devices of the kernel's NBD client that are connected."""
    for directory in sorted(_SYSTEM.glob("nbd[0-9]*"), key=lambda path: int(path.name[3:])):
        if not (directory / "pid").exists():
            continue
        with suppress(OSError):
            backend = directory / "backend"
            yield Attached(
                f"/dev/{directory.name}",
                backend.read_text().removesuffix("\n") if backend.exists() else "",
                512 * int((directory / "size").read_text()),
                (directory / "ro").read_text().strip() == "1",
            )


def open_link(path: Path, name: str, count: int) -> Link:
    """Connect to the daemon's NBD socket ``count`` times, and choose the export.

    Raises Unreachable, NotFound, Forbidden, InvalidRequest, or DeviceError for whatever else it refuses.
    """
    with ExitStack() as opened:
        sockets, size, flags, key = [], 0, 0, name
        for _ in range(count):
            sock = opened.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(_TIMEOUT_S)
            try:
                sock.connect(str(path))
                size, flags, key = _choose(sock, name)
            except OSError as error:
                raise Unreachable(
                    f"nobody serves block devices on {path}: {error.strerror or error}",
                    hint="is rustord running? --nbd-socket names another one",
                ) from error
            sock.settimeout(None)
            sockets.append(sock)
        opened.pop_all()
        return Link(sockets, size, flags, key)


def _choose(sock: socket.socket, name: str) -> tuple[int, int, str]:
    magic, have, _ = GREETING.unpack(_receive(sock, GREETING.size))
    if (magic, have) != (NBDMAGIC, IHAVEOPT):
        raise DeviceError("this is no NBD server")
    encoded = name.encode()
    data = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, Info.KEY)
    flags = CLIENT_FLAGS.pack(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES)
    sock.sendall(flags + OPTION.pack(IHAVEOPT, Opt.GO, len(data)) + data)
    size, its_flags, key = 0, 0, name
    while True:
        kind, told = _option_reply(sock)
        if kind == Rep.ACK:
            return size, its_flags, key
        if kind == Rep.INFO and told[:2] == Info.EXPORT.to_bytes(2, "big"):
            size, its_flags = EXPORT_INFO.unpack_from(told, 2)
        elif kind == Rep.INFO and told[:2] == Info.KEY.to_bytes(2, "big"):
            key = told[2:].decode()
        elif kind >> 31:
            why = told.decode(errors="replace")
            raise _REFUSALS.get(kind, DeviceError)(why or f"the export {name!r} was refused")


def _option_reply(sock: socket.socket) -> tuple[int, bytes]:
    magic, _, kind, length = OPTION_REPLY.unpack(_receive(sock, OPTION_REPLY.size))
    if magic != OPTION_REPLY_MAGIC or length > _OPTION_BYTES_MAX:
        raise DeviceError("this is no NBD server")
    return kind, _receive(sock, length)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        data += part
    return data


def find(which: str) -> Attached:
    """What is attached as the device ``which``, or under that name. Raises NotFound."""
    for device in attached():
        if which and which in (device.path, device.name):  # those of other programs have no name
            return device
    raise NotFound(f"{which!r} is not attached", hint="'rustorctl attached' shows what is")


def check_unused(path: str) -> None:
    """Raise InUse if the device is mounted, or held by another program."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse(f"{path} is mounted, or otherwise in use", hint="unmount it first") from error
        raise


class Kernel:
    """The kernel's NBD client. Raises Unsupported if there is none, Forbidden without the right to use it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.bind((0, 0))
            self._sequence = 0
            self._family = 0
            self._lost: deque[int] = deque()
            """Devices that have lost a connection, one after the other."""
            self._family, groups = self._find_family()
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _find_family(self) -> tuple[int, list[int]]:
        request = netlink.text(netlink.FAMILY_NAME, "nbd")
        try:
            told = self._ask(netlink.CONTROL, netlink.GET_FAMILY, request)
        except OSError:
            with suppress(OSError):  # there may be no modprobe
                subprocess.run(["modprobe", "nbd"], check=False, capture_output=True)
            try:
                told = self._ask(netlink.CONTROL, netlink.GET_FAMILY, request)
            except OSError as error:
                raise Unsupported(
                    "the kernel has no NBD client, or does not let us use it",
                    hint="load its module (modprobe nbd, as root), or use the export without it:\n"
                    "  nbdfuse DIRECTORY/disk 'nbd+unix:///NAME?socket=SOCKET'\n"
                    "  qemu-img convert 'nbd+unix:///NAME?socket=SOCKET' disk.raw",
                ) from error
        groups = netlink.read_attributes(told.get(netlink.GROUPS, b""))
        ids = [netlink.read_u32(netlink.read_attributes(group)[netlink.GROUP_ID]) for group in groups.values()]
        return netlink.read_u16(told[netlink.FAMILY_ID]), ids

    def connect(self, link: Link, backend: str) -> int:
        """Make a block device of it; its number. Raises DeviceError, or Forbidden."""
        attributes = (
            netlink.u64(netlink.SIZE_BYTES, link.size)
            + netlink.u64(netlink.BLOCK_SIZE_BYTES, 512)
            + netlink.u64(netlink.SERVER_FLAGS, link.flags)
            + netlink.u64(netlink.DEAD_CONN_TIMEOUT, DEAD_S)
            + self._sockets(link)
            + netlink.text(netlink.BACKEND_IDENTIFIER, backend)
        )
        told = self._do(netlink.CONNECT, attributes)
        return netlink.read_u32(told[netlink.INDEX])

    def reconnect(self, number: int, link: Link, backend: str) -> None:
        """Give a device that lost its connections new ones."""
        attributes = netlink.u32(netlink.INDEX, number) + self._sockets(link)
        self._do(netlink.RECONFIGURE, attributes + netlink.text(netlink.BACKEND_IDENTIFIER, backend))

    def disconnect(self, number: int) -> None:
        """Take the device away, whoever uses it."""
        self._do(netlink.DISCONNECT, netlink.u32(netlink.INDEX, number))

    def wait_for_loss(self, timeout_s: float) -> int | None:
        """The number of the next device that loses a connection; None if none does within the time."""
        self._socket.settimeout(timeout_s)
        try:
            if not self._lost:
                self._receive()
        except TimeoutError:
            pass
        finally:
            self._socket.settimeout(_TIMEOUT_S)
        return self._lost.popleft() if self._lost else None

    def _receive(self) -> list[netlink.Message]:
        """What the kernel says next; the news that a connection is lost is put aside, whatever else we wait for."""
        answers = []
        for told in netlink.read_messages(self._socket.recv(65536)):
            if told.family == self._family and told.command == netlink.LINK_DEAD:
                self._lost.append(netlink.read_u32(told.attributes[netlink.INDEX]))
            else:
                answers.append(told)
        return answers

    @staticmethod
    def _sockets(link: Link) -> bytes:
        return netlink.socket_list([sock.fileno() for sock in link.sockets])

    def _do(self, command: int, attributes: bytes) -> dict[int, bytes]:
        try:
            return self._ask(self._family, command, attributes)
        except PermissionError as error:
            raise Forbidden("only root may change the kernel's block devices", hint="use sudo") from error
        except OSError as error:
            raise DeviceError(f"the kernel refused: {error.strerror or error}", hint="see its log (dmesg)") from error

    def _ask(self, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
        """Raises OSError."""
        self._sequence += 1
        self._socket.send(netlink.message(family, command, self._sequence, attributes))
        answer: dict[int, bytes] = {}
        while True:
            for told in self._receive():
                if told.sequence != self._sequence:
                    continue  # it answers what nobody waits for any more
                if told.family == netlink.ERROR:
                    if told.error:
                        raise OSError(told.error, os.strerror(told.error))
                    return answer
                if told.family == family:
                    answer = dict(told.attributes)


def attach(
    kernel: Kernel, path: Path, name: str, *, connections: int = 1, read_only: bool = False, take_over: bool = False
) -> tuple[int, Link, str]:
    """Make an export a block device: its number, what it is connected by, and what the kernel calls it.

    Raises InUse if it is one already, and what `open_link` and `Kernel` raise. With ``take_over``, one that is a block
    device already stays that, and is connected again if nobody did so meanwhile.
    """
    backend = backend_of(path, name)
    for device in attached():
        if device.backend == backend:
            if take_over and device.read_only >= read_only:
                link = open_link(path, name, connections)
                link.close()
                if link.key == name:  # or else it may mean something else by now
                    link = link._replace(size=device.size)
                    _reconnect(kernel, device.number, link, path, name)
                    return device.number, link, backend
            raise InUse(f"{name!r} is attached already, as {device.path}", hint=f"'rustorctl detach {name}' ends that")
    link = open_link(path, name, connections)
    try:
        if connections > 1 and not link.flags & Flag.CAN_MULTI_CONN:
            raise InvalidRequest(f"{name!r} takes one connection only")
        if not link.size:
            raise InvalidRequest(f"{name!r} is empty", hint="a block device has at least one byte")
        number = kernel.connect(link._replace(flags=link.flags | (Flag.READ_ONLY if read_only else 0)), backend)
    finally:
        link.close()  # the kernel has its own hold on them
    return number, link, backend


def keep(
    kernel: Kernel,
    number: int,
    link: Link,
    path: Path,
    name: str,
    say: Callable[[str], None] = lambda text: None,
    is_to_end: Callable[[], bool] = lambda: False,
) -> None:
    """Connect a device anew whenever it has lost its connections; returns once it is no longer attached.

    Once it ``is_to_end``, the device is detached as soon as nobody uses it.
    """
    backend = backend_of(path, name)
    has_said = False

    def goes_on() -> bool:
        nonlocal has_said
        if not _is_attached(number, backend) or (is_to_end() and _let_go(kernel, number)):
            return False
        if is_to_end() and not has_said:
            say(f"/dev/nbd{number} is mounted, or otherwise in use: it stays attached until that has ended")
            has_said = True
        return True

    while goes_on():
        if kernel.wait_for_loss(1.0) != number:
            continue
        say(f"/dev/nbd{number} has lost a connection")
        dead_at = time.monotonic() + DEAD_S
        while goes_on():
            try:
                _reconnect(kernel, number, link, path, name)
            except RustordError as error:
                say(f"{error.message}; trying again")
                time.sleep(_PAUSE_S if time.monotonic() < dead_at else _LONG_PAUSE_S)
            else:
                say(f"/dev/nbd{number} is connected again")
                break


def _reconnect(kernel: Kernel, number: int, link: Link, path: Path, name: str) -> None:
    again = open_link(path, link.key, len(link.sockets))
    try:
        # A volume may have grown: the device stays as long as it is.
        if again.key != link.key or again.size < link.size:
            was, is_now = (f"{each.key}, {each.size} bytes" for each in (link, again))
            raise DeviceError(f"{name!r} is not what was attached: that was {was}, and this is {is_now}")
        kernel.reconnect(number, again, backend_of(path, name))
    finally:
        again.close()


def _let_go(kernel: Kernel, number: int) -> bool:
    try:
        check_unused(f"/dev/nbd{number}")
    except InUse:
        return False
    kernel.disconnect(number)
    return True


def _is_attached(number: int, backend: str) -> bool:
    return any(device.number == number and device.backend == backend for device in attached())
