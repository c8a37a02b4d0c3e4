"""The client for everybody who may wait.

Only what is needed is imported, so that a command starts quickly: there is no http.client here.
"""

from __future__ import annotations

import io
import json
import math
import os
import select
import socket
import stat as stat_module
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO

from rustord.client.connection import EXPECT_BYTES, HEAD_BYTES_MAX, Connection, SourceFailed
from rustord.errors import InvalidRequest, Unavailable
from rustord.manifest import Data
from rustord.wire.http1 import ReplyHead, read_reply_head
from rustord.wire.problem import read_problem
from rustord.wire.request import (
    CHECK,
    DEVICES,
    EXPORTS,
    METRICS,
    MOVER,
    PLUGINS,
    POOL,
    SCRUB,
    SLOW_REQUESTS,
    STOP_MOVER,
    STOP_SCRUB,
    VOLUMES,
    Info,
    Listing,
    Request,
    Stored,
    add_device,
    clone_volume,
    create_volume,
    delete,
    delete_volume,
    fetch,
    freeze_volume,
    get_volume,
    keep_device,
    look,
    manifest,
    map_device,
    read_info,
    read_looked,
    read_stored,
    remove_device,
    resize_volume,
    snapshot_volume,
    start_mover,
    start_scrub,
    store,
)

_READ_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20


