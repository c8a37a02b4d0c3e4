"""Against a PostgreSQL of our own, on a Unix socket in a temporary directory."""

from __future__ import annotations

import logging
import os
import pwd
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from rustord_keystore_postgres import PostgresBackend, make_postgres

import rustord
from rustord.errors import ConfigError, DeviceBusy, DeviceError, NoSpace, RustordError
from rustord.keygen import HashKeyGen
from rustord.plugins import PluginManager
from rustord.pool import create_pool, open_devices
from rustord.testing import KeyStoreContract

LAST = b"\xff" * 501
SECRET = "hunter2"
PASSWORD_ONLY = "local all guarded scram-sha-256\nlocal all all trust\n"


def find_programs() -> Path | None:
    """Where initdb and postgres are: Debian keeps them out of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if found:
        return found[-1].parent
    return Path(on_path).parent if on_path else None


class Server:
    """A PostgreSQL that belongs to `postgres` when we are root (it refuses to run as root), else to us."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self.directory = directory
        self._programs = programs
        self._data = directory / "data"
        self._identity: dict[str, Any] = {"cwd": directory}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(directory, user.pw_uid, user.pw_gid)
            self._identity |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "-D", self._data)
        (self._data / "pg_hba.conf").write_text(PASSWORD_ONLY)
        self.conninfo = f"host={directory} user=postgres dbname=postgres"

    def start(self, *settings: str) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.directory} -c shared_buffers=16MB"
        options += "".join(f" -c {setting}" for setting in settings)
        log = self.directory / "log"
        self._run("pg_ctl", "start", "--wait", "-D", self._data, "-l", log, "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate", "-D", self._data)

    def execute(self, query: str) -> int:
        """How many rows the query has changed or found."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            return connection.execute(query.encode()).rowcount

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self._programs / program, *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self._identity,
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    programs = find_programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL server; `apt-get install postgresql` brings it")
    with tempfile.TemporaryDirectory(prefix="rustord-postgres-") as directory:
        server = Server(Path(directory), programs)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def make(server: Server) -> Callable[[], PostgresBackend]:
    def make() -> PostgresBackend:
        backend = make_postgres({"conninfo": server.conninfo})
        assert isinstance(backend, PostgresBackend)
        return backend

    return make


@pytest.fixture
def backend(make: Callable[[], PostgresBackend], tmp_path: Path) -> Iterator[PostgresBackend]:
    backend = make()
    backend.open(tmp_path)
    yield backend
    backend.close()


class TestContract(KeyStoreContract):
    factory = staticmethod(make_postgres)

    @pytest.fixture
    def options(self, server: Server) -> Mapping[str, object]:
        return {"conninfo": server.conninfo}


def test_many_entries_come_in_order(backend: PostgresBackend) -> None:
    entries = {number.to_bytes(4, "big") * 4: number.to_bytes(2, "big") * 100 for number in range(20_000)}
    backend.commit(entries, ())
    assert list(backend.scan(b"", LAST)) == list(entries.items())


def test_batch_of_several_statements_is_one(backend: PostgresBackend, make: Any, tmp_path: Path) -> None:
    puts = {bytes([number]): bytes([number]) * (6 << 20) for number in range(7)}
    backend.commit(puts, ())
    assert dict(backend.scan(b"", LAST)) == puts


def test_commit_is_durable_whatever_the_servers_setting(
    server: Server, backend: PostgresBackend, tmp_path: Path
) -> None:
    backend.commit({b"key": b"value"}, ())
    server.stop()  # --mode=immediate: as if it had crashed
    server.start()
    assert backend.get(b"key") == b"value"


def test_server_that_was_away_is_found_again(server: Server, backend: PostgresBackend) -> None:
    backend.commit({b"key": b"value"}, ())
    assert backend.get(b"key") == b"value"
    server.stop()
    with pytest.raises(DeviceError, match="cannot be reached"):
        backend.get(b"key")
    with pytest.raises(DeviceError, match="cannot be reached"):
        backend.commit({b"key": b"other"}, ())
    server.start()
    assert backend.get(b"key") == b"value"
    backend.commit({b"key": b"another"}, ())
    assert backend.get(b"key") == b"another"


def test_a_daemon_with_many_open_files_reads_and_commits(backend: PostgresBackend, tmp_path: Path) -> None:
    """A descriptor may be too high for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with ExitStack() as many:
            for _ in range(1100):
                many.enter_context(Path(os.devnull).open())
            backend.close()
            backend.open(tmp_path)
            for number in range(3):
                backend.commit({b"key": bytes([number])}, ())
                assert backend.get(b"key") == bytes([number])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lock_is_held_again_after_the_server_was_away(
    server: Server, backend: PostgresBackend, make: Any, tmp_path: Path
) -> None:
    server.stop()
    server.start()
    backend.commit({b"key": b"value"}, ())
    with pytest.raises(DeviceBusy):
        make().open(tmp_path)


