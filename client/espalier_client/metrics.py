"""Prometheus metrics of a client."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from espalier.monitor.metrics import seconds_summary
from espalier.monitor.node_status import NodeStatus
from espalier.wire.traffic import CLIENT_EDGE

TRAIN = "train"


class NodeCollector(Collector):
    """Metrics of a client.

    Parameters
    ----------
    status : NodeStatus
        Its status.
    """

    def __init__(self, status: NodeStatus) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Return nothing: values are computed when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        status = self._status
        failed = sum(status.failed.values())
        trained = status.answered[TRAIN] - status.failed[TRAIN]
        yield CounterMetricFamily("espalier_rounds", "Rounds that this client trained.", trained)
        sent = CounterMetricFamily(
            "espalier_link_bytes", "Payload bytes; up is towards the cloud.", labels=["link", "direction"]
        )
        sent.add_metric([CLIENT_EDGE, "up"], status.up_bytes)
        sent.add_metric([CLIENT_EDGE, "down"], status.down_bytes)
        yield sent
        faults = CounterMetricFamily(
            "espalier_faults", "Calls of the app that failed.", labels=["kind", "tier"]
        )
        faults.add_metric(["error", "client"], failed)
        yield faults
        yield seconds_summary(
            "training", "Seconds of local training", status.answered[TRAIN], status.seconds[TRAIN]
        )
        connected = sum(upstream.connected for upstream in status.upstreams.values())
        yield GaugeMetricFamily(
            "espalier_servers_connected", "Edges that this client is connected to.", connected
        )
        yield GaugeMetricFamily("espalier_training", "1 while it trains.", float(status.busy_with == TRAIN))
