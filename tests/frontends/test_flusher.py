from __future__ import annotations

import threading
import weakref

import pytest

from rustord.frontends.flusher import Flusher
from rustord.wire.transmission import Waiting
from tests.frontends.served import SECONDS_MAX, no_more_threads


class Disk:
    """What takes as long to flush as a test lets it."""

    def __init__(self) -> None:
        self.done: list[list[Waiting]] = []
        self.flusher = Flusher(self.flush)
        self._begun, self._may_end = threading.Semaphore(0), threading.Semaphore(0)

    def flush(self, waiting: list[Waiting]) -> None:
        self._begun.release()
        assert self._may_end.acquire(timeout=SECONDS_MAX)
        self.done.append(waiting)

    def begins(self) -> None:
        assert self._begun.acquire(timeout=SECONDS_MAX)

    def end(self, count: int = 1) -> None:
        self._may_end.release(count)


def test_those_that_come_during_a_flush_are_the_next_one() -> None:
    disk = Disk()
    flusher = disk.flusher
    flusher.put([(1, 0)])
    disk.begins()
    for cookie in (2, 3):
        flusher.put([(cookie, 0)])
    assert flusher.is_busy
    disk.end()
    disk.begins()
    assert flusher.is_busy
    flusher.put([(4, 0)])
    disk.end(2)
    flusher.wait()
    assert not flusher.is_busy
    assert disk.done == [[(1, 0)], [(2, 0), (3, 0)], [(4, 0)]]
    flusher.close()


def test_closing_waits_for_all() -> None:
    disk = Disk()
    disk.flusher.put([(1, 0)])
    disk.begins()
    disk.flusher.put([(2, 0)])
    disk.end(2)
    disk.flusher.close()
    assert disk.done == [[(1, 0)], [(2, 0)]]


def test_who_asks_for_too_many_waits() -> None:
    disk = Disk()
    disk.flusher.put([(0, 0)])
    disk.begins()
    disk.flusher.put([(1, 0)] * 4096)
    (asking := threading.Thread(target=disk.flusher.put, args=([(2, 0)],))).start()
    asking.join(0.2)
    assert asking.is_alive()
    disk.end(3)
    asking.join(SECONDS_MAX)
    disk.flusher.close()
    assert [len(waiting) for waiting in disk.done] == [1, 4096, 1]


def test_one_that_was_never_used_has_no_thread() -> None:
    before = threading.active_count()
    flusher = Disk().flusher
    flusher.wait()
    flusher.close()
    assert threading.active_count() == before


def test_it_lets_go_of_whom_it_calls() -> None:
    disk = Disk()
    disk.end()
    disk.flusher.put([(1, 0)])
    disk.flusher.close()
    gone = weakref.ref(disk)
    del disk
    assert gone() is None


def test_the_system_may_have_no_more_threads() -> None:
    disk = Disk()
    with no_more_threads(), pytest.raises(RuntimeError):
        disk.flusher.put([(1, 0)])
    assert not disk.flusher.is_busy
    disk.end()
    disk.flusher.put([(2, 0)])
    disk.flusher.close()
    assert disk.done == [[(2, 0)]]
