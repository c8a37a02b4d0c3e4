from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from rustord.frontends.poller import Poller

SECONDS_MAX = 10


@dataclass
class Peer:
    """One end of a connection, which notes what it is told in a list that all share."""

    name: str
    sock: socket.socket
    told: list[str]
    then: Callable[[], None] = lambda: None
    taken: bytes = field(default=b"", init=False)

    def readable(self) -> None:
        self.told.append(f"{self.name} readable")
        self.taken += self.sock.recv(100)
        self.then()

    def writable(self) -> None:
        self.told.append(f"{self.name} writable")
        self.then()

    def close(self) -> None:
        self.told.append(f"{self.name} closed")


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(3)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


def polled(told: list[str], steps: Callable[[Poller], None]) -> None:
    """Runs an event loop with a poller for one turn."""

    async def run() -> None:
        ended = asyncio.Event()

        def end_turn() -> bool:
            told.append("end")
            poller.close()
            ended.set()
            return False

        poller = Poller(end_turn)
        steps(poller)
        await asyncio.wait_for(ended.wait(), SECONDS_MAX)

    asyncio.run(run())


def test_all_that_is_ready_is_one_turn(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    told: list[str] = []
    peers = [Peer(str(number), ours, told) for number, (ours, _) in enumerate(pairs)]
    for _, theirs in pairs:
        theirs.send(b"x")

    def steps(poller: Poller) -> None:
        for peer in peers:
            poller.watch(peer.sock.fileno(), peer, reading=True, writing=False)
        poller.wake(lambda: told.append("call"))

    polled(told, steps)
    assert sorted(told[:3]) == ["0 readable", "1 readable", "2 readable"]
    assert told[3:] == ["call", "end"]
    assert [peer.taken for peer in peers] == [b"x"] * 3


def test_only_what_is_watched_for_is_told(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    told: list[str] = []
    writer, reader, nobody = (Peer(str(number), ours, told) for number, (ours, _) in enumerate(pairs))
    for _, theirs in pairs:
        theirs.send(b"x")

    def steps(poller: Poller) -> None:
        poller.watch(writer.sock.fileno(), writer, reading=True, writing=False)
        poller.watch(writer.sock.fileno(), writer, reading=False, writing=True)
        poller.watch(reader.sock.fileno(), reader, reading=True, writing=False)
        poller.watch(nobody.sock.fileno(), nobody, reading=True, writing=True)
        poller.watch(nobody.sock.fileno(), nobody, reading=False, writing=False)

    polled(told, steps)
    assert sorted(told) == ["0 writable", "1 readable", "end"]


@pytest.mark.parametrize("reading", [True, False])
def test_the_end_of_a_connection_is_told_to_whoever_waits(
    pairs: list[tuple[socket.socket, socket.socket]], reading: bool
) -> None:
    told: list[str] = []
    ours, theirs = pairs[0]
    ours.setblocking(False)
    while not reading:  # there is no room to write
        try:
            ours.send(bytes(1 << 16))
        except BlockingIOError:
            break
    theirs.close()
    peer = Peer("0", ours, told)

    def broken() -> None:
        raise ConnectionError("it has ended")

    peer.then = broken
    polled(told, lambda poller: poller.watch(ours.fileno(), peer, reading=reading, writing=not reading))
    assert told == [f"0 {'readable' if reading else 'writable'}", "0 closed", "end"], "who fails is cut"


def test_who_has_been_let_go_of_in_a_turn_is_told_nothing_more(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    told: list[str] = []
    peers = [Peer(str(number), ours, told) for number, (ours, _) in enumerate(pairs)]
    for _, theirs in pairs:
        theirs.send(b"x")

    def steps(poller: Poller) -> None:
        def let_go_of_all() -> None:
            for peer in peers:
                poller.watch(peer.sock.fileno(), peer, reading=False, writing=False)

        for peer in peers:
            peer.then = let_go_of_all
            poller.watch(peer.sock.fileno(), peer, reading=True, writing=False)

    polled(told, steps)
    assert len(told) == 2
    assert told[0] in {"0 readable", "1 readable", "2 readable"}
    assert told[1] == "end"


def test_a_call_that_fails_keeps_no_other_from_being_made() -> None:
    told: list[str] = []

    def fail() -> None:
        raise ValueError("it fails")

    def steps(poller: Poller) -> None:
        for call in (fail, lambda: told.append("call")):
            poller.wake(call)

    polled(told, steps)
    assert told == ["call", "end"]


def test_calls_of_many_threads_are_all_made() -> None:
    made: list[int] = []

    async def run() -> None:
        all_made = asyncio.Event()
        poller = Poller(lambda: all_made.set() if len(made) == 4000 else None)

        def call(first: int) -> None:
            for number in range(first, first + 1000):
                poller.wake(lambda number=number: made.append(number))  # type: ignore[misc]

        threads = [threading.Thread(target=call, args=(first,)) for first in range(0, 4000, 1000)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(all_made.wait(), SECONDS_MAX)
        for thread in threads:
            thread.join()
        poller.close()
        poller.wake(lambda: made.append(-1))

    asyncio.run(run())
    assert sorted(made) == list(range(4000))
    for first in range(0, 4000, 1000):
        mine = [number for number in made if first <= number < first + 1000]
        assert mine == sorted(mine), "in the order of the calls"


@pytest.mark.parametrize("is_up_to_clients", [True, False])
def test_a_client_that_comes_again_at_once_is_served_at_once_but_not_for_ever(
    pairs: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch, is_up_to_clients: bool
) -> None:
    """The client sends the next request as soon as it has an answer; beside it the event loop wants its turns."""
    monkeypatch.setattr("rustord.frontends.poller.LOOK_S", 60.0)
    ours, theirs = pairs[0]
    told: list[str] = []
    turns: list[int] = [0]

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def end_turn() -> bool:
            turns[0] += 1
            told.append("end")
            theirs.send(b"x")
            if turns[0] == 1:
                loop.call_soon(loop.call_soon, told.append, "loop")  # behind what is ready by then
            return is_up_to_clients and turns[0] < 100_000

        poller = Poller(end_turn)
        poller._answered = time.monotonic()  # just before
        poller.watch(ours.fileno(), Peer("a", ours, told), reading=True, writing=False)
        theirs.send(b"x")
        deadline = time.monotonic() + SECONDS_MAX
        while "loop" not in told and time.monotonic() < deadline:
            await asyncio.sleep(0)
        poller.close()

    asyncio.run(run())
    assert "loop" in told
    turns_before = told[: told.index("loop")].count("end")
    assert turns_before < 100_000
    assert (turns_before > 3) is is_up_to_clients
