"""The in-tree KeyGens keep the contract, and the contract finds KeyGens that do not."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import zlib
from collections.abc import Callable
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


class Undigested(LastPiece):
    """Has no digest before it has seen data."""

    def __init__(self) -> None:
        self.data: Any = None

    def update(self, data: Any) -> None:
        self.data = (self.data or b"") + bytes(data)

    def digest(self) -> bytes:
        return hashlib.sha256(b"nothing" if self.data is None else self.data).digest()


class Scratch:
    """Hashes in one place for all; whoever begins to update takes it from the one who was at it."""

    owner: Scratch | None = None
    hash = hashlib.sha256()

    def update(self, data: Any) -> None:
        if Scratch.owner is not self:
            Scratch.owner, Scratch.hash = self, hashlib.sha256()
        Scratch.hash.update(data)

    def digest(self) -> bytes:
        return (Scratch.hash if Scratch.owner is self else hashlib.sha256()).digest()


def counted_by_thread() -> Any:
    """Uuids that are new in each thread."""
    instance, counts = os.urandom(8), threading.local()

    def uuid() -> bytes:
        counts.number = getattr(counts, "number", 0) + 1
        return instance + int(counts.number).to_bytes(8, "big")

    return uuid


UUIDS = {
    f"test_uuids_{what}_never_the_same" for what in ("are_16_bytes_and", "of_many_threads_are", "of_two_instances_are")
}
DISTURBED = "test_hashers_at_work_at_once_do_not_disturb_one_another"
BROKEN: list[tuple[Callable[[], HashKeyGen], set[str]]] = [
    (lambda: HashKeyGen("sha256", uuid=lambda: bytes(16)), UUIDS),
    (lambda: HashKeyGen("sha256", uuid=lambda: b"short"), UUIDS),
    (lambda: HashKeyGen("sha256", uuid=lambda: os.urandom(15)), {"test_uuids_are_16_bytes_and_never_the_same"}),
    (lambda: HashKeyGen("sha256", uuid=counted(1)), {"test_uuids_of_two_instances_are_never_the_same"}),
    (lambda: HashKeyGen("sha256", uuid=counted_by_thread()), {"test_uuids_of_many_threads_are_never_the_same"}),
    (lambda: HashKeyGen("a:b", hashlib.sha256), {"test_algorithm_can_be_recorded"}),
    (lambda: HashKeyGen("x" * 33, hashlib.sha256), {"test_algorithm_can_be_recorded"}),
    (lambda: HashKeyGen("last", LastPiece), {"test_digest_does_not_depend_on_how_the_data_arrives"}),
    (lambda: HashKeyGen("crc", Checksum), {"test_digest_has_one_length"}),
    (lambda: HashKeyGen("head", Head), {"test_digest_tells_data_apart"}),
    (lambda: HashKeyGen("empty", Undigested), {"test_digest_of_nothing_needs_no_update"}),
    (
        lambda: HashKeyGen("shared", lambda: shared),
        {"test_digest_is_the_same_each_time", DISTURBED},
    ),
    (lambda: HashKeyGen("scratch", Scratch), {"test_digest_does_not_depend_on_how_the_data_arrives", DISTURBED}),
]


@pytest.mark.parametrize(("keygen", "found_by"), BROKEN)
def test_contract_finds_what_is_wrong_and_nothing_else(keygen: Callable[[], HashKeyGen], found_by: set[str]) -> None:
    found: set[str] = set()
    for _ in range(3):  # whether threads disturb one another is up to the scheduler
        report = check("keygen", lambda options: keygen())
        found |= {failure.test.partition("[")[0] for failure in report.failures}
        if found == found_by:
            break
    assert found == found_by


def test_every_test_of_the_contract_finds_something() -> None:
    tests = {name for name in vars(KeyGenContract) if name.startswith("test_")}
    assert set().union(*(found_by for _, found_by in BROKEN)) == tests
