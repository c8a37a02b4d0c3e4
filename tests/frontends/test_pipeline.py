from __future__ import annotations

import threading
from functools import partial

import pytest

from rustord.frontends.pipeline import Pipeline
from tests.frontends.served import no_more_threads


def test_jobs_are_done_one_after_the_other_beside_who_gives_them() -> None:
    pipeline = Pipeline()
    done: list[int] = []
    gates = [threading.Event() for _ in range(3)]
    for number, gate in enumerate(gates):

        def job(number: int = number, gate: threading.Event = gate) -> None:
            assert gate.wait(10)
            done.append(number)

        pipeline.put(job)
        assert done == list(range(number))  # the last one is done, this one is not
        gate.set()
    pipeline.wait()
    assert done == [0, 1, 2]
    pipeline.close()


def test_closing_waits_for_what_was_begun() -> None:
    pipeline = Pipeline()
    done: list[int] = []
    for number in range(10):
        pipeline.put(partial(done.append, number))
    pipeline.close()
    assert done == list(range(10))


def test_a_pipeline_that_was_never_used_has_no_thread() -> None:
    before = threading.active_count()
    pipeline = Pipeline()
    pipeline.wait()
    pipeline.close()
    assert threading.active_count() == before


def test_the_system_may_have_no_more_threads() -> None:
    pipeline = Pipeline()
    with no_more_threads(), pytest.raises(RuntimeError):
        pipeline.put(lambda: None)
    pipeline.put(lambda: None)
    pipeline.close()
