"""What all tests share: image files, loop devices, a plain user, and a seed that can be repeated.

In CI (`CI=true`) a test that is skipped has failed: there, everything that can be tested is.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

import rustord
from rustord.objectstore import ObjectStore
from tests import container as containers
from tests import faultydisk
from tests.container import Container
from tests.daemon import Daemon, make_pool
from tests.simulation import Simulation
from tests.zoo import Zoo

MIB = 1 << 20
_BLKROSET = 0x125D
# pytest must not see it: in CI it prints whole differences, and takes minutes to find those of large values.
IN_CI = os.environ.pop("CI", "").lower() == "true"
LOOP_FIXTURES = {"loop_device", "make_loop", "faulty_loop", "container"}
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# mkfs and its like are there, too, which the PATH of a plain user often lacks.
os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# Examples share two cores with servers and flushes, so how long one takes says nothing.
hypothesis.settings.register_profile(
    "rustord", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("rustord")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--seed", type=int, help="the seed of a run to repeat (default: a new one)")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)  # what `pytest_configure_node` gave us, if pytest-xdist started us
    config.option.in_ci = worker["in_ci"] if worker else IN_CI
    if worker is not None:
        config.option.seed = worker["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1 << 32)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; what we start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.option.seed
    node.workerinput["in_ci"] = IN_CI


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (repeat with --seed {config.option.seed})"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if LOOP_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("root")
        if "debian" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))  # the first one may have to make the root filesystem
    if not config.option.long:
        later = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]
    items.sort(key=_takes_less)  # so that no worker begins with what takes long when the others are done


def _takes_less(item: pytest.Item) -> tuple[bool, bool]:
    return (item.path.name != "test_guest.py", item.path.parent.name not in ("e2e", "crash"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and (lacking := _lacking_for_root()):
        pytest.skip(f"this test needs root and loop devices: {lacking}")


def _lacking_for_root() -> str:
    if os.geteuid() != 0:
        return f"we run as uid {os.geteuid()}; `sudo ./dev test` runs it"
    if not os.path.exists("/dev/loop-control"):
        return "/dev/loop-control is absent; `modprobe loop` brings it, or give it to this container"
    if shutil.which("losetup") is None:
        return "there is no losetup; `apt-get install mount` brings it"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _skipped_is_failed(item.config, item.nodeid, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _skipped_is_failed(collector.config, collector.nodeid, (yield))


def _skipped_is_failed(config: pytest.Config, nodeid: str, report: Report) -> Report:
    if config.option.in_ci and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{nodeid} was skipped, and in CI nothing may be: {reason}"
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for `random.Random`; the report of a failing test tells it."""
    chosen: int = request.config.getoption("seed")
    request.node.add_report_section("setup", "seed", f"repeat with --seed {chosen}")
    return chosen


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a disk: tmp_path, unless that is in memory."""
    if _filesystem_of(tmp_path) not in ("tmpfs", "ramfs"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-") as directory:
        yield Path(directory)


def _filesystem_of(path: Path) -> str:
    stat = ["stat", "--file-system", "--format=%T", os.fspath(path)]
    return subprocess.run(stat, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def make_image(disk_path: Path) -> Callable[[int], Path]:
    """Makes image files: `make_image(64 << 20)` is the path of a new, sparse one of that many bytes."""
    made = 0

    def make(size: int = 64 * MIB) -> Path:
        nonlocal made
        path = disk_path / f"image{made}.img"
        made += 1
        with path.open("xb") as file:
            file.truncate(size)
        return path

    return make


@pytest.fixture
def image(make_image: Callable[[int], Path]) -> Path:
    """A sparse image file of 64 MiB."""
    return make_image(64 * MIB)


@pytest.fixture
def store(image: Path) -> Iterator[ObjectStore]:
    """A new pool on an image file, opened as a library."""
    make_pool(image)
    with rustord.open(image) as opened:
        yield opened


class LoopDevices:
    """Attaches image files as loop devices.

    Each is held by an open descriptor and marked to go away with the last one (that is what detaching a device
    that is in use does), so that even a test run that is killed leaves none behind.
    """

    def __init__(self, make_image: Callable[[int], Path]) -> None:
        self._make_image = make_image
        self._held: dict[Path, tuple[Path, int]] = {}

    def __call__(self, size: int = 64 * MIB, sector_size: int = 512) -> Path:
        """The path of a new loop device of `size` bytes with logical blocks of `sector_size` bytes."""
        return self.attach(self._make_image(size), sector_size)

    def attach(self, image: Path, sector_size: int = 512) -> Path:
        """The path of a new loop device over an image file."""
        attach = ["losetup", "--find", "--show", "--sector-size", str(sector_size), os.fspath(image)]
        device = Path(subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip())
        # Write protection stays with the number of a loop device, for whoever gets it next.
        subprocess.run(["blockdev", "--setrw", device], check=True)
        descriptor = os.open(device, os.O_RDONLY)
        subprocess.run(["losetup", "--detach", device], check=True)
        self._held[device] = (image, descriptor)
        return device

    def image(self, device: Path) -> Path:
        """The image file behind a device."""
        return self._held[device][0]

    def detach(self, device: Path) -> None:
        """Lets a device go. It is gone when nobody else has it open."""
        _, descriptor = self._held.pop(device)
        with suppress(OSError):  # who gets this number next may not be one of us
            fcntl.ioctl(descriptor, _BLKROSET, struct.pack("i", 0))
        os.close(descriptor)

    def detach_all(self) -> None:
        for device in list(self._held):
            self.detach(device)


@pytest.fixture
def make_loop(make_image: Callable[[int], Path]) -> Iterator[LoopDevices]:
    """Makes loop devices: `make_loop(64 << 20, sector_size=4096)` is the path of a new one."""
    devices = LoopDevices(make_image)
    yield devices
    devices.detach_all()


@pytest.fixture
def loop_device(make_loop: LoopDevices) -> Path:
    """A loop device of 64 MiB."""
    return make_loop(64 * MIB)


class FaultyLoop:
    """A loop device of 16 MiB over a `FaultyDisk`, which nbdfuse shows as a file."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory / "faulty"
        self._mount = self._directory / "disk"
        self._directory.mkdir()
        self._mount.touch()
        with (medium := self._directory / "medium").open("xb") as file:
            file.truncate(16 * MIB)
        server = [sys.executable, faultydisk.__file__, self._directory, medium]
        self._server = stack.enter_context(_running(*server, stdin=subprocess.PIPE))
        _until((self._directory / "socket").exists)
        stack.enter_context(_running("nbdfuse", self._mount, "--unix", self._directory / "socket"))
        stack.callback(_run, "umount", "--lazy", self._mount)
        _until(lambda: self._mount.stat().st_size > 0)
        self.path = Path(_run("losetup", "--find", "--show", "--direct-io=on", self._mount))
        stack.callback(_run, "losetup", "--detach", self.path)

    @contextmanager
    def failing(self, *operations: str) -> Iterator[None]:
        """What reaches the device now gets EIO: all of it, or these of "read", "write" and "flush".

        A write reaches it when the page cache is written back, so it is a flush that fails. What the page cache holds
        is not read from the device; `forget` empties it.
        """
        switches = [self._directory / f"fail-{operation}" for operation in operations or faultydisk.OPERATIONS]
        for switch in switches:
            switch.touch()
        try:
            yield
        finally:
            for switch in switches:
                switch.unlink()

    def forget(self) -> None:
        """Write back what the page cache holds of the device, and drop it."""
        _run("blockdev", "--flushbufs", self.path)

    def die(self) -> None:
        """Everything gets EIO from now on, and what was not flushed is lost."""
        self._server.kill()
        self._server.wait(10)


