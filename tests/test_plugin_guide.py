"""The plugin author's guide, plugins/README.md: what it shows is typed from it, and works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rustord import config, hookspecs, testing
from rustord.plugins import HOOKS, PluginManager

PLUGINS = Path(__file__).parent.parent / "plugins"
GUIDE = (PLUGINS / "README.md").read_text()
MODULE, TESTS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
PYPROJECT, CONFIGURATION = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's example as its steps leave it, installed."""
    (tmp_path / "rustord_placer_roomiest.py").write_text(MODULE)
    (tmp_path / "test_roomiest.py").write_text(TESTS)
    told = tomllib.loads(PYPROJECT)["project"]
    information = tmp_path / "rustord_placer_roomiest-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n")
    entries = [f"{name} = {module}" for name, module in told["entry-points"]["rustord.plugins"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[rustord.plugins]", *entries]))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_its_tests_pass(project: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_roomiest.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_configuration_chooses_the_plugin(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "rustord.toml"
    file.write_text(CONFIGURATION)
    settings = config.load(file)
    plugins = PluginManager(settings.plugins)
    placer = plugins.make("placer", settings.placer.policy, settings.placer.options)
    assert placer.name == "roomiest"
    assert placer.place.__self__.keep == 256  # type: ignore[attr-defined]
    found = plugins.find("placer", "roomiest")
    assert found[0].distribution == "rustord-placer-roomiest"
    assert testing.check("placer", found[1]).failures == ()


def test_it_names_all_there_is() -> None:
    assert f"RUSTORD_API_VERSION = {hookspecs.API_VERSION}" in MODULE
    assert all(f"{name}Contract" in GUIDE for name in ("KeyGen", "Placer", "KeyStore"))
    assert set(HOOKS) == {"keygen", "placer", "keystore"}
    for path in re.findall(r"`(rustord/\S+\.py)`", GUIDE):
        assert (PLUGINS.parent / path).is_file(), path
    for target in re.findall(r"\]\((rustord-\S+)\)", GUIDE):
        assert (PLUGINS / target / "README.md").is_file(), target


@pytest.mark.parametrize("pyproject", sorted(PLUGINS.glob("*/pyproject.toml")), ids=lambda path: path.parent.name)
def test_plugins_here_are_built_as_it_says(pyproject: Path) -> None:
    told, shown = tomllib.loads(pyproject.read_text()), tomllib.loads(PYPROJECT)
    assert told["build-system"] == shown["build-system"]
    assert told["project"]["name"] == pyproject.parent.name
    assert told["project"]["optional-dependencies"] == shown["project"]["optional-dependencies"]
    (module,) = told["project"]["entry-points"]["rustord.plugins"].values()
    assert told["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"{module}.py"]
    assert list((pyproject.parent / "tests").glob("test_*.py"))
