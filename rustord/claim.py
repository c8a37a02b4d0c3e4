"""Claim: is this device free, and may we take it?

A device is theirs until it is proven free. It is opened first, exclusively; then everything is looked up through that
descriptor or in sysfs under the device's number, so that nobody can slip in between looking and taking. What is on it
is read from the device itself, never from udev's database, which may be old or absent. Looking changes nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rustord.blockdevice import ImageFile, Opener, RawDevice, open_device, openers
from rustord.errors import ClaimRefused, DeviceBusy, DeviceError, FormatError
from rustord.label import DEVICE_BYTES_MIN, LABEL_BYTES, decode_label, label_offsets
from rustord.objkey import uuid_text

_MIB = 1 << 20
_BLKPG = 0x1269  # linux/blkpg.h
_BLKPG_DEL_PARTITION = 2
_ERASING_PASSES_MAX = 8  # a signature can hide another one; no device is known to need more than two passes
_PROBE_SECONDS_MAX = 60  # reading a few KiB; longer means that the device hangs
_PASSING_SECONDS = 0.2
_Device = RawDevice | ImageFile


@dataclass(frozen=True)
class Reason:
    """One reason against taking a device, and what to do about it."""

    what: str
    remedy: str
    yields_to_force: bool = False

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """What was found on a device of ``size`` bytes (0 if it cannot be opened at all)."""

    path: str
    size: int
    reasons: tuple[Reason, ...]
    """Against taking it; none if it is free."""
    erasures: tuple[str, ...]
    """What ``claim`` with force erases."""

    def require(self, *, force: bool = False) -> None:
        """Raises ClaimRefused, with every reason, unless the device may be taken."""
        if all(force and reason.yields_to_force for reason in self.reasons):
            return
        hint = "nothing on it was changed"
        if all(reason.yields_to_force for reason in self.reasons):
            hint += f"; --force would erase {', '.join(self.erasures)}"
        raise ClaimRefused(
            f"{self.path} is not proven free", reasons=[str(reason) for reason in self.reasons], hint=hint
        )


class Signature(NamedTuple):
    """What libblkid recognises: ``length`` bytes at byte ``offset``, of ``type`` ext4, LVM2_member, gpt, ..."""

    offset: int
    length: int
    type: str
    usage: str
    label: str
    uuid: str


@dataclass(frozen=True)
class _Findings:
    """All that is on a device and would have to be erased."""

    signatures: tuple[Signature, ...] = ()
    labels: tuple[int, ...] = ()
    """Offsets of the copies of a rustord label."""
    partitions: tuple[Path, ...] = ()
    """Their directories in sysfs."""
    unknown: tuple[int, ...] = ()
    """Where data begins that nothing of the above explains."""

    def erasures(self) -> Iterator[str]:
        for signature in self.signatures:
            yield f"the {signature.type} signature at byte {signature.offset}"
        if self.labels:
            yield "the label of the rustord pool"
        for partition in self.partitions:
            yield f"partition {partition.name}"
        if self != _Findings():
            yield "the first and the last MiB"


def check(path: str | os.PathLike[str]) -> Verdict:
    """Looks whether the device or image file may be taken, and changes nothing."""
    device, verdict, _ = _examine(os.fspath(path))
    if device is not None:
        device.close()
    return verdict


def claim(
    path: str | os.PathLike[str], *, force: bool = False, announce: Callable[[str], object] = lambda erasure: None
) -> RawDevice | ImageFile:
    """Takes the device: returns it open, locked and proven free.

    ``force`` erases what is on it, after ``announce`` was told each of ``Verdict.erasures``; it never takes a device
    that is in use, read-only, too small or unreadable. Raises ClaimRefused with every reason; nothing was changed
    then, unless the erasing itself failed and the error says so.
    """
    device, verdict, findings = _examine(os.fspath(path))
    try:
        verdict.require(force=force)
        assert device is not None
        for erasure in verdict.erasures:
            announce(erasure)
        if verdict.erasures:
            _erase(device, findings)
        return device
    except BaseException:
        if device is not None:
            device.close()
        raise


def require_ours(device: RawDevice | ImageFile) -> None:
    """Raises ClaimRefused if a device of a pool is somebody else's by now, who took it while no rustord held it.

    The copies of the label that he left would be enough to open the pool, and to heal the others would destroy what is
    his. Only what stands at the ends is his: between them, the journal and Objects may hold anything.
    """
    labels, _ = _labels(device)
    if not labels:
        return
    signatures, reasons = _signatures(device)
    tail = label_offsets(device.size)[2]
    foreign = [signature for signature in signatures if not _MIB <= signature.offset < tail]
    if foreign:
        reasons = [_on_it(device.path, group) for group in _by_owner(foreign)]
    if reasons and (foreign or not signatures):
        raise ClaimRefused(
            f"{device.path} bears the label of a rustord pool, and not it alone: somebody else has taken it since",
            reasons=[reason.what for reason in reasons],
            hint=f"nothing on it was changed; if it is the pool's all the same, first wipefs --all {device.path}",
        )


def _examine(path: str) -> tuple[_Device | None, Verdict, _Findings]:
    device, error = _open(path)
    refusal = [] if error is None else [Reason(error.message, error.hint)]
    if device is None:
        return None, Verdict(path, 0, tuple(refusal), ()), _Findings()
    try:
        uses = list(_uses(device))
        if uses and isinstance(error, DeviceBusy):
            refusal = []  # the uses say the same, and better
        labels, label_reasons = _labels(device)
        signatures, signature_reasons = _signatures(device)
        findings = _Findings(signatures, labels, tuple(_partitions(device)))
        reasons = [*refusal, *uses, *_size_reasons(device), *label_reasons, *signature_reasons]
        reasons += _partition_reasons(findings.partitions)
        if findings == _Findings() and (unknown := _unexplained(device)):
            findings = _Findings(unknown=unknown)
            reasons.append(_unknown(path, unknown[0]))
        verdict = Verdict(path, device.size, tuple(reasons), tuple(findings.erasures()))
    except BaseException:
        device.close()
        raise
    return device, verdict, findings


def _open(path: str) -> tuple[_Device | None, DeviceError | None]:
    """The device, exclusively; or why not, and the device as well as it can be opened to find further reasons."""
    try:
        return open_device(path), None
    except DeviceError as error:
        refusal = error
    try:
        return open_device(path, read_only=True, exclusive=False), refusal
    except DeviceError:
        return None, refusal


# -- who uses it: the kernel, told by sysfs and procfs, and other processes ------------------------------------------


def _uses(device: _Device) -> Iterator[Reason]:
    """Who uses the device or a partition of it. No force sets these aside."""
    nodes = {f"/dev/{partition.name}": partition for partition in _partitions(device)}
    if isinstance(device, RawDevice):
        nodes = {device.path: _sysfs(device), **nodes}
    names = {(node / "dev").read_text().strip(): name for name, node in nodes.items()}
    for mount in _mounts():
        for name in {names[number] for number in mount.numbers if number in names}:
            yield mount.reason(name)
    for swap in _swaps():
        if _number(swap) in names or _is_same(swap, device):
            yield Reason(f"{swap} is swap space in use", f"switch it off (swapoff {swap})")
    for name, node in nodes.items():
        for holder in sorted((node / "holders").iterdir()):
            yield _held(name, holder)
    for loop in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            backing = loop.read_text().rstrip("\n")
        except OSError:
            continue  # detached since
        if _is_same(backing, device):
            name = f"/dev/{loop.parts[3]}"
            yield Reason(f"the loop device {name} stands on {device.path}", f"detach it (losetup -d {name})")
    for writer in _writers(device):
        yield Reason(f"{writer} has {device.path} open for writing", "stop that process")


def _writers(device: _Device) -> list[Opener]:
    """Other processes that may write to the device. Who has closed it a moment later (losetup, for one, opens every
    loop device in its search for a free one) does not count."""
    writers = [opener for opener in openers(device.path) if opener.writing and opener.pid != os.getpid()]
    if not writers:
        return []
    time.sleep(_PASSING_SECONDS)
    remaining = openers(device.path)
    return [writer for writer in writers if writer in remaining]


class _Mount(NamedTuple):
    numbers: frozenset[str]
    """MAJOR:MINOR of the mounted device, in one or two ways: btrfs, for one, has a number of its own."""
    point: str
    pid: int
    """A process that sees it; 0: we do."""

    def reason(self, name: str) -> Reason:
        if not self.pid:
            return Reason(f"{name} is mounted on {self.point}", f"unmount it (umount {self.point})")
        return Reason(
            f"{name} is mounted on {self.point} in the mount namespace of process {self.pid}",
            f"unmount it there (nsenter --mount --target {self.pid} umount {self.point})",
        )


def _mounts() -> Iterator[_Mount]:
    """All mounts of all mount namespaces that we may look into, ours first; the same place is told once."""
    namespaces = {os.readlink("/proc/self/ns/mnt"): 0}
    for link in Path("/proc").glob("[0-9]*/ns/mnt"):
        try:
            namespaces.setdefault(os.readlink(link), int(link.parts[2]))
        except OSError:
            continue  # ended since, or not ours to see
    told = set()
    for pid in namespaces.values():
        try:
            lines = _lines(f"/proc/{pid or 'self'}/mountinfo")
        except OSError:
            continue
        for line in lines:
            mount = _parse_mount(line, pid)
            if (mount.numbers, mount.point) not in told:
                told.add((mount.numbers, mount.point))
                yield mount


def _parse_mount(line: str, pid: int) -> _Mount:
    """A line of mountinfo, see proc(5)."""
    fields = [_unescape(field) for field in line.split(" ")]
    source = fields[fields.index("-") + 2]
    return _Mount(frozenset((fields[2], _number(source))), fields[4], pid)


def _swaps() -> list[str]:
    return [_unescape(line.split(" ")[0]) for line in _lines("/proc/swaps")[1:]]


def _lines(path: str) -> list[str]:
    """Those of a file of the kernel. The names in it may have whatever else ends a line elsewhere."""
    return Path(path).read_bytes().decode(errors="surrogateescape").split("\n")[:-1]


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(path: str) -> str:
    """MAJOR:MINOR of a block device; empty if it is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""


