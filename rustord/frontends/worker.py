"""The process behind `rustord.frontends.workers.Worker`: serves connections to an export until nobody orders it.

It imports little, for a client waits until it is there.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

import msgpack

from rustord.errors import RustordError
from rustord.export import Kind
from rustord.frontends.channel import ORDER_BYTES_MAX, Call, Channel, End, Order
from rustord.frontends.holding import HeldExport, Holding
from rustord.frontends.ledger import Ledger
from rustord.frontends.session import Session
from rustord.wire.negotiation import Agreement

_FD_COUNT_MAX = 3


class _Worker:
    def __init__(self) -> None:
        self._fds: list[int] = []
        """Of the devices, by handle."""
        self._locks: list[int] = []
        """The same, only to be kept: as long as they are there, the devices are locked."""
        self._sizes: list[int] = []
        """Of those that are files."""
        self._holdings: dict[int, Holding] = {}
        self._nothing = os.open(os.devnull, os.O_RDONLY)  # for reading: nobody may think that he has written

    def obey(self, order: int, arguments: Sequence[Any], fds: Sequence[int]) -> list[int]:
        """The answer to an order."""
        if order == Order.SERVE:
            self._serve(*arguments, *fds)
        elif order == Order.DEVICE:
            self._sizes += arguments
            for kept, fd in zip((self._fds, self._locks), fds, strict=True):
                kept.append(fd)
        elif order == Order.GONE:
            (handle,) = arguments
            for kept in (self._fds, self._locks):
                os.dup2(self._nothing, kept[handle])
        elif order == Order.LEAVE:
            number, groups = arguments
            if number in self._holdings:
                self._holdings[number].leave(groups)
        elif order == Order.RECALL:
            number, is_last = arguments
            holding = self._holdings.pop(number, None) if is_last else self._holdings.get(number)
            return holding.recall() if holding else []
        return []

    def _serve(
        self,
        number: int,
        client: str,
        name: str,
        agreed: tuple[bool, bool, bool],
        shape: tuple[str, str, int, bool, bool],
        rest: bytes,
        sock_fd: int,
        channel_fd: int,
        ledger_fd: int,
    ) -> None:
        if number not in self._holdings:
            self._holdings[number] = Holding(self._fds, self._sizes)
        sock, channel = socket.socket(fileno=sock_fd), Channel(socket.socket(fileno=channel_fd))
        key, kind, size, read_only, rotational = shape
        export = HeldExport(
            *(self._holdings[number], channel, key, Kind(kind), size), read_only=read_only, rotational=rotational
        )
        with closing(Ledger(ledger_fd)) as ledger:
            session = Session(sock, Agreement(name, export, *agreed), ledger, client)
        try:
            threading.Thread(target=_run, args=(session, sock, channel, rest), name="nbd", daemon=True).start()
        except RuntimeError as error:  # the system has no more threads; the other sessions go on
            _tell(channel, End.FAILED, str(error).encode())
            channel.close()
            sock.close()


def _run(session: Session, sock: socket.socket, channel: Channel, rest: bytes) -> None:
    """Serve a connection, and tell how it has ended."""
    with sock:
        try:
            left = session.run(rest)
        except RustordError as error:
            _tell(channel, End.UNKEPT, str(error).encode())
        except OSError as error:
            _tell(channel, End.FAILED, str(error).encode())
        except Exception:
            _tell(channel, End.BROKEN, traceback.format_exc().encode())
        else:
            if left is not None:
                _tell(channel, End.LEFT, left)
    channel.close()


def _tell(channel: Channel, how: End, data: bytes) -> None:
    with suppress(OSError):  # nobody listens any more
        channel.tell(Call.END, data, flags=how)


def main() -> None:
    """Obey until there is nobody at the other end of the socket whose descriptor is the argument."""
    with suppress(OSError), open("/proc/self/comm", "w") as name:
        name.write("rustord-nbd")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the one who orders
    orders = socket.socket(fileno=int(sys.argv[1]))
    worker = _Worker()
    gc.freeze()
    while True:
        with suppress(ConnectionError):
            message, fds, _, _ = socket.recv_fds(orders, ORDER_BYTES_MAX, _FD_COUNT_MAX)
            if message:
                order, *arguments = msgpack.unpackb(message)
                orders.send(msgpack.packb(worker.obey(order, arguments, fds)))
                continue
        os._exit(0)  # at once, whatever the threads are doing


if __name__ == "__main__":
    main()
