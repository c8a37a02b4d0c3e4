"""Workers: the processes that serve NBD connections once they have chosen an export, one process for each export.

The threads of one process share the interpreter's lock, so several exports in one process would share one CPU: two
used 1.05 CPUs in reads of 4 KiB, and with a process for each they go 1.4 times as fast, one alone as fast as before.

A worker has the client's socket, and the places on the devices that the export has granted (see `rustord.lease`): there
it reads, writes and flushes by itself, and for all else it calls the thread of ours that has negotiated. What it has
written is in the page cache, and does not end with it: it tells which devices have to be flushed when it is recalled;
and if it is killed, all that it could write to have to be.

A worker ends when we do, whatever ends us: nobody is at the other end of its socket then. As long as it lives it keeps
the locks of the devices, so that no other daemon takes them while it may still write.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from mmap import mmap

import msgpack

from rustord.blockdevice import BlockDevice, ImageFile, RawDevice
from rustord.errors import RustordError
from rustord.event import FAULT
from rustord.frontends.channel import (
    FAST,
    KEEP,
    ORDER_BYTES_MAX,
    RUN_COUNT_MAX,
    Call,
    Channel,
    End,
    Order,
    Request,
    encode_runs,
)
from rustord.frontends.holding import Places, chunks_of
from rustord.frontends.ledger import Ledger
from rustord.lease import Grantor, OpenExport
from rustord.wire.negotiation import Agreement
from rustord.wire.transmission import BUFFER_BYTES

log = logging.getLogger(__name__)

_ORDER_S = 30.0
"""How long a worker may take to obey: as long as a disk may take over what is under way. Then it is killed."""
_END_S = 5.0
_HANDLE_COUNT_MAX = 1 << 16
_GROUP_COUNT_MAX = 4096
"""More are not worth to be told one by one."""


class Worker:
    """One process. Any thread may call any method but `close`."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.user_count = 0
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.settimeout(_ORDER_S)
        self._ordering = threading.Lock()
        self._devices: list[tuple[int, RawDevice | ImageFile]] = []
        """By handle, with their slots in the pool."""
        self._handles: dict[BlockDevice, int] = {}
        self._naming = threading.Lock()
        self._tenancies: dict[Grantor, _Tenancy] = {}
        self._tenancy_count = 0
        self._entering = threading.Lock()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "rustord.frontends.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except BaseException:
                self._orders.close()
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def order(self, order: Order, *arguments: object, fds: Sequence[int] = ()) -> list[int]:
        """Have it done. Raises OSError if that is impossible; the worker has been killed then (see `wait`)."""
        with self._ordering:
            try:
                socket.send_fds(self._orders, [msgpack.packb((order, *arguments))], fds)
                answer = self._orders.recv(ORDER_BYTES_MAX)
                if not answer:
                    raise ConnectionResetError("the worker is gone")
            except OSError as error:
                if isinstance(error, TimeoutError):
                    log.error("process %d, which serves NBD, does not obey: perhaps a disk does not answer", self.pid)
                self._process.kill()  # it must not go on, nor may what it answers late be taken for another answer
                raise ConnectionResetError(f"process {self.pid} does not serve any more: {error}") from error
        return list(msgpack.unpackb(answer))

    def wait(self) -> None:
        """Return when it has ended. Without limit, as for a thread: what it has begun may reach a disk until then."""
        self._process.wait()

    def close(self, *, at_once: bool = False) -> None:
        """End it; nobody uses it any more, or it is to be ``at_once`` whoever does."""
        if at_once:
            self._process.kill()
        with self._ordering:
            self._orders.close()
        if not self._ends():
            self._process.kill()
            self._ends()  # if not: a disk keeps it, and it keeps the lock of the disk
        for handle, (_, device) in enumerate(self._devices):
            device.lost.pop((self, handle), None)

    def _ends(self) -> bool:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    # Devices

    def handle(self, slot: int, device: BlockDevice) -> int:
        """What the worker knows a device by; -1 if it has to do without it."""
        handle = self._handles.get(device)
        return self._name(slot, device) if handle is None else handle

    def _name(self, slot: int, device: BlockDevice) -> int:
        with self._naming:
            if device in self._handles:
                return self._handles[device]
            if not isinstance(device, RawDevice | ImageFile) or len(self._devices) >= _HANDLE_COUNT_MAX:
                return -1
            handle = len(self._devices)
            try:
                if (shared := device.share()) is None:
                    return -1
                with ExitStack() as passed:
                    for fd in shared:
                        passed.callback(os.close, fd)
                    self.order(Order.DEVICE, device.size if isinstance(device, ImageFile) else 0, fds=shared)
            except OSError as error:
                log.warning("NBD goes the long way to %s: %s", device.path, error)
                return -1
            self._devices.append((slot, device))
            device.lost[self, handle] = partial(self._lose, handle)
            if device.failed:  # before it could be told
                self._lose(handle)
            self._handles[device] = handle
            return handle

    def _lose(self, handle: int) -> None:
        with suppress(OSError):  # it is gone itself
            self.order(Order.GONE, handle)

    def devices(self, handles: Iterable[int]) -> list[tuple[int, BlockDevice]]:
        """What these handles are, with their slots in the pool."""
        return [self._devices[handle] for handle in handles]

    # Connections

    def serve(
        self, export: OpenExport, agreement: Agreement, sock: socket.socket, rest: bytes, ledger: Ledger, client: str
    ) -> bytes | None:
        """Have it serve a connection; see `rustord.frontends.session.Session.run`. Raises OSError, RustordError."""
        tenancy = self._enter(export.grantor)
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    agreed = agreement.structured, agreement.extended, agreement.allocation
                    shape = export.key, export.kind, export.size, export.read_only, export.rotational
                    fds = sock.fileno(), theirs.fileno(), ledger.fileno()
                    self.order(Order.SERVE, tenancy.number, client, agreement.name, agreed, shape, rest, fds=fds)
                return _Served(Channel(ours), export, tenancy).run()
        finally:
            self._leave(tenancy)

    def _enter(self, grantor: Grantor) -> _Tenancy:
        with self._entering:
            if grantor not in self._tenancies:
                self._tenancy_count += 1
                self._tenancies[grantor] = _Tenancy(self, self._tenancy_count, grantor)
            tenancy = self._tenancies[grantor]
            tenancy.user_count += 1
            return tenancy

    def _leave(self, tenancy: _Tenancy) -> None:
        with self._entering:
            tenancy.user_count -= 1
            if not tenancy.user_count:
                del self._tenancies[tenancy.grantor]
                tenancy.close()

    def bury(self) -> None:
        """It is gone: what it has written is to be flushed by whoever comes next."""
        with self._entering:
            for tenancy in self._tenancies.values():
                tenancy.recall()


