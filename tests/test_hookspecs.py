from __future__ import annotations

import inspect

from rustord import defaults, hookspecs
from rustord.plugins import HOOKS

HOOK_FUNCTIONS = {name for name in vars(hookspecs) if name.startswith("rustord_")}


def test_each_role_has_its_hook_and_each_hook_its_role() -> None:
    assert set(HOOKS.values()) == HOOK_FUNCTIONS


def test_each_hook_is_documented() -> None:
    assert all(inspect.getdoc(getattr(hookspecs, name)) for name in HOOK_FUNCTIONS)


def test_rustord_itself_uses_each_hook() -> None:
    assert {name for name in vars(defaults) if name.startswith("rustord_")} == HOOK_FUNCTIONS


def test_hooks_fit_on_a_page() -> None:
    assert len(inspect.getsource(hookspecs).splitlines()) <= 80
