"""Poller: waits for the sockets of all connections at once, inside the event loop.

It has an epoll of its own, whose descriptor the event loop watches. So whatever has become ready costs the loop one
callback, and is one turn: all requests that have arrived are read, all answers that the writer's thread has given are
taken up, and only then changes are handed over and replies sent. (asyncio's own watching takes a callback, with a
handle and a context, for every socket; and a reply that is sent at once wakes its peer for it alone, which takes
longer than to make the reply.)
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from select import EPOLLIN, EPOLLOUT, epoll
from threading import Lock
from time import monotonic
from typing import Protocol

from rustord.event import FAULT
from rustord.frontends.session import LOOK_S

log = logging.getLogger(__name__)

_READY_COUNT_MAX = 256
"""Sockets in one turn: others than connections want theirs as well."""
_LOOKING_S_MAX = 5e-3
"""How long turns may follow one another in this way until the event loop has its own."""


class Watched(Protocol):
    """What a `Poller` tells that its socket is ready, or broken: to read or write then says so."""

    def readable(self) -> None:
        """There is something to read. Told only if that is watched for."""

    def writable(self) -> None:
        """There is room to write. Told only if that is watched for."""

    def close(self) -> None:
        """One of the others has failed."""


class Poller:
    """Belongs to the event loop that runs when it is made; only `wake` is for any thread."""

    def __init__(self, end_turn: Callable[[], bool]) -> None:
        """``end_turn`` is called at the end of each turn, and tells whether what comes next is up to clients.

        It must not raise.
        """
        self._end_turn = end_turn
        self._loop = asyncio.get_running_loop()
        self._epoll = epoll()
        self._watched: dict[int, tuple[Watched, int]] = {}
        """Who is watched by each file descriptor, and for what."""
        self._calls: deque[Callable[[], None]] = deque()
        self._answered = 0.0
        """When it was up to clients last."""
        self._woken = False
        self._waking = Lock()  # so that nobody writes to a descriptor that has been closed meanwhile
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._event, EPOLLIN)
        self._loop.add_reader(self._epoll, self._turns)

    def watch(self, fd: int, watched: Watched, *, reading: bool, writing: bool) -> None:
        """From now on tell ``watched`` when ``fd`` can be read or written, or neither."""
        events = (EPOLLIN if reading else 0) | (EPOLLOUT if writing else 0)
        if not events:
            if self._watched.pop(fd, None):
                self._epoll.unregister(fd)
        elif fd in self._watched:
            self._epoll.modify(fd, events)
            self._watched[fd] = watched, events
        else:
            self._epoll.register(fd, events)
            self._watched[fd] = watched, events

    def wake(self, call: Callable[[], None]) -> None:
        """Have ``call`` called in the next turn, which begins at once; never if the poller is closed before."""
        self._calls.append(call)
        with self._waking:
            if not self._woken and self._event >= 0:
                self._woken = True
                os.eventfd_write(self._event, 1)

    def _turns(self) -> None:
        began = monotonic()
        is_brisk = began - self._answered < LOOK_S
        ready = self._epoll.poll(0, _READY_COUNT_MAX)
        while True:
            is_alone = len(ready) <= 1
            self._turn(ready)
            self._answered = monotonic() if self._end_turn() and is_alone else 0.0
            if not (is_brisk and self._answered and self._answered - began < _LOOKING_S_MAX):
                return
            if not (ready := self._look(self._answered + LOOK_S)):
                return

    def _look(self, until: float) -> list[tuple[int, int]]:
        while monotonic() < until:
            if ready := self._epoll.poll(0, _READY_COUNT_MAX):
                return ready
        return []

    def _turn(self, ready_sockets: Iterable[tuple[int, int]]) -> None:
        for fd, ready in ready_sockets:
            if fd == self._event:
                os.eventfd_read(fd)
                self._woken = False
            elif found := self._watched.get(fd):  # unless somebody before it in this turn has ended it
                self._tell(*found, ready)
        for _ in range(len(self._calls)):
            try:
                self._calls.popleft()()
            except Exception:
                log.exception("a call of another thread has failed", extra=FAULT())

    def _tell(self, watched: Watched, events: int, ready: int) -> None:
        try:
            # An error, or the end of the connection, is told to whoever waits for anything.
            if events & EPOLLIN and ready & ~EPOLLOUT:
                watched.readable()
            elif events & EPOLLOUT and ready & ~EPOLLIN:
                watched.writable()
        except Exception:
            log.exception("a connection has failed, and is cut", extra=FAULT())
            watched.close()

    def close(self) -> None:
        """Watch nothing any more."""
        self._loop.remove_reader(self._epoll)
        self._epoll.close()
        with self._waking:
            os.close(self._event)
            self._event = -1
