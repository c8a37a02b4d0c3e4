"""What /metrics tells: in Prometheus' format, as METRICS.md says, and true."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import rustord
from rustord import metrics
from rustord.frontends.traffic import Traffic
from rustord.objectstore import ObjectStore
from rustord.repair import Repairer
from rustord.scrub import Scrub
from rustord.wire.api import ROUTES
from rustord.writer import Writer
from tests.daemon import MIB, Daemon, make_pool, until
from tests.frontends.nbdserved import NbdPeer

DOCUMENT = Path(metrics.__file__).with_name("METRICS.md")
BLOCK = 4096


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    path = make_image(16 * MIB)
    make_pool(path)
    return path


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], image: Path) -> Daemon:
    started: Daemon = make_daemon(image).start()
    return started


class Scrape:
    """The metrics of one moment."""

    def __init__(self, text: bytes) -> None:
        self.families: Mapping[str, Metric] = {
            family.name: family for family in text_string_to_metric_families(text.decode())
        }
        self._values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, sample: str, **labels: str) -> float:
        """The value of a sample; 0 if it is not there yet, as Prometheus' increase() takes it."""
        return self._values.get((sample, *sorted(labels.items())), 0.0)


def scrape(daemon: Daemon) -> Scrape:
    reply = daemon.request("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(reply.body)


class Documented(NamedTuple):
    type: str
    labels: frozenset[str]
    meaning: str


def documented() -> dict[str, Documented]:
    """The table of METRICS.md."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {
        name: Documented(kind, frozenset(re.findall(r"`(\w+)`", labels)), what) for name, kind, labels, what in rows
    }


def offered(text: bytes) -> Iterator[tuple[str, Documented]]:
    """The same of a scrape."""
    for family in Scrape(text).families.values():
        if family.name.startswith("rustord_"):
            labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, Documented(family.type, labels, family.documentation)


def test_every_metric_is_documented_as_it_is(daemon: Daemon) -> None:
    daemon.put(b"data")
    assert dict(offered(daemon.request("GET", "/metrics").body)) == documented()


def test_the_document_names_every_state_and_phase(daemon: Daemon) -> None:
    text = DOCUMENT.read_text()
    for label in ("state", "kind", "phase"):
        (listed,) = re.findall(rf"`{label}` is one of ([^.]*)\.", text)
        values = {
            sample.labels[label]
            for family in scrape(daemon).families.values()
            for sample in family.samples
            if label in sample.labels
        }
        assert set(re.findall(r"`([\w-]+)`", listed)) == values


def test_names_carry_the_base_unit(daemon: Daemon) -> None:
    counted = {"rustord_index_lag", "rustord_objects", "rustord_free_runs", "rustord_connections_open"}
    counted |= {"rustord_scrub_running", "rustord_scrub_lost", "rustord_nbd_connections_open"}
    counted |= {"rustord_read_only", "rustord_device_state", "rustord_cycle_changes"}
    for name in documented().keys() - counted:
        assert name.endswith(("_seconds", "_bytes", "_ratio", "_total")), name
    daemon.put(b"data")
    for family in scrape(daemon).families.values():
        if family.name.endswith("_ratio"):
            assert all(0 <= sample.value <= 1 for sample in family.samples)


def test_histograms_are_cumulative(daemon: Daemon) -> None:
    daemon.put(b"data")
    for family in scrape(daemon).families.values():
        if family.type == "histogram":
            buckets: dict[tuple[tuple[str, str], ...], list[float]] = {}
            for sample in family.samples:
                labels = {key: value for key, value in sample.labels.items() if key != "le"}
                series = buckets.setdefault(tuple(sorted(labels.items())), [])
                if sample.name.endswith("_bucket"):
                    series.append(sample.value)
                elif sample.name.endswith("_count"):
                    assert sample.value == series[-1]
            assert all(series == sorted(series) for series in buckets.values())


def test_requests_are_counted_by_operation_and_status(daemon: Daemon) -> None:
    before = scrape(daemon)
    uuid = daemon.put(b"x" * 100)
    daemon.put(b"y", name="name")
    daemon.put(b"yy", name="name")
    for path in (f"/v1/objects/{uuid}", "/v1/names/name", "/v1/names/none", "/v1/nothing"):
        daemon.request("GET", path)
    daemon.request("GET", f"/v1/objects/{uuid}", Range="bytes=10-19")
    daemon.request("HEAD", f"/v1/objects/{uuid}")
    daemon.delete(uuid)
    after = scrape(daemon)

    def increase(operation: str, status: int) -> float:
        labels = {"operation": operation, "status": str(status)}
        return after("rustord_requests_total", **labels) - before("rustord_requests_total", **labels)

    assert increase("store_object", 201) == 1
    assert increase("store_named", 201) == 1
    assert increase("store_named", 200) == 1
    assert increase("get_object", 200) == 1
    assert increase("get_object", 206) == 1
    assert increase("get_named", 200) == 1
    assert increase("get_named", 404) == 1
    assert increase("head_object", 200) == 1
    assert increase("delete_object", 204) == 1
    assert increase("none", 404) == 1
    assert increase("get_metrics", 200) == 1
    assert after("rustord_received_bytes_total") - before("rustord_received_bytes_total") == 103
    assert after("rustord_sent_bytes_total") > before("rustord_sent_bytes_total") + 100 + 10 + 2
    assert after("rustord_connections_total") - before("rustord_connections_total") == 11
    assert after("rustord_connections_open") == 1
    assert after("rustord_request_seconds_count", operation="get_object") == 2
    assert after("rustord_request_seconds_sum", operation="get_object") > 0


def test_every_operation_has_its_latency(daemon: Daemon) -> None:
    told = {
        sample.labels["operation"]
        for sample in scrape(daemon).families["rustord_request_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert told == {operation.id for methods in ROUTES.values() for operation in methods.values()}


def test_large_bodies_are_counted_whole(daemon: Daemon) -> None:
    before = scrape(daemon)
    daemon.get(daemon.put(bytes(3 * MIB)))
    after = scrape(daemon)
    assert after("rustord_received_bytes_total") - before("rustord_received_bytes_total") == 3 * MIB
    sent = before("rustord_sent_bytes_total") + 3 * MIB  # counted when the last piece has been handed over
    until(lambda: scrape(daemon)("rustord_sent_bytes_total") >= sent, "it is counted")


def test_an_upload_that_breaks_off_is_counted(daemon: Daemon) -> None:
    free = scrape(daemon)("rustord_device_free_bytes", device="0")
    with closing(daemon.connect()) as connection:
        connection.putrequest("POST", "/v1/objects")
        connection.putheader("Content-Length", str(4 * MIB))
        connection.endheaders(bytes(MIB))
        until(lambda: scrape(daemon)("rustord_device_free_bytes", device="0") < free, "the upload has begun")
        assert scrape(daemon)("rustord_connections_open") == 2
        assert scrape(daemon)("rustord_transfers_broken_off_total") == 0
    until(lambda: scrape(daemon)("rustord_transfers_broken_off_total") == 1, "it is counted")
    until(lambda: scrape(daemon)("rustord_device_free_bytes", device="0") == free, "its blocks are free again")
    assert scrape(daemon)("rustord_connections_open") == 1


def test_what_passes_over_nbd_is_counted_by_the_kind_of_export(daemon: Daemon) -> None:
    daemon.put(b"x" * 4096, name="image")
    assert daemon.request("POST", "/v1/volumes", b'{"name": "disk", "size": 1048576}').status == 201
    path = daemon.socket.with_name("nbd.sock")
    with NbdPeer(path) as idle, NbdPeer(path).go("image") as image, NbdPeer(path).go("disk") as disk:
        assert idle.ask(3)  # to list exports is not to use one
        image.read(0, 512)
        assert image.one(1, 0, 4, payload=b"data").error
        disk.one(1, 0, 5, payload=b"bytes")
        disk.one(3)
        disk.read(0, 1024)
        disk.read(0, 1024)
        told = scrape(daemon)
        assert [told("rustord_nbd_connections_open", kind=kind) for kind in ("object", "volume")] == [1, 1]
        assert daemon.pool()["exports"] == 2
    until(lambda: not scrape(daemon)("rustord_nbd_connections_open", kind="volume"), "the client has gone")
    with NbdPeer(path).go("image") as image:
        image.read(0, 512)
        told = scrape(daemon)
    names = ("connections", "requests", "errors", "read_bytes", "written_bytes")
    for kind, expected in (("object", [2, 3, 1, 1024, 0]), ("volume", [1, 4, 0, 2048, 5])):
        assert [told(f"rustord_nbd_{name}_total", kind=kind) for name in names] == expected


def test_cycles_their_phases_and_flushes_are_timed(daemon: Daemon) -> None:
    before = scrape(daemon)
    for _ in range(5):
        daemon.put(b"data")  # one after another: a cycle for each
    until(lambda: scrape(daemon)("rustord_cycle_changes_count") == 5, "the last one, too, is counted")
    after = scrape(daemon)
    assert after("rustord_cycle_changes_sum") == after("rustord_cycle_seconds_count") == 5
    flushes = after("rustord_flush_seconds_count", device="0") - before("rustord_flush_seconds_count", device="0")
    assert flushes == 5
    phases = ("place", "write", "journal", "flush", "settle")
    for phase in phases:
        counts = [moment("rustord_phase_seconds_count", phase=phase) for moment in (before, after)]
        assert counts[1] - counts[0] == 5
    in_phases = sum(after("rustord_phase_seconds_sum", phase=phase) for phase in phases)
    assert 0 < after("rustord_flush_seconds_sum", device="0") < in_phases <= after("rustord_cycle_seconds_sum")


def test_stock_and_free_space_follow_the_objects(daemon: Daemon) -> None:
    before = scrape(daemon)
    size = before("rustord_device_size_bytes", device="0")
    free = before("rustord_device_free_bytes", device="0")
    assert before("rustord_objects") == before("rustord_data_bytes") == 0
    assert size == free > 8 * MIB
    first, second = (daemon.put(bytes(BLOCK)) for _ in range(2))  # its footer takes another block
    after = scrape(daemon)
    assert after("rustord_objects") == 2
    assert after("rustord_data_bytes") == 2 * BLOCK
    assert free - after("rustord_device_free_bytes", device="0") == 4 * BLOCK
    pool = daemon.pool()
    assert after("rustord_device_free_bytes", device="0") == pool["free_bytes"]
    assert after("rustord_device_size_bytes", device="0") == pool["size_bytes"] == size
    runs = after("rustord_free_runs")
    daemon.delete(first)
    after = scrape(daemon)
    assert after("rustord_free_runs") == runs + 1 == daemon.pool()["free_runs"]
    daemon.delete(second)
    after = scrape(daemon)
    assert after("rustord_objects") == after("rustord_data_bytes") == 0
    assert after("rustord_device_free_bytes", device="0") == free
    assert after("rustord_free_runs") == before("rustord_free_runs")


def test_the_state_of_each_device_is_told(make_daemon: Callable[..., Daemon], make_image: Callable[..., Path]) -> None:
    images = [make_image(16 * MIB) for _ in range(2)]
    make_pool(*images)
    told = scrape(make_daemon(images[1]).start())
    for device, there in (("0", "missing"), ("1", "online")):
        for state in ("online", "failed", "read-only", "missing"):
            assert told("rustord_device_state", device=device, state=state) == (state == there)
    assert told("rustord_read_only") == 0


@pytest.fixture
def store(image: Path, tmp_path: Path) -> Iterator[ObjectStore]:
    with rustord.open(image, directory=tmp_path / "index") as store:
        yield store


def idle_scrub(store: ObjectStore, directory: Path) -> Scrub:
    """One that leaves the store alone."""
    writer = Writer(store)
    writer.close()
    scrub = Scrub(store, Repairer(store, writer), directory / "scrub.json")
    scrub.close()
    return scrub


def test_lag_and_journal_grow_until_the_index_has_caught_up(store: ObjectStore, tmp_path: Path) -> None:
    told = metrics.Metrics()
    told.watch(store, Traffic([]), idle_scrub(store, tmp_path))
    assert Scrape(told.text())("rustord_index_lag") == 0
    for _ in range(100):
        store.put(b"data")
    moment = Scrape(told.text())
    assert moment("rustord_index_lag") == 100
    assert moment("rustord_journal_used_ratio") == pytest.approx(100 / 1024)  # of 4 MiB, a block each
    store.keystore.checkpoint()
    moment = Scrape(told.text())
    assert moment("rustord_index_lag") == 0
    assert moment("rustord_journal_used_ratio") == 0


def test_a_pool_that_takes_no_changes_says_so(store: ObjectStore, tmp_path: Path) -> None:
    told = metrics.Metrics()
    told.watch(store, Traffic([]), idle_scrub(store, tmp_path))
    assert Scrape(told.text())("rustord_read_only") == 0
    store.read_only = "a test says so"
    assert Scrape(told.text())("rustord_read_only") == 1


def test_labels_tell_nothing_of_the_objects(daemon: Daemon) -> None:
    daemon.put(b"data", name="secret-name")
    daemon.request("GET", "/v1/names/secret-name")
    daemon.request("GET", "/v1/secret-path")
    assert b"secret" not in daemon.request("GET", "/metrics").body
