"""BLAKE3 as the hash of Objects: cryptographic, and several times as fast as SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blake3 import blake3

from rustord.defaults import NoOptions
from rustord.hookspecs import Options, hookimpl
from rustord.keygen import HashKeyGen, KeyGen
from rustord.settings import parse_options

RUSTORD_API_VERSION = 1


@hookimpl
def rustord_keygens() -> Mapping[str, Callable[[Options], KeyGen]]:
    return {"blake3": make_blake3}


def make_blake3(options: Options) -> KeyGen:
    """A KeyGen with BLAKE3 digests of 32 bytes. It takes no options: a ConfigError names one that is given."""
    parse_options(NoOptions, options, "keygen")
    return HashKeyGen("blake3", blake3)
