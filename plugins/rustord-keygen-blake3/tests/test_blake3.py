from __future__ import annotations

import pytest
from rustord_keygen_blake3 import make_blake3

from rustord.errors import ConfigError
from rustord.plugins import PluginManager
from rustord.testing import KeyGenContract


class TestBlake3(KeyGenContract):
    factory = staticmethod(make_blake3)


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (1023, "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11"),
        (1024, "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"),
        (1025, "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"),
    ],
)
def test_digests_are_those_of_the_specification(size: int, digest: str) -> None:
    """From test_vectors.json of the BLAKE3 team: the input repeats 0, 1, ... 250."""
    hasher = make_blake3({}).hasher()
    hasher.update(bytes(number % 251 for number in range(size)))
    assert hasher.digest().hex() == digest


def test_configuration_can_choose_it() -> None:
    assert PluginManager(["blake3"]).make("keygen", "blake3").algorithm == "blake3"


def test_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads"):
        make_blake3({"threads": 4})
