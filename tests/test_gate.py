"""A gate keeps operations out, and waits for those that are in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from rustord.gate import Gate


def test_a_gate_that_is_shut_lets_nobody_in() -> None:
    gate = Gate()
    inside = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with gate.shut():

            def enter() -> None:
                with gate:
                    inside.set()

            entering = pool.submit(enter)
            assert not inside.is_set()
        entering.result(10)
        assert inside.is_set()


def test_two_who_shut_it_wait_for_one_another() -> None:
    gate = Gate()
    inside: list[int] = []

    def shut(number: int) -> None:
        for _ in range(200):
            with gate.shut():
                inside.append(number)
                assert inside == [number]
                inside.remove(number)
            with gate:
                pass

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(shut, number) for number in range(4)]:
            done.result(30)


def test_to_drain_it_waits_for_who_is_inside() -> None:
    gate = Gate()
    leave, drained = threading.Event(), threading.Event()
    inside = threading.Event()

    def stay() -> None:
        with gate:
            inside.set()
            assert leave.wait(10)

    def drain() -> None:
        gate.drain()
        drained.set()

    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(stay)
        assert inside.wait(10)
        draining = pool.submit(drain)
        assert not drained.is_set()
        leave.set()
        staying.result(10)
        draining.result(10)
    assert drained.is_set()
