"""Where a thread is, to name whose fault it is that it does not get on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from rustord.guard import GuardedBackend
from rustord.whereabouts import whereabouts


def test_a_thread_is_where_a_plugin_was_entered() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def get(self, key: bytes) -> None:
            self.wait()

        def wait(self) -> None:
            entered.set()
            leave.wait()  # in threading.py, which is nobody's fault

        def scan(self, first: bytes, end: bytes) -> Iterator[object]:
            raise AssertionError

    backend = GuardedBackend(Slow(), "slow")  # type: ignore[arg-type]
    thread = threading.Thread(target=backend.get, args=(b"key",))
    thread.start()
    entered.wait()
    found = whereabouts(thread.ident)
    leave.set()
    thread.join()
    assert found.startswith(f"{__file__}, line ")
    assert found.endswith(", get")
    assert whereabouts(thread.ident) == "no code any more"
