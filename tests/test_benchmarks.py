from __future__ import annotations

import shutil
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import WORKS, measure
from benchmarks.effort import MIB, Effort
from benchmarks.load import GENERATOR, Generator, LoadError, build
from benchmarks.report import Bound, Row, Times, cells, for_programs, for_readme, verdict

SMALLEST = Effort(
    rounds=1,
    seconds=0.2,
    small_count=500,
    large_repeats=1,
    huge_size=64 * MIB,
    start_counts=(100, 1000),
    warm_up_count=100,
    disk_size=320 * MIB,  # mkfs.xfs makes none below 300 MiB
    nearly_full_size=64 * MIB,
)


def row(**figures: list[float]) -> Row:
    return Row("durable PUT", "op/s", figures, (Times(1.5, ("Redis", "PostgreSQL")),))


def test_a_ratio_is_of_medians() -> None:
    assert row(rustord=[10.0, 30.0, 20.0], Redis=[9.0, 10.0, 40.0]).ratio("Redis") == 2.0


def test_less_can_be_better() -> None:
    assert Row("memory", "MiB", {"rustord": [50.0], "Redis": [100.0]}, more_is_better=False).ratio("Redis") == 2.0


def test_a_goal_is_met_only_if_every_peer_is_outdone() -> None:
    assert verdict(row(rustord=[30.0], Redis=[20.0], PostgreSQL=[10.0])) == "met"
    assert verdict(row(rustord=[30.0], Redis=[21.0], PostgreSQL=[10.0])) == "missed"


def test_nothing_is_claimed_over_a_peer_that_was_not_measured() -> None:
    assert verdict(row(rustord=[30.0], Redis=[20.0])) == ""


def test_a_bound_is_the_most_or_the_least() -> None:
    assert verdict(Row("memory", "MiB", {"rustord": [97.0]}, (Bound(96.0),), more_is_better=False)) == "missed"
    assert verdict(Row("speed", "MB/s", {"rustord": [97.0]}, (Bound(96.0),))) == "met"


def test_the_table_for_the_readme_has_a_cell_for_every_heading() -> None:
    rows = [row(rustord=[30.0], Redis=[20.0]), row(rustord=[30.0], LMDB=[20.0])]
    table = [line for line in for_readme(rows, "machine").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "LMDB 20 (1.50\N{MULTIPLICATION SIGN})" in cells(rows[1])


@pytest.fixture
def wrong_server(tmp_path: Path) -> Iterator[Path]:
    """Answers everything with 500."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline() and self.rfile.readline():
                self.wfile.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")

    address = tmp_path / "socket"
    with socketserver.ThreadingUnixStreamServer(str(address), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield address
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler; `apt-get install gcc` brings it")
def test_bad_replies_void_a_measurement(tmp_path: Path, wrong_server: Path) -> None:
    generator = Generator(build(GENERATOR, tmp_path), "http", wrong_server, tmp_path)
    with pytest.raises(LoadError, match="were bad"):
        generator.run(b"GET / HTTP/1.1\r\n\r\n", connections=2, count=10)


@pytest.mark.root
@pytest.mark.timeout(600)
def test_every_work_is_measured(tmp_path: Path) -> None:
    installed = ["redis"] if shutil.which("redis-server") else []
    works = [work for work in WORKS if work != "nbd" or shutil.which("qemu-nbd")]
    rows = list(measure(tmp_path, tuple(works), (*installed, "files"), SMALLEST))
    assert len(rows) == (43 if "nbd" in works else 22)
    for each in rows:
        assert each.figures["rustord"], each
        assert each.unit == "MiB" or all(figure > 0 for of_one in each.figures.values() for figure in of_one), each
    assert len(for_programs(rows, "machine")["rows"]) == len(rows)