@pytest.fixture
def faulty_loop(disk_path: Path) -> Iterator[FaultyLoop]:
    """A loop device of 16 MiB; `with faulty_loop.failing():` all I/O of `faulty_loop.path` is answered with EIO."""
    if shutil.which("nbdfuse") is None:
        pytest.skip("there is no nbdfuse; `apt-get install libnbd-bin fuse3` brings it")
    with ExitStack() as stack:
        yield FaultyLoop(disk_path, stack)


def _run(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def _running(*command: str | os.PathLike[str], stdin: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


class PlainUser:
    """Somebody without rights: `nobody` when we are root, else ourselves."""

    def __init__(self, directory: Path) -> None:
        self.uid, self.gid = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        self.directory = directory
        os.chown(directory, self.uid, self.gid)

    @property
    def identity(self) -> dict[str, Any]:
        """The keywords that make `subprocess.run` and `subprocess.Popen` start a process as this user."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if os.geteuid() == 0 else {}

    def run(self, *command: str | os.PathLike[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command as this user, in his directory unless said otherwise."""
        settings: dict[str, Any] = {"cwd": self.directory, "capture_output": True, "text": True}
        return subprocess.run(command, **(settings | self.identity | keywords))


@pytest.fixture
def plain_user() -> Iterator[PlainUser]:
    """A user without rights, with a directory of his own on a disk."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-") as directory:
        yield PlainUser(Path(directory))


@pytest.fixture(scope="session")
def zoo() -> Iterator[Zoo]:
    """An image of each kind of thing that a device may hold; nobody may change them."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rustord-test-") as directory:
        yield Zoo(Path(directory))


@pytest.fixture
def make_daemon(disk_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons: `make_daemon(image, config="...")` serves that device or image file once it is started.

    They are stopped in the end. None of them may ever have shown a traceback.
    """
    made: list[Daemon] = []

    def make(*devices: Path, config: str = "", patch: str = "") -> Daemon:
        made.append(Daemon(disk_path / f"daemon{len(made)}", devices, config, patch))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()
        print(f"--- {daemon.log_file}\n{daemon.log[-4000:]}")  # shown if the test has failed
    for daemon in made:
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def simulate(disk_path: Path) -> Iterator[Callable[..., Simulation]]:
    """Makes simulations; closes at the end what is open."""
    made: list[Simulation] = []

    def make(*sizes: int, **settings: Any) -> Simulation:
        directory = disk_path / f"pool{len(made)}"
        directory.mkdir()
        made.append(Simulation(directory, sizes or (16 << 20,), **settings))
        return made[-1]

    yield make
    for simulation in made:
        if simulation.is_open:
            simulation.close()


@pytest.fixture
def simulation(simulate: Callable[..., Simulation]) -> Simulation:
    """A pool on one device of 16 MiB."""
    return simulate()


@pytest.fixture(scope="session")
def debian() -> Path:
    """The files of a Debian machine, for `tests.container.booted`; nobody changes them."""
    if lacking := containers.lacking():
        pytest.skip(f"this test boots a container: {lacking}")
    return containers.root_filesystem()


@pytest.fixture
def container(debian: Path) -> Iterator[Container]:
    """A Debian machine that has booted, with systemd, udevd and the packages that rustord depends on."""
    with containers.booted(debian) as machine:
        yield machine