def _is_same(path: str, device: _Device) -> bool:
    """Whether ``path`` names the device or image file."""
    ours = os.fstat(device.fileno())
    if stat.S_ISBLK(ours.st_mode):
        return _number(path) == f"{os.major(ours.st_rdev)}:{os.minor(ours.st_rdev)}"
    try:
        return os.path.samestat(os.stat(path), ours)
    except OSError:
        return False


def _sysfs(device: RawDevice) -> Path:
    number = os.fstat(device.fileno()).st_rdev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()


def _partitions(device: _Device) -> list[Path]:
    """The directories in sysfs of the partitions that the kernel knows on it."""
    return sorted(path.parent for path in _sysfs(device).glob("*/partition")) if isinstance(device, RawDevice) else []


def _held(name: str, holder: Path) -> Reason:
    mapped = holder / "dm" / "name"
    if mapped.exists():
        mapping = mapped.read_text().strip()
        if (holder / "dm" / "uuid").read_text().startswith("mpath-"):
            what = f"{name} is one path of the multipath device {mapping}"
            return Reason(what, f"name that instead (/dev/mapper/{mapping})")
        return Reason(
            f"{name} is held by {holder.name} ({mapping})", f"remove it (lvremove, or dmsetup remove {mapping})"
        )
    remedy = f"stop it (mdadm --stop /dev/{holder.name})" if holder.name.startswith("md") else "take it out of that"
    return Reason(f"{name} is held by {holder.name}", remedy)


