"""Metrics: what /metrics tells Prometheus, gathered when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from rustord.distribution import Distribution
from rustord.export import Kind
from rustord.frontends.traffic import ExportTraffic, Traffic
from rustord.objectstore import ObjectStore
from rustord.scrub import Scrub

_STATES = ("online", "failed", "read-only", "missing")
_SIZE_BOUNDS = tuple(float(1 << power) for power in range(10))


class Metrics:
    """Reads the plain numbers that the parts keep; costs them nothing until somebody asks."""

    def __init__(self) -> None:
        self.cycle_s = Distribution()
        self.cycle_changes = Distribution(_SIZE_BOUNDS)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

    def watch(
        self,
        store: ObjectStore,
        traffic: Traffic,
        scrub: Scrub,
        exports: Callable[[], Mapping[Kind, ExportTraffic]] = dict,
    ) -> None:
        """Tell of these from now on; ``exports`` tells what passed over NBD."""
        self._store, self._traffic, self._scrub, self._exports = store, traffic, scrub, exports
        self._registry.register(self)

    def on_cycle(self, changes: int, seconds: float) -> None:
        """Count a cycle of the Writer."""
        self.cycle_s.observe(seconds)
        self.cycle_changes.observe(changes)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._requests()
        yield from self._block_devices()
        yield from self._cycles()
        yield from self._pool()
        yield from self._integrity()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "rustord_requests", "Requests answered, by operation and HTTP status", labels=["operation", "status"]
        )
        latency = HistogramMetricFamily(
            "rustord_request_seconds", "Time from a request's head to its reply", labels=["operation"]
        )
        for name, operation in self._traffic.operations.items():
            for status, count in list(operation.statuses.items()):
                requests.add_metric([name, str(status)], count)
            latency.add_metric([name], operation.latency_s.cumulative(), operation.latency_s.sum)
        for status, count in list(self._traffic.requests_refused.items()):
            requests.add_metric(["none", str(status)], count)
        yield requests
        yield latency
        traffic = self._traffic
        yield CounterMetricFamily("rustord_received_bytes", "Bodies of requests", value=traffic.received_bytes)
        yield CounterMetricFamily("rustord_sent_bytes", "Bodies of replies", value=traffic.sent_bytes)
        yield CounterMetricFamily("rustord_connections", "Connections accepted", value=traffic.connections_total)
        yield CounterMetricFamily(
            "rustord_connections_refused", "Connections beyond the limit", value=traffic.connections_refused
        )
        yield CounterMetricFamily(
            "rustord_transfers_broken_off", "Uploads and downloads that did not end", value=traffic.broken_off
        )
        yield GaugeMetricFamily("rustord_connections_open", "Connections open now", value=traffic.connections)

    def _block_devices(self) -> Iterator[Metric]:
        kind = ["kind"]
        opened = GaugeMetricFamily("rustord_nbd_connections_open", "NBD connections to exports open now", labels=kind)
        total = CounterMetricFamily("rustord_nbd_connections", "NBD connections that chose an export", labels=kind)
        requests = CounterMetricFamily("rustord_nbd_requests", "NBD requests", labels=kind)
        errors = CounterMetricFamily("rustord_nbd_errors", "Of these, those answered with an error", labels=kind)
        read = CounterMetricFamily("rustord_nbd_read_bytes", "What NBD clients have read", labels=kind)
        written = CounterMetricFamily("rustord_nbd_written_bytes", "What NBD clients have written", labels=kind)
        for name, traffic in self._exports().items():
            opened.add_metric([name], traffic.connections)
            total.add_metric([name], traffic.connections_total)
            requests.add_metric([name], traffic.requests)
            errors.add_metric([name], traffic.errors)
            read.add_metric([name], traffic.read_bytes)
            written.add_metric([name], traffic.written_bytes)
        yield from (opened, total, requests, errors, read, written)

    def _cycles(self) -> Iterator[Metric]:
        yield _histogram("rustord_cycle_seconds", "Time of a cycle, its flush included", self.cycle_s)
        yield _histogram("rustord_cycle_changes", "Changes in a cycle", self.cycle_changes)
        flush = HistogramMetricFamily("rustord_flush_seconds", "Time of a flush of one device", labels=["device"])
        for index, slot in list(self._store.blocks.slots.items()):
            flush.add_metric([str(index)], slot.flush_s.cumulative(), slot.flush_s.sum)
        yield flush
        phases = HistogramMetricFamily("rustord_phase_seconds", "Time of each phase of a cycle", labels=["phase"])
        for name, phase in self._store.phase_s.items():
            phases.add_metric([name], phase.cumulative(), phase.sum)
        yield phases
        yield GaugeMetricFamily(
            "rustord_journal_used_ratio", "Used part of the fullest journal", value=self._store.keystore.journal_used()
        )
        yield GaugeMetricFamily("rustord_index_lag", "Changes not in the index yet", value=self._store.keystore.lag())

    def _pool(self) -> Iterator[Metric]:
        store = self._store
        block_size = store.label.block_size
        yield GaugeMetricFamily("rustord_objects", "Objects in the pool", value=store.stock.count)
        yield GaugeMetricFamily("rustord_data_bytes", "Data of all Objects", value=store.stock.size)
        yield GaugeMetricFamily("rustord_free_runs", "Runs of free blocks", value=store.allocator.fragments())
        yield GaugeMetricFamily("rustord_read_only", "1 if the pool takes no changes", value=bool(store.read_only))
        size = GaugeMetricFamily("rustord_device_size_bytes", "Room for data on a device", labels=["device"])
        free = GaugeMetricFamily("rustord_device_free_bytes", "Free room on a device", labels=["device"])
        bad = GaugeMetricFamily("rustord_device_bad_bytes", "Bad blocks, which are never used again", labels=["device"])
        state = GaugeMetricFamily("rustord_device_state", "1 for the state that it is in", labels=["device", "state"])
        for index, slot in list(store.blocks.slots.items()):
            size.add_metric([str(index)], slot.geometry.data_block_count * block_size)
            free.add_metric([str(index)], store.allocator.free_count(index) * block_size)
            bad.add_metric([str(index)], slot.bad.block_count * block_size)
            for name in _STATES:
                state.add_metric([str(index), name], slot.state == name)
        yield size
        yield free
        yield bad
        yield state

    def _integrity(self) -> Iterator[Metric]:
        scrub, repairer = self._scrub, self._scrub.repairer
        report = scrub.report
        yield CounterMetricFamily(
            "rustord_damaged", "Chunks and footers that were found damaged", value=repairer.damaged
        )
        yield CounterMetricFamily(
            "rustord_mended", "Of these, those that were made good from another copy", value=repairer.mended
        )
        yield CounterMetricFamily(
            "rustord_transient", "Pieces that were read wrong, and right the next time", value=repairer.transient
        )
        yield CounterMetricFamily("rustord_scrub_bytes", "What scrubs have read", value=scrub.bytes_total)
        yield GaugeMetricFamily("rustord_scrub_running", "1 while a scrub runs", value=scrub.task.is_running)
        yield GaugeMetricFamily(
            "rustord_scrub_lost", "Chunks that the last scrub found damaged on every copy", value=report.lost
        )
        yield GaugeMetricFamily(
            "rustord_scrub_ended_timestamp_seconds", "When the last scrub was done; 0 if none was", value=report.ended
        )


def _histogram(name: str, text: str, distribution: Distribution) -> Metric:
    return HistogramMetricFamily(name, text, buckets=distribution.cumulative(), sum_value=distribution.sum)
