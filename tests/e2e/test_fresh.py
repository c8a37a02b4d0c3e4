"""The README's first steps, typed on a fresh Debian with no more than it asks for: python3 and git."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests import container as containers
from tests.test_readme import blocks, pattern, steps

ROOT = Path(__file__).parents[2]
# How this machine reaches its mirrors, if it has ways of its own.
OF_THE_NETWORK = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
VARIABLES = re.compile(r"PIP_.*|SSL_.*|.*_proxy|.*_PROXY|LANG")

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(1200)]


class Fresh:
    """A minimal Debian in a directory, entered by chroot, with a clone of this project in /root/rustord."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clone = root / "root" / "rustord"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, self.clone], check=True)
        for name in OF_THE_NETWORK:
            if Path("/", name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path("/", name), root / name)
        self.environment = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
        self.environment |= {"PATH": containers.PATH, "HOME": "/root"}

    def command(self, script: str) -> list[str]:
        return ["chroot", str(self.root), "bash", "-c", f"cd /root/rustord; {script}"]


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    if lacking := containers.lacking():
        pytest.skip(f"this test makes a Debian: {lacking}")
    root = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="rustord-fresh-"))
    containers.bootstrap(root, ("python3", "git", "ca-certificates"))
    with ExitStack() as stack:
        for name in ("proc", "sys", "dev"):
            subprocess.run(["mount", "--bind", f"/{name}", root / name], check=True)
            stack.callback(subprocess.run, ["umount", root / name], check=True)
        yield Fresh(root)
    # Only what is of this filesystem: never what is mounted there after all.
    subprocess.run(["rm", "--recursive", "--force", "--one-file-system", root], check=True)


def test_the_first_steps_work_as_they_are_typed(fresh: Fresh) -> None:
    (start, *_) = blocks("sh")
    (session, *_) = blocks("console")
    with (fresh.root / "said").open("wb") as said:
        daemon = subprocess.Popen(
            fresh.command(f"exec {start}"),
            env=fresh.environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        text = (fresh.root / "said").read_text
        while "In another terminal, try" not in text():
            assert daemon.poll() is None, text()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(0.2)
        for step, printed in zip(steps(session), type_into(fresh, session), strict=True):
            assert re.fullmatch(pattern(step.output), printed, re.DOTALL), f"$ {step.command}\n{printed}"
    finally:
        os.killpg(daemon.pid, signal.SIGINT)  # Ctrl-C
        assert daemon.wait(60) == 0


def type_into(fresh: Fresh, session: str) -> list[str]:
    """What each command of a session prints, all typed into one shell."""
    end = "\x1eend of step\x1e\n"
    script = "".join(f"{step.command}\nprintf '\\x1eend of step\\x1e\\n'\n" for step in steps(session))
    done = subprocess.run(
        fresh.command("exec bash"),
        input=script,
        env=fresh.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split(end)[:-1]