# -- what is on it: read from the device itself ----------------------------------------------------------------------


def _size_reasons(device: _Device) -> list[Reason]:
    if device.size >= DEVICE_BYTES_MIN:
        return []
    return [Reason(f"{device.path} has only {device.size} bytes", f"take one of {DEVICE_BYTES_MIN} bytes at least")]


def _labels(device: _Device) -> tuple[tuple[int, ...], list[Reason]]:
    """Where labels of rustord pools are, and the reasons found while looking: those labels, unreadable blocks."""
    if device.size < DEVICE_BYTES_MIN:
        return (), []
    # What the page cache still holds says nothing about the device.
    os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found: dict[str, Reason] = {}
    offsets = []
    for offset in label_offsets(device.size):
        data = bytearray(_MIB)
        try:
            device.read(offset, [data])
            label = decode_label(memoryview(data)[:LABEL_BYTES])
        except FormatError as error:
            what = f"it bears a label of a rustord pool, but {error.message}"
        except DeviceError as error:
            found[error.message] = Reason(error.message, error.hint)
            continue
        else:
            if label is None:
                continue
            what = f'it is in the rustord pool "{label.pool_name}" (uuid {uuid_text(label.pool_uuid)})'
        offsets.append(offset)
        found[what] = Reason(what, "remove it from that pool first; --force would break that pool", True)
    return tuple(offsets), list(found.values())


