"""Plugins that do what no plugin may: the request fails, the log names the plugin, and the pool goes on unharmed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import hostile
from tests.daemon import Daemon, Reply, make_pool, until

MIB = 1 << 20
SMALL, LARGE = b"small" * 100, bytes(range(256)) * (3 * MIB // 256)

KEYGEN = (
    *("uuid raises", "uuid exits", "uuid is short", "uuid is text", "uuid is none", "uuid again"),
    *("hasher raises", "hasher is none", "update raises", "update exits"),
    *("digest raises", "digest is empty", "digest is short", "digest is endless", "digest is text", "digest is none"),
)
PLACER = (
    *("place raises", "place exits", "nothing", "no copy", "no extent", "a number", "text", "two copies", "too short"),
    *("too long", "overlapping", "twice the same", "less than nothing", "another device", "no device"),
    *("before the start", "the label", "behind the end", "far behind the end", "beyond all numbers", "half a block"),
    "plain numbers",
)
LOOKING = ("get raises", "get gives text", "get gives a number")
LISTING = ("scan raises", "scan gives text", "scan gives numbers", "scan goes astray")
COMMITTING = ("commit raises", "commit does nothing", "commit does half")


class Host:
    """A daemon with the hostile plugin in one role, and its mood."""

    def __init__(self, daemon: Daemon, directory: Path, role: str) -> None:
        self.daemon = daemon
        self._mood = directory / "mood"
        self._information = directory / "hostile-1.0.dist-info"
        self._information.mkdir()
        (self._information / "METADATA").write_text("Metadata-Version: 2.1\nName: rustord-hostile\nVersion: 1.0\n")
        (self._information / "entry_points.txt").write_text("[rustord.plugins]\nhostile = tests.hostile\n")
        daemon.environment |= {"HOSTILE": str(self._mood), "PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}"}
        setting = {"keygen": "algorithm", "placer": "policy", "keystore": "backend"}[role]
        daemon.configure(f'plugins = ["hostile"]\n[{role}]\n{setting} = "hostile"\n')
        daemon.start()

    def feel(self, mood: str) -> None:
        new = self._mood.with_suffix(".new")
        new.write_text(mood)
        new.rename(self._mood)

    def uninstall(self) -> None:
        self._information.rename(self._information.with_suffix(".gone"))

    def attempts(self) -> Iterator[Reply]:
        """A small Object, a large one that streams, and one that replaces another."""
        yield self.daemon.request("POST", "/v1/objects", SMALL)
        yield self.daemon.request("POST", "/v1/objects", LARGE)
        yield self.daemon.request("PUT", "/v1/names/taken", SMALL[::-1])

    def check_whole(self, stored: dict[str, bytes]) -> None:
        """Everything is there, and nothing else takes room: when it is deleted, all is free again."""
        for uuid, data in stored.items():
            assert self.daemon.get(uuid) == data
        assert self.daemon.pool()["objects"] == len(stored)
        for uuid in stored:
            self.daemon.delete(uuid)
        pool = self.daemon.pool()
        assert (pool["objects"], pool["free_bytes"]) == (0, pool["size_bytes"])


MakeHost = Callable[[str], Host]


@pytest.fixture
def make_host(make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path], tmp_path: Path) -> MakeHost:
    def make(role: str) -> Host:
        make_pool(image := make_image(64 * MIB))
        return Host(make_daemon(image), tmp_path, role)

    return make


@pytest.mark.parametrize(("role", "moods"), [("keygen", KEYGEN), ("placer", PLACER)])
def test_what_makes_no_object_fails_alone(make_host: MakeHost, role: str, moods: tuple[str, ...]) -> None:
    host = make_host(role)
    daemon = host.daemon
    stored = {daemon.put(SMALL): SMALL, daemon.put(SMALL, name="taken"): SMALL, daemon.put(LARGE): LARGE}
    for mood in moods:
        host.feel(mood)
        for reply in host.attempts():
            assert (reply.status, reply.json()["code"]) == (500, "plugin"), (mood, reply.body)
            assert "hostile" in reply.problem, mood
            assert reply.problem.partition(":")[0] in daemon.log, mood
        assert all(daemon.get(uuid) == data for uuid, data in stored.items()), mood
        host.feel("")
        stored[daemon.put(mood.encode())] = mood.encode()
        assert daemon.pool()["state"] == "ok"
    daemon.stop(signal.SIGKILL)
    daemon.start()
    host.check_whole(stored)


def test_an_index_that_cannot_be_read_fails_the_readers(make_host: MakeHost) -> None:
    host = make_host("keystore")
    daemon = host.daemon
    stored = {daemon.put(SMALL): SMALL, daemon.put(SMALL, name="taken"): SMALL}
    until(lambda: daemon.pool()["index_lag"] == 0, "all is in the index")
    for mood in (*LOOKING, *LISTING):
        host.feel(mood)
        asked = ["/v1/names"] if mood in LISTING else [*(f"/v1/objects/{uuid}" for uuid in stored), "/v1/names/taken"]
        for path in asked:
            reply = daemon.request("GET", path)
            assert (reply.status, reply.json()["code"]) == (500, "plugin"), (mood, reply.body)
            assert "'hostile' (of rustord-hostile 1.0)" in reply.problem
        if mood in LOOKING:
            reply = daemon.request("PUT", "/v1/names/taken", b"new")
            assert (reply.status, reply.json()["code"]) == (500, "plugin"), (mood, reply.body)
        host.feel("")
        assert all(daemon.get(uuid) == data for uuid, data in stored.items()), mood
    assert "the keystore of plugin 'hostile' (of rustord-hostile 1.0) failed: ArithmeticError" in daemon.log
    assert daemon.pool()["state"] == "ok"
    host.check_whole(stored)


def test_an_index_that_lies_about_a_commit_costs_nothing(make_host: MakeHost) -> None:
    """What it did not keep stays in the journal, and is in the index once that is honest; also after a crash."""
    host = make_host("keystore")
    daemon = host.daemon
    stored = {}
    for mood in (*COMMITTING, "commit is slow"):
        host.feel(mood)
        for number in range(3):
            data = f"{mood} {number}".encode()
            stored[daemon.put(data)] = data
        assert all(daemon.get(uuid) == data for uuid, data in stored.items()), mood
        if mood in COMMITTING:
            told = "failed: Arithm" if mood == "commit raises" else "says that it has committed a batch, and does not"
            daemon.wait_for_log(told)
            assert daemon.pool()["index_lag"] > 0
            if mood != "commit raises":
                daemon.stop(signal.SIGKILL)
                host.feel("")
                daemon.start()
        host.feel("")
        until(lambda: daemon.pool()["index_lag"] == 0, "all is in the index")
    daemon.restart()
    host.check_whole(stored)


def test_a_placer_that_hangs_is_named_and_reading_goes_on(
    make_daemon: Callable[..., Daemon], image: Path, tmp_path: Path
) -> None:
    make_pool(image)
    daemon = make_daemon(image, patch="daemon.STUCK_S = 0.1")
    daemon.environment["WATCHDOG_USEC"] = "400000"
    host = Host(daemon, tmp_path, "placer")
    uuid = daemon.put(SMALL)
    host.feel("place hangs")
    connection = daemon.connect()
    connection.request("POST", "/v1/objects", SMALL)
    daemon.wait_for_log(f"the writer is in {hostile.__file__}, line")
    assert daemon.get(uuid) == SMALL
    daemon.stop(signal.SIGABRT)  # what systemd sends to a service that does not answer
    assert "hostile.py" in daemon.log
    connection.close()
    host.feel("")
    daemon.start()
    host.check_whole({uuid: SMALL})


def test_an_index_that_hangs_is_told_and_work_goes_on_as_far_as_it_can(
    make_daemon: Callable[..., Daemon], image: Path, tmp_path: Path
) -> None:
    make_pool(image)
    patch = "import rustord.keystore.store as store; store.COMMIT_S_MAX = 0.2; store._OVERLAY_MAX = 10"
    daemon = make_daemon(image, patch=patch)
    daemon.environment["WATCHDOG_USEC"] = "400000"
    host = Host(daemon, tmp_path, "keystore")
    stored = {daemon.put(SMALL): SMALL}
    host.feel("commit hangs")
    stored[daemon.put(b"first")] = b"first"
    daemon.wait_for_log(f" s, in {hostile.__file__}, line")
    refused = None
    for number in range(40):  # as many as may wait for the index, and one more
        data = b"%d" % number
        reply = daemon.request("POST", "/v1/objects", data)
        if reply.status != 201:
            refused = reply
            break
        stored[reply.json()["uuid"]] = data
    assert refused is not None
    assert (refused.status, refused.json()["code"]) == (503, "unavailable")
    assert "the index takes no changes: a commit has not ended for" in refused.problem
    assert len(stored) > 10
    assert "the index takes no changes" in daemon.pool()["problems"][0]
    assert all(daemon.get(uuid) == data for uuid, data in stored.items())
    daemon.stop(signal.SIGKILL)  # what waited for the index is in the journal
    host.feel("")
    daemon.start()
    host.check_whole(stored)


def test_a_hash_that_hangs_is_named_and_reading_goes_on(
    make_daemon: Callable[..., Daemon], image: Path, tmp_path: Path
) -> None:
    make_pool(image)
    daemon = make_daemon(image, patch="daemon.STUCK_S = 0.1")
    daemon.environment["WATCHDOG_USEC"] = "400000"
    host = Host(daemon, tmp_path, "keygen")
    stored = {daemon.put(SMALL): SMALL}
    host.feel("update hangs")
    with ThreadPoolExecutor() as threads:
        hanging = {data: threads.submit(daemon.put, data) for data in (LARGE, b"another")}
        try:
            daemon.wait_for_log(f"a transfer has not moved for a minute: it is in {hostile.__file__}, line")
            daemon.wait_for_log(f"the writer is in {hostile.__file__}, line")
            assert all(daemon.get(uuid) == data for uuid, data in stored.items())
        finally:
            host.feel("")
        stored |= {put.result(): data for data, put in hanging.items()}
    host.check_whole(stored)


@pytest.mark.parametrize("role", ["keygen", "placer"])
def test_without_its_plugin_a_pool_can_be_read(make_host: MakeHost, role: str) -> None:
    host = make_host(role)
    daemon = host.daemon
    uuid = daemon.put(LARGE)
    host.uninstall()
    daemon.restart()
    assert daemon.get(uuid) == LARGE
    reply = daemon.request("DELETE", f"/v1/objects/{uuid}")
    assert (reply.status, reply.json()["code"]) == (503, "read-only")
    assert "plugin 'hostile' is not installed (install the distribution that brings it" in reply.problem
    (problem,) = daemon.pool()["problems"]
    assert f"there is no {role} 'hostile'" in problem
    assert problem in daemon.log


def test_without_the_plugin_of_its_index_a_pool_says_what_to_install(make_host: MakeHost) -> None:
    host = make_host("keystore")
    host.daemon.put(SMALL)
    assert host.daemon.stop() == 0
    host.uninstall()
    status, said = host.daemon.refusal()
    assert status == 14
    assert "there is no keystore 'hostile'" in said
    assert "install the plugin that offers 'hostile'" in said
