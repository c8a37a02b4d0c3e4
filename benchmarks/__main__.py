"""The command: `./dev bench`, or `python -m benchmarks`."""

from __future__ import annotations

import json
import os
import platform
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import click
import rich.console

from benchmarks import fullness, growth, large, nbd, small
from benchmarks.contestant import Contestant
from benchmarks.disks import loop_device, xfs
from benchmarks.effort import FULL, KIB, QUICK, Effort
from benchmarks.load import GENERATOR, LoadError, build
from benchmarks.peers.files import files
from benchmarks.peers.postgresql import postgresql
from benchmarks.peers.redis import redis
from benchmarks.report import Row, cells, for_programs, for_readme, for_terminal
from benchmarks.subject import Rustord, rustord

SMALL = {"put": small.put, "get": small.get, "delete": small.delete}
WORKS = (*SMALL, "large", "memory", "start", "full", "nbd")
PEERS = ("redis", "postgresql", "files")

# Printable, so that PostgreSQL need not write it in hexadecimal; random, so that nobody gains by compressing it.
DATA = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=4 * KIB)).encode()


def some_of(allowed: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Makes a tuple of an option like "put,get"; empty means all."""
    names = tuple(allowed)

    def parse(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
        chosen = tuple(filter(None, value.split(",")))
        if unknown := sorted(set(chosen) - set(names)):
            raise click.BadParameter(f"{', '.join(unknown)}: choose from {','.join(names)}", context, option)
        return chosen or names

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default="", callback=some_of(WORKS), help=f"Measure only these of {','.join(WORKS)}.")
@click.option("--against", default="", callback=some_of(PEERS), help=f"Start only these peers of {','.join(PEERS)}.")
@click.option("--quick", is_flag=True, help="One short round of each: to see that it works, not to quote.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("/var/tmp"),
    show_default=True,
    help="Where the files under the loop devices go: on a disk with 20 GiB free.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures of all rounds to a file.")
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write the table for the README.")
def main(
    only: tuple[str, ...],
    against: tuple[str, ...],
    quick: bool,
    directory: Path,
    json_path: Path | None,
    markdown_path: Path | None,
) -> None:
    """Measures rustord beside Redis, PostgreSQL, files and LMDB, and prints how many times as good it is."""
    if os.geteuid() != 0:
        raise click.ClickException("loop devices and filesystems need root: sudo ./dev bench")
    screen = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=directory, prefix="rustord-bench-", ignore_cleanup_errors=True) as place:
        os.chmod(place, 0o755)  # PostgreSQL runs as a user of its own
        try:
            for row in measure(Path(place), only, against, QUICK if quick else FULL):
                click.echo(" | ".join(filter(None, cells(row))), err=True)
                rows.append(row)
        except (LoadError, subprocess.CalledProcessError) as error:
            raise click.ClickException(str(error)) from error
        finally:
            if rows:
                screen.print(for_terminal(rows))
    if json_path:
        json_path.write_text(json.dumps(for_programs(rows, machine()), indent=1))
    if markdown_path:
        markdown_path.write_text(for_readme(rows, machine()))


def measure(place: Path, only: tuple[str, ...], against: tuple[str, ...], effort: Effort) -> Iterator[Row]:
    """All rows of the chosen works, as they come."""
    program = build(GENERATOR, place)

    def subject(device: str, name: str) -> AbstractContextManager[Rustord]:
        return rustord(device, place / name, program, DATA)

    if chosen := [name for name in SMALL if name in only]:
        with (
            xfs(place / "peers.img", effort.disk_size, place / "peers") as filesystem,
            loop_device(place / "small.img", effort.disk_size) as device,
            subject(device, "small") as ours,
            peers(against, filesystem, program) as others,
        ):
            for each in (ours, *others):
                each.fill(effort.warm_up_count)
                each.clear()
            for name in chosen:
                yield from SMALL[name]([ours, *others], effort)
    if "large" in only:
        with (
            xfs(place / "peers.img", effort.large_disk_size, place / "peers") as filesystem,
            loop_device(place / "large.img", effort.large_disk_size) as device,
            subject(device, "large") as ours,
        ):
            yield from large.large(ours, filesystem, effort)
    if "memory" in only:
        with loop_device(place / "memory.img", effort.huge_disk_size) as device, subject(device, "memory") as ours:
            yield from large.huge(ours, effort)
    if "start" in only:
        with loop_device(place / "start.img", effort.start_disk_size) as device, subject(device, "start") as ours:
            yield from growth.growth(ours, effort)
    if "full" in only:
        with (
            loop_device(place / "full.img", effort.nearly_full_size) as device,
            loop_device(place / "empty.img", effort.nearly_full_size) as other_device,
            subject(device, "full") as ours,
            subject(other_device, "empty") as empty,
        ):
            yield from fullness.fullness(ours, empty, len(DATA), effort)
    if "nbd" in only:
        with (
            loop_device(place / "nbd.img", 3 * nbd.SIZE) as device,
            loop_device(place / "peers-nbd.img", nbd.SIZE) as other_device,
            subject(device, "nbd") as ours,
        ):
            yield from nbd.nbd(ours, other_device, place, effort)


@contextmanager
def peers(against: tuple[str, ...], filesystem: Path, program: Path) -> Iterator[list[Contestant]]:
    """The chosen ones, running."""
    starts: dict[str, Callable[[], AbstractContextManager[Contestant]]] = {
        "redis": lambda: redis(filesystem, program, DATA),
        "postgresql": lambda: postgresql(filesystem, DATA),
        "files": lambda: files(filesystem, DATA),
    }
    with ExitStack() as running:
        yield [running.enter_context(starts[name]()) for name in PEERS if name in against]


def machine() -> str:
    """What the figures were measured on, in a sentence."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processors = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.machine()]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    python = f"{platform.python_version()} in {sys.base_prefix}"
    return (
        f"{len(processors)} CPUs, {processors[0]}, {memory_gib:.0f} GiB, Linux {platform.release()}, Python {python}."
    )


if __name__ == "__main__":
    main()
