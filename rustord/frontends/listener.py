"""Listener: accepts connections from one listening socket."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""After the process ran out of file descriptors."""
_BURST_COUNT = 64
"""Connections accepted before others get their turn."""


class Listener:
    """Belongs to the event loop that runs when it is made, and accepts from then on until `close`."""

    def __init__(self, sock: socket.socket, admit: Callable[[socket.socket], None]) -> None:
        """``admit`` is given each connection, and must not raise. ``sock`` is the listener's, which closes it."""
        self._sock = sock
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_BURST_COUNT):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("no further connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._sock)
                self._waiting = self._loop.call_later(_AGAIN_S, self._listen)
                return
            self._admit(sock)

    def close(self) -> None:
        """Accept nobody any more."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
