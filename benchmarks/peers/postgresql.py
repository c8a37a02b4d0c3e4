"""PostgreSQL with a table of key and bytea, driven by its own pgbench with prepared statements."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contestant import Contestant
from benchmarks.load import Load, LoadError

PROGRAMS = Path("/usr/lib/postgresql")
USER = "postgres"

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "3GB",  # no checkpoint falls into a turn
    "min_wal_size": "2GB",  # its log's files are used again: making them costs more than writing them
    "max_connections": "200",
    "listen_addresses": "",
    "autovacuum": "off",
    "bytea_output": "escape",  # the data is printable: neither direction pays for hexadecimal
}

# EXTERNAL: the data does not compress, so trying to would only cost time.
SCHEMA = """
create table objects (key bigint primary key, data bytea not null);
alter table objects alter column data set storage external;
"""

# Keys ascend, as rustord's uuids do: the cheapest way to fill an index.
PUT = r"""
\set number :number + 1
\set key :first + :client_id * 1000000 + :number
insert into objects values (:key, :data);
"""
GET = r"""
\set key random(1, :count)
select data from objects where key = :key;
"""
DELETE = r"""
\set number :number + 1
\set key :client_id * :share + :number
delete from objects where key = :key;
"""


class PostgreSQL(Contestant):
    """A server on a Unix socket in `directory`. `data` must be printable ASCII without backslashes."""

    name = "PostgreSQL"

    def __init__(self, programs: Path, directory: Path, data: bytes) -> None:
        self._programs = programs
        self._directory = directory
        self._data = data.decode("ascii")
        self._first = 0
        self._count = 0

    @property
    def pid(self) -> int:
        return int((self._directory / "data" / "postmaster.pid").read_text().split()[0])

    def put(self, connections: int, seconds: float) -> Load:
        self._first += 1_000_000_000
        variables: dict[str, int | str] = {"number": 0, "first": self._first, "data": self._data}
        return self._pgbench(PUT, connections, f"--time={max(1, round(seconds))}", variables)

    def fill(self, count: int) -> None:
        self._count = count
        self.sql(f"insert into objects select key, '{self._data}' from generate_series(1, {count}) key")
        self.sql("vacuum analyze objects")
        self.sql("checkpoint")

    def get(self, connections: int, depth: int, seconds: float) -> Load:
        """pgbench knows no depth; its connections ask one by one."""
        return self._pgbench(GET, connections, f"--time={max(1, round(seconds))}", {"count": self._count})

    def delete(self, connections: int) -> Load:
        share = self._count // connections
        return self._pgbench(DELETE, connections, f"--transactions={share}", {"number": 0, "share": share})

    def clear(self) -> None:
        self.sql("truncate objects")
        self.sql("checkpoint")

    def sql(self, statements: str) -> None:
        """Runs statements, each in a transaction of its own. Raises CalledProcessError."""
        subprocess.run(
            [self._programs / "psql", "-qX", "-v", "ON_ERROR_STOP=1", *self._where()],
            input=statements,
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _where(self) -> list[str]:
        return ["--host", os.fspath(self._directory), "--username", USER, "--dbname", "postgres"]

    def _pgbench(self, script: str, connections: int, limit: str, variables: dict[str, int | str]) -> Load:
        path = self._directory / "script.sql"
        path.write_text(script)
        defines = [f"--define={name}={value}" for name, value in variables.items()]
        done = subprocess.run(
            [
                self._programs / "pgbench",
                *self._where()[:4],
                "--no-vacuum",
                "--protocol=prepared",
                f"--client={connections}",
                f"--file={path}",
                limit,
                *defines,
                "postgres",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 or "number of failed transactions: 0 " not in done.stdout:
            raise LoadError(f"pgbench: {done.stderr.strip()} {done.stdout.strip()}")
        operations = int(_figure(r"actually processed: (\d+)", done.stdout))
        rate = _figure(r"tps = ([\d.]+)", done.stdout)
        return Load(operations, operations / rate)


def _figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise LoadError(f"pgbench's report has no {pattern!r}: {text}")
    return float(found[1])


def programs() -> Path | None:
    """The folder of the newest installed server's programs, None without any."""
    found = sorted(PROGRAMS.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgresql(filesystem: Path, data: bytes) -> Iterator[PostgreSQL]:
    """A new cluster in a directory on `filesystem`, run by user postgres."""
    folder = programs()
    if folder is None:
        raise LoadError("PostgreSQL is not installed: apt install postgresql")
    directory = filesystem / "postgresql"
    directory.mkdir()
    subprocess.run(["chown", USER, directory], check=True)
    as_user: list[str | Path] = ["runuser", "-u", USER, "--"]
    control = [*as_user, folder / "pg_ctl", "-D", directory / "data", "-s", "-w"]
    subprocess.run([*control, "-o", "--auth=trust --encoding=UTF8 --locale=C", "init"], check=True, cwd=directory)
    with (directory / "data" / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())
        file.write(f"unix_socket_directories = '{directory}'\n")
    subprocess.run([*control, "-l", directory / "log", "start"], check=True, cwd=directory)
    try:
        contestant = PostgreSQL(folder, directory, data)
        contestant.sql(SCHEMA)
        yield contestant
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=directory)
