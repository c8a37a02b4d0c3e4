"""A Debian machine with a kernel of its own: QEMU emulates it, so disks can be plugged in, and its power be cut."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests import container as containers

SECONDS_MAX = 300
"""Emulated, everything takes ten times as long."""
WIRE = "rustord.test"
"""/dev/virtio-ports/WIRE in the guest: who writes a line there goes on once it has left the machine."""

# A shell on the second serial port, driven by the test through a socket.
AGENT = """
[Service]
ExecStart=/bin/sh -c 'exec </dev/ttyS1 >/dev/ttyS1 2>/dev/null; stty raw -echo; echo AGENT-READY; exec /bin/bash'
Environment=PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
SendSIGHUP=yes
TimeoutStopSec=5
"""
UNUSED = (
    *("dbus.service", "dbus.socket", "systemd-logind.service", "systemd-user-sessions.service", "getty.target"),
    *("serial-getty@ttyS0.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *(f"modprobe@{module}.service" for module in ("configfs", "dm_mod", "drm", "efi_pstore", "fuse", "loop")),
    *("systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "e2scrub_reap.service", "dpkg-db-backup.timer"),
)
"""Units that take a quarter of the time of a boot, and that nothing of ours has to do with."""
KERNEL_LINE = (
    "console=ttyS0 root=/dev/nvme0n1 rootfstype=ext4 rw panic=-1 quiet mitigations=off nokaslr random.trust_cpu=on "
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 audit=0 apparmor=0 systemd.show_status=false"
)


def lacking() -> str:
    """What keeps us from starting a guest; empty if nothing does."""
    if shutil.which("qemu-system-x86_64") is None:
        return "`apt-get install qemu-system-x86` brings what is missing"
    return containers.lacking()


def kernel() -> Path:
    """The directory with the files of Debian's kernel for virtual machines. Fetched when it is needed first."""
    depends = subprocess.check_output(["apt-cache", "depends", "linux-image-cloud-amd64"], text=True)
    package: str = re.findall(r"Depends: (linux-image-\S+)", depends)[0]
    cache = containers.cache()
    made = cache / package
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            (unfinished := cache / "kernel-unfinished").mkdir(exist_ok=True)
            subprocess.run(["apt-get", "--quiet=2", "download", package], cwd=unfinished, check=True)
            (archive,) = unfinished.glob("*.deb")
            subprocess.run(["dpkg-deb", "--extract", archive, unfinished], check=True)
            archive.unlink()
            unfinished.rename(made)
    return made


