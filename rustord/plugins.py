"""Plugins: which are installed, which are loaded, and what they offer.

Only what the configuration names is imported: a privileged daemon does not load whatever happens to be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Final, Literal, NamedTuple, overload

import pluggy

from rustord import defaults, hookspecs
from rustord.errors import ConfigError, PluginError, RustordError
from rustord.guard import GuardedBackend, GuardedKeyGen, GuardedPlacer
from rustord.hookspecs import Options
from rustord.keygen import KeyGen
from rustord.keystore.backend import Backend
from rustord.placer import Placer

GROUP: Final = "rustord.plugins"
"""The group of entry points in which a distribution names its plugins."""

HOOKS: Final[Mapping[str, str]] = {
    "keygen": "rustord_keygens",
    "placer": "rustord_placers",
    "keystore": "rustord_keystores",
}
"""The hook that offers each role."""

_GUARDS: Mapping[str, Callable[[Any, str], object]] = {
    "keygen": GuardedKeyGen,
    "placer": GuardedPlacer,
    "keystore": GuardedBackend,
}
_OWN = "rustord"
"""The name under which rustord's own defaults are listed."""


class Plugin(NamedTuple):
    """A plugin that is installed. ``offers`` are the names it has for each role, known only when it is ``loaded``."""

    name: str
    distribution: str
    version: str
    loaded: bool
    offers: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        return f"{self.name!r} (of {self.distribution} {self.version})"


class PluginManager:
    """What rustord itself offers, and what the plugins do that the configuration names."""

    def __init__(self, enabled: Iterable[str] = (), *, tolerant: bool = False) -> None:
        """Load the plugins of these names. Raises PluginError, naming plugin and distribution, for any that cannot be.

        If ``tolerant``, it goes on without them, and ``problems`` holds the errors. A name that is there twice counts
        once.
        """
        self.problems: list[PluginError] = []
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._factories: dict[str, dict[str, tuple[Plugin, Callable[[Options], Any]]]] = {role: {} for role in HOOKS}
        self._loaded: dict[str, Plugin] = {}
        self._add(Plugin(_OWN, "rustord", _own_version(), True, {}), defaults)
        for name in dict.fromkeys(enabled):
            try:
                self._load(name)
            except PluginError as error:
                if not tolerant:
                    raise
                self.problems.append(error)

    def _load(self, name: str) -> None:
        entry = _find(name)
        plugin = _describe(entry)
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:  # whatever its code does at import, it is that plugin's fault
            raise PluginError(
                f"plugin {plugin} cannot be imported: {type(error).__name__}: {error}",
                hint=f"reinstall {plugin.distribution}, or take {name!r} out of 'plugins' in rustord.toml",
            ) from error
        self._add(plugin, module)

    def _add(self, plugin: Plugin, module: object) -> None:
        _check_version(plugin, getattr(module, "RUSTORD_API_VERSION", None))
        try:
            self._manager.register(module, plugin.name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(
                f"plugin {plugin} does not fit: {error}", hint=f"tell those who make {plugin.distribution}"
            ) from error
        offers = {role: self._offers(plugin, role, hook) for role, hook in HOOKS.items()}
        if not any(offers.values()):
            raise PluginError(
                f"plugin {plugin} offers nothing: it has none of {', '.join(HOOKS.values())}",
                hint="a hook needs the mark @rustord.hookspecs.hookimpl",
            )
        plugin = plugin._replace(loaded=True, offers={role: tuple(names) for role, names in offers.items() if names})
        self._loaded[plugin.name] = plugin
        for role, factories in offers.items():
            self._factories[role].update((name, (plugin, factory)) for name, factory in factories.items())

    def _offers(self, plugin: Plugin, role: str, hook: str) -> Mapping[str, Callable[[Options], Any]]:
        """The factories of a plugin for a role, checked."""
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        hooks = [each.function for each in implementations if each.plugin_name == plugin.name]
        try:
            offers = {name: factory for function in hooks for name, factory in function().items()}
            for name, factory in offers.items():
                if not (1 <= len(name) <= 32 and name.isascii() and name.isprintable() and callable(factory)):
                    raise ValueError(f"{name!r}: a name of 1 to 32 ASCII characters and a callable are wanted")
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{hook} of plugin {plugin} failed: {type(error).__name__}: {error}",
                hint=f"tell those who make {plugin.distribution}",
            ) from error
        for name in offers.keys() & self._factories[role].keys():
            other = self._factories[role][name][0]
            raise PluginError(
                f"plugins {other} and {plugin} both offer the {role} {name!r}",
                hint="take one of the two out of 'plugins' in rustord.toml",
            )
        return offers

    def offered(self, role: str) -> list[str]:
        """The names that `make` takes for a role, those of rustord itself first."""
        return list(self._factories[role])

    @overload
    def make(self, role: Literal["keygen"], name: str, options: Options = ...) -> KeyGen: ...
    @overload
    def make(self, role: Literal["placer"], name: str, options: Options = ...) -> Placer: ...
    @overload
    def make(self, role: Literal["keystore"], name: str, options: Options = ...) -> Backend: ...

    def make(self, role: str, name: str, options: Options = {}) -> object:  # noqa: B006 - it is only read
        """What fills a role. Raises PluginError if nobody offers ``name``, ConfigError for options that are refused."""
        plugin, factory = self.find(role, name)
        try:
            made = factory(options)
            return made if plugin.name == _OWN else _GUARDS[role](made, str(plugin))
        except RustordError:
            raise
        except ValueError as error:
            raise ConfigError(f"[{role}.options]: {error}", hint=f"{plugin.distribution} documents them") from error
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {plugin} cannot make the {role} {name!r}: {type(error).__name__}: {error}",
                hint=f"choose another {role} in rustord.toml, or tell those who make {plugin.distribution}",
            ) from error

    def find(self, role: str, name: str) -> tuple[Plugin, Callable[[Options], Any]]:
        """Who offers ``name`` for a role, and the factory. Raises PluginError."""
        try:
            return self._factories[role][name]
        except KeyError:
            unloaded = ", ".join(str(plugin) for plugin in self.plugins() if not plugin.loaded)
            raise PluginError(
                f"there is no {role} {name!r}: those to choose from are {', '.join(self.offered(role))}",
                hint=f"install the plugin that offers {name!r} and name it in 'plugins' in rustord.toml"
                + (f"; installed, but not named there: {unloaded}" if unloaded else ""),
            ) from None

    def plugins(self) -> list[Plugin]:
        """The plugins that are loaded, rustord's own first, then those that are only installed. Imports nothing."""
        installed = (_describe(entry) for entry in _installed())
        return [*self._loaded.values(), *(plugin for plugin in installed if plugin.name not in self._loaded)]


