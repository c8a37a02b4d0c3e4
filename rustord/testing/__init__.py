"""For plugin authors: the contract of each role as a suite of tests.

A plugin's tests run it with one class::

    from rustord.testing import PlacerContract

    class TestSpread(PlacerContract):
        factory = staticmethod(make_spread)     # what the hook offers: options -> Placer

and `check` runs it on whatever is installed, as ``rustorctl plugin check`` does. The suites need pytest and hypothesis.
"""

from __future__ import annotations

from rustord.errors import PluginError

try:
    import hypothesis  # noqa: F401
    import pytest
except ImportError as error:
    raise PluginError(
        f"the contract suites need pytest and hypothesis, and {error.name} is not installed",
        hint="install both: apt-get install python3-pytest python3-hypothesis, or pip install 'rustord[test]'",
    ) from error

# Before they are imported: so that a failed assert shows the values it saw.
pytest.register_assert_rewrite("rustord.testing.keygen", "rustord.testing.keystore", "rustord.testing.placer")

from rustord.testing.check import Failure, Report, check  # noqa: E402
from rustord.testing.keygen import KeyGenContract  # noqa: E402
from rustord.testing.keystore import KeyStoreContract  # noqa: E402
from rustord.testing.placer import PlacerContract  # noqa: E402

__all__ = ["Failure", "KeyGenContract", "KeyStoreContract", "PlacerContract", "Report", "check"]
