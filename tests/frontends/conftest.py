"""What the tests of the frontends share: served stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rustord.frontends.peer import Peer
from rustord.wire.api import Role
from rustord.wire.limits import Limits
from tests.daemon import make_pool
from tests.frontends.served import Served

Serve = Callable[..., Served]


@pytest.fixture
def serve(make_image: Callable[[int], Path], disk_path: Path) -> Iterator[Serve]:
    """Serves new pools: `serve(limits=Limits(idle_s=1))`."""
    started: list[Served] = []

    def start(
        *,
        size: int = 64 << 20,
        limits: Limits | None = None,
        roles: Callable[[Peer], Role] | None = None,
        slow_request_s: float = 60.0,
    ) -> Served:
        image = make_image(size)
        make_pool(image)
        path = disk_path / f"{len(started)}.sock"
        started.append(Served(image, path, limits or Limits(), roles, slow_request_s))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture
def served(serve: Serve) -> Served:
    """A new pool of 64 MiB, served with the usual limits."""
    return serve()
