"""A Task: started, paced, stopped, failed; and started again."""

from __future__ import annotations

import threading
import time

import pytest

from rustord.errors import NoSpace
from rustord.task import Task


def test_a_task_runs_to_its_end_beside_us() -> None:
    may_end = threading.Event()

    def work(task: Task) -> None:
        task.total = 10
        task.pace(10)
        task.done = 10
        assert may_end.wait(20)

    task = Task("work", work)
    assert task.state == "idle"
    assert task.start()
    assert not task.start()  # it runs already
    assert task.is_running
    may_end.set()
    assert task.wait(20)
    assert (task.state, task.done, task.total, task.error) == ("done", 10, 10, "")


def test_a_stop_ends_it_at_the_next_piece_and_it_can_be_started_again() -> None:
    rounds = []

    def work(task: Task) -> None:
        rounds.append(0)
        while len(rounds) == 1:
            task.pace(1)

    task = Task("work", work, bytes_s_max=1000)
    task.start()
    assert task.stop(20)
    assert task.state == "stopped"
    task.start()
    assert task.wait(20)
    assert (task.state, len(rounds)) == ("done", 2)


def test_a_stop_does_not_wait_for_a_slow_pace() -> None:
    task = Task("work", lambda task: task.pace(1 << 30), bytes_s_max=1)
    task.start()
    assert task.stop(20)
    assert task.state == "stopped"


def test_the_pace_is_kept() -> None:
    def work(task: Task) -> None:
        for _ in range(10):
            task.pace(1000)

    task = Task("work", work, bytes_s_max=100_000)
    began = time.monotonic()
    task.start()
    assert task.wait(20)
    assert time.monotonic() - began >= 0.09  # never faster, however busy the machine is


@pytest.mark.parametrize(("error", "said"), [(NoSpace("it is full"), "it is full"), (KeyError("x"), "KeyError('x')")])
def test_a_failure_is_told(error: Exception, said: str) -> None:
    def work(task: Task) -> None:
        raise error

    task = Task("work", work)
    task.start()
    assert task.wait(20)
    assert task.state == "failed"
    assert said in task.error


def test_stopping_what_was_never_started_is_fine() -> None:
    assert Task("work", lambda task: None).stop()
