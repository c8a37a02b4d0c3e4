"""Rebuild: a new index for a pool whose index is lost, from what its devices hold.

It reads the devices and never writes to them; the next opening erases what is left of deleted Objects. Nothing of the
index is touched before all has been read, and a crash while it is written leaves one that no opening takes for whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rustord.blockdevice import BlockDevice
from rustord.blockstore import BlockStore
from rustord.errors import PoolError
from rustord.keystore.backend import Backend
from rustord.keystore.contents import owner_of, replace_index
from rustord.label import Label
from rustord.objkey import uuid_text
from rustord.page import decode_head
from rustord.pool import assemble
from rustord.record import Record
from rustord.survey import Progress, Survey, skip_behind, take_survey

_SHOWN_MAX = 20


@dataclass(frozen=True)
class Report:
    """What a rebuild found. ``losses`` says what may be missing, and why; empty if nothing is."""

    pool_uuid: bytes
    pool_name: str
    object_count: int
    data_bytes: int
    name_count: int
    grave_count: int
    """Deleted Objects that the next opening erases."""
    volume_count: int
    void_count: int
    """Footers of Objects that were never committed, and are left out."""
    losses: tuple[str, ...]
    doubtful: tuple[str, ...]
    """Where Objects contradicted one another, and how that was decided; and what a crash left unfinished."""


def rebuild(
    devices: Sequence[BlockDevice],
    *,
    backend: Backend,
    directory: Path,
    without: Collection[int] = (),
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda size: None,
) -> Report:
    """Make the index in ``directory`` anew for the pool that ``devices`` make up; with ``dry_run`` only look.

    The devices are closed in the end, also when this raises. Raises PoolError if a device of the pool is missing whose
    index is not in ``without``, if one is older than the others, or if ``directory`` holds an index and ``replace`` is
    not given; DeviceError, FormatError. The index is unchanged then.
    """
    try:
        label, blocks = assemble(devices, "none")
    except BaseException:
        for device in devices:
            device.close()
        raise
    try:
        _check_devices(label, blocks, without)
        if dry_run:
            survey = take_survey(label, blocks, progress)
        else:
            backend.open(directory)
            try:
                _check_index(backend, directory, label, replace)
                survey = take_survey(label, blocks, progress)
                _write(backend, survey)
            finally:
                backend.close()
        return _report(survey, blocks)
    finally:
        blocks.close()


def _check_devices(label: Label, blocks: BlockStore, without: Collection[int]) -> None:
    missing = {index: slot for index, slot in blocks.slots.items() if slot.device is None and index not in without}
    if missing:
        names = ", ".join(f"{index} ({uuid_text(slot.uuid)}: {slot.why})" for index, slot in missing.items())
        raise PoolError(
            f"of this pool, device {names} is missing",
            hint="attach it; or give --without and its index, if it will never come back: what only it knows is lost "
            "then, and its Objects' blocks on other devices are used again",
        )


def _check_index(backend: Backend, directory: Path, label: Label, replace: bool) -> None:
    owner, is_whole = owner_of(backend)
    if owner and owner != label.pool_uuid:
        raise PoolError(
            f"the index at {directory} belongs to pool {uuid_text(owner)}, not to {uuid_text(label.pool_uuid)}",
            hint="give each pool a directory of its own",
        )
    if is_whole and not replace:
        raise PoolError(
            f"there is an index at {directory}",
            hint="if it is not to be trusted, give --replace, which discards it, or move it away before",
        )


def _write(backend: Backend, survey: Survey) -> None:
    label = survey.label
    objects = (Record(survey.live[uuid]) for uuid in sorted(survey.live))
    bases = map(Record, survey.bases().values())
    state = (survey.sequence + skip_behind(survey), label.generation, label.pool_uuid)
    replace_index(backend, state, survey.positions, objects, survey.graves(), bases, survey.pages.values())


def _report(survey: Survey, blocks: BlockStore) -> Report:
    data_bytes = name_count = 0
    for record in map(Record, survey.live.values()):
        data_bytes += record.size
        name_count += bool(record.name)
    return Report(
        pool_uuid=survey.label.pool_uuid,
        pool_name=survey.label.pool_name,
        object_count=len(survey.live),
        data_bytes=data_bytes,
        name_count=name_count,
        grave_count=len(survey.gone),
        volume_count=sum(
            bool(decode_head(page.content).name) for (_, number), page in survey.pages.items() if number == 0
        ),
        void_count=len(survey.void),
        losses=tuple(_losses(survey, blocks)),
        doubtful=tuple(_shortened([*survey.doubtful, *survey.torn])),
    )


def _losses(survey: Survey, blocks: BlockStore) -> Iterator[str]:
    for index, slot in blocks.slots.items():
        if slot.device is None:
            yield f"device {index} is missing: what only it knows is not found, and what was deleted may be back"
    yield from _shortened(survey.holes)
    for what, found in (
        ("cannot be read: if an Object ends there, it is not found", survey.unreadable),
        ("has half a footer: from a write that was cut short, or of an Object that is lost", survey.damaged),
    ):
        lost = survey.unknown(found)
        for extent in lost[:_SHOWN_MAX]:
            yield f"block {extent.block} of device {extent.device} {what}"
        if len(lost) > _SHOWN_MAX:
            yield f"{len(lost) - _SHOWN_MAX:,} more such blocks"


def _shortened(texts: Sequence[str]) -> Iterator[str]:
    yield from texts[:_SHOWN_MAX]
    if len(texts) > _SHOWN_MAX:
        yield f"{len(texts) - _SHOWN_MAX:,} more of this kind"
