"""A Debian machine to test on: systemd, udevd and journald run in it as anywhere, and all of it is thrown away after.

systemd-nspawn boots it in a second from a root filesystem that mmdebstrap makes once and the user's cache keeps. It has
devices of its own, and a network of its own with nobody else in it; what it changes goes into memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "mount", "util-linux", "e2fsprogs", "curl"),
    *("python3", "python3-systemd", "python3-pyudev", "python3-xxhash", "python3-click", "python3-pluggy"),
    *("python3-lmdb", "python3-btrees", "python3-msgpack", "python3-prometheus-client", "python3-rich"),
)
"""What is on the machine: the dependencies of rustord, since it reaches no mirror, and what tests use."""

# Documentation takes most of the time that unpacking takes. systemd-sysctl would change the host's settings.
HOOK = """
echo rustord-test > "$1/etc/hostname"
rm -f "$1/etc/machine-id"
echo uninitialized > "$1/etc/machine-id"
for unit in systemd-sysctl.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer; do
    ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
"""
EXCLUDED = ("/usr/share/locale/*", "/usr/share/doc/*")
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

SECONDS_MAX = 100
LOOP_MAJOR = "7"
LOOP_NUMBERS = range(200, 1 << 16)
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81


def lacking() -> str:
    """What keeps us from booting a container; empty if nothing does."""
    needed = {"systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "losetup": "mount"}
    missing = [package for program, package in needed.items() if shutil.which(program) is None]
    if os.geteuid() != 0:
        return f"we run as uid {os.geteuid()}; `sudo ./dev test` runs it"
    return f"`apt-get install {' '.join(missing)}` brings what is missing" if missing else ""


def cache() -> Path:
    """Where that is kept which takes long to make."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rustord-tests"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def root_filesystem() -> Path:
    """The directory with the machine's files, which nobody changes. Made when it is needed first; takes a minute."""
    recipe = hashlib.sha256(repr((SUITE, PACKAGES, HOOK, EXCLUDED)).encode()).hexdigest()[:12]
    made = cache() / f"{SUITE}-{recipe}"
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for stale in cache().glob(f"{SUITE}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            bootstrap(unfinished := cache() / f"{SUITE}-unfinished", PACKAGES)
            unfinished.rename(made)
    return made


def bootstrap(directory: Path, packages: Sequence[str]) -> None:
    """Make a minimal Debian with some packages in a new directory."""
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    command += ['--aptopt=Acquire::Languages "none"', f"--customize-hook={HOOK}", SUITE, str(directory)]
    if SOURCES.exists():
        command.append(str(SOURCES))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


class LoopNumber:
    """A loop device that nobody else uses, known by its number; there from `add` to `remove`, with all uevents."""

    def __init__(self) -> None:
        while True:
            self.number = random.choice(LOOP_NUMBERS)
            with suppress(FileExistsError):
                self.add()
                break

    @property
    def path(self) -> Path:
        return Path(f"/dev/loop{self.number}")

    def add(self) -> None:
        """Raises FileExistsError if it is there already, whosever it is."""
        self._control(LOOP_CTL_ADD)

    def remove(self) -> None:
        """Detach it, if it is attached, and let it vanish."""
        subprocess.run(["losetup", "--detach", self.path], capture_output=True)
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            try:
                return self._control(LOOP_CTL_REMOVE)
            except OSError:  # EBUSY until the last user of a device that was detached has closed it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def attach(self, image: Path) -> None:
        """Let it have the content of an image file."""
        subprocess.run(["losetup", self.path, image], check=True)

    def detach(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)

    def _control(self, request: int) -> None:
        control = os.open("/dev/loop-control", os.O_RDWR)
        try:
            fcntl.ioctl(control, request, self.number)
        finally:
            os.close(control)


class Container:
    """A machine that has booted. ``files`` is its root directory, for the host to read and write."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._loops: list[LoopNumber] = []
        self.files = Path(f"/proc/{leader}/root")

    def command(self, *command: str | Path, user: str = "") -> list[str]:
        """What the host has to run so that a command runs on the machine, as root or another of its users."""
        enter = ["nsenter", f"--target={self._leader}", "--all", "--", "env", "-i", "--chdir=/", f"PATH={PATH}"]
        if user:
            enter += ["runuser", "--user", user, "--"]
        return [*enter, *map(str, command)]

    def run(self, *command: str | Path, user: str = "", **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine; the keywords are those of `subprocess.run`."""
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 2 * SECONDS_MAX}
        if "input" not in keywords:
            settings["stdin"] = subprocess.DEVNULL
        return subprocess.run(self.command(*command, user=user), **(settings | keywords))

    def ok(self, *command: str | Path, **keywords: Any) -> str:
        """What a command printed, which must have ended well."""
        done = self.run(*command, **keywords)
        said = f"{done.stdout}\n{done.stderr}\n{self.journal()}"
        assert done.returncode == 0, f"{command} ended with status {done.returncode}\n{said}"
        return done.stdout

    def sh(self, script: str, **keywords: Any) -> str:
        """What a shell script printed; the first command that fails ends it, and the test."""
        return self.ok("sh", "-euc", script, **keywords)

    def until(self, met: Callable[[], object], what: str) -> None:
        """Waits until it is so, which must be soon."""
        deadline = time.monotonic() + SECONDS_MAX
        while not met():
            assert time.monotonic() < deadline, f"waited in vain until {what}\n{self.journal()}"
            time.sleep(0.02)

    def journal(self) -> str:
        """The end of what the machine has logged."""
        return self.run("journalctl", "--boot", "--no-pager", "--output=short-precise", "--lines=60").stdout

    def new_loop(self, image: Path) -> LoopNumber:
        """A loop device with the content of an image file, for this machine alone."""
        loop = LoopNumber()
        self._loops.append(loop)
        self._make_node(loop)
        loop.attach(image)
        return loop

    def unplug(self, loop: LoopNumber) -> None:
        """Let a device that nobody has open vanish."""
        self.ok("rm", loop.path)  # which the kernel does where /dev is its own; to open it would bring the device back
        loop.remove()

    def plug(self, loop: LoopNumber, image: Path) -> None:
        """Let it appear again."""
        self._make_node(loop)
        loop.add()
        loop.attach(image)

    def _make_node(self, loop: LoopNumber) -> None:
        self.ok("mknod", "--mode=660", loop.path, "b", LOOP_MAJOR, str(loop.number))
        self.ok("chgrp", "disk", loop.path)

    def remove_loops(self) -> None:
        for loop in self._loops:
            loop.remove()


