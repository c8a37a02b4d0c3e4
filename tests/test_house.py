"""The rules of this house. What a reviewer would have to say twice, a test says instead."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules without a tests/**/test_NAME.py of their own, and where they are tested instead.
TESTED_ELSEWHERE = {
    "rustord/layer.py": "tests/test_volumes.py",
    "rustord/notes.py": "tests/test_layermover.py",
    "rustord/replay.py": "tests/test_pool.py",
    "rustord/stock.py": "tests/test_pool.py",
    "rustord/keystore/contents.py": "tests/test_audit.py",
    "rustord/keystore/keys.py": "tests/keystore/test_store.py",
    "rustord/keystore/overlay.py": "tests/keystore/test_store.py",
    "rustord/cli/commands.py": "tests/cli/test_rustorctl.py",
    "rustord/client/connection.py": "tests/client/test_blocking.py",
    "rustord/lease.py": "tests/frontends/test_holding.py",
    "rustord/frontends/exchange.py": "tests/frontends/test_connection.py",
    "rustord/frontends/traffic.py": "tests/frontends/test_http.py",
    "rustord/frontends/worker.py": "tests/frontends/test_workers.py",
}

# A module is one noun that users and documents use too.
NAMES_THAT_SAY_NOTHING = {"common", "constants", "helper", "helpers", "misc", "util", "utils"}

# Below these, code is synchronous and all changes are made by one writer thread.
ASYNCHRONOUS = ("rustord/frontends/", "rustord/client/aio.py", "rustord/daemon.py")

# The daemon's paths (/run, /var/lib, /etc) are the same everywhere; these are somebody's own.
PATH_OF_ONE_MACHINE = re.compile(r"(?<![\w.~}])/(home|work|Users)/\w")


def run(*command: str | Path) -> None:
    """Runs a checker of this Python's own environment; what it says is the failure."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)


def modules() -> Iterator[Path]:
    """The modules of rustord, as paths from the root of the project; `__init__.py` stays with its package."""
    for path in sorted((ROOT / "rustord").rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield path.relative_to(ROOT)


def test_ruff_has_nothing_to_say() -> None:
    run("-m", "ruff", "check", "--quiet", ".")


def test_types_are_complete() -> None:
    plugins = [path for path in ROOT.glob("plugins/*/*.py") if path.stem != "conftest"]
    run("-m", "mypy", "--strict", "rustord", "benchmarks", *plugins)


def test_a_module_imports_only_from_lower_floors() -> None:
    run("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))")


def test_tests_mirror_the_source_tree() -> None:
    mirrors = {module: Path("tests", *module.parts[1:-1], f"test_{module.name}") for module in modules()}
    tests = [TESTED_ELSEWHERE.get(module.as_posix(), mirror) for module, mirror in mirrors.items()]
    assert [test for test in tests if not (ROOT / test).is_file()] == []


def test_exceptions_of_the_mirror_are_still_needed() -> None:
    assert set(TESTED_ELSEWHERE) <= {module.as_posix() for module in modules()}


def test_a_module_is_a_noun() -> None:
    assert [module for module in modules() if set(module.with_suffix("").parts) & NAMES_THAT_SAY_NOTHING] == []


def test_asyncio_stays_in_the_frontends() -> None:
    for module in modules():
        if not module.as_posix().startswith(ASYNCHRONOUS):
            assert "asyncio" not in set(imports(module)), f"{module} is below the asynchronous floors"


def imports(module: Path) -> Iterator[str]:
    """The top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        match node:
            case ast.Import():
                yield from (name.name.partition(".")[0] for name in node.names)
            case ast.ImportFrom(module=str(origin)):
                yield origin.partition(".")[0]


def test_no_file_names_a_path_of_one_machine() -> None:
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if (path := ROOT / name).is_file():
            found = PATH_OF_ONE_MACHINE.search(path.read_bytes().decode("ascii", "replace"))
            assert found is None, f"{name} says {found[0]}"