def _signatures(device: _Device) -> tuple[tuple[Signature, ...], list[Reason]]:
    """What libblkid recognises on the device, and the reasons that follow.

    Two programs are asked, since each alone can miss something: wipefs lists every signature with its place, but
    blkid also says that it cannot decide between several. blkid answers "nothing" for a device that it cannot open.
    """
    listing = _probe(device, "wipefs", "--json", "--output", "OFFSET,LENGTH,TYPE,USAGE,LABEL,UUID")
    verdict = _probe(device, "blkid", "--probe", "--output", "export")
    reasons = [answer for answer in (listing, verdict) if isinstance(answer, Reason)]
    if isinstance(listing, Reason) or isinstance(verdict, Reason):
        return (), reasons
    if listing.returncode or verdict.returncode not in (0, 2, 8):
        what = f"what is on {device.path} cannot be told: {(listing.stderr or verdict.stderr).strip()}"
        return (), [Reason(what, "see whether wipefs and blkid --probe work on it")]
    signatures = _parse_wipefs(listing.stdout)
    known = {signature.type for signature in signatures}
    signatures += [Signature(0, 0, kind, "", "", "") for kind in _parse_blkid(verdict.stdout) - known]
    reasons = [_on_it(device.path, group) for group in _by_owner(signatures)]
    if verdict.returncode == 8:
        what = f"blkid cannot decide what {device.path} is, since it has the signatures of several things"
        reasons.append(Reason(what, "find out which of them it is; --force erases them all", True))
    return tuple(signatures), reasons


