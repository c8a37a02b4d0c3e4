"""Connection: the way to the daemon's socket, which the blocking client and that for asyncio have in common."""

from __future__ import annotations

import os
import select
import socket

from rustord.errors import Unreachable
from rustord.wire.request import Request

DEFAULT_SOCKET = "/run/rustord/rustord.sock"
EXPECT_BYTES = 1 << 20
"""A longer body is announced first: the daemon may refuse it before it is sent."""
HEAD_BYTES_MAX = 64 << 10
_LONG_S = 86_400.0
"""How long the daemon may stay silent when it is asked for what takes long."""
_STATUS = "'systemctl status rustord' says how the daemon is, and 'systemctl start rustord' starts it"
_STATUS_BY_HAND = f"start the daemon whose socket that is ('rustord --socket'), or name another ({DEFAULT_SOCKET})"


class SourceFailed(Exception):
    """Carries an error of what was to be sent past all that takes it for one of the connection."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class Connection:
    """A connection to the daemon, made when it is needed, and again when it was lost."""

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_SOCKET, *, timeout_s: float = 300.0) -> None:
        """``timeout_s``: how long the daemon may stay silent, unless it is asked for what takes long."""
        self._path = os.fspath(path)
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None
        self._received = b""

    def close(self) -> None:
        """Close the connection; the next request makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._received = b""

    def _silence_s(self, request: Request) -> float:
        """How long the answer may take to begin, or to go on."""
        return max(self._timeout_s, _LONG_S) if request.takes_long else self._timeout_s

    def _close_unless_fresh(self) -> None:
        """Go on only if the daemon has sent nothing unasked: neither the rest of a reply nor the end."""
        if self._sock is not None:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if self._received or poll.poll(0):
                self.close()

    def _unreachable(self, error: OSError) -> Unreachable:
        """What an error of the connection means."""
        path = self._path
        status = _STATUS if path == DEFAULT_SOCKET else _STATUS_BY_HAND
        if isinstance(error, FileNotFoundError):
            return Unreachable(f"there is no socket {path}", hint=status)
        if isinstance(error, ConnectionRefusedError):
            return Unreachable(f"nobody listens on {path}", hint=status)
        if isinstance(error, PermissionError):
            return Unreachable(f"{path} may not be used", hint="join the group that owns the socket, or use sudo")
        if isinstance(error, (TimeoutError, BlockingIOError)):
            return Unreachable(f"the daemon on {path} was silent for {self._timeout_s:g} s", hint=status)
        if error.errno is None and not isinstance(error, ConnectionError):  # such as a path that is too long
            return Unreachable(f"{path} cannot be the daemon's socket: {error}", hint="name another one")
        return Unreachable(f"the connection to {path} was lost: {error}", hint=status)