def test_opening_waits_for_the_server_to_notice_that_the_last_user_is_gone(
    server: Server, backend: PostgresBackend, make: Any, tmp_path: Path
) -> None:
    with closing(make()) as next_backend, ThreadPoolExecutor() as pool:
        opening = pool.submit(next_backend.open, tmp_path)
        while not server.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            assert not opening.done()
        backend.close()
        opening.result(timeout=10)
        next_backend.commit({b"key": b"value"}, ())


def test_commit_does_not_go_on_when_another_has_taken_over(
    server: Server, backend: PostgresBackend, make: Any, tmp_path: Path
) -> None:
    server.stop()
    server.start()
    with closing(make()) as other:
        other.open(tmp_path)
        with pytest.raises(DeviceBusy):
            backend.commit({b"key": b"value"}, ())
        assert other.get(b"key") is None


def test_table_that_is_gone_is_not_made_anew_under_a_pool_that_is_open(
    server: Server, backend: PostgresBackend, make: Any, tmp_path: Path
) -> None:
    """It would have the last batch and none before, and the journals would let go of that."""
    backend.commit({b"key": b"value"}, ())
    table = backend.info()["table"]
    server.stop()
    server.start()
    server.execute(f"DROP TABLE {table}")
    with pytest.raises(DeviceError, match="does not exist"):
        backend.commit({b"other": b"value"}, ())
    assert not server.execute(f"SELECT FROM pg_tables WHERE tablename = '{table}'")


def test_read_that_breaks_off_leaves_others_alone(server: Server, backend: PostgresBackend) -> None:
    backend.commit({bytes([number]): bytes(100_000) for number in range(100)}, ())
    scan = backend.scan(b"", LAST)
    next(scan)
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY%'")
    with pytest.raises(DeviceError):
        list(scan)
    assert backend.get(b"\1") == bytes(100_000)


def test_idle_readers_are_few(backend: PostgresBackend, server: Server) -> None:
    backend.commit({b"key": b"value", b"other": b""}, ())
    scans = [backend.scan(b"", LAST) for _ in range(20)]
    assert [next(scan) for scan in scans] == [(b"key", b"value")] * 20
    for scan in scans:
        scan.close()  # type: ignore[attr-defined]
    assert len(backend._idle) == 8


@pytest.mark.parametrize(
    ("setting", "found"), [("synchronous_commit=off", "on"), ("synchronous_commit=local", "local")]
)
def test_commits_wait_for_the_disk(server: Server, make: Any, tmp_path: Path, setting: str, found: str) -> None:
    server.stop()
    server.start(setting)
    with closing(make()) as backend:
        backend.open(tmp_path)
        assert backend._writer.execute("SHOW synchronous_commit").fetchone() == (found,)
    server.stop()
    server.start()


def test_server_that_does_not_flush_is_refused(server: Server, make: Any, tmp_path: Path) -> None:
    server.stop()
    server.start("fsync=off")
    with closing(make()) as backend, pytest.raises(DeviceError, match="fsync=off"):
        backend.open(tmp_path)
    server.stop()
    server.start()


@pytest.mark.root
def test_full_disk_refuses_the_whole_batch(server: Server, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small filesystem needs root; `sudo ./dev test` does it")
    small = server.directory / "small"
    small.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m,uid=postgres,gid=postgres,mode=700", "tmpfs", small], check=True
    )
    try:
        server.execute(f"CREATE TABLESPACE small LOCATION '{small}'")
        options = {"conninfo": f"{server.conninfo} options='-c default_tablespace=small'", "table": "full_one"}
        with closing(make_postgres(options)) as backend:
            backend.open(tmp_path)
            backend.commit({b"key": b"value"}, ())
            with pytest.raises(NoSpace) as caught:
                backend.commit({bytes([number]): os.urandom(100_000) for number in range(100)}, [b"key"])
            assert "database server" in caught.value.hint
            assert list(backend.scan(b"", LAST)) == [(b"key", b"value")]
            backend.commit({b"small": b"value"}, ())
        server.execute("DROP TABLE full_one")
        server.execute("DROP TABLESPACE small")
    finally:
        server.execute("CHECKPOINT")
        subprocess.run(["umount", small], check=True)


