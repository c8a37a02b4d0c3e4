"""The KeyGens, Placers and KeyStore backends that rustord brings along, offered as a plugin offers its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from rustord import settings
from rustord.hookspecs import API_VERSION, Options, hookimpl
from rustord.keygen import HASHES, HashKeyGen, KeyGen
from rustord.keystore.backend import Backend
from rustord.placer import Contiguous, FirstFit, Mirrored, Placer, Striped
from rustord.settings import parse_options, setting

RUSTORD_API_VERSION = API_VERSION


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """For what takes none: an option is refused, not ignored."""


@dataclasses.dataclass(frozen=True)
class StripedOptions:
    unit_blocks: int = setting(
        settings.integer(1, 1 << 20, "blocks"), 256, "How much goes to one device before the next one's turn."
    )


@dataclasses.dataclass(frozen=True)
class MirroredOptions:
    copies: int = setting(settings.integer(2, 16), 2, "How many copies there are, each on a device of its own.")


@hookimpl
def rustord_keygens() -> Mapping[str, Callable[[Options], KeyGen]]:
    return {algorithm: partial(_keygen, algorithm) for algorithm in HASHES}


@hookimpl
def rustord_placers() -> Mapping[str, Callable[[Options], Placer]]:
    return {"contiguous": _contiguous, "first-fit": _first_fit, "striped": _striped, "mirrored": _mirrored}


@hookimpl
def rustord_keystores() -> Mapping[str, Callable[[Options], Backend]]:
    return {"lmdb": _lmdb, "sqlite": _sqlite}


def _keygen(algorithm: str, options: Options) -> KeyGen:
    parse_options(NoOptions, options, "keygen")
    return HashKeyGen(algorithm)


def _contiguous(options: Options) -> Placer:
    parse_options(NoOptions, options, "placer")
    return Contiguous()


def _first_fit(options: Options) -> Placer:
    parse_options(NoOptions, options, "placer")
    return FirstFit()


def _striped(options: Options) -> Placer:
    return Striped(parse_options(StripedOptions, options, "placer").unit_blocks)


def _mirrored(options: Options) -> Placer:
    return Mirrored(parse_options(MirroredOptions, options, "placer").copies)


# A backend's library is loaded only where that backend is used.


def _lmdb(options: Options) -> Backend:
    from rustord.keystore.lmdb import LmdbBackend

    parse_options(NoOptions, options, "keystore")
    return LmdbBackend()


def _sqlite(options: Options) -> Backend:
    from rustord.keystore.sqlite import SqliteBackend

    parse_options(NoOptions, options, "keystore")
    return SqliteBackend()
