"""The README: its session works when it is typed, its tables are those of the program, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rustord.cli import edge

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# What differs from one run to the next: a uuid, a time, a place; "..." in the README stands for any text.
VARYING = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z|(?<=blocks )[0-9]+-[0-9]+"


class Step(NamedTuple):
    command: str
    output: str


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def steps(block: str) -> Iterator[Step]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield Step(command, output)


def pattern(output: str) -> str:
    """A regular expression for what a command is said to print."""
    fixed = (re.escape(part).replace(r"\.\.\.", ".*") for part in re.split(VARYING, output))
    return f"(?:{VARYING})".join(fixed)


@pytest.fixture
def clone(disk_path: Path) -> Path:
    """A directory that looks like a clone in which `./dev run` was typed, without a daemon yet."""
    for name in ("README.md", "packaging"):
        (disk_path / name).symlink_to(ROOT / name)
    (disk_path / ".dev").mkdir()
    (disk_path / ".venv").mkdir()
    (disk_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return disk_path


@pytest.fixture
def dev_run(clone: Path) -> Iterator[Path]:
    """The clone, once the daemon serves."""
    binaries = clone / ".venv" / "bin"
    image = clone / ".dev" / "pool.img"
    subprocess.run(
        [binaries / "rustorctl", "pool", "create", "--pool-name", "dev", "--size", "4GiB", image],
        check=True,
        capture_output=True,
    )
    command = [binaries / "rustord", "--device", image, "--directory", clone / ".dev" / "index"]
    daemon = subprocess.Popen(
        [*command, "--socket", clone / ".dev" / "rustord.sock"], stderr=subprocess.PIPE, text=True
    )
    assert daemon.stderr is not None
    for line in daemon.stderr:
        if "serving on" in line:
            break
    yield clone
    daemon.terminate()
    assert daemon.wait(timeout=60) == 0
    daemon.stderr.close()


def type_into_bash(block: str, directory: Path) -> list[str]:
    """What each command of a block prints, all typed into one shell."""
    end = "\x1eend of step\x1e\n"
    script = "shopt -s expand_aliases\n" + "".join(
        f"{step.command}\nprintf '\\x1eend of step\\x1e\\n'\n" for step in steps(block)
    )
    environment = {key: value for key, value in os.environ.items() if key != "RUSTORD_SOCKET"}
    done = subprocess.run(
        ["bash"],
        input=script,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split(end)[:-1]


def test_the_sessions_do_what_they_say(dev_run: Path) -> None:
    sessions = blocks("console")
    assert len(sessions) == 3
    for session in sessions:
        setup = "" if session is sessions[0] else "$ " + next(steps(sessions[0])).command + "\n"
        printed = type_into_bash(setup + session, dev_run)
        for step, output in zip(steps(setup + session), printed, strict=True):
            assert re.fullmatch(pattern(step.output), output, re.DOTALL), f"$ {step.command}\n{output}"


def test_curl_does_what_rustorctl_does(dev_run: Path, make_image: Callable[[int], Path]) -> None:
    curl = ["curl", "-sS", "--fail-with-body", "--unix-socket", str(dev_run / ".dev" / "rustord.sock")]
    stored = subprocess.run([*curl, "-d", "x", "http://r/v1/objects"], check=True, capture_output=True)
    values = {
        "FILE": "README.md",
        "NAME": "some/name",
        "UUID": json.loads(stored.stdout)["uuid"],
        "PREFIX": "some/",
        "PATH": str(make_image(64 << 20)),
        "INDEX": "1",
    }
    rows = re.findall(r"^\| (`.*?) \| (`.*`) \|$", README.split("## With curl")[1].split("##")[0], re.MULTILINE)
    assert len(rows) >= 17
    for _, cell in rows:
        for arguments in re.findall(r"`([^`]*http://[^`]*)`", cell):
            line = re.sub("|".join(values), lambda found: values[found[0]], arguments.replace("-o FILE", "-o out"))
            done = subprocess.run(
                f"{shlex.join(curl)} {line}", shell=True, cwd=dev_run, input="data", capture_output=True, text=True
            )
            assert done.returncode == 0, (line, done)
            if "PUT" in line or "-T" in line:
                assert json.loads(done.stdout)["name"] == values["NAME"]


def test_the_programs_run(dev_run: Path) -> None:
    environment = {**os.environ, "PATH": f"{dev_run}/.venv/bin:{os.environ['PATH']}"}
    subprocess.run(
        ["rustorctl", "pool", "create", "--size", "64MiB", "pool.img"],
        check=True,
        cwd=dev_run,
        env=environment,
        capture_output=True,
    )
    programs = blocks("python")
    assert len(programs) == 2
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], cwd=dev_run, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello'\n", "")


def test_the_library_example_is_short() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 5


def test_the_configuration_is_one(tmp_path: Path) -> None:
    from rustord.config import load

    for number, text in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        assert load(path).placer.policy == "mirrored"


def test_the_exit_statuses_are_those_of_the_commands() -> None:
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", README, re.MULTILINE)
    assert documented == re.findall(r"^(\d+) +(.*)$", edge.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
