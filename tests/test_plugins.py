from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rustord.errors import ConfigError, NoSpace, PluginError
from rustord.plugins import PluginManager

GOOD = """
from rustord.hookspecs import hookimpl
from rustord.placer import Contiguous

RUSTORD_API_VERSION = 1

@hookimpl
def rustord_placers():
    return {NAME: lambda options: Contiguous()}
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution: ``install("far", code)`` brings the plugin `far` of rustord-placer-far 1.2."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(name: str, code: str, *, distribution: str = "", module: str = "") -> None:
        module = module or f"rustord_placer_{name}"
        distribution = distribution or f"rustord-placer-{name}"
        information = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (information / "entry_points.txt").write_text(f"[rustord.plugins]\n{name} = {module}\n")
        (tmp_path / f"{module}.py").write_text(code)

    yield install
    for added in set(sys.modules) - before:
        if added.startswith("rustord_placer_"):
            del sys.modules[added]


def good(name: str) -> str:
    return GOOD.replace("NAME", repr(name))


def refused(*enabled: str) -> PluginError:
    with pytest.raises(PluginError) as caught:
        PluginManager(enabled)
    assert caught.value.hint
    return caught.value


def test_plugin_that_is_named_is_used_like_an_own_one(install: Install) -> None:
    install("far", good("farthest"))
    plugins = PluginManager(["far", "far"])
    assert plugins.offered("placer")[-1] == "farthest"
    assert plugins.make("placer", "farthest").copies == 1
    assert plugins.find("placer", "farthest")[0].distribution == "rustord-placer-far"


def test_plugin_that_is_not_named_is_listed_but_never_imported(install: Install) -> None:
    install("far", "raise SystemExit('imported')")
    plugins = PluginManager()
    far = next(plugin for plugin in plugins.plugins() if plugin.name == "far")
    assert (far.distribution, far.version, far.loaded, far.offers) == ("rustord-placer-far", "1.2", False, {})
    assert "rustord_placer_far" not in sys.modules
    with pytest.raises(PluginError, match="there is no placer 'farthest'") as caught:
        plugins.make("placer", "farthest")
    assert "'far' (of rustord-placer-far 1.2)" in caught.value.hint


def test_list_tells_what_is_offered(install: Install) -> None:
    install("far", good("farthest"))
    own, far, *_ = PluginManager(["far"]).plugins()
    assert own.name == "rustord"
    assert set(own.offers) == {"keygen", "placer", "keystore"}
    assert far.loaded
    assert far.offers == {"placer": ("farthest",)}


def test_plugin_that_is_missing(install: Install) -> None:
    install("far", good("farthest"))
    error = refused("fra")
    assert "'fra' is not installed" in error.message
    assert "far" in error.hint


def test_two_distributions_with_one_plugin_name(install: Install) -> None:
    install("far", good("farthest"))
    install("far", good("farther"), distribution="other-far", module="rustord_placer_other")
    assert "other-far and rustord-placer-far" in refused("far").message


@pytest.mark.parametrize("taken", ["contiguous", "farthest"])
def test_one_name_offered_twice(install: Install, taken: str) -> None:
    install("far", good("farthest"))
    install("near", good(taken))
    error = refused("far", "near")
    assert f"both offer the placer {taken!r}" in error.message
    assert "rustord-placer-near 1.2" in error.message


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import module_that_is_absent", "No module named 'module_that_is_absent'"),
        ("this is no Python", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        (good("x").replace("return", "raise SystemExit(0)  #"), "SystemExit"),
        (good("x").replace("RUSTORD_API_VERSION = 1", ""), "says nothing of the API version"),
        (good("x").replace("RUSTORD_API_VERSION = 1", "RUSTORD_API_VERSION = 2"), "is for 2 as the API version"),
        (good("x").replace("RUSTORD_API_VERSION = 1", "RUSTORD_API_VERSION = 0"), "is for 0 as the API version"),
        (good("x").replace("@hookimpl", ""), "offers nothing"),
        (good("x").replace("rustord_placers", "rustord_palcers"), "rustord_palcers"),
        (good("x").replace("rustord_placers()", "rustord_placers(pool)"), "pool"),
        (good("x").replace("return {", "return 1 / 0, {"), "ZeroDivisionError"),
        (good("x").replace("return {", "return None and {"), "NoneType"),
        (good(""), "1 to 32 ASCII"),
        (good("x" * 33), "1 to 32 ASCII"),
        (good("größte"), "1 to 32 ASCII"),
        (good("x").replace("lambda options: Contiguous()", "3"), "a callable"),
    ],
)
def test_plugin_that_is_broken_is_named_with_its_distribution(install: Install, code: str, told: str) -> None:
    install("far", code)
    error = refused("far")
    assert told in error.message
    assert "'far' (of rustord-placer-far 1.2)" in error.message


@pytest.mark.parametrize(
    ("raises", "expected", "told"),
    [
        ("ValueError('copies: 3 is odd')", ConfigError, "[placer.options]: copies: 3 is odd"),
        ("KeyError('copies')", PluginError, "'far' (of rustord-placer-far 1.2)"),
        ("SystemExit(0)", PluginError, "'far' (of rustord-placer-far 1.2)"),
    ],
)
def test_factory_that_fails(install: Install, raises: str, expected: type[Any], told: str) -> None:
    code = good("farthest") + f"\ndef fail(options):\n    raise {raises}\n"
    install("far", code.replace("lambda options: Contiguous()", "fail"))
    with pytest.raises(expected) as caught:
        PluginManager(["far"]).make("placer", "farthest", {"copies": 3})
    assert told in caught.value.message
    assert caught.value.hint


def test_errors_of_the_tree_come_out_as_they_are(install: Install) -> None:
    code = good("farthest") + "\nfrom rustord.errors import NoSpace\ndef fail(options):\n    raise NoSpace('full')\n"
    install("far", code.replace("lambda options: Contiguous()", "fail"))
    with pytest.raises(NoSpace):
        PluginManager(["far"]).make("placer", "farthest")
