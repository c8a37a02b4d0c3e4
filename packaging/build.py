#!/usr/bin/env python3
"""Builds what rustord is distributed as, into a directory: everything, or only what is named.

    packaging/build.py DIRECTORY [wheel|deb|rpm]...

The source distribution comes first, and all else is made from it. Two builds of one commit are equal, byte by byte, but
for what tells of the build itself: Debian's .buildinfo and .changes; and an RPM's source has the name of the directory
that it was built in, its header an id of that source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The distribution's own programs: no build reaches for a package index.
PYTHON = "/usr/bin/python3"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} ended with status {done.returncode}")


def epoch() -> str:
    """When the commit was made, which is the time of everything in a package."""
    log = ["git", "-c", "safe.directory=*", "log", "-1", "--format=%ct"]
    return subprocess.run(log, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def unpack(archive: Path, directory: Path) -> Path:
    run("tar", "--extract", "--file", archive, cwd=directory)
    (tree,) = (path for path in directory.iterdir() if path.is_dir())
    return tree


def build_sdist(destination: Path) -> Path:
    run(PYTHON, "-m", "hatchling", "build", "--target", "sdist", "--directory", destination, cwd=ROOT)
    (sdist,) = destination.glob("*.tar.gz")
    sdist.chmod(0o644)
    os.utime(sdist, (int(os.environ["SOURCE_DATE_EPOCH"]),) * 2)  # which a source package keeps
    return sdist


def build_wheel(sdist: Path, work: Path, destination: Path) -> None:
    tree = unpack(sdist, work)
    run(PYTHON, "-m", "hatchling", "build", "--target", "wheel", "--directory", work, cwd=tree)
    (wheel,) = work.glob("*.whl")
    wheel.chmod(0o644)
    shutil.copy(wheel, destination)


def build_deb(sdist: Path, work: Path, destination: Path) -> None:
    """Debian's packages, source and all."""
    tree = unpack(sdist, work)
    shutil.copytree(tree / "packaging" / "debian", tree / "debian")
    shutil.copy(sdist, work / f"rustord_{tree.name.partition('-')[2]}.orig.tar.gz")
    run("dpkg-buildpackage", "--no-sign", "--build=full", cwd=tree)
    for path in work.glob("*rustord_*"):
        shutil.copy(path, destination)


def build_rpm(sdist: Path, work: Path, destination: Path) -> None:
    """An RPM and its source. On a machine of Debian's nobody knows what RPMs are installed, so none are asked for."""
    spec = unpack(sdist, work) / "packaging" / "rustord.spec"
    define = ["--define", f"_topdir {work}/rpm", "--define", f"_sourcedir {sdist.parent}"]
    define += ["--define", "use_source_date_epoch_as_buildtime 1", "--define", "_buildhost rustord"]
    define += ["--define", "clamp_mtime_to_source_date_epoch 1"]
    run("rpmbuild", "-ba", "--nodeps", *define, spec, cwd=work)
    for path in (work / "rpm").glob("*RPMS/**/*.rpm"):
        shutil.copy(path, destination)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("kinds", nargs="*", choices=["wheel", "deb", "rpm"], default=["wheel", "deb", "rpm"])
    arguments = parser.parse_args()
    destination = arguments.directory.resolve()
    destination.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)
    os.environ.setdefault("SOURCE_DATE_EPOCH", epoch())
    os.environ["PATH"] = PATH
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(prefix="rustord-build-", dir="/var/tmp") as work:
            sdist = build_sdist(Path(work, "sdist"))
            (tree := Path(work, kind)).mkdir()
            if kind == "wheel":
                build_wheel(sdist, tree, destination)
                shutil.copy(sdist, destination)
            elif kind == "deb":
                build_deb(sdist, tree, destination)
            else:
                build_rpm(sdist, tree, destination)


if __name__ == "__main__":
    main()
