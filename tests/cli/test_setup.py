"""plugin, config and completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def test_plugins_that_the_daemon_has(daemon: object, rustorctl: Command) -> None:
    told = json.loads(rustorctl.ok("plugin", "list", "--json"))
    assert told[0]["name"] == "rustord"
    assert "contiguous" in told[0]["offers"]["placer"]
    assert "keystore lmdb, sqlite" in rustorctl.ok("plugin", "list")


def test_plugins_are_checked_without_a_daemon(rustorctl: Command, disk_path: Path) -> None:
    assert rustorctl.ok("plugin", "check", "--config", os.devnull).startswith("rustord (rustord ")
    done = rustorctl("plugin", "check", "nothing")
    assert (done.returncode, done.stdout) == (14, "")
    assert "plugin 'nothing' is not installed" in done.stderr
    (disk_path / "rustord.toml").write_text('plugins = ["nothing"]')
    assert rustorctl("plugin", "check", "--config", disk_path / "rustord.toml").returncode == 14


BENT = """
from rustord.hookspecs import hookimpl
from rustord.placer import Contiguous

RUSTORD_API_VERSION = 1

class Bent(Contiguous):
    def place(self, count, free):
        return [extents[:-1] for extents in super().place(count, free)]

@hookimpl
def rustord_placers():
    return {"straight": lambda options: Contiguous(), "bent": lambda options: Bent()}
"""


def test_plugins_that_are_named_have_to_keep_the_contract(rustorctl: Any, disk_path: Path) -> None:
    """As plugins/README.md says."""
    (information := disk_path / "rustord_bent-1.0.dist-info").mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rustord-bent\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[rustord.plugins]\nbent = rustord_bent\n")
    (disk_path / "rustord_bent.py").write_text(BENT)
    path = os.pathsep.join(filter(None, (str(disk_path), os.environ.get("PYTHONPATH"))))
    environment = {**rustorctl.environment, "PYTHONPATH": path}
    done = rustorctl("plugin", "check", "bent", env=environment)
    assert done.returncode == 14, done
    assert "bent (rustord-bent 1.0): placer straight, bent\n" in done.stdout
    assert re.search(r"\nplacer straight: \d+ tests of the contract passed, 0 failed\n", done.stdout)
    assert re.search(r"\nplacer bent: \d+ tests of the contract passed, [1-9]\d* failed\n  test_", done.stdout)
    assert "tests of the contract failed" in done.stderr
    (disk_path / "rustord.toml").write_text('plugins = ["bent"]')
    done = rustorctl("plugin", "check", "--config", disk_path / "rustord.toml", env=environment)
    assert (done.returncode, "contract" in done.stdout) == (0, False), done


def test_a_configuration_is_checked_with_what_it_names(rustorctl: Command, disk_path: Path) -> None:
    main = disk_path / "rustord.toml"
    main.write_text('[placer]\npolicy = "mirrored"\noptions = { copies = 3 }\n')
    (disk_path / "conf.d").mkdir()
    (disk_path / "conf.d" / "10.toml").write_text("")
    assert rustorctl.ok("config", "check", main) == f"{main}: ok\n{disk_path}/conf.d/10.toml: ok\n"


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("[plaser]", 78, "plaser: there is no such setting\nhint: did you mean 'placer'?"),
        ("[placer]\npolicy = 5", 78, "[placer] policy: 5 is not allowed"),
        ('[placer]\npolicy = "spiral"', 14, "there is no placer 'spiral'"),
        ('[placer]\npolicy = "mirrored"\noptions.copies = 99', 78, "[placer.options] copies: 99 is not allowed"),
        ("[placer]\noptions.copies = 2", 78, "[placer.options] copies: there is no such setting"),
        ('[keystore]\nbackend = "files"', 14, "there is no keystore 'files'"),
        ('plugins = ["nothing"]', 14, "plugin 'nothing' is not installed"),
        ('[nbd]\nlisten = "127.0.0.1:99999"', 78, "nobody can listen on 127.0.0.1:99999"),
        ('[nbd]\nlisten = "192.0.2.1:10809"', 78, "nbd.listen is 192.0.2.1:10809, which is not this machine alone"),
        ('[nbd]\ntls_key = "/dev/null"', 78, "TLS needs all of"),
        (
            "[nbd]\n" + "".join(f'tls_{name} = "/none/{name}"\n' for name in ("certificate", "key", "authority")),
            78,
            "/none/certificate with the key /none/key cannot be used for TLS",
        ),
        ("[", 78, ""),
    ],
)
def test_what_would_keep_the_daemon_from_starting_is_found(
    rustorctl: Command, disk_path: Path, text: str, status: int, message: str
) -> None:
    main = disk_path / "rustord.toml"
    main.write_text(text)
    done = rustorctl("config", "check", main)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert rustorctl("config", "check", disk_path / "missing").returncode == 78


def complete_in_bash(rustorctl: Command, *words: str) -> list[str]:
    """What bash offers for the last word."""
    script = (
        'source <("$0" completion bash); COMP_WORDS=(rustorctl "$@"); COMP_CWORD=$#; '
        '_rustorctl_completion "$0"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, rustorctl.program, *words],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        env=rustorctl.environment,  # type: ignore[attr-defined]
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


def test_bash_completes_commands_options_and_names(daemon: object, rustorctl: Command) -> None:
    assert complete_in_bash(rustorctl, "sta") == ["stat", "status"]
    assert complete_in_bash(rustorctl, "device", "") == ["add", "fail", "list", "remove", "replace"]
    assert complete_in_bash(rustorctl, "put", "--no") == ["--no-clobber"]
    rustorctl.ok("put", "-", "--name", "logs/one", input="")
    rustorctl.ok("put", "-", "--name", "logs/two", input="")
    assert complete_in_bash(rustorctl, "get", "lo") == ["logs/one", "logs/two"]


def test_bash_completes_commands_without_a_daemon(rustorctl: Command) -> None:
    assert complete_in_bash(rustorctl, "comp") == ["completion"]
    assert complete_in_bash(rustorctl, "get", "lo") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_for_each_shell(rustorctl: Command, shell: str) -> None:
    script = rustorctl.ok("completion", shell)
    assert f"_RUSTORCTL_COMPLETE={shell}_complete" in script


def test_an_unknown_shell(rustorctl: Command) -> None:
    assert rustorctl("completion", "tcsh").returncode == 2
