"""`rustorctl attach` with a kernel that has nbd, in a machine that QEMU emulates."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest import kernel

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 900
"""Without hardware's help, and with other work beside it."""

PROGRAM = """#!/usr/bin/python3
from rustord.cli.{name} import main
main()
"""


def disk(directory: Path, debian: Path) -> Path:
    """An image to boot from: a Debian with rustord, whose first process is the script."""
    root = directory / "root"
    subprocess.run(["cp", "--archive", "--reflink=auto", debian, root], check=True)
    (modules,) = (kernel() / "lib/modules").iterdir()
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    subprocess.run(["chroot", root, "depmod", modules.name], check=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rustord", root / "usr/lib/python3/dist-packages/rustord", ignore=ignore)
    for name in ("rustord", "rustorctl"):
        (root / "usr/bin" / name).write_text(PROGRAM.format(name=name))
        (root / "usr/bin" / name).chmod(0o755)
    shutil.copy(Path(__file__).with_name("kernel_nbd.sh"), root / "first")
    (root / "first").chmod(0o755)
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard", "-d", root, image], check=True)
    shutil.rmtree(root)
    return image


@pytest.mark.root
@pytest.mark.long
@pytest.mark.timeout(SECONDS_MAX + 120)
@pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None,
    reason="there is no qemu-system-x86_64; `apt-get install qemu-system-x86` brings it",
)
def test_the_kernel_attaches_and_survives_the_daemon(disk_path: Path, debian: Path) -> None:
    image = disk(disk_path, debian)
    (boot,) = (kernel() / "boot").glob("vmlinuz-*")
    console = disk_path / "console"
    settings = "console=ttyS0 root=/dev/nvme0n1 rootfstype=ext4 rw init=/first panic=-1 quiet mitigations=off"
    command: list[str | Path] = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35"]
    command += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1500", "-no-reboot"]
    command += ["-kernel", boot, "-append", f"{settings} random.trust_cpu=on tsc=reliable no_timer_check"]
    command += ["-drive", f"file={image},format=raw,if=none,id=root,cache=unsafe"]
    command += ["-device", "nvme,drive=root,serial=root", "-serial", f"file:{console}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=SECONDS_MAX)
    said = console.read_text(errors="replace")
    print(said)
    assert "FAILED" not in said
    assert len(re.findall(r"(?<![a-z])ok [a-z]", said)) == 24  # behind a progress bar, too, which ends no line
    assert "\ndone" in said
