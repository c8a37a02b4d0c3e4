"""Label: what a device of a pool says of itself and of the pool; and where everything lies on the device.

Three copies stand at the head, in the middle and at the tail of the device. Any good one opens the pool; FORMAT.md has
the tables. The first sector of a label holds nothing that could be taken for a partition table.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from xxhash import xxh3_64_digest

from rustord.errors import DeviceError, FormatError
from rustord.objkey import uuid_text

HEAD = struct.Struct("<16s8sIHHQQQ16s16sHHIIIQQQQ32s64s")
"""magic, checksum, length, format_version, state, compatible, read_only_compatible, incompatible, pool_uuid,
device_uuid, device_index, member_count, void_count, block_size, next_index, generation, round, created_ns, block_count,
secret, pool_name"""
MEMBER = struct.Struct("<16sQQQQHHI")
"""device_uuid, generation, before, round, block_count, device_index, standing, reserved"""
VOID = struct.Struct("<QQ")
"""first, end"""

MAGIC = b"rustord pool\r\n\x1a\0"
FORMAT_VERSION = 1
LABEL_BYTES = 65536
"""Room for one copy of the label."""
TABLES_AT = 4096
"""The tables begin behind the head's block, which is zero where other systems keep their signatures."""
MEMBER_COUNT_MAX = 96
VOID_COUNT_MAX = (LABEL_BYTES - TABLES_AT - MEMBER_COUNT_MAX * MEMBER.size) // VOID.size
_SUMMED_FROM = 24
_MIB = 1 << 20
DEVICE_BYTES_MIN = 16 * _MIB
JOURNAL_BYTES_MIN = 4 * _MIB
JOURNAL_BYTES_MAX = 1024 * _MIB
LAYERED = 1
"""Incompatible feature: the pool has, or had, volumes."""
BLOCK_SIZES = (4096, 8192, 16384, 32768, 65536)


class State(IntEnum):
    CLEAN = 0
    """closed in order: the index knows all that the journal holds"""
    OPEN = 1


class Standing(IntEnum):
    """What the pool means to do with a device."""

    IN_USE = 0
    LEAVING = 1
    """it takes no new data, and is emptied, to be removed"""
    GIVEN_UP = 2
    """as LEAVING, and what cannot be read from it any more is lost"""


@dataclass(frozen=True)
class Member:
    """One device of the pool: ``block_count`` is its size in blocks.

    ``generation`` and ``round`` are those of the last label that was to be written to it, ``before`` is the generation
    of the one that it had until then.
    """

    device_uuid: bytes
    device_index: int
    block_count: int
    generation: int = 1
    before: int = 0
    round: int = 0
    standing: Standing = Standing.IN_USE

    def bears(self, label: Label) -> bool:
        """Whether ``label``, found on the device, is one that the device may have: no older one, nor one of others."""
        return (label.generation, label.round) == (self.generation, self.round) or label.generation == self.before


