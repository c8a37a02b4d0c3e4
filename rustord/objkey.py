"""ObjKey: what identifies an Object, and the text form of its uuid."""

from __future__ import annotations

import re
from typing import NamedTuple

from rustord.errors import InvalidRequest

ObjectId = bytes
"""A uuid as its 16 bytes, the form in which the store handles it; `uuid_text` and `parse_uuid` convert."""

_UUID_TEXT = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")


class ObjKey(NamedTuple):
    """``uuid`` (16 bytes), the hash of the data (``algorithm`` by name, ``digest``) and ``size`` in bytes."""

    uuid: ObjectId
    algorithm: str
    digest: bytes
    size: int

    def __str__(self) -> str:
        return uuid_text(self.uuid)


def uuid_text(uuid: ObjectId) -> str:
    """The canonical text form (RFC 9562, section 4): 8-4-4-4-12 lower-case hexadecimal digits."""
    text = uuid.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_uuid(text: str) -> bool:
    """Whether `parse_uuid` accepts ``text``."""
    return _UUID_TEXT.fullmatch(text) is not None


def parse_uuid(text: str) -> ObjectId:
    """The 16 bytes of a uuid in text form; hyphens and case do not matter. Raises InvalidRequest."""
    if not is_uuid(text):
        hint = "a uuid has 32 hexadecimal digits, as 'put' printed it"
        raise InvalidRequest(f"{text[:80]!r} is not a uuid", hint=hint)
    return bytes.fromhex(text.replace("-", ""))
