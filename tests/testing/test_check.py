from __future__ import annotations

import subprocess
import sys

import pytest

from rustord import defaults
from rustord.placer import Contiguous
from rustord.testing import check

WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
from rustord.errors import PluginError
try:
    import rustord.testing
except PluginError as error:
    print(error.message, error.hint)
"""


def test_what_is_right_passes(capfd: pytest.CaptureFixture[str]) -> None:
    report = check("placer", defaults.rustord_placers()["mirrored"], {"copies": 3})
    assert report.failures == ()
    assert report.passed > 40
    assert capfd.readouterr() == ("", "")


def test_failures_say_what_and_where() -> None:
    class Silent(Contiguous):
        name = ""

    report = check("placer", lambda options: Silent())
    assert [failure.test for failure in report.failures] == ["test_name_can_be_recorded"]
    assert "assert 1 <= 0" in report.failures[0].what
    assert "rustord/testing/placer.py" in report.failures[0].detail
    assert report.passed > 40


def test_factory_that_raises_fails_each_test() -> None:
    def fail(options: object) -> object:
        raise OSError("no server answers")

    report = check("keygen", fail)
    assert report.passed == 0
    assert {failure.what for failure in report.failures} == {"OSError: no server answers"}


def test_options_are_handed_on() -> None:
    seen = []

    def factory(options: object) -> Contiguous:
        seen.append(options)
        return Contiguous()

    check("placer", factory, {"some": "option"})
    assert {"some": "option"} in seen
    assert {} not in seen


def test_surroundings_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    assert check("keygen", defaults.rustord_keygens()["sha256"]).passed > 10


def test_without_pytest_it_says_what_to_install() -> None:
    told = subprocess.run([sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True, check=True).stdout
    assert "need pytest" in told
    assert "apt-get install python3-pytest" in told