def test_table_can_be_chosen_and_says_what_it_is(server: Server, tmp_path: Path) -> None:
    with closing(make_postgres({"conninfo": server.conninfo, "table": "my_pool"})) as backend:
        backend.open(tmp_path / "it's here")
        backend.commit({b"key": b"value"}, ())
        assert backend.info()["table"] == "my_pool"
    with psycopg.connect(server.conninfo) as connection:
        assert connection.execute("SELECT key, value FROM my_pool").fetchall() == [(b"key", b"value")]
        comment = connection.execute("SELECT obj_description('my_pool'::regclass)").fetchone()
    assert comment == (f"index of the rustord pool at {tmp_path}/it's here",)


def test_info_tells_the_server(backend: PostgresBackend) -> None:
    assert str(backend.info()["library"]).startswith("PostgreSQL 1")


def test_pool_with_its_index_in_postgres(make: Callable[[], PostgresBackend], tmp_path: Path) -> None:
    image = tmp_path / "pool.img"
    with image.open("xb") as file:
        file.truncate(64 << 20)
    devices = open_devices([image])
    create_pool(devices, HashKeyGen("xxh3-128"))
    devices[0].close()
    with rustord.open(image, backend=make()) as store:
        uuids = [store.put(b"%d" % number, name=f"name {number}").uuid for number in range(100)]
        store.delete(uuids.pop())
    with rustord.open(image, backend=make()) as store:
        assert [store.get(uuid) for uuid in uuids] == [b"%d" % number for number in range(99)]
        assert [name for name, _ in store.names("name 9")] == [f"name {number}" for number in (9, *range(90, 99))]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"conninfo": "passwrd=" + SECRET}, "conninfo"),
        ({"conninfo": f"host=/nowhere '{SECRET}"}, "conninfo"),
        ({"conninfo": f"postgresql://user:{SECRET}@[::1"}, "conninfo"),
        ({"table": "drop table x"}, "table"),
        ({"tabel": "x"}, "tabel"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PluginManager(["postgres"]).make("keystore", "postgres", options)
    assert f"[keystore.options] {told}" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "conninfo",
    [
        "host={directory} user=guarded password={secret} dbname=postgres",
        "host={directory} user=absent password={secret} dbname=absent",
        "host=/nowhere user=postgres password={secret}",
        "postgresql://guarded:{secret}@/postgres?host={directory}",
        "host={directory} no such thing {secret}",
    ],
)
def test_no_error_and_no_log_tells_a_password(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, conninfo: str
) -> None:
    server.execute("DO $$ BEGIN CREATE ROLE guarded LOGIN PASSWORD 'another'; EXCEPTION WHEN OTHERS THEN END $$")
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RustordError) as caught:
        make_postgres({"conninfo": conninfo.format(directory=server.directory, secret=SECRET)}).open(tmp_path)
    error: BaseException | None = caught.value
    told = [caught.value.hint, caplog.text]
    while error is not None:
        told.append(f"{error!r} {error}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert SECRET not in "".join(told)


def test_a_password_may_be_a_credential(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.execute("DO $$ BEGIN CREATE ROLE guarded LOGIN PASSWORD 'another'; EXCEPTION WHEN OTHERS THEN END $$")
    server.execute("GRANT CREATE ON SCHEMA public TO guarded")
    (tmp_path / "postgres").write_text("another\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    options = {"conninfo": f"host={server.directory} user=guarded dbname=postgres", "table": "guarded"}
    with pytest.raises(RustordError):
        make_postgres(options).open(tmp_path)
    with closing(make_postgres({**options, "credential": "postgres"})) as backend:
        backend.open(tmp_path)
        backend.commit({b"key": b"value"}, [])
        assert backend.get(b"key") == b"value"
