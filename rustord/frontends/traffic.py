"""Traffic: what passed through a frontend, counted for /metrics."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rustord.distribution import Distribution
from rustord.frontends.ledger import Counts


class OperationTraffic:
    """One operation's requests: how many by HTTP status, and the seconds from head to reply."""

    __slots__ = ("latency_s", "statuses")

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.latency_s = Distribution()

    def count(self, status: int, latency_s: float) -> None:
        """Count one request that has been answered."""
        self.statuses[status] += 1
        self.latency_s.observe(latency_s)


class ExportTraffic:
    """What connections to exports of one kind have done; ``connections`` are open now."""

    __slots__ = ("connections", "connections_total", "errors", "read_bytes", "requests", "written_bytes")

    def __init__(self) -> None:
        self.connections = 0
        self.connections_total = 0
        self.requests = 0
        self.errors = 0
        """Requests that were answered with an error."""
        self.read_bytes = 0
        self.written_bytes = 0

    def add(self, counts: Counts) -> None:
        """Add what one connection has done, which may be open."""
        self.connections_total += 1
        self.requests += counts.requests
        self.errors += counts.errors
        self.read_bytes += counts.read_bytes
        self.written_bytes += counts.written_bytes


class SlowRequest(NamedTuple):
    """A request that took long. Times are in seconds, ``at`` since 1970.

    ``phases_s`` is where they went: ``body`` until the last byte of the body had arrived and, of a change, the phases
    of its cycle (see `ObjectStore.phase_s`) with ``wait`` for what lay before it.
    """

    at: float
    method: str
    target: str
    status: int
    taken_s: float
    phases_s: Mapping[str, float]

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases_s.items())
        return f"{self.method} {self.target} took {self.taken_s:.3f} s ({phases}), status {self.status}"


SLOW_REQUEST_COUNT = 32


class Traffic:
    """Plain numbers, changed by the event loop alone and read by anybody at any time."""

    def __init__(self, operations: Iterable[str]) -> None:
        self.operations = {operation: OperationTraffic() for operation in operations}
        """By the operation's id."""
        self.connections = 0
        """Open now."""
        self.connections_total = 0
        self.connections_refused = 0
        """Beyond the limit."""
        self.requests_refused: Counter[int] = Counter()
        """Requests that made no operation (malformed, unknown, forbidden, too slow), by HTTP status."""
        self.received_bytes = 0
        """Bodies of requests."""
        self.sent_bytes = 0
        """Bodies of replies."""
        self.uploads = 0
        """Large bodies under way or waiting for their turn."""
        self.downloads = 0
        """Large replies under way or waiting for their turn."""
        self.broken_off = 0
        """Uploads and downloads whose peer vanished or that failed in the middle."""
        self.slow: deque[SlowRequest] = deque(maxlen=SLOW_REQUEST_COUNT)
        """The last ones, the newest at the end."""
