"""Supervisor: the service manager (systemd) that started us: what it passed on, and what it is told.

See sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from systemd.daemon import listen_fds_with_names

KEEP_S = 5.0
"""How long handing over file descriptors may take."""
START_S = 300
"""How long a step of the start may take without a sign of progress."""


class Supervisor:
    """Telling it something never waits and never fails: serving is more important than who listens to what we say.

    So what it has to know is repeated: see `alive`. Without a manager, nobody is told. Only to hand over sockets waits.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        asked = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(environment.get("WATCHDOG_USEC", "0")) / 1e6 if asked else 0.0
        """It wants a sign of life at least that often; 0 if it does not care."""

    def sockets(self) -> list[tuple[str, socket.socket]]:
        """The sockets that it passed: the listening ones, with the names of their units, and those that it kept, with
        the names that `keep` gave them. They are the caller's from now on."""
        return [(name, socket.socket(fileno=number)) for number, name in listen_fds_with_names().items()]

    def progress(self, text: str) -> None:
        """The start is getting on, and may take longer."""
        self._tell(f"STATUS=starting: {text}", f"EXTEND_TIMEOUT_USEC={START_S * 1_000_000}")

    def alive(self, status: str) -> None:
        """We serve, and all threads do their work. To be called at least every `watchdog_s` / 2."""
        self._tell("READY=1", f"STATUS={status}", "WATCHDOG=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self._tell(f"STATUS={text}")

    def reloading(self) -> None:
        """The configuration is being read again; `alive` ends that."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        self._tell("STOPPING=1", f"STATUS={status}")

    @property
    def keeps(self) -> bool:
        """Whether there is somebody who could `keep` sockets."""
        return bool(self._address)

    def keep(self, sockets: Iterable[tuple[str, socket.socket]]) -> None:
        """Have sockets kept for the process that is started next, under names. Raises OSError; some may be kept then.

        How many it keeps is for the unit to say; it closes the others. Those of one name are dropped together.
        """
        with self._connected() as manager:
            for name, kept in sockets:
                socket.send_fds(manager, [f"FDSTORE=1\nFDNAME={name}".encode()], [kept.fileno()])
            self._settle(manager)

    def drop(self, names: Iterable[str]) -> None:
        """Have what was kept under these names kept no more. Raises OSError."""
        with self._connected() as manager:
            for name in names:
                manager.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
            self._settle(manager)

    def _connected(self) -> socket.socket:
        """A socket on which a message waits until there is room for it."""
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        manager.settimeout(KEEP_S)
        try:
            manager.connect(self._address)
        except OSError:
            manager.close()
            raise
        return manager

    @staticmethod
    def _settle(manager: socket.socket) -> None:
        """Wait until all messages have been taken in; see sd_notify_barrier(3)."""
        reading, writing = socket.socketpair()
        with reading:
            with writing:
                socket.send_fds(manager, [b"BARRIER=1"], [writing.fileno()])
            reading.settimeout(KEEP_S)
            reading.recv(1)  # ends when the manager closes its end

    def _tell(self, *assignments: str) -> None:
        if self._address:
            text = "\n".join(line.replace("\n", " ") for line in assignments)
            with suppress(OSError):  # it is gone, or does not read; a system call may be all that we can afford
                self._socket.sendto(text.encode(errors="replace"), self._address)

    def close(self) -> None:
        self._socket.close()
