from __future__ import annotations

import random
import threading
import time
import uuid

import pytest

from rustord.errors import InvalidRequest
from rustord.keygen import HASHES, HashKeyGen, KeyGen, Uuid7, find_hash

# The vector of RFC 9562, appendix A.6: 017F22E2-79B0-7CC3-98C4-DC0C0C07398F.
RFC_MS = 0x017F22E279B0


class Clock:
    """A clock that shows what it is told, in milliseconds."""

    def __init__(self, ms: int) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms * 1_000_000 + 999_999


def uuid_maker(clock: Clock, seed: int = 1) -> Uuid7:
    return Uuid7(now_ns=clock, random_bytes=random.Random(seed).randbytes)


def test_a_uuid_is_a_version_7_of_its_millisecond() -> None:
    made = uuid.UUID(bytes=uuid_maker(Clock(RFC_MS))())
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == RFC_MS


def test_the_fields_are_where_the_rfc_wants_them() -> None:
    make = Uuid7(now_ns=Clock(RFC_MS), random_bytes=lambda count: bytes([0xFF]) * count)
    # The counter begins with its highest bit clear; only its lowest 9 bits are not random.
    assert make().hex() == "017f22e279b077ffbffffe00ffffffff"
    assert make().hex() == "017f22e279b077ffbffffe01ffffffff"


def test_uuids_ascend_within_a_millisecond_and_across_them() -> None:
    clock = Clock(RFC_MS)
    make = uuid_maker(clock)
    made = []
    for _ in range(3000):
        made += [make(), make(), make()]
        clock.ms += 1
    assert made == sorted(set(made))
    assert made[-1][:6] == (clock.ms - 1).to_bytes(6, "big")


def test_uuids_ascend_when_the_clock_is_set_back() -> None:
    clock = Clock(RFC_MS)
    make = uuid_maker(clock)
    made = [make()]
    clock.ms -= 3_600_000
    made += [make() for _ in range(1000)]
    clock.ms += 3_600_001
    made += [make()]
    assert made == sorted(set(made))
    assert made[-1][:6] == clock.ms.to_bytes(6, "big")


def test_a_counter_that_overflows_carries_into_the_time() -> None:
    make = uuid_maker(Clock(RFC_MS))
    made = [make()]
    make._time_and_counter |= (1 << 42) - 2
    made += [make(), make(), make()]
    assert made == sorted(set(made))
    assert [int.from_bytes(one[:6], "big") - RFC_MS for one in made] == [0, 0, 1, 1]
    assert made[2][6:8] == bytes.fromhex("7000")
    assert made[1][6:8] == bytes.fromhex("7fff")


def test_uuids_are_a_function_of_clock_and_randomness() -> None:
    one, same, other = (uuid_maker(Clock(RFC_MS), seed) for seed in (1, 1, 2))
    made = [one() for _ in range(2000)]
    assert [same() for _ in range(2000)] == made
    assert not {other() for _ in range(2000)} & set(made)


def test_two_makers_never_make_the_same_uuid() -> None:
    makers = [Uuid7(), Uuid7()]
    assert len({make() for _ in range(5000) for make in makers}) == 10_000


def test_threads_never_get_the_same_uuid_and_each_sees_them_ascend() -> None:
    make = Uuid7()
    made: list[list[bytes]] = [[] for _ in range(8)]

    def fill(mine: list[bytes]) -> None:
        mine.extend(make() for _ in range(2000))

    threads = [threading.Thread(target=fill, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({one for mine in made for one in mine}) == 16_000


def test_a_uuid_tells_the_time_of_day() -> None:
    before_ms = time.time_ns() // 1_000_000
    made_ms = int.from_bytes(HashKeyGen("sha256").uuid()[:6], "big")
    assert before_ms <= made_ms <= time.time_ns() // 1_000_000


# Digests of b"abc" by other hands: published for xxh3, `b2sum -l 256` for blake2b, FIPS 180-4 for sha256.
DIGESTS_OF_ABC = {
    "xxh3-128": "06b05ab6733a618578af5f94892f3950",
    "xxh3-64": "78af5f94892f3950",
    "blake2b": "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319",
    "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
}


def test_every_hash_is_covered() -> None:
    assert list(DIGESTS_OF_ABC) == list(HASHES)


@pytest.mark.parametrize("algorithm", HASHES)
def test_hashes_stream_and_give_the_digests_that_others_give(algorithm: str) -> None:
    keygen: KeyGen = HashKeyGen(algorithm)
    hasher = keygen.hasher()
    hasher.update(b"a")
    hasher.update(memoryview(bytearray(b"bc")))
    assert hasher.digest().hex() == DIGESTS_OF_ABC[algorithm]
    assert keygen.algorithm == algorithm
    assert keygen.hasher().digest() != hasher.digest(), "a new hasher has seen nothing"


@pytest.mark.parametrize("algorithm", ["md5", "", "XXH3-128"])
def test_an_unknown_hash_is_refused_with_the_names_of_the_known(algorithm: str) -> None:
    with pytest.raises(InvalidRequest, match=repr(algorithm)) as caught:
        HashKeyGen(algorithm)
    assert all(name in caught.value.hint for name in HASHES)
    with pytest.raises(InvalidRequest):
        find_hash(algorithm)


def test_a_plugin_brings_its_own_hash() -> None:
    keygen: KeyGen = HashKeyGen("mine", HASHES["sha256"], uuid=lambda: bytes(16))
    assert (keygen.algorithm, keygen.uuid()) == ("mine", bytes(16))
    assert keygen.hasher().digest() == HASHES["sha256"]().digest()