class _Tenancy:
    """What the connections of a worker have been granted by one grantor."""

    def __init__(self, worker: Worker, number: int, grantor: Grantor) -> None:
        self.worker = worker
        self.number = number
        self.grantor = grantor
        self.user_count = 0
        self._writable: set[int] = set()
        """Handles of the devices that it may have written to."""
        self._telling = threading.Lock()
        """Held by who may know of something to flush that the grantor does not know of yet."""
        for gate in grantor.gates:
            gate.extend(self.recall)

    def close(self) -> None:
        """It will not be granted anything any more."""
        self._recall(last=True)  # some session may not know yet that nobody is at the other end of its channel
        for gate in self.grantor.gates:
            gate.withdraw(self.recall)

    def recall(self, groups: Collection[int] | None = None) -> None:
        """Have it ask again for all that it was granted, or for some groups of chunks.

        Who is to ask for all has his writes flushed by us.
        """
        if groups is None or len(groups) > _GROUP_COUNT_MAX:
            self._recall(last=False)
            return
        try:
            self.worker.order(Order.LEAVE, self.number, [*groups])
        except OSError:
            self.worker.wait()

    def _recall(self, *, last: bool) -> None:
        with self._telling:
            try:
                dirty = self.worker.order(Order.RECALL, self.number, last)
            except OSError:
                self.worker.wait()
                dirty = [*self._writable]  # by then, for others may be granted something at this moment
            self._tell(dirty)

    @property
    def is_shared(self) -> bool:
        """Whether somebody in our own process changes the same at this moment."""
        return any(gate.is_kept for gate in self.grantor.gates)

    def dirtied(self, handles: Iterable[int]) -> None:
        """The worker has written there, and has not flushed it; nor what it was asked about before."""
        with self._telling:
            self._tell(handles)

    def _tell(self, handles: Iterable[int]) -> None:
        self.grantor.dirtied(self.worker.devices(handles))

    def took(self, told: array[int]) -> None:
        """The worker has flushed these devices, each in so many µs."""
        for (slot, _), taken_us in zip(self.worker.devices(told[::2]), told[1::2], strict=True):
            self.grantor.flushed(slot, taken_us / 1e6)

    def grant(self, first: int, end: int) -> bytes:
        """What the worker may do by itself with the chunks from ``first`` to before ``end``."""
        if self.is_shared:
            return Places.none(end - first).encode()
        granted = self.grantor.grant(first, end)
        places = Places.of(granted, self.worker.handle)
        self._writable |= places.writable_handles()
        return places.encode()


