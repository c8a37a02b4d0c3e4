from __future__ import annotations

from typing import Any

import pytest

from rustord import defaults
from rustord.config import KeygenTable, KeystoreTable, PlacerTable
from rustord.errors import ConfigError
from rustord.plugins import HOOKS, PluginManager


@pytest.fixture(scope="module")
def plugins() -> PluginManager:
    return PluginManager()


def test_what_the_documents_promise_is_offered(plugins: PluginManager) -> None:
    assert plugins.offered("keygen") == ["xxh3-128", "xxh3-64", "blake2b", "sha256"]
    assert plugins.offered("placer") == ["contiguous", "first-fit", "striped", "mirrored"]
    assert plugins.offered("keystore") == ["lmdb", "sqlite"]


def test_configuration_that_says_nothing_is_served(plugins: PluginManager) -> None:
    assert plugins.make("keygen", KeygenTable().algorithm).algorithm == "xxh3-128"
    assert plugins.make("placer", PlacerTable().policy, PlacerTable().options).name == "contiguous"
    assert plugins.make("keystore", KeystoreTable().backend, KeystoreTable().options) is not None


@pytest.mark.parametrize("role", HOOKS)
def test_each_can_be_made_without_options_and_goes_by_its_name(plugins: PluginManager, role: Any) -> None:
    for name in plugins.offered(role):
        made = plugins.make(role, name)
        if role != "keystore":
            assert name == (made.algorithm if role == "keygen" else made.name)


def test_options_of_the_placers() -> None:
    placers = defaults.rustord_placers()
    assert placers["mirrored"]({"copies": 3}).copies == 3
    assert placers["striped"]({"unit_blocks": 4}).unit_blocks == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("role", "name", "options", "told"),
    [
        ("placer", "mirrored", {"copies": 1}, "[placer.options] copies"),
        ("placer", "mirrored", {"copies": True}, "[placer.options] copies"),
        ("placer", "mirrored", {"cpies": 2}, "[placer.options] cpies"),
        ("placer", "striped", {"unit_blocks": "4 KiB"}, "[placer.options] unit_blocks"),
        ("placer", "contiguous", {"unit_blocks": 4}, "[placer.options] unit_blocks"),
        ("placer", "first-fit", {"copies": 4}, "[placer.options] copies"),
        ("keystore", "lmdb", {"map_size": 4}, "[keystore.options] map_size"),
        ("keystore", "sqlite", {"synchronous": "off"}, "[keystore.options] synchronous"),
        ("keygen", "sha256", {"rounds": 4}, "[keygen.options] rounds"),
    ],
)
def test_option_that_makes_no_sense_is_named(
    plugins: PluginManager, role: Any, name: str, options: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.make(role, name, options)
    assert told in caught.value.message
    assert caught.value.hint