def make_image(path: Path, work: Path, packages: Sequence[Path] = (), files: Sequence[Path] = ()) -> None:
    """A root filesystem that boots, with Debian ``packages`` and with ``files`` in /root. ``work`` is empty."""
    root = work / "root"
    subprocess.run(["cp", "--archive", "--reflink=auto", containers.root_filesystem(), root], check=True)
    (modules,) = (kernel() / "lib" / "modules").iterdir()
    (root / "usr/lib/modules").mkdir(exist_ok=True)
    subprocess.run(["cp", "--archive", modules, root / "usr/lib/modules/"], check=True)
    subprocess.run(["chroot", root, "depmod", modules.name], check=True)
    for file in (*packages, *files):
        shutil.copy(file, root / "root")
    if packages:  # in the machine that has booted, this takes minutes
        command = ["systemd-nspawn", "--quiet", f"--directory={root}", "--register=no", "--keep-unit", "--pipe"]
        command += ["--private-network", "dpkg", "--install", *(f"/root/{package.name}" for package in packages)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (root / "etc/fstab").write_text("/dev/nvme0n1 / ext4 rw,noatime 0 0\n")
    (root / "var/log/journal").mkdir(exist_ok=True)  # so that it tells of earlier boots, too
    units = root / "etc/systemd/system"
    (units / "agent.service").write_text(AGENT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants" / "agent.service").symlink_to("../agent.service")
    for unit in UNUSED:
        (units / unit).symlink_to("/dev/null")
    with path.open("wb") as image:
        image.truncate(800 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard", "-d", root, path], check=True)
    shutil.rmtree(root)


def command_line(image: Path | str, console: Path, kernel_settings: str = "") -> list[str]:
    """What boots the root filesystem in ``image``, with more settings for the kernel."""
    (vmlinuz,) = (kernel() / "boot").glob("vmlinuz-*")
    # A plain processor: what it could do beyond that is slow to emulate, and lets the kernel load modules for it.
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "qemu64,svm=off", "-smp", "2", "-m", "1024"]
    command += ["-kernel", str(vmlinuz), "-append", f"{KERNEL_LINE} {kernel_settings}"]
    command += ["-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    return [*command, "-drive", _drive("root", image), "-device", "nvme,drive=root,serial=root"]


class Guest:
    """A machine that runs, with its root filesystem in ``image`` and more disks, given by serial number.

    An image may be anything that QEMU takes for a file, as the address of an NBD export. ``told`` are the lines that
    programs on the machine have written to its wire.
    """

    def __init__(self, directory: Path, image: Path | str, disks: dict[str, Path | str]) -> None:
        directory.mkdir()
        self.told: list[str] = []
        self._console, self._buffer = directory / "console", b""
        command = command_line(image, self._console)
        command += ["-chardev", f"socket,id=agent,path={directory}/agent,server=on,wait=off"]
        command += ["-serial", "chardev:agent", "-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
        command += ["-chardev", f"socket,id=wire,path={directory}/wire,server=on,wait=off"]
        command += ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=wire,name={WIRE}"]
        for number in range(4):
            command += ["-device", f"pcie-root-port,id=port{number},chassis={number},slot={number}"]
        for number, (serial, disk) in enumerate(disks.items()):
            command += ["-drive", _drive(serial, disk)]
            command += ["-device", f"virtio-blk-pci,drive={serial},serial={serial},bus=port{number},id=disk-{serial}"]
        self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._agent = self._connect(directory / "agent")
        self._wire = self._connect(directory / "wire")
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._control = self._connect(directory / "qmp")
        self._control.settimeout(SECONDS_MAX)
        self._qmp = self._control.makefile("rw")
        self._qmp.readline()
        self.qmp("qmp_capabilities")
        self._until(b"AGENT-READY\n")
        assert self.run("false; true")[0] == 1, "what fails there would not be noticed here"

    def _connect(self, path: Path) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + SECONDS_MAX
        while connection.connect_ex(str(path)) != 0:
            assert self._qemu.poll() is None, "QEMU did not start"
            assert time.monotonic() < deadline, "QEMU makes no socket"
            time.sleep(0.05)
        return connection

    def _listen(self) -> None:
        """Note what comes over the wire, until the machine is gone."""
        with self._wire.makefile("rb") as wire, suppress(ConnectionError):
            self.told.extend(line.decode().rstrip("\n") for line in wire if line.endswith(b"\n"))

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Ask QEMU itself for something."""
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        answer = self._qmp_message("return", "error")
        assert "return" in answer, answer
        return answer["return"]

    def _qmp_message(self, *kinds: str) -> Any:
        """The next message of one of these kinds; others are passed over."""
        while True:
            message = json.loads(self._qmp.readline())
            if any(kind in message for kind in kinds):
                return message

    def _until(self, mark: bytes) -> bytes:
        self._agent.settimeout(1)
        deadline = time.monotonic() + SECONDS_MAX
        while mark not in self._buffer:
            assert time.monotonic() < deadline, self._buffer[-2000:]
            assert self._qemu.poll() is None, self._console.read_text(errors="replace")[-2000:]
            with suppress(TimeoutError):
                self._buffer += self._agent.recv(1 << 16)
        before, _, self._buffer = self._buffer.partition(mark)
        return before

    def run(self, script: str) -> tuple[int, str]:
        """The exit status of a shell script, and what it printed, on either output."""
        mark = f"DONE{time.time_ns()}"
        self._agent.settimeout(SECONDS_MAX)
        self._agent.sendall(f"( set -e; {script}\n) 2>&1 </dev/null; status=$?; echo; echo {mark}:$status:\n".encode())
        printed = self._until(f"{mark}:".encode()).decode(errors="replace").removesuffix("\n")
        return int(self._until(b":\n")), printed

    def ok(self, script: str) -> str:
        """What a shell script printed, every command of which must have ended well."""
        status, printed = self.run(script)
        assert status == 0, f"{script}\n{printed}"
        return printed

    def until(self, met: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while not met():
            assert time.monotonic() < deadline, f"waited in vain until {what}\n{self.ok('journalctl -b -n 40')}"
            time.sleep(0.5)

    def plug(self, serial: str, disk: Path | str, port: int) -> None:
        """A disk appears while the machine runs."""
        self.qmp("human-monitor-command", **{"command-line": f"drive_add 0 {_drive(serial, disk)}"})
        device = {"driver": "virtio-blk-pci", "drive": serial, "serial": serial, "bus": f"port{port}"}
        self.qmp("device_add", id=f"disk-{serial}", **device)

    def unplug(self, serial: str) -> None:
        """A disk is asked back; returns when the machine has let go of it."""
        self.qmp("device_del", id=f"disk-{serial}")
        while self._qmp_message("event").get("data", {}).get("device") != f"disk-{serial}":
            pass

    def power_cut(self) -> None:
        """The machine is gone at once. What it had told by then is known."""
        self._qemu.kill()
        self._qemu.wait()
        self._listener.join()
        for connection in (self._agent, self._qmp, self._control, self._wire):
            connection.close()

    def shut_down(self, how: str = "poweroff") -> None:
        """The machine ends as when somebody asks it to; ``how`` may be "reboot", where the next `Guest` is the boot."""
        self._agent.sendall(f"systemctl {how}\n".encode())
        self._qemu.wait(SECONDS_MAX)
        self.power_cut()


def _drive(name: str, image: Path | str) -> str:
    return f"file={image},format=raw,if=none,id={name}"