def _installed() -> list[metadata.EntryPoint]:
    """The entry points of all plugins; a distribution that is on the path twice counts once."""
    found = metadata.entry_points(group=GROUP)
    entries = {(entry.name, _distribution_name(entry), entry.value): entry for entry in found}
    return [entries[key] for key in sorted(entries)]


def _find(name: str) -> metadata.EntryPoint:
    installed = _installed()
    found = [entry for entry in installed if entry.name == name]
    if not found:
        raise PluginError(
            f"plugin {name!r} is not installed",
            hint=f"install the distribution that brings it (such as rustord-placer-{name}), or take {name!r} out of "
            f"'plugins' in rustord.toml; installed are: {', '.join(entry.name for entry in installed) or 'none'}",
        )
    if len(found) > 1:
        one, two = (_distribution_name(entry) for entry in found[:2])
        raise PluginError(f"{one} and {two} both bring a plugin {name!r}", hint="uninstall one of the two")
    return found[0]


def _describe(entry: metadata.EntryPoint) -> Plugin:
    version = entry.dist.version if entry.dist else "of unknown version"
    return Plugin(entry.name, _distribution_name(entry), version, False, {})


def _distribution_name(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module


def _own_version() -> str:
    try:
        return metadata.version("rustord")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _check_version(plugin: Plugin, version: object) -> None:
    if version == hookspecs.API_VERSION:
        return
    if not isinstance(version, int):
        hint = "its module must say RUSTORD_API_VERSION = " + str(hookspecs.API_VERSION)
    elif version < hookspecs.API_VERSION:
        hint = f"install a newer {plugin.distribution}"
    else:
        hint = f"install a newer rustord, or an older {plugin.distribution}"
    said = "says nothing of the" if version is None else f"is for {version!r} as the"
    raise PluginError(f"plugin {plugin} {said} API version; rustord has {hookspecs.API_VERSION}", hint=hint)