class _Served:
    """A connection that a worker serves: what it calls for, done by the thread that has negotiated."""

    def __init__(self, channel: Channel, export: OpenExport, tenancy: _Tenancy) -> None:
        self._channel = channel
        self._export = export
        self._tenancy = tenancy
        self._room = memoryview(mmap(-1, BUFFER_BYTES))

    def run(self) -> bytes | None:
        """Until the session ends; see `rustord.frontends.session.Session.run`. Raises OSError or RustordError."""
        channel = self._channel
        while request := channel.receive(self._room):
            if request.call == Call.END:
                return _ended(request)
            if request.call == Call.TOOK:
                self._tenancy.took(array("Q", request.data.tobytes()))
                continue
            try:
                self._answer(request)
            except OSError:
                # Nobody there gives up what this has changed, and another worker may hold it by now.
                for gate in self._tenancy.grantor.gates:
                    gate.recall()
                raise
        return None

    def _answer(self, request: Request) -> None:
        try:
            reply = self._do(request)
        except RustordError as error:
            self._channel.refuse(error)
        else:
            self._channel.reply(reply)

    def _do(self, request: Request) -> bytes | memoryview:
        call, flags, offset, length, data = request
        export, tenancy = self._export, self._tenancy
        if call == Call.GRANT:
            return tenancy.grant(offset, offset + length)
        if call == Call.READ:
            export.read(offset, self._room[:length])
            return self._room[:length]
        if call == Call.WRITE:
            export.write(offset, data)
            return self._granted_after(*chunks_of(offset, length))
        if call == Call.FLUSH:
            tenancy.dirtied(array("H", data.tobytes()))
            is_shared = tenancy.is_shared  # asked before: who has begun meanwhile has recalled what was granted
            export.flush()
            return bytes((is_shared,))
        if call == Call.FAIL:
            ((_, device),) = tenancy.worker.devices((offset,))
            assert isinstance(device, RawDevice | ImageFile)
            log.error("device: %s", device.report(OSError(length, os.strerror(length))))
        elif call == Call.TRIM:
            export.trim(offset, length)
        elif call == Call.ZERO:
            export.zero(offset, length, keep=bool(flags & KEEP), fast=bool(flags & FAST))
        elif call == Call.RUNS:
            return encode_runs(islice(export.runs(offset, length), RUN_COUNT_MAX))
        return b""

    def _granted_after(self, first: int, end: int) -> bytes:
        try:
            return self._tenancy.grant(first, end)
        except RustordError:  # it has been written, whatever becomes of it next
            return Places.none(end - first).encode()


def _ended(request: Request) -> bytes:
    data = bytes(request.data)
    if request.flags == End.LEFT:
        return data
    text = data.decode("utf-8", "replace")
    if request.flags == End.UNKEPT:
        raise RustordError(text)
    if request.flags == End.BROKEN:
        log.error("a connection has failed, which is a fault of rustord's:\n%s", text, extra=FAULT())
    raise ConnectionAbortedError(text)


class Workers:
    """All of them: one for each export that is open, and one that is left over. Any thread may call any method."""

    def __init__(self) -> None:
        self._by_key: dict[str, Worker] = {}
        self._all: set[Worker] = set()
        self._idle: Worker | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def enter(self, key: str) -> Worker:
        """The worker for an export, until `leave`. Raises OSError if there can be none."""
        with self._lock:
            if self._is_closed:  # somebody may have chosen an export at the last moment
                raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
            worker = self._by_key.get(key)
            if worker is not None and not worker.is_alive:
                worker.bury()
                worker = None
            if worker is None:
                worker, self._idle = self._idle, None
                if worker is not None and not worker.is_alive:
                    self._all.discard(worker)
                    worker.close()
                    worker = None
                if worker is None:
                    worker = Worker()
                    self._all.add(worker)
                self._by_key[key] = worker
            worker.user_count += 1
        try:
            worker.order(Order.RECALL, 0, False)  # of nothing: whether it is there
        except OSError:
            self.leave(key, worker)
            raise
        return worker

    def leave(self, key: str, worker: Worker) -> None:
        """Undo one `enter`. One worker is kept for the next export, so that this need not wait for a process."""
        with self._lock:
            worker.user_count -= 1
            if worker.user_count:
                return
            if self._by_key.get(key) is worker:
                del self._by_key[key]
            if self._idle is None and worker.is_alive:
                self._idle = worker
                return
            self._all.discard(worker)
        worker.close()

    def close(self) -> None:
        """End all of them, at once if they serve somebody still."""
        with self._lock:
            workers, self._all, self._idle, self._is_closed = self._all, set(), None, True
        for worker in workers:
            worker.close(at_once=worker.user_count > 0)
