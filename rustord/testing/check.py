"""Run the contract of a role on what a plugin offers, outside of any test suite."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import pytest

from rustord.errors import PluginError

_Factory = Callable[[Mapping[str, object]], Any]

_VARIABLES: Final = {"PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Failure(NamedTuple):
    """A test that failed: its name, what was found in a line or two, and all that pytest has to say."""

    test: str
    what: str
    detail: str


class Report(NamedTuple):
    """How many tests of the contract passed, and those that failed."""

    passed: int
    failures: tuple[Failure, ...]


def check(role: str, factory: _Factory, options: Mapping[str, object] | None = None) -> Report:
    """Run the suite of ``role`` (keygen, placer or keystore) on what ``factory`` makes of ``options``.

    A backend is given stores in a temporary directory. Raises PluginError if the suite itself cannot run.
    """
    global _subject
    _subject = _suite(role, factory, options or {})
    observer = _Observer()
    output = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="rustord_check_") as directory:
        module = Path(directory, f"{Path(directory).name}.py")  # a name that no module was ever imported by
        module.write_text("from rustord.testing.check import subject\n\nTestContract = subject()\n")
        # No file, cache or pytest plugin of whoever calls us has a say, and no variable.
        arguments = ["-c/dev/null", f"--rootdir={directory}", f"--basetemp={directory}/tmp"]
        arguments += ["--override-ini=addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", str(module)]
        with redirect_stdout(output), redirect_stderr(output), patch.dict(os.environ, _VARIABLES):
            status = pytest.main(arguments, plugins=[observer])
    sys.modules.pop(module.stem, None)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise PluginError(f"the contract suite of a {role} did not run: {output.getvalue().strip()[-500:]}")
    return Report(observer.passed, tuple(observer.failures))


_subject: type | None = None


def subject() -> type:
    """The suite that is being run."""
    assert _subject is not None
    return _subject


def _suite(role: str, factory: _Factory, options: Mapping[str, object]) -> type:
    from rustord.testing import KeyGenContract, KeyStoreContract, PlacerContract

    suites: dict[str, type] = {"keygen": KeyGenContract, "placer": PlacerContract, "keystore": KeyStoreContract}
    given = pytest.fixture(lambda self: options, name="options")
    return type("TestContract", (suites[role],), {"factory": staticmethod(factory), "options": given})


class _Observer:
    """A pytest plugin that notes what became of each test."""

    def __init__(self) -> None:
        self.passed = 0
        self.failures: list[Failure] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            what = crash.message if crash is not None else report.longreprtext
            self.failures.append(Failure(report.nodeid.rpartition("::")[2], what[:500], report.longreprtext))
        elif report.when == "call" and report.passed:
            self.passed += 1
