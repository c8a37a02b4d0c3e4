"""Change: what can be asked of an ObjectStore that changes it. Changes are gathered into cycles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rustord.blockdevice import BlockDevice
from rustord.errors import InvalidRequest, PreconditionFailed, RustordError, TooLarge
from rustord.extent import Extent
from rustord.layer import Frozen, Layer
from rustord.manifest import Data
from rustord.objkey import ObjectId
from rustord.record import Metadata, Record, RecordId, encode_metadata
from rustord.relocation import Relocation
from rustord.upload import Upload

NAME_BYTES_MAX = 1024
CONTENT_TYPE_BYTES_MAX = 255
ATTRIBUTE_COUNT_MAX = 64
ATTRIBUTE_BYTES_MAX = 8192
"""Of all attributes of an Object together, keys and values."""


_NO_METADATA = Metadata()


class Put:
    """Store an Object: its data, an `Upload` that has taken it in already, or a `Frozen` Layer.

    ``replaced`` says whether it replaced one.

    With ``if_none_match`` the change fails if its name is taken; with ``if_match`` it fails unless the name maps to an
    Object with one of these entity tags ("*" for any Object). A name that is taken is replaced otherwise. Raises
    InvalidRequest or TooLarge for metadata that cannot be stored.
    """

    __slots__ = ("created_ns", "if_match", "if_none_match", "metadata", "name", "name_bytes", "replaced", "source")

    def __init__(
        self,
        source: Data | Upload | Frozen,
        metadata: Metadata | None = None,
        *,
        if_none_match: bool = False,
        if_match: Sequence[str] | None = None,
    ) -> None:
        self.source = source
        self.if_none_match = if_none_match
        self.if_match = if_match
        self.created_ns = time.time_ns()
        self.replaced = False
        if metadata is None or metadata == _NO_METADATA:
            self.name, self.name_bytes, self.metadata = "", b"", b""
        else:
            check_metadata(metadata)
            self.name, self.name_bytes = metadata.name, metadata.name.encode()
            self.metadata = encode_metadata(metadata)


class Delete:
    """Delete an Object; with ``if_match`` only if it has one of these entity tags ("*" for any)."""

    __slots__ = ("if_match", "record", "uuid")

    def __init__(self, uuid: ObjectId, *, if_match: Sequence[str] | None = None) -> None:
        self.uuid = uuid
        self.if_match = if_match
        self.record: Record | None = None
        """What was deleted."""


class Move:
    """Give an Object the blocks that a `Relocation` has copied it to; its uuid, name and data stay.

    The outcome is its new Record. NotFound if it was deleted meanwhile; PreconditionFailed if it was moved.
    """

    __slots__ = ("source",)

    def __init__(self, source: Relocation) -> None:
        self.source = source


class Undo:
    """Take back a Record that reached some devices' journals but not all: it was never acknowledged.

    ``extents`` are the blocks to erase, ``ids`` the graves that end with that: its own, and that of a move's copy.
    """

    __slots__ = ("extents", "ids", "record")

    def __init__(self, record: Record, extents: Sequence[Extent], ids: Sequence[RecordId]) -> None:
        self.record = record
        self.extents = extents
        self.ids = ids


class Erase:
    """Erase blocks that no Object names any more, and give them back once that is durable.

    ``ids`` are those of the Records that named them, or of a GRAVE; none for blocks that no journal names, and
    several where an Object was moved shortly before it was deleted. ``cause`` is the Delete that waits for it.
    ``layers`` are forgotten with it, and ``layer`` is the number of one that it had needed. ``after`` is the sequence
    up to which the index has to hold everything before. ``finished`` is told that it is done, or why it could not be.
    ``erased`` is set once the blocks have been written over, on ``devices``, so that only the flush is left to do;
    ``error`` says why they could not be.
    """

    __slots__ = ("after", "cause", "devices", "erased", "error", "extents", "finished", "ids", "layer", "layers")

    def __init__(
        self,
        extents: Sequence[Extent],
        ids: Sequence[RecordId] = (),
        cause: Delete | None = None,
        *,
        after: int = 0,
        layer: int = 0,
        layers: Sequence[Layer] = (),
        finished: Callable[[RustordError | None], None] | None = None,
    ) -> None:
        self.extents = extents
        self.ids = ids
        self.layer = layer
        self.layers = layers
        self.finished = finished
        self.cause = cause
        self.after = after
        self.erased = False
        self.devices: Mapping[int, BlockDevice] = {}
        self.error: RustordError | None = None


Change = Put | Delete | Move | Undo | Erase


def check_match(record: Record | None, if_match: Sequence[str] | None, what: str) -> None:
    """Raise PreconditionFailed unless ``if_match`` allows a change of ``record``."""
    if if_match is not None and (record is None or ("*" not in if_match and record.etag not in if_match)):
        raise PreconditionFailed(
            f"{what} is not what If-Match asks for", hint="read its entity tag again, and repeat with that"
        )


def check_name(name: str) -> None:
    """Raise InvalidRequest unless ``name`` is 1 to 1,024 bytes of UTF-8 without control characters."""
    length = _byte_count(name)
    if not 1 <= length <= NAME_BYTES_MAX:
        raise InvalidRequest(f"the name has {length} bytes", hint=f"a name has 1 to {NAME_BYTES_MAX} bytes in UTF-8")
    if not name.isprintable() and _has_control(name):
        raise InvalidRequest(f"the name {name[:80]!r} has a control character", hint="remove it")


def _byte_count(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{text[:80]!r} is not valid Unicode", hint="metadata is UTF-8 text") from None


def _has_control(text: str) -> bool:
    return any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text)


def check_metadata(metadata: Metadata) -> None:
    """Raise InvalidRequest or TooLarge unless ``metadata`` can be stored."""
    if metadata.name:
        check_name(metadata.name)
    if _byte_count(metadata.content_type) > CONTENT_TYPE_BYTES_MAX or _has_control(metadata.content_type):
        raise InvalidRequest(
            f"the content type {metadata.content_type[:80]!r} cannot be stored",
            hint=f"a content type has at most {CONTENT_TYPE_BYTES_MAX} bytes and no control characters",
        )
    attributes = metadata.attributes
    length = sum(_byte_count(key) + _byte_count(value) for key, value in attributes.items())
    if len(attributes) > ATTRIBUTE_COUNT_MAX or length > ATTRIBUTE_BYTES_MAX:
        raise TooLarge(
            f"there are {len(attributes)} attributes, of {length} bytes in all",
            hint=f"an Object has at most {ATTRIBUTE_COUNT_MAX} attributes of {ATTRIBUTE_BYTES_MAX} bytes in all",
        )