def _probe(device: _Device, program: str, *arguments: str) -> subprocess.CompletedProcess[str] | Reason:
    """Runs a program of util-linux on our own descriptor, so that it looks at the device that we hold."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        return Reason(f"what is on {device.path} cannot be told without {program}", "install util-linux")
    command = [path, *arguments, f"/proc/self/fd/{device.fileno()}"]
    try:
        return subprocess.run(
            command,
            pass_fds=[device.fileno()],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS_MAX,
            env={"LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired:
        return Reason(f"{program} on {device.path} hangs", "see whether the device answers at all (dmesg)")


def _parse_wipefs(listing: str) -> list[Signature]:
    # An old wipefs prints nothing at all where there is nothing.
    entries = json.loads(listing)["signatures"] if listing.strip() else []
    return [
        Signature(
            int(entry["offset"], 0),
            int(entry["length"]),
            entry["type"],
            entry["usage"] or "",
            entry["label"] or "",
            entry["uuid"] or "",
        )
        for entry in entries
    ]


def _parse_blkid(answer: str) -> set[str]:
    """The filesystem and the partition table that it found. What it says of a partition's own entry (PART_ENTRY_*)
    is no content."""
    pairs = dict(line.split("=", 1) for line in answer.splitlines() if "=" in line)
    return {pairs[key] for key in ("TYPE", "PTTYPE") if key in pairs}


def _by_owner(signatures: Iterable[Signature]) -> list[list[Signature]]:
    """One list for each thing that is on the device: a filesystem may have several signatures."""
    groups: dict[tuple[str, str], list[Signature]] = {}
    for signature in signatures:
        groups.setdefault((signature.type, signature.uuid), []).append(signature)
    return list(groups.values())


def _on_it(path: str, signatures: list[Signature]) -> Reason:
    first = signatures[0]
    names = [f'{key} "{value}"' for key, value in (("label", first.label), ("uuid", first.uuid)) if value]
    described = ", ".join([first.usage or "unknown use", *names])
    places = ", ".join(str(signature.offset) for signature in signatures)
    return Reason(
        f"{path} carries {first.type} ({described}) at byte {places}", "if nobody needs it, --force erases it", True
    )


def _unexplained(device: _Device) -> tuple[int, ...]:
    """Where data begins in the first MiB and in the last one, in which nearly everybody leaves a trace.

    A filesystem whose signature is damaged, or was wiped by mistake, is still its owner's.
    """
    if device.size < DEVICE_BYTES_MIN:
        return ()
    found = []
    for offset in (0, device.size - _MIB):
        data = bytearray(_MIB)
        try:
            device.read(offset, [data])
        except DeviceError:
            continue  # `_labels` has told
        if not any(data.count(erased) == len(data) for erased in (0x00, 0xFF)):
            found.append(offset + len(data) - len(data.lstrip(b"\0")))
    return tuple(found)


def _unknown(path: str, offset: int) -> Reason:
    return Reason(
        f"{path} holds data of a kind that nobody here knows, from byte {offset} on",
        "find out whose it is; if nobody needs it, --force erases its first and its last MiB",
        True,
    )


def _partition_reasons(partitions: Iterable[Path]) -> list[Reason]:
    names = ", ".join(partition.name for partition in partitions)
    if not names:
        return []
    return [Reason(f"it has partitions ({names})", "if nobody needs them, remove them (parted, or --force)", True)]


# -- taking it by force ----------------------------------------------------------------------------------------------


def _erase(device: _Device, findings: _Findings) -> None:
    """Erases what was found, and looks again, until nothing is found any more.

    The partitions go first: the kernel refuses that while one of them is open, and nothing is erased then.
    """
    for partition in findings.partitions:
        _drop_partition(device, partition)
    places = [(0, _MIB), (device.size - _MIB, _MIB), *((offset, _MIB) for offset in findings.labels)]
    signatures = findings.signatures
    reasons: list[Reason] = []
    for _ in range(_ERASING_PASSES_MAX):
        for offset, length in [*places, *((signature.offset, signature.length) for signature in signatures)]:
            device.zero(offset, length)
        device.flush()
        signatures, reasons = _signatures(device)
        if not reasons:
            return
    raise ClaimRefused(
        f"{device.path} was erased in part, and is still not free",
        reasons=[str(reason) for reason in reasons],
        hint=f"erase it with its own tools, or write zeros over everything (blkdiscard --zeroout {device.path})",
    )


def _drop_partition(device: _Device, partition: Path) -> None:
    """Has the kernel forget a partition; the same as delpart(8)."""
    number = int((partition / "partition").read_text())
    entry = ctypes.create_string_buffer(struct.pack("qqi64s64s4x", 0, 0, number, b"", b""))
    try:
        fcntl.ioctl(
            device.fileno(),
            _BLKPG,
            struct.pack("iiiP", _BLKPG_DEL_PARTITION, 0, len(entry) - 1, ctypes.addressof(entry)),
        )
    except OSError as error:
        if error.errno == errno.ENXIO:
            return  # gone already
        raise ClaimRefused(
            f"partition {partition.name} of {device.path} cannot be removed",
            reasons=[f"the kernel says: {error.strerror}"],
            hint="close whatever has that partition open; nothing was erased",
        ) from error
