"""The in-tree KeyGens keep the contract, and the contract finds KeyGens that do not."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from typing import Any

import pytest

from rustord import defaults
from rustord.keygen import HashKeyGen
from rustord.testing import KeyGenContract, check

OFFERED = defaults.rustord_keygens()


class TestXxh3(KeyGenContract):
    factory = staticmethod(OFFERED["xxh3-128"])


class TestXxh3Short(KeyGenContract):
    factory = staticmethod(OFFERED["xxh3-64"])


class TestBlake2b(KeyGenContract):
    factory = staticmethod(OFFERED["blake2b"])


class TestSha256(KeyGenContract):
    factory = staticmethod(OFFERED["sha256"])


class LastPiece:
    """Hashes only what came last."""

    def __init__(self) -> None:
        self.data = b""

    def update(self, data: Any) -> None:
        self.data = bytes(data)

    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()


class Checksum:
    """Drops the zeros in front of its digest."""

    def __init__(self) -> None:
        self.sum = 0

    def update(self, data: Any) -> None:
        self.sum = zlib.crc32(data, self.sum)

    def digest(self) -> bytes:
        return self.sum.to_bytes(4, "big").lstrip(b"\0")


class Head(LastPiece):
    """Hashes the first 64 KiB."""

    def update(self, data: Any) -> None:
        self.data = (self.data + bytes(data))[:65536]


shared = hashlib.sha256()


def counted(start: int) -> Any:
    numbers = itertools.count(start)
    return lambda: next(numbers).to_bytes(16, "big")


@pytest.mark.parametrize(
    ("keygen", "found_by"),
    [
        (lambda: HashKeyGen("sha256", uuid=lambda: bytes(16)), "test_uuids_are_16_bytes_and_never_the_same"),
        (lambda: HashKeyGen("sha256", uuid=lambda: b"short"), "test_uuids_are_16_bytes_and_never_the_same"),
        (lambda: HashKeyGen("sha256", uuid=counted(1)), "test_uuids_of_two_instances_are_never_the_same"),
        (lambda: HashKeyGen("a:b", hashlib.sha256), "test_algorithm_can_be_recorded"),
        (lambda: HashKeyGen("x" * 33, hashlib.sha256), "test_algorithm_can_be_recorded"),
        (lambda: HashKeyGen("last", LastPiece), "test_digest_does_not_depend_on_how_the_data_arrives[0]"),
        (lambda: HashKeyGen("crc", Checksum), "test_digest_has_one_length"),
        (lambda: HashKeyGen("head", Head), "test_digest_tells_data_apart"),
        (lambda: HashKeyGen("shared", lambda: shared), "test_digest_is_the_same_each_time"),
    ],
)
def test_contract_finds_what_is_wrong(keygen: Any, found_by: str) -> None:
    report = check("keygen", lambda options: keygen())
    assert found_by in [failure.test for failure in report.failures]
