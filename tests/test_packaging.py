"""What rustord is distributed as: the manual, the completions, the wheel and the packages' descriptions."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import rustord
from rustord.cli.commands import rustorctl
from rustord.config import Config
from rustord.event import EVENTS
from rustord.settings import settings_of

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
PAGES = ("rustord.8", "rustorctl.1", "rustord.toml.5", "rustord-plugins.7", "rustord-nbd.7")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"there is no {', '.join(missing)}; `./dev package` brings it")


def run(*command: str | Path, **environment: str) -> str:
    """What a command printed, on either output; it must have ended well."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with all that packaging/manual.py makes."""
    directory = tmp_path_factory.mktemp("manual")
    run(sys.executable, PACKAGING / "manual.py", directory)
    return directory


def read(page: Path) -> str:
    """A manual page as a person sees it."""
    shown = run("man", "--local-file", page, MANWIDTH="500", MAN_KEEP_FORMATTING="", LC_ALL="C.UTF-8")
    return re.sub(r"\s+", " ", shown)


# The manual


@needs("man", "mandoc")
@pytest.mark.parametrize("page", PAGES)
def test_a_manual_page_has_no_mistakes(manual: Path, page: str) -> None:
    assert run("man", "--warnings", "--encoding=UTF-8", "--local-file", "-Tutf8", "--ditroff", manual / page)[:1] == "x"
    assert run("mandoc", "-Tlint", "-Wwarning", manual / page) == ""


def commands(group: click.Group, path: str = "") -> list[str]:
    found = []
    for name, command in group.commands.items():
        found += commands(command, f"{path}{name} ") if isinstance(command, click.Group) else [f"{path}{name}"]
    return found


@needs("man")
def test_the_manual_has_every_command(manual: Path) -> None:
    shown = read(manual / "rustorctl.1")
    assert len(commands(rustorctl)) > 10
    for command in commands(rustorctl):
        assert f" {command} rustorctl {command} [OPTIONS]" in shown


@needs("man")
def test_the_manual_has_every_setting(manual: Path) -> None:
    shown = read(manual / "rustord.toml.5")
    for field in Config.__dataclass_fields__.values():
        for name, setting in settings_of(field.metadata.get("table", field.metadata.get("tables", Config))):
            assert f" {name} " in shown
            assert " ".join(setting.doc.split()) in shown


@needs("man")
def test_the_manual_and_the_catalog_have_every_event(manual: Path) -> None:
    shown, catalog = read(manual / "rustord.8"), (manual / "rustord.catalog").read_text()
    for event in EVENTS.values():
        assert f"{event.subject} MESSAGE_ID={event.message_id} {event.advice}" in shown
        assert f"-- {event.message_id}\nSubject: {event.subject}\n" in catalog


@needs("man")
def test_no_page_refers_to_one_that_is_not_there(manual: Path) -> None:
    pages = {f"{page.rpartition('.')[0]}({page[-1]})" for page in PAGES}
    for page in PAGES:
        assert set(re.findall(r"\brustor[a-z.-]*\(\d\)", read(manual / page))) <= pages


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs(shell)) for shell in ("bash", "zsh", "fish")])
def test_completions_are_valid(manual: Path, shell: str) -> None:
    scripts = list((manual / shell).iterdir())
    assert len(scripts) == 2
    for script in scripts:
        run(shell, "--no-execute" if shell == "fish" else "-n", script)


# The packages


SURROUNDINGS = (
    {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
    {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
)
"""Of two builds; the umask and the directory are others, too."""
TELL_OF_THE_BUILD = (".buildinfo", ".changes", ".src.rpm")


def digest(path: Path) -> str:
    """Of all that is in a package."""
    if path.suffix == ".rpm":
        files = "[%{FILENAMES} %{FILEMODES} %{FILEUSERNAME} %{FILEMTIMES}\n]"
        return run("rpm", "--query", "--package", "--queryformat", f"%{{BUILDTIME}} %{{PAYLOADDIGEST}}\n{files}", path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs("/usr/bin/python3")
@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [
        ("wheel", {".whl", ".gz"}),
        pytest.param("deb", {".deb", ".dsc", ".gz", ".xz"}, marks=[pytest.mark.long, needs("pybuild")]),
        pytest.param("rpm", {".rpm"}, marks=[pytest.mark.long, needs("rpmbuild")]),
    ],
)
@pytest.mark.timeout(900)
def test_two_builds_are_equal(tmp_path: Path, kind: str, suffixes: set[str]) -> None:
    if not Path("/usr/lib/python3/dist-packages/hatchling").exists():
        pytest.skip("there is no python3-hatchling; `./dev package` brings it")
    builds = []
    for number, surroundings in enumerate(SURROUNDINGS):
        umask = ["sh", "-euc", f'umask 00{2 + 5 * number}{2 + 5 * number}; exec "$@"', "sh"]
        run(
            *umask,
            sys.executable,
            PACKAGING / "build.py",
            directory := tmp_path / f"build{number}",
            kind,
            **surroundings,
        )
        built = [path for path in sorted(directory.iterdir()) if not path.name.endswith(TELL_OF_THE_BUILD)]
        builds.append({path.name: digest(path) for path in built})
    assert builds[0] == builds[1]
    assert {Path(name).suffix for name in builds[0]} == suffixes


def test_the_packages_have_the_version_of_the_program() -> None:
    changelog = (PACKAGING / "debian" / "changelog").read_text()
    assert changelog.startswith(f"rustord ({rustord.__version__}-")
    assert f"\nVersion:        {rustord.__version__}\n" in (PACKAGING / "rustord.spec").read_text()


@needs("rpmlint")
def test_the_description_of_the_rpm_has_no_mistakes() -> None:
    run("rpmlint", "--config", PACKAGING / "rpmlint.toml", PACKAGING / "rustord.spec")


@needs("rpmbuild")
def test_the_rpm_can_be_built(tmp_path: Path) -> None:
    run(sys.executable, PACKAGING / "build.py", tmp_path, "rpm")
    (package,) = tmp_path.glob("rustord-*.noarch.rpm")
    files = run("rpm", "--query", "--list", "--package", package)
    assert "/usr/bin/rustord\n" in files
    assert "/usr/lib/systemd/system/rustord.service\n" in files
