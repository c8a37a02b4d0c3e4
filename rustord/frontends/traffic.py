"""Traffic: what passed through a frontend, counted for /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rustord.distribution import Distribution


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
