"""Discovery: which block devices are there, which of them a rule means, and what has changed.

Events are hints, enumeration is the truth: whatever an event says, or however many were lost, the devices are listed
again and compared with the list before. So nothing here depends on the order, the content or the arrival of events.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, TypeAlias

import pyudev

from rustord.errors import DeviceError

_UDEVD_SOCKET = Path("/run/udev/control")
_BY_ID = Path("/dev/disk/by-id")
_RECEIVE_BYTES = 8 << 20  # about 10,000 events; more lost ones cost nothing but the certainty that none was
_EVENT_BYTES_MAX = 1 << 16
_SECTOR_BYTES = 512  # of sysfs, whatever the device's own are


@dataclass(frozen=True)
class Candidate:
    """A block device that could belong to a pool: it has a node, and a size."""

    path: str
    """Its node, such as /dev/sda."""
    by_id: tuple[str, ...]
    """Its links in /dev/disk/by-id; none where no udevd makes them."""
    serial: str
    model: str
    size: int
    """In bytes."""
    devnum: int
    diskseq: int
    """The kernel's count of disks: another one tells that the disk was exchanged behind the same name. 0: unknown."""


class DeviceRule(Protocol):
    """What a device must be like. None, 0 or an empty string asks for nothing."""

    @property
    def path(self) -> str | None:
        """A name in /dev, links included, or a pattern of one."""

    @property
    def serial(self) -> str | None:
        """A serial number or a pattern."""

    @property
    def model(self) -> str | None:
        """A model or a pattern."""

    @property
    def size_min(self) -> int | None:
        """In bytes."""

    @property
    def size_max(self) -> int | None:
        """In bytes."""


@dataclass(frozen=True)
class DeviceAdded:
    candidate: Candidate


@dataclass(frozen=True)
class DeviceRemoved:
    candidate: Candidate


@dataclass(frozen=True)
class DeviceChanged:
    """The same device with another size, or under other names."""

    candidate: Candidate
    before: Candidate


Change: TypeAlias = DeviceAdded | DeviceRemoved | DeviceChanged


def matches(rule: DeviceRule, candidate: Candidate) -> bool:
    """Whether the device is all that the rule asks for. A rule that asks for nothing means no device."""
    names = (candidate.path, *candidate.by_id)
    asked = []
    if rule.path:
        # A link that is not of udev's making counts, too.
        asked.append(any(fnmatchcase(name, rule.path) for name in names) or os.path.realpath(rule.path) == names[0])
    if rule.serial:
        asked.append(fnmatchcase(candidate.serial, rule.serial))
    if rule.model:
        asked.append(fnmatchcase(candidate.model, rule.model))
    if rule.size_min:
        asked.append(candidate.size >= rule.size_min)
    if rule.size_max:
        asked.append(candidate.size <= rule.size_max)
    return bool(asked) and all(asked)


def candidates() -> list[Candidate]:
    """All block devices that are there now, by path.

    Serial and model come from udev's database, or from sysfs where there is none (many kinds of disk have none there).
    Devices without a node are left out, as a container sees them, and those of size 0: empty drives, unused loops.
    """
    links = _by_id_links()
    found = (_candidate(device, links) for device in pyudev.Context().list_devices(subsystem="block"))
    return sorted((candidate for candidate in found if candidate is not None), key=lambda candidate: candidate.path)


class Watcher:
    """Follows the devices that come, go and change.

    Listens to udevd where one runs, since the links are made only when it is done with a device, and to the kernel
    where none does. Belongs to one thread. Raises DeviceError if it may not listen at all.
    """

    def __init__(self, *, receive_bytes: int = _RECEIVE_BYTES) -> None:
        self._known: dict[tuple[int, int], Candidate] | None = None
        try:
            self._socket = _listen("udev" if _UDEVD_SOCKET.exists() else "kernel", receive_bytes)
        except OSError as error:
            raise DeviceError(
                f"devices that come and go cannot be followed: {error.strerror}",
                hint="allow this service netlink sockets (systemd: RestrictAddressFamilies=AF_NETLINK)",
            ) from error

    def fileno(self) -> int:
        """Readable when `wait` has something to look at; for an event loop, which calls ``wait(0)`` then."""
        return self._socket.fileno()

    def wait(self, timeout: float | None = None) -> list[Change]:
        """What has changed since the last call; the first call returns all devices as added, at once.

        Waits for the next event, for ``timeout`` seconds at most; then it enumerates even without one. May return
        nothing. Removals come first, so that a device that was exchanged is let go before it is opened anew.
        """
        if self._known is not None:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if poll.poll(None if timeout is None else timeout * 1000) and not self._drain():
                return []
        return self._compare()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drain(self) -> bool:
        """Reads all events that have arrived; whether any is about a block device, or one was lost."""
        about_us = False
        while True:
            try:
                # The kernel's own events come unfiltered. Both kinds name the subsystem in the same way.
                about_us |= b"SUBSYSTEM=block\0" in self._socket.recv(_EVENT_BYTES_MAX)
            except BlockingIOError:
                return about_us
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                about_us = True

    def _compare(self) -> list[Change]:
        before = self._known or {}
        now = {(candidate.devnum, candidate.diskseq): candidate for candidate in candidates()}
        self._known = now
        return [
            *(DeviceRemoved(before[key]) for key in before.keys() - now.keys()),
            *(DeviceChanged(now[key], before[key]) for key in before.keys() & now.keys() if now[key] != before[key]),
            *(DeviceAdded(candidate) for key, candidate in now.items() if key not in before),
        ]


def _listen(source: str, receive_bytes: int) -> socket.socket:
    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    monitor.filter_by("block")
    with suppress(OSError):  # without CAP_NET_ADMIN the default must do
        monitor.set_receive_buffer_size(receive_bytes)
    monitor.start()
    # pyudev gives up for good when events were lost (its poll() takes the error for the end), and what the events say
    # is of no interest here, so they are read from the socket itself.
    listening = socket.socket(fileno=os.dup(monitor.fileno()))
    listening.setblocking(False)
    return listening


def _candidate(device: pyudev.Device, links: dict[str, list[str]]) -> Candidate | None:
    node, sysfs = device.device_node, Path(device.sys_path)
    size = int(_text(sysfs / "size") or 0) * _SECTOR_BYTES
    if not size or node is None or not _is_node(node, device.device_number):
        return None
    disk = sysfs.parent if (sysfs / "partition").exists() else sysfs
    properties = device.properties
    return Candidate(
        path=node,
        by_id=tuple(sorted(links.get(node, ()))),
        serial=properties.get("ID_SERIAL_SHORT") or _text(disk / "serial") or _text(disk / "device" / "serial"),
        model=properties.get("ID_MODEL") or _text(disk / "device" / "model"),
        size=size,
        devnum=device.device_number,
        diskseq=int(_text(disk / "diskseq") or 0),
    )


def _is_node(path: str, devnum: int) -> bool:
    """Whether the node is there, and of that device: a container has some of the host's, or its own."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == devnum


def _by_id_links() -> dict[str, list[str]]:
    """The links of each node. They are read from the directory, since udev's database can be older than it."""
    links: dict[str, list[str]] = {}
    for link in _links():
        links.setdefault(os.path.realpath(link), []).append(os.fspath(link))
    return links


def _links() -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from _BY_ID.iterdir()


def _text(attribute: Path) -> str:
    """A file of sysfs; empty if the device has no such attribute, or is gone."""
    try:
        return attribute.read_text(errors="replace").strip()
    except OSError:
        return ""