@dataclass(frozen=True)
class Geometry:
    """Where things lie on a device of ``block_count`` blocks of ``block_size`` bytes. Offsets are in bytes."""

    block_count: int
    block_size: int

    @classmethod
    def of_device(cls, size: int, block_size: int) -> Geometry:
        """The geometry of a new member of ``size`` bytes. Raises DeviceError if that is too small."""
        if size < DEVICE_BYTES_MIN:
            raise DeviceError(
                f"a device of {size} bytes is too small for a pool",
                hint=f"the smallest device has {DEVICE_BYTES_MIN} bytes (16 MiB)",
            )
        return cls(size // block_size, block_size)

    @property
    def size(self) -> int:
        return self.block_count * self.block_size

    @property
    def label_offsets(self) -> tuple[int, int, int]:
        """Head, middle and tail copy: byte 0, the MiB at half of the device, the last whole MiB."""
        return label_offsets(self.size)

    @property
    def bad_table_offsets(self) -> tuple[int, int]:
        """Where the copies of the table of bad blocks stand: behind the first and the last copy of the label."""
        head, _, tail = self.label_offsets
        return head + LABEL_BYTES, tail + LABEL_BYTES

    @property
    def journal_offset(self) -> int:
        return _MIB

    @property
    def journal_length(self) -> int:
        """1/256 of the device in whole MiB, 4 MiB to 1 GiB."""
        return min(max(self.size // 256 // _MIB * _MIB, JOURNAL_BYTES_MIN), JOURNAL_BYTES_MAX)

    @property
    def data_runs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(block, count) of the two runs of blocks that hold Objects: before and behind the label in the middle."""
        _, middle, tail = self.label_offsets
        first = (self.journal_offset + self.journal_length) // self.block_size
        resume = (middle + LABEL_BYTES) // self.block_size
        return (
            (first, middle // self.block_size - first),
            (resume, tail // self.block_size - resume),
        )

    @property
    def data_block_count(self) -> int:
        return sum(count for _, count in self.data_runs)


def label_offsets(size: int) -> tuple[int, int, int]:
    """Where the copies of the label stand on a device of ``size`` bytes."""
    return 0, size // 2 // _MIB * _MIB, max(size - _MIB, 0) // _MIB * _MIB


@dataclass(frozen=True)
class Label:
    """All that a label says.

    ``generation`` counts the labels written by this pool, whatever the device; ``round`` is a random number that all
    labels have that were written together. ``next_index`` is that of the next device to be added. ``voids`` are
    half-open ranges of sequences that were never committed, so that a footer which bears one of them is nothing.
    """

    pool_uuid: bytes
    pool_name: str
    device_uuid: bytes
    device_index: int
    block_size: int
    block_count: int
    secret: bytes = field(repr=False)
    created_ns: int
    next_index: int = 1
    generation: int = 1
    round: int = 0
    state: State = State.CLEAN
    members: tuple[Member, ...] = ()
    voids: tuple[tuple[int, int], ...] = ()
    incompatible: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.block_count, self.block_size)

    def is_void(self, sequence: int) -> bool:
        """Whether a sequence lies in one of the ``voids``."""
        at = bisect_right(self.voids, (sequence, 1 << 64)) - 1
        return at >= 0 and sequence < self.voids[at][1]

    def for_member(self, member: Member) -> Label:
        """The same label as it stands on another member of the pool."""
        return replace(
            self, device_uuid=member.device_uuid, device_index=member.device_index, block_count=member.block_count
        )

    def encode(self) -> bytes:
        """The copy as it stands on the device, a multiple of 4 KiB long."""
        tables = b"".join(
            [
                *(
                    MEMBER.pack(
                        m.device_uuid, m.generation, m.before, m.round, m.block_count, m.device_index, m.standing, 0
                    )
                    for m in self.members
                ),
                *(VOID.pack(first, end) for first, end in self.voids),
            ]
        )
        head = HEAD.pack(
            MAGIC,
            b"",
            TABLES_AT + len(tables),
            FORMAT_VERSION,
            self.state,
            0,
            0,
            self.incompatible,
            self.pool_uuid,
            self.device_uuid,
            self.device_index,
            len(self.members),
            len(self.voids),
            self.block_size,
            self.next_index,
            self.generation,
            self.round,
            self.created_ns,
            self.block_count,
            self.secret,
            self.pool_name.encode(),
        )
        rest = head[_SUMMED_FROM:] + bytes(TABLES_AT - HEAD.size) + tables
        label = MAGIC + xxh3_64_digest(rest) + rest
        assert len(label) <= LABEL_BYTES
        return label + bytes(-len(label) % 4096)


def decode_label(data: bytes | memoryview) -> Label | None:
    """The label that begins ``data`` (`LABEL_BYTES` long), or None if there is none.

    Raises FormatError if there is one that is damaged, or that needs a newer rustord.
    """
    view = memoryview(data)
    (
        magic,
        checksum,
        length,
        version,
        state,
        _compatible,
        _read_only_compatible,
        incompatible,
        pool_uuid,
        device_uuid,
        device_index,
        member_count,
        void_count,
        block_size,
        next_index,
        generation,
        round,
        created_ns,
        block_count,
        secret,
        pool_name,
    ) = HEAD.unpack_from(view)
    if magic != MAGIC:
        return None
    tables_end = TABLES_AT + member_count * MEMBER.size + void_count * VOID.size
    if not TABLES_AT <= length <= len(view) or xxh3_64_digest(view[_SUMMED_FROM:length]) != checksum:
        raise FormatError("the label does not match its checksum")
    if version != FORMAT_VERSION or incompatible & ~LAYERED:
        raise FormatError(
            f"the label has format version {version} and incompatible features {incompatible:#x}",
            hint="open the pool with the newer rustord that wrote it",
        )
    if length != tables_end or block_size not in BLOCK_SIZES or state not in list(State):
        raise FormatError("the label contradicts itself")
    members = [MEMBER.unpack_from(view, TABLES_AT + i * MEMBER.size) for i in range(member_count)]
    if any(standing not in list(Standing) for *_, standing, _ in members):
        raise FormatError("the label contradicts itself")
    return Label(
        pool_uuid=pool_uuid,
        pool_name=pool_name.rstrip(b"\0").decode(errors="replace"),
        device_uuid=device_uuid,
        device_index=device_index,
        block_size=block_size,
        block_count=block_count,
        secret=secret,
        created_ns=created_ns,
        next_index=next_index,
        generation=generation,
        round=round,
        state=State(state),
        members=tuple(
            Member(uuid, index, blocks, written, before, number, Standing(standing))
            for uuid, written, before, number, blocks, index, standing, _ in members
        ),
        voids=tuple(VOID.iter_unpack(view[tables_end - void_count * VOID.size : tables_end])),
        incompatible=incompatible,
    )


def choose_label(copies: Sequence[Label | FormatError | DeviceError | None]) -> Label | None:
    """The newest good one of the copies of one device; None if none of them is a label.

    Raises FormatError if all copies that there are are damaged, or if good ones are not of one device; DeviceError if
    those that may be there cannot be read.
    """
    good = [copy for copy in copies if isinstance(copy, Label)]
    if not good:
        for kind in (FormatError, DeviceError):
            for copy in copies:
                if isinstance(copy, kind):
                    raise copy
        return None
    newest = max(good, key=lambda label: label.generation)
    if any(label.device_uuid != newest.device_uuid for label in good):
        # A device that was claimed anew keeps no older label (claiming overwrites all copies), so this is a mixture.
        owners = ", ".join(sorted({uuid_text(label.pool_uuid) for label in good}))
        raise FormatError(
            f"the copies of the label belong to different devices or pools ({owners})",
            hint="remove the foreign copy, or claim the device anew with --force",
        )
    return newest


def merge_voids(voids: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges in order, adjoining ones made one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(voids):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)
