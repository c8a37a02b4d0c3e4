"""Task: long work beside the writer, such as a scrub, on a thread of its own: paced, and stopped when asked to.

What it has done it says itself; what it has to remember over a restart it keeps itself.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rustord.errors import RustordError

log = logging.getLogger(__name__)

State = Literal["idle", "running", "stopped", "done", "failed"]


class Stopped(Exception):
    """Raised by `Task.pace` within the work when it is to end before it is done."""


class Task:
    """``work`` is called with the Task itself, and says how far it is in ``done`` and ``total``, in bytes.

    ``state`` is "idle" before the first start, then "running", and in the end "done", "stopped", or "failed"; then
    ``error`` says why. Any thread may call any method but `pace`, which is for the work.
    """

    def __init__(self, name: str, work: Callable[[Task], None], *, bytes_s_max: int = 0) -> None:
        self.name = name
        self.bytes_s_max = bytes_s_max
        """How fast it may be; 0 for as fast as can be. May be changed at any time."""
        self.state: State = "idle"
        self.error = ""
        self.done = 0
        self.total = 0
        self._work = work
        self._due = 0.0
        self._stopping = threading.Event()
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    def start(self) -> bool:
        """Begin; False if it runs already."""
        with self._changing:
            if self.is_running:
                return False
            self.state, self.error, self.done, self.total = "running", "", 0, 0
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
            return True

    def stop(self, timeout_s: float = 60.0) -> bool:
        """Let it end soon, and wait for that; whether it has ended within ``timeout_s``."""
        self._stopping.set()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; whether it has ended within ``timeout_s``."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return not self.is_running

    def pace(self, length: int) -> None:
        """Called by the work after each ``length`` bytes: waits as long as that is too fast. Raises Stopped."""
        now = time.monotonic()
        rate = self.bytes_s_max
        self._due = max(self._due, now) + (length / rate if rate else 0.0)
        if self._stopping.wait(self._due - now):
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Called by the work that has to wait for something. Raises Stopped."""
        if self._stopping.wait(seconds):
            raise Stopped

    def _run(self) -> None:
        state: State = "failed"
        try:
            self._work(self)
            state = "done"
        except Stopped:
            state = "stopped"
        except RustordError as error:
            self.error = str(error)
            log.error("%s failed: %s", self.name, error)
        except Exception as error:
            self.error = f"an internal error: {error!r}"
            log.exception("%s failed", self.name)
        self.state = state


def keep_note(file: Path, note: Any) -> None:
    """Keep in ``file``, as JSON, what some work has to remember over a restart. That it cannot be kept is logged."""
    new = file.with_name(file.name + ".new")
    try:
        new.write_text(json.dumps(note))
        os.replace(new, file)
    except OSError as error:
        log.warning("what is under way cannot be noted in %s: %s", file, error)
