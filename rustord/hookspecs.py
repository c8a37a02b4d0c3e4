"""What plugins may offer.

A plugin is a module with some of these hooks, ``RUSTORD_API_VERSION = 1``, and an entry point in the group
``rustord.plugins`` that names it::

    from rustord.hookspecs import hookimpl

    RUSTORD_API_VERSION = 1

    @hookimpl
    def rustord_placers():
        return {"spread": make_spread}

    def make_spread(options):
        return Spread()

It is imported only when ``plugins`` in rustord.toml names it. Each hook runs once, at start-up, and offers factories by
name; the configuration picks one for each role. From then on the core calls what the factory made as plain methods. A
name is 1 to 32 ASCII characters, and no two plugins may offer the same one for one role.

A factory is given the options of its role as the configuration has them, a mapping of TOML values, and returns an
object for that role. For options that make no sense it raises `rustord.errors.ConfigError`; `rustord.settings` has
`parse_options`, which does so and names the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import pluggy

from rustord.keygen import KeyGen
from rustord.keystore.backend import Backend
from rustord.placer import Placer

API_VERSION: Final = 1
"""Goes up when a plugin that was right becomes wrong: a hook or a method of a role changed, or became required."""

PROJECT: Final = "rustord"

Options = Mapping[str, object]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


def hookimpl(function: _Function) -> _Function:
    """Marks a function of a plugin as the hook that it is named after."""
    return _hookimpl(function)


@_hookspec
def rustord_keygens() -> Mapping[str, Callable[[Options], KeyGen]]:  # type: ignore[empty-body]
    """KeyGens, by the name of their hash. Each Object records it, so another hash needs another name."""


@_hookspec
def rustord_placers() -> Mapping[str, Callable[[Options], Placer]]:  # type: ignore[empty-body]
    """Placers, by the name of their policy."""


@_hookspec
def rustord_keystores() -> Mapping[str, Callable[[Options], Backend]]:  # type: ignore[empty-body]
    """Backends for the KeyStore's index, not opened yet."""