@contextmanager
def booted(root: Path, *options: str) -> Iterator[Container]:
    """A machine with the files of ``root``; more ``options`` are for systemd-nspawn."""
    with tempfile.TemporaryDirectory(prefix="rustord-nspawn-", dir="/var/tmp") as directory:
        console = Path(directory, "console")
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notifications, console.open("wb") as output:
            notifications.bind(f"{directory}/notify")
            notifications.settimeout(0.1)
            nspawn = subprocess.Popen(
                _nspawn(root, *options),
                env={**os.environ, **_ENVIRONMENT, "NOTIFY_SOCKET": f"{directory}/notify"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            container = None
            try:
                leader = _wait_for_boot(nspawn, notifications, console)
                container = Container(leader)
                yield container
                os.kill(leader, signal.SIGRTMIN + 4)  # power off
                nspawn.wait(SECONDS_MAX)
            finally:
                nspawn.kill()
                nspawn.wait()
                if container is not None:
                    container.remove_loops()


# DeviceAllow= needs the unified hierarchy and BPF, udevd a /sys that it may write.
_ENVIRONMENT = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}


def _nspawn(root: Path, *options: str) -> list[str]:
    # If the tests are killed, the machine goes too.
    command = ["setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", f"--directory={root}", "--boot"]
    name = f"rustord-test-{os.getpid()}-{random.getrandbits(24)}"
    command += ["--volatile=overlay", "--private-network", f"--machine={name}"]
    command += ["--register=no", "--keep-unit", "--notify-ready=yes", "--console=pipe", "--kill-signal=SIGRTMIN+4"]
    return [*command, "--capability=CAP_BPF,CAP_PERFMON", "--system-call-filter=bpf", *options]


def _wait_for_boot(nspawn: subprocess.Popen[bytes], notifications: socket.socket, console: Path) -> int:
    """The machine's first process, seen from outside, once everything on it has started."""
    leader = 0
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline and nspawn.poll() is None:
        with suppress(TimeoutError):
            for assignment in notifications.recv(4096).decode().splitlines():
                name, _, value = assignment.partition("=")
                if name == "X_NSPAWN_LEADER_PID":
                    leader = int(value)
                if assignment == "READY=1" and leader:
                    return leader
    raise AssertionError(f"the container does not boot:\n{console.read_text(errors='replace')[-4000:]}")
