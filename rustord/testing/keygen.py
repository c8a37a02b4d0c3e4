"""The contract of a KeyGen."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from rustord.keygen import KeyGen


class KeyGenContract:
    """What every KeyGen must do. ``factory`` is what the hook offers; the fixture `options` is what it is given."""

    factory: Callable[[Mapping[str, object]], KeyGen]

    @pytest.fixture
    def options(self) -> Mapping[str, object]:
        return {}

    @pytest.fixture
    def keygen(self, options: Mapping[str, object]) -> KeyGen:
        return self.factory(options)

    def test_algorithm_can_be_recorded(self, keygen: KeyGen) -> None:
        assert 1 <= len(keygen.algorithm) <= 32
        assert keygen.algorithm.isascii()
        assert keygen.algorithm.isprintable()
        assert ":" not in keygen.algorithm, "an ETag is algorithm:digest"

    def test_uuids_are_16_bytes_and_never_the_same(self, keygen: KeyGen) -> None:
        uuids = [keygen.uuid() for _ in range(10_000)]
        assert {type(uuid) for uuid in uuids} == {bytes}
        assert {len(uuid) for uuid in uuids} == {16}
        assert len(set(uuids)) == len(uuids)

    def test_uuids_of_many_threads_are_never_the_same(self, keygen: KeyGen) -> None:
        together = threading.Barrier(8)

        def make(_: int) -> list[bytes]:
            together.wait(60)  # or one thread might be done before the next begins, and do its work as well
            return [keygen.uuid() for _ in range(2_000)]

        with ThreadPoolExecutor(8) as threads:
            assert len({uuid for uuids in threads.map(make, range(8)) for uuid in uuids}) == 16_000

    def test_uuids_of_two_instances_are_never_the_same(self, options: Mapping[str, object]) -> None:
        one, other = self.factory(options), self.factory(options)
        assert {one.uuid() for _ in range(1_000)}.isdisjoint({other.uuid() for _ in range(1_000)})

    def test_digest_has_one_length(self, keygen: KeyGen) -> None:
        lengths = set()
        for size in (0, 1, 63, 64, 65, 4096, 1 << 20):
            hasher = keygen.hasher()
            hasher.update(bytes(size))
            digest = hasher.digest()
            assert type(digest) is bytes
            lengths.add(len(digest))
        assert len(lengths) == 1
        assert 1 <= lengths.pop() <= 64

    def test_digest_of_nothing_needs_no_update(self, keygen: KeyGen) -> None:
        updated = keygen.hasher()
        updated.update(b"")
        assert keygen.hasher().digest() == updated.digest()

    @pytest.mark.parametrize("seed", range(10))
    def test_digest_does_not_depend_on_how_the_data_arrives(self, keygen: KeyGen, seed: int) -> None:
        rng = random.Random(seed)
        data = rng.randbytes(rng.randrange(300_000))
        whole = keygen.hasher()
        whole.update(data)
        pieces = keygen.hasher()
        at = 0
        while at < len(data):
            step = rng.choice((1, 63, 64, 4096, 65536))
            kind = rng.choice((bytes, bytearray, memoryview))
            pieces.update(kind(data[at : at + step]))
            at += step
        assert pieces.digest() == whole.digest()

    def test_digest_is_the_same_each_time(self, keygen: KeyGen, options: Mapping[str, object]) -> None:
        digests = set()
        for each in (keygen, keygen, self.factory(options)):
            hasher = each.hasher()
            hasher.update(b"the same data")
            digests |= {hasher.digest(), hasher.digest()}
        assert len(digests) == 1

    def test_digest_tells_data_apart(self, keygen: KeyGen) -> None:
        data = bytearray(100_000)
        digests = set()
        for at in (None, 0, 63, 64, 65_535, 65_536, 99_999):
            changed = bytearray(data)
            if at is not None:
                changed[at] ^= 1
            hasher = keygen.hasher()
            hasher.update(changed)
            digests.add(hasher.digest())
        assert len(digests) == 7

    def test_hashers_at_work_at_once_do_not_disturb_one_another(self, keygen: KeyGen) -> None:
        def digest(byte: int) -> bytes:
            hasher = keygen.hasher()
            for _ in range(200):
                hasher.update(bytes([byte]) * 10_000)
            return hasher.digest()

        alone = [digest(byte) for byte in range(8)]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(digest, range(8))) == alone