class Client(Connection):
    """A connection to the daemon, made when it is needed, and again when it was lost; for one thread at a time."""

    _download: Download | None = None
    """What was opened last, and may not have been read to its end."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Objects

    def put(
        self,
        data: Data | BinaryIO,
        *,
        name: str = "",
        content_type: str = "",
        attributes: Mapping[str, str] | None = None,
        replace: bool = True,
        if_match: str = "",
        progress: Callable[[int], object] = lambda size: None,
    ) -> Stored:
        """Store an Object; it is durable on return.

        ``data`` may be a binary file, from where it stands to its end. Without ``replace`` the name must be new; with
        ``if_match`` it must belong to an Object with that entity tag. ``progress`` is told the size of each piece that
        has been sent. Raises PreconditionFailed, NoSpace, InvalidRequest, TooLarge, ReadOnly, ...
        """
        request = store(name, content_type, attributes or {}, replace, if_match)
        return read_stored(self._body(self._check(self._send(request, data, progress))))

    def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """The data of an Object, or the part of it from ``start`` to before ``end``; see `open`."""
        with self.open(key, start=start, end=end) as download:
            return download.read()

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> Download:
        """Begin to read an Object, or its bytes from ``start`` to before ``end``.

        A negative ``start`` counts from its end. Read it all before the next request, which breaks it off. Raises
        NotFound, RangeNotSatisfiable, Damaged, ...
        """
        head = self._check(self._send(fetch(key, start, end)))
        self._download = Download(self, key, read_info(head), head.fields.content_length or 0)
        return self._download

    def stat(self, key: str) -> Info:
        """An Object's metadata. Raises NotFound."""
        return read_looked(self._send(look(key)), key)

    def delete(self, key: str, *, if_match: str = "") -> None:
        """Delete an Object; on return its blocks have been erased. Raises NotFound, PreconditionFailed."""
        self._check(self._send(delete(key, if_match)))

    def manifest(self, uuid: str) -> dict[str, Any]:
        """All that is known of an Object, with the extents that hold it."""
        return dict(self._json(manifest(uuid)))

    def names(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Iterator[Stored]:
        """Objects that have a name with this ``prefix``, by name, behind ``after`` on; at most ``limit``."""
        return self._list(Listing("/v1/names", {"prefix": prefix, "after": after}, limit))

    def objects(self, *, after: str = "", limit: int | None = None) -> Iterator[Stored]:
        """All Objects by uuid, from behind the uuid ``after`` on; at most ``limit``."""
        return self._list(Listing("/v1/objects", {"after": after}, limit))

    def _list(self, listing: Listing) -> Iterator[Stored]:
        while not listing.done:
            head = self._check(self._send(listing.request))
            yield from listing.feed(head, self._body(head))

    # The daemon

    def pool(self) -> dict[str, Any]:
        """The pool's state."""
        return dict(self._json(POOL))

    def devices(self) -> list[dict[str, Any]]:
        """The pool's devices."""
        return list(self._json(DEVICES))

    def add_device(
        self, path: str, *, force: bool = False, dry_run: bool = False, replaces: str = ""
    ) -> dict[str, Any]:
        """Claim a device for the pool; the one that it ``replaces`` leaves. Raises ClaimRefused with every reason."""
        return dict(self._json(*add_device(path, force, dry_run, replaces)))

    def remove_device(self, device: str, *, give_up: bool = False) -> dict[str, Any]:
        """Take a device (its index, uuid or path) out of the pool: at once if it is empty, else when it has become so.

        With ``give_up`` what cannot be read from it is lost. Raises NoSpace if the others have no room.
        """
        return dict(self._json(remove_device(device, give_up)))

    def keep_device(self, device: str) -> dict[str, Any]:
        """Keep a device that was to leave."""
        return dict(self._json(keep_device(device)))

    def mover(self) -> dict[str, Any]:
        """What is being moved from device to device, and how far that is."""
        return dict(self._json(MOVER))

    def start_mover(self, work: str) -> dict[str, Any]:
        """Begin to "heal" or to "rebalance" the pool."""
        return dict(self._json(start_mover(work)))

    def stop_mover(self) -> dict[str, Any]:
        """Move nothing any more."""
        return dict(self._json(STOP_MOVER))

    def map_device(self, device: str, *, cells: int = 1024) -> dict[str, Any]:
        """How full each part of a device is, as the server tells it. Raises NotFound."""
        return dict(self._json(map_device(device, cells)))

    def slow_requests(self) -> list[dict[str, Any]]:
        """The last requests that took long, as the server tells it, the newest at the end."""
        return list(self._json(SLOW_REQUESTS))

    def volumes(self) -> list[dict[str, Any]]:
        """The pool's volumes, by name."""
        return list(self._json(VOLUMES))

    def volume(self, name: str) -> dict[str, Any]:
        """One volume. Raises NotFound."""
        return dict(self._json(get_volume(name)))

    def create_volume(self, name: str, size: int) -> dict[str, Any]:
        """Make an empty volume of ``size`` bytes, rounded up to 64 KiB. Raises PreconditionFailed if there is one."""
        return dict(self._json(*create_volume(name, size)))

    def clone_volume(self, source: str, name: str) -> dict[str, Any]:
        """Make a volume of what an Object (its uuid or name) has; it shares its blocks. Raises NotFound."""
        return dict(self._json(*clone_volume(source, name)))

    def resize_volume(self, name: str, size: int) -> dict[str, Any]:
        """Make a volume longer, or shorter if there is nothing beyond. Raises InvalidRequest, InUse."""
        return dict(self._json(*resize_volume(name, size)))

    def delete_volume(self, name: str) -> None:
        """Delete a volume; on return what nobody else needs of it has been erased. Raises NotFound, InUse."""
        self._check(self._send(delete_volume(name)))

    def freeze_volume(self, name: str, object_name: str = "") -> Stored:
        """Make a volume an Object, named like it unless told otherwise. Raises NotFound, InUse."""
        request, body = freeze_volume(name, object_name)
        return read_stored(self._body(self._check(self._send(request, body))))

    def snapshot_volume(self, name: str, object_name: str = "") -> Stored:
        """Make an Object of what a volume has now, also while it is in use. Raises NotFound, PreconditionFailed."""
        request, body = snapshot_volume(name, object_name)
        return read_stored(self._body(self._check(self._send(request, body))))

    def scrub(self) -> dict[str, Any]:
        """How far the scrub is, and what it, or the last one, has found."""
        return dict(self._json(SCRUB))

    def start_scrub(self, *, again: bool = False) -> dict[str, Any]:
        """Begin to verify everything that is stored, or go on where that was stopped; ``again``: from the start."""
        return dict(self._json(start_scrub(again)))

    def stop_scrub(self) -> dict[str, Any]:
        """End the scrub where it is."""
        return dict(self._json(STOP_SCRUB))

    def check(self) -> list[dict[str, Any]]:
        """What the server finds wrong with labels, the index, names and blocks of its pool; empty if nothing is."""
        return list(self._json(CHECK))

    def exports(self) -> list[dict[str, Any]]:
        """What is open as a block device over NBD, an entry for each connection."""
        return list(self._json(EXPORTS))

    def plugins(self) -> list[dict[str, Any]]:
        """The plugins that are loaded or installed."""
        return list(self._json(PLUGINS))

    def metrics(self) -> str:
        """All metrics, in the text format of Prometheus."""
        return self._body(self._check(self._send(METRICS))).decode()

    # Requests

    def _send(
        self,
        request: Request,
        data: Data | BinaryIO | None = None,
        progress: Callable[[int], object] = lambda size: None,
    ) -> ReplyHead:
        """Send a request, and read the head of its reply. Raises Unreachable."""
        if self._download is not None:
            self._download.break_off()
            self._download = None
        try:
            sock = self._connected()
            sock.settimeout(self._silence_s(request))
            if data is None:
                sock.sendall(request.head())
                return self._reply_head(sock)
            if isinstance(data, (bytes, bytearray, memoryview)):
                return self._send_data(sock, request, memoryview(data).cast("B"), progress)
            size = _size_left(data)
            if size is None:
                return self._send_chunks(sock, request, data, progress)
            return self._send_file(sock, request, data, size, progress)
        except (ConnectionError, TimeoutError) as error:
            self.close()
            raise self._unreachable(error) from error
        except SourceFailed as failed:
            self.close()
            raise failed.error from None
        except BaseException:  # such as an error of the file, in the middle of the request
            self.close()
            raise

    def _send_data(
        self, sock: socket.socket, request: Request, data: memoryview, progress: Callable[[int], object]
    ) -> ReplyHead:
        if refused := self._announce(sock, request, len(data)):
            return refused
        return self._while_sending(sock, lambda: _send_pieces(sock, data, progress))

    def _send_file(
        self, sock: socket.socket, request: Request, file: BinaryIO, size: int, progress: Callable[[int], object]
    ) -> ReplyHead:
        if refused := self._announce(sock, request, size):
            return refused

        def send() -> None:
            left = size
            while left:
                sent = sock.sendfile(file, file.tell(), min(left, _PIECE_BYTES))
                if not sent:
                    raise InvalidRequest(
                        "the file became shorter while it was sent", hint="try again when it is at rest"
                    )
                left -= sent
                progress(sent)

        return self._while_sending(sock, send)

    def _send_chunks(
        self, sock: socket.socket, request: Request, file: BinaryIO, progress: Callable[[int], object]
    ) -> ReplyHead:
        sock.sendall(request.head("Transfer-Encoding: chunked"))

        def send() -> None:
            while piece := _read(file):
                _send_all(sock, [b"%x\r\n" % len(piece), piece, b"\r\n"])
                progress(len(piece))
            sock.sendall(b"0\r\n\r\n")

        return self._while_sending(sock, send)

    def _announce(self, sock: socket.socket, request: Request, size: int) -> ReplyHead | None:
        """Send the head. If the body is long, wait until the daemon wants it; its reply if it does not."""
        length = f"Content-Length: {size}"
        if size < EXPECT_BYTES:
            sock.sendall(request.head(length))
            return None
        sock.sendall(request.head(length, "Expect: 100-continue"))
        head = self._reply_head(sock)
        return None if head.status == 100 else head

    def _while_sending(self, sock: socket.socket, send: Callable[[], None]) -> ReplyHead:
        with suppress(BrokenPipeError, ConnectionResetError):  # it listens no more, and its reply says why
            send()
        return self._reply_head(sock)

    def _connected(self) -> socket.socket:
        self._close_unless_fresh()
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # A connect that does not block fails at once while the daemon is busy, instead of waiting for it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(self._timeout_s), 0))
                sock.connect(self._path)
            except OSError as error:
                sock.close()
                raise self._unreachable(error) from error
            self._sock = sock
        return self._sock

    # Replies

    def _reply_head(self, sock: socket.socket) -> ReplyHead:
        while (head := read_reply_head(self._received)) is None:
            data = sock.recv(_READ_BYTES)
            if not data or len(self._received) > HEAD_BYTES_MAX:
                raise ConnectionResetError("no whole reply came")
            self._received += data
        self._received = self._received[head.end :]
        return head

    def read_into(self, buffer: memoryview) -> int:
        """Read some bytes of the reply under way; 0 at the end of the connection. For `Download`."""
        if self._received:
            count = min(len(buffer), len(self._received))
            buffer[:count] = self._received[:count]
            self._received = self._received[count:]
            return count
        if self._sock is None:
            return 0
        try:
            return self._sock.recv_into(buffer)
        except OSError as error:
            self.close()
            raise self._unreachable(error) from error

    def _body(self, head: ReplyHead) -> bytes:
        """The body of a reply that is wanted whole."""
        length = 0 if head.status in (204, 304) else head.fields.content_length or 0
        body = memoryview(bytearray(length))
        done = 0
        while done < length:
            count = self.read_into(body[done:])
            if not count:
                self.close()
                raise Unavailable("the daemon broke off its reply", hint="its log says why")
            done += count
        if head.fields.closes:
            self.close()
        return bytes(body)

    def _check(self, head: ReplyHead) -> ReplyHead:
        """Raise what the daemon answered if it is an error."""
        if head.status >= 400:
            raise read_problem(head.status, self._body(head))
        return head

    def _json(self, request: Request, body: bytes | None = None) -> Any:
        return json.loads(self._body(self._check(self._send(request, body))))


class Download:
    """An Object on its way here, or a part of it: ``size`` bytes of the one that ``info`` describes."""

    def __init__(self, client: Client, key: str, info: Info, size: int) -> None:
        self.info = info
        self.size = size
        self._client = client
        self._key = key
        self._left = size
        self._is_broken_off = False

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Read no more of it."""
        if self._left and not self._is_broken_off:
            self._client.close()
        self._left = 0

    def break_off(self) -> None:
        """The connection is wanted for the next request."""
        if self._left:
            self._is_broken_off = True
            self._client.close()

    def readinto(self, buffer: Data) -> int:
        """Read some bytes; 0 at the end. Raises Unavailable if the rest does not come: what came is not the Object."""
        view = memoryview(buffer).cast("B")[: self._left]
        if not view:
            return 0
        if self._is_broken_off:
            raise InvalidRequest(
                f"{self._left} bytes of {self._key[:80]!r} were not read before the next request",
                hint="read them first, or use another Client for it",
            )
        count = self._client.read_into(view)
        if not count:
            missing, self._left = self._left, 0
            self._client.close()
            raise Unavailable(
                f"the daemon broke off {missing} bytes before the end of the Object", hint="its log says why"
            )
        self._left -= count
        return count

    def read(self) -> bytes:
        """All that is left."""
        buffer = memoryview(bytearray(self._left))
        done = 0
        while count := self.readinto(buffer[done:]):
            done += count
        return bytes(buffer)

    def __iter__(self) -> Iterator[memoryview]:
        """Pieces of up to 1 MiB, each valid until the next one."""
        buffer = memoryview(bytearray(min(self.size, _PIECE_BYTES)))
        while count := self.readinto(buffer):
            yield buffer[:count]


def _size_left(file: BinaryIO) -> int | None:
    """Bytes from where the file stands to its end; None if that cannot be known beforehand."""
    if not isinstance(getattr(file, "raw", file), io.FileIO):  # what it gives need not be what its descriptor has: gzip
        return None
    try:
        found = os.fstat(file.fileno())
        # Files of the kernel (in /proc, say) claim to be empty and are not.
        return max(0, found.st_size - file.tell()) if stat_module.S_ISREG(found.st_mode) and found.st_size else None
    except OSError:  # one that cannot be sought
        return None


def _read(file: BinaryIO) -> bytes:
    """The next piece; empty at the end."""
    read: Callable[[int], bytes | None] = file.read
    try:
        while (piece := read(_PIECE_BYTES)) is None:  # it does not block, and has nothing yet
            poll = select.poll()
            poll.register(file, select.POLLIN)
            poll.poll()
    except OSError as error:
        raise SourceFailed(error) from None
    return piece


def _send_pieces(sock: socket.socket, data: memoryview, progress: Callable[[int], object]) -> None:
    for at in range(0, len(data), _PIECE_BYTES):
        piece = data[at : at + _PIECE_BYTES]
        sock.sendall(piece)
        progress(len(piece))


def _send_all(sock: socket.socket, buffers: list[Data]) -> None:
    sent = sock.sendmsg(buffers)
    for buffer in buffers:
        if sent < len(buffer):
            sock.sendall(memoryview(buffer)[sent:])
        sent = max(0, sent - len(buffer))
