"""Writer: the one thread that changes an open pool. What arrives while a cycle runs makes up the next one."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from rustord.change import Change, Erase
from rustord.errors import RustordError, Unavailable
from rustord.event import FAULT, POOL_READ_ONLY
from rustord.objectstore import ERASE_BYTES_MAX, ObjectStore
from rustord.record import Record
from rustord.whereabouts import whereabouts

log = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = Record | RustordError
Deliver = Callable[[Sequence[tuple[Change, Outcome]]], None]

CHANGE_COUNT_MAX = 512
"""Changes in one cycle: enough that the flush is shared by all who wait, few enough that nobody waits long."""
GATHER_S = 0.001
"""How long a cycle waits, at the most, for those whom the one before has answered; never longer than half of that."""
CHECKPOINT_S = 0.25
"""How long changes gather before they go into the index together."""
_CHECKPOINT_COUNT = 8192


def busy() -> Unavailable:
    """Why somebody waits no longer for a change, which may be made all the same."""
    return Unavailable("the pool is busy", hint="see 'rustorctl status', and look what has become of it")


def stopping() -> Unavailable:
    """For whoever asks for something that has to wait for the next start."""
    return Unavailable("rustord is stopping", hint="try again when it has started")


class _Call(Generic[T]):
    """A function to be run between two cycles, and what comes of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._function = function

    def __call__(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except BaseException as error:
            self.future.set_exception(error)

    def refuse(self, problem: RustordError) -> None:
        """Have it raise ``problem`` in place of running."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(problem)


class Writer:
    """Runs the store's cycles on a thread of its own, long erasures beside them, and puts changes into the index.

    ``cycle_count`` counts the cycles that ended, ``change_count`` the changes in them.
    """

    def __init__(
        self, store: ObjectStore, on_cycle: Callable[[int, float], None] = lambda count, seconds: None
    ) -> None:
        """``on_cycle`` is told after each cycle how many changes it had and how long it took."""
        self.store = store
        self.cycle_count = 0
        self.change_count = 0
        self.index_problem = ""
        """Why the index could not be written the last time; "" if it could. The journal takes what it does not hold."""
        self._busy_since = 0.0
        """The monotonic time at which the cycle, or the call, under way began; 0 if there is none."""
        self._calling = False
        self._clock = 0
        """Of the CPU time of the writer's thread."""
        self._moved = (0.0, 0.0)
        """That time as `standstill_s` saw it last, and since when it has been so."""
        self._on_cycle = on_cycle
        self._queue: SimpleQueue[Sequence[Change] | Erase | Callable[[], None] | None] = SimpleQueue()
        self._waiting: dict[Change, Deliver] = {}
        self._following: list[Change] = []
        self._expected = 0
        """Changes that the next cycle may have: who has just been answered will want more, and some wait already."""
        self._patience_s = 0.0
        self._erasing = 0
        self._erasers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="erase")
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._index_due = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name="writer", daemon=True),
            threading.Thread(target=self._index, name="index", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, changes: Sequence[Change], deliver: Deliver) -> None:
        """Have ``changes`` made; ``deliver`` is called on the writer's thread with the outcomes of each cycle together.

        Any thread may call this. ``deliver`` must be quick and must not raise; if it does, that is logged.
        """
        if self._closing.is_set():
            problem = stopping()
            deliver([(change, problem) for change in changes])
            return
        self._waiting.update(dict.fromkeys(changes, deliver))
        for first in range(0, len(changes), CHANGE_COUNT_MAX):
            self._queue.put(changes[first : first + CHANGE_COUNT_MAX])
        if self._ended.is_set():
            self._refuse_the_rest()

    def make(self, changes: Sequence[Change], timeout_s: float) -> list[tuple[Change, Outcome]]:
        """Have ``changes`` made, and wait for all outcomes. Raises TimeoutError; they may be made all the same then.

        Not for the writer's own thread.
        """
        outcomes: list[tuple[Change, Outcome]] = []
        done = threading.Event()

        def deliver(finished: Sequence[tuple[Change, Outcome]]) -> None:
            outcomes.extend(finished)
            if len(outcomes) == len(changes):
                done.set()

        self.submit(changes, deliver)
        if not done.wait(timeout_s):
            raise TimeoutError(f"{len(changes) - len(outcomes)} changes were not made in {timeout_s:.0f} s")
        return outcomes

    def call(self, function: Callable[[], T], timeout_s: float = 60.0) -> T:
        """Run ``function`` on the writer's thread between two cycles, and return or raise what it does.

        Raises Unavailable once the writer has ended, or TimeoutError; it may be running then, but does not begin any
        more: who asked for it has gone on.
        """
        call = _Call(function)
        self._queue.put(call)
        if self._ended.is_set():
            self._refuse_the_rest()
        try:
            return call.future.result(timeout_s)
        finally:
            call.future.cancel()

    def standstill_s(self) -> float:
        """For how long the writer has not got on; 0 if there is nothing to do. To be asked every few seconds.

        A cycle is short: one that takes long does not get on. What `call` runs may take long (to read what a device
        brings back, say); it gets on as long as it takes CPU time, of which waiting for a device or a lock takes none.
        """
        began, now = self._busy_since, time.monotonic()
        cpu_s = time.clock_gettime(self._clock) if self._clock else 0.0
        if cpu_s != self._moved[0]:
            self._moved = cpu_s, now
        if not began:
            return 0.0
        return now - (max(began, self._moved[1]) if self._calling else began)

    def is_alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def whereabouts(self) -> str:
        """Where in the code the writer is at this moment."""
        return whereabouts(self._threads[0].ident)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Finish what has been submitted, and stop; whether that was done within ``timeout_s``."""
        self._closing.set()
        self._queue.put(None)
        self._index_due.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._erasers.shutdown(wait=False, cancel_futures=True)
        return not any(thread.is_alive() for thread in self._threads)

    # The writer's thread

    def _run(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        stopping = False
        try:
            while not stopping or self._following or self._erasing or not self._queue.empty():
                changes, self._following = self._following, []
                stopping = self._gather(changes, wait=not changes) or stopping
                if changes or self.store.idle_work():
                    self._cycle(changes)
        finally:
            self._ended.set()
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Answer what was submitted while the writer stopped: by itself behind its end, and by who submitted later."""
        problem = stopping()
        with suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, _Call):
                    item.refuse(problem)
                for change in item if isinstance(item, Sequence) else ():
                    if deliver := self._waiting.pop(change, None):
                        deliver([(change, problem)])

    def _gather(self, changes: list[Change], *, wait: bool) -> bool:
        """Add what has been submitted to ``changes``; whether the writer is to stop.

        Who works in lockstep with the store, one change after the other, comes again just after the answers have gone
        out. A cycle that began with the first of them would leave the others to the next one, and from then on each
        flush would be shared by half of them.
        """
        stop = False
        deadline = math.inf if wait else time.monotonic() + self._patience_s
        with suppress(Empty):
            while len(changes) < CHANGE_COUNT_MAX and not stop:
                if deadline == math.inf:
                    item = self._queue.get()
                    deadline = time.monotonic() + self._patience_s
                elif len(changes) < self._expected and (left := deadline - time.monotonic()) > 0:
                    item = self._queue.get(timeout=left)
                else:
                    item = self._queue.get_nowait()
                if item is None:
                    stop = True
                elif isinstance(item, Erase):
                    self._erasing -= 1
                    changes.append(item)
                elif callable(item):
                    self._run_call(item)
                else:
                    changes += item
        return stop

    def _run_call(self, call: Callable[[], None]) -> None:
        self._calling, self._busy_since = True, time.monotonic()
        call()
        self._calling, self._busy_since = False, 0.0

    def _cycle(self, changes: list[Change]) -> None:
        self._busy_since = began = time.monotonic()
        try:
            outcomes, following = self.store.cycle(changes)
        except Exception as error:
            log.exception("a cycle failed; the pool takes no more changes", extra=POOL_READ_ONLY())
            self.store.read_only = f"an internal error: {error!r}"
            self.store.keystore.is_behind = True
            problem = RustordError(f"an internal error: {error!r}", hint="see rustord's log, and restart it")
            erases = [change for change in changes if isinstance(change, Erase)]
            causes = [erase.cause for erase in erases if erase.cause is not None]
            outcomes, following = [(change, problem) for change in [*changes, *causes]], []
            for erase in erases:
                if erase.finished is not None:
                    erase.finished(problem)
        for change in following:
            if isinstance(change, Erase) and self._is_long(change):
                self._erasing += 1
                self._erasers.submit(self._erase, change)
            else:
                self._following.append(change)
        answers: dict[Deliver, list[tuple[Change, Outcome]]] = {}
        for change, outcome in outcomes:
            if deliver := self._waiting.pop(change, None):
                answers.setdefault(deliver, []).append((change, outcome))
        self._expected = len(self._waiting) + len(outcomes)
        for deliver, finished in answers.items():
            try:
                deliver(finished)
            except Exception:
                log.exception("somebody could not be told what became of his changes", extra=FAULT())
        self._busy_since = 0.0
        self.cycle_count += 1
        self.change_count += len(changes)
        taken_s = time.monotonic() - began
        self._patience_s = min(GATHER_S, taken_s / 2)
        self._on_cycle(len(changes), taken_s)
        if self.store.keystore.lag() > _CHECKPOINT_COUNT:
            self._index_due.set()

    def _is_long(self, erase: Erase) -> bool:
        block_count = sum(extent.count for extent in erase.extents)
        return not erase.erased and block_count * self.store.label.block_size > ERASE_BYTES_MAX

    def _erase(self, erase: Erase) -> None:
        try:
            self.store.erase(erase)
        finally:
            self._queue.put(erase)  # whatever happened: the writer waits for it, and so may somebody who deleted

    # The index's thread

    def _index(self) -> None:
        while not self._closing.is_set():
            self._index_due.wait(CHECKPOINT_S)
            self._index_due.clear()
            self._checkpoint()
            if self.store.idle_work():
                self._queue.put(lambda: None)

    def _checkpoint(self) -> None:
        problem = ""
        try:
            self.store.keystore.checkpoint()
        except Exception as error:
            fault = not isinstance(error, RustordError)
            problem = repr(error) if fault else str(error)
            if problem != self.index_problem:  # it is tried four times a second, and told once
                extra = FAULT() if fault else None
                log.error("the index cannot be written, and is tried again: %s", problem, exc_info=fault, extra=extra)
        if self.index_problem and not problem:
            log.info("the index is written again")
        self.index_problem = problem
