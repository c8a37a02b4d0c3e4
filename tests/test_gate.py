"""A gate keeps operations out, and waits for those that are in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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


def test_who_is_elsewhere_is_recalled_when_nobody_is_inside_and_before_anything_changes() -> None:
    gate, told = Gate(), list[str]()
    gate.extend(lambda places: told.append("recalled" if places is None else str(places)))
    with gate:
        shutting = threading.Thread(target=lambda: [told.append("shut") for _ in _within(gate)])
        shutting.start()
        assert not told
    shutting.join()
    assert told == ["recalled", "shut"]
    gate.drain()
    gate.recall()
    gate.drain([1, 2])
    assert told[2:] == ["recalled", "recalled", "[1, 2]"]


def _within(gate: Gate) -> Iterator[None]:
    with gate.shut():
        yield


def test_who_has_withdrawn_is_not_recalled() -> None:
    gate, told = Gate(), list[str]()
    stays, goes = (lambda places: told.append("stays")), (lambda places: told.append("goes"))
    gate.extend(goes)
    gate.extend(stays)
    gate.withdraw(goes)
    gate.drain()
    assert told == ["stays"]


def test_what_is_kept_is_recalled_first_and_kept_by_whoever_is_the_last() -> None:
    gate, told = Gate(), list[str]()
    gate.extend(lambda places: told.append("recalled" if gate.is_kept else "too early"))
    with gate.kept():
        assert told == ["recalled"]
        with gate.kept():
            assert gate.is_kept
        assert gate.is_kept
    assert not gate.is_kept
