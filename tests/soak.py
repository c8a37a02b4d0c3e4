"""The load and soak test: `./dev soak --minutes 5`.

Several clients put, replace, read, list and delete Objects of all sizes on one daemon, and compare every byte that they
read with what they stored. At the end, and again after a crash and a restart, everything is there and nothing else;
when it has been deleted, all is free; and the daemon has neither more memory nor more descriptors than it settled at.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from benchmarks.processes import memory
from rustord.client import Client
from rustord.errors import NotFound
from tests.daemon import Daemon, make_pool, until

MIB = 1 << 20
DEVICE_BYTES = 512 * MIB
DEVICE_COUNT = 2
CLIENT_COUNT = 6
LIVE_BYTES_MAX = 40 * MIB
"""What one client has stored at any time, so that there is always room."""
NAME_COUNT = 40
SAMPLES = 60
MEMORY_SLACK_MIB = 24.0
DESCRIPTOR_SLACK = 4


class Stored(NamedTuple):
    """An Object by what its data is made of."""

    seed: int
    size: int

    @property
    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.size)


class Sample(NamedTuple):
    memory_mib: float
    descriptors: int


class Mixed:
    """One client and what it has stored. Its work is drawn from a seed; how it interleaves with others is not."""

    def __init__(self, socket: Path, number: int, seed: int) -> None:
        self._client = Client(socket)
        self._number = number
        self._rng = random.Random(seed * 1000 + number)
        self.objects: dict[str, Stored] = {}
        self.names: dict[str, Stored] = {}
        self.counts: Counter[str] = Counter()
        self.byte_count = 0
        self._actions = [self._put] * 30 + [self._replace] * 15 + [self._delete] * 15
        self._actions += [self._get] * 30 + [self._get_range] * 15 + [self._list]

    def run(self, until: float, failed: threading.Event) -> None:
        """Work until a monotonic time, or until another one has failed."""
        try:
            while time.monotonic() < until and not failed.is_set():
                full = sum(stored.size for stored in self.objects.values()) > LIVE_BYTES_MAX
                action = self._delete if full else self._rng.choice(self._actions)
                action()
                self.counts[action.__name__.strip("_")] += 1
        except BaseException:
            failed.set()
            raise

    def _new(self) -> Stored:
        scale = self._rng.choice((1, 100, 4096, 4096, 4096, 20_000, 65_536, 300_000, 6 * MIB))
        return Stored(self._rng.getrandbits(48), self._rng.randrange(scale + 1))

    def _put(self) -> None:
        stored = self._new()
        self.objects[self._client.put(stored.data).uuid] = stored

    def _replace(self) -> None:
        name = f"client {self._number}/{self._rng.randrange(NAME_COUNT)}"
        stored = self._new()._replace(size=self._rng.randrange(100_000))
        self._client.put(stored.data, name=name, attributes={"color": "blue"})
        self.names[name] = stored

    def _any(self) -> tuple[str, Stored] | None:
        table = self._rng.choice((self.objects, self.names))
        return self._rng.choice(list(table.items())) if table else None

    def _get(self) -> None:
        if found := self._any():
            self.check(*found)

    def check(self, key: str, stored: Stored) -> None:
        data = self._client.get(key)
        assert data == stored.data, f"{key} has other bytes than were stored"
        self.byte_count += len(data)

    def _get_range(self) -> None:
        found = self._any()
        if found and (size := found[1].size):
            start = self._rng.randrange(size)
            end = self._rng.randrange(start + 1, size + 1)
            data = self._client.get(found[0], start=start, end=end)
            assert data == found[1].data[start:end], f"{found[0]} has other bytes from {start} to {end}"
            self.byte_count += len(data)

    def _delete(self) -> None:
        if self.objects:
            uuid = self._rng.choice(list(self.objects))
            self._client.delete(uuid)
            del self.objects[uuid]
            with pytest.raises(NotFound):
                self._client.stat(uuid)

    def _list(self) -> None:
        listed = {entry.name for entry in self._client.names(f"client {self._number}/")}
        assert listed == self.names.keys()

    def check_all(self) -> None:
        for key, stored in (*self.objects.items(), *self.names.items()):
            self.check(key, stored)
        self._list()

    def close(self) -> None:
        self._client.close()

    def delete_all(self) -> None:
        for key in (*self.objects, *self.names):
            self._client.delete(key)


def soak(daemon: Daemon, seconds: float, seed: int, say: Callable[[str], object] = print) -> None:
    """Load a daemon that has been started on an empty pool. Raises AssertionError for whatever is wrong."""
    with ExitStack() as opened:
        clients = [opened.enter_context(closing(Mixed(daemon.socket, number, seed))) for number in range(CLIENT_COUNT)]
        load(daemon, clients, seconds, say)
        for number in (signal.SIGTERM, signal.SIGKILL):
            check_all(daemon, clients)
            daemon.stop(number)
            daemon.start()
        check_all(daemon, clients)
        for client in clients:
            client.delete_all()
    pool = daemon.pool()
    assert (pool["objects"], pool["problems"]) == (0, []), pool
    until(lambda: daemon.pool()["free_bytes"] == pool["size_bytes"], "all is free again")
    total = sum((client.counts for client in clients), Counter[str]())
    said = ", ".join(f"{count} {action.replace('_', ' ')}" for action, count in sorted(total.items()))
    say(f"{said}; {sum(client.byte_count for client in clients) / MIB:.0f} MiB compared, all right")


def load(daemon: Daemon, clients: list[Mixed], seconds: float, say: Callable[[str], object]) -> None:
    end = time.monotonic() + seconds
    failed = threading.Event()
    samples: list[Sample] = []
    with ThreadPoolExecutor(CLIENT_COUNT) as threads:
        running = [threads.submit(client.run, end, failed) for client in clients]
        while time.monotonic() < end and not failed.is_set():
            failed.wait(seconds / SAMPLES)
            samples.append(sample(daemon))
            say(f"{samples[-1].memory_mib:.0f} MiB, {samples[-1].descriptors} descriptors")
        for each in running:
            each.result()
    check_flat(samples)


def check_all(daemon: Daemon, clients: list[Mixed]) -> None:
    for client in clients:
        client.check_all()
    assert daemon.pool()["objects"] == sum(len(client.objects) + len(client.names) for client in clients)


def sample(daemon: Daemon) -> Sample:
    assert daemon.process is not None
    pid = daemon.process.pid
    return Sample(memory(pid)["RssAnon"], len(os.listdir(f"/proc/{pid}/fd")))


def check_flat(samples: list[Sample]) -> None:
    """The last third may not need more than the middle one did; the first one warms up."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    peaks = [max(sample.memory_mib for sample in part) for part in (middle, last)]
    assert peaks[1] <= peaks[0] + MEMORY_SLACK_MIB, f"memory grows: from {peaks[0]:.0f} to {peaks[1]:.0f} MiB"
    # What is open for a moment is closed again: of descriptors it is the least that grows when some are left behind.
    least = [min(sample.descriptors for sample in part) for part in (middle, last)]
    assert least[1] <= least[0] + DESCRIPTOR_SLACK, f"descriptors leak: from {least[0]} to {least[1]}"


@click.command()
@click.option("--minutes", type=click.FloatRange(0.01), default=5.0, show_default=True)
@click.option("--seed", type=int, default=lambda: random.SystemRandom().randrange(1 << 32))
@click.option("--config", default="", help="Settings of the daemon, as TOML.")
@click.argument("devices", nargs=-1, type=click.Path(path_type=Path))
def main(minutes: float, seed: int, config: str, devices: tuple[Path, ...]) -> None:
    """Load a daemon for a while and compare every byte. DEVICES are blank; without any, image files are made."""
    with tempfile.TemporaryDirectory(prefix="rustord-soak-", dir="/var/tmp") as directory:
        if not devices:
            devices = tuple(Path(directory, f"device{number}.img") for number in range(DEVICE_COUNT))
            for device in devices:
                device.touch()
                os.truncate(device, DEVICE_BYTES)
        print(f"seed {seed}, on {', '.join(map(str, devices))}")
        make_pool(*devices)
        daemon = Daemon(Path(directory, "daemon"), devices, config)
        try:
            soak(daemon.start(), 60 * minutes, seed)
        except BaseException:
            print(daemon.log[-4000:], file=sys.stderr)
            raise
        finally:
            daemon.end()


if __name__ == "__main__":
    main()
