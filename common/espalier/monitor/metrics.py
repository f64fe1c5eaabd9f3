"""Prometheus metrics of a cloud or an edge, from its status snapshots, and the server that exposes metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from espalier.errors import AddressError
from espalier.security.transport import Address
from espalier_proto import monitor_pb2 as mpb


def serve_metrics(address: Address, *collectors: Collector) -> Callable[[], None]:
    """Serve metrics at ``http://HOST:PORT/metrics``; return the function that stops the server.

    Raises
    ------
    AddressError
        The address cannot be listened on.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)
    try:
        server, thread = start_http_server(address.port, address.host, registry=registry)
    except OSError as error:
        raise AddressError(
            f"--metrics-port: cannot listen on {address}: {error.strerror}; give another port or --metrics-host"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


class TreeCollector(Collector):
    """Metrics of a cloud or an edge.

    Parameters
    ----------
    source : callable
        Returns the newest snapshot.
    """

    def __init__(self, source: Callable[[], mpb.TreeStatus]) -> None:
        self._source = source

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering takes no snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of a snapshot."""
        status = self._source()
        totals = status.totals
        yield CounterMetricFamily("espalier_rounds", "Rounds of the newest run that ended.", totals.rounds)
        yield CounterMetricFamily("espalier_windows", "Windows of the newest run that ended.", totals.windows)
        sent = CounterMetricFamily(
            "espalier_link_bytes", "Payload bytes; up is towards the cloud.", labels=["link", "direction"]
        )
        messages = CounterMetricFamily("espalier_link_messages", "Messages with a payload.", labels=["link"])
        for link in totals.links:
            sent.add_metric([link.link, "up"], link.up_bytes)
            sent.add_metric([link.link, "down"], link.down_bytes)
            messages.add_metric([link.link], link.messages)
        yield from (sent, messages)
        faults = CounterMetricFamily(
            "espalier_faults", "Faults that did not end the run.", labels=["kind", "tier"]
        )
        for fault in totals.faults:
            faults.add_metric([fault.kind, fault.tier], fault.count)
        yield faults
        yield seconds_summary(
            "training", "Seconds of local training", totals.trainings, totals.training_seconds
        )
        yield seconds_summary("window", "Seconds of a window", totals.windows, totals.window_seconds)
        nodes = GaugeMetricFamily("espalier_nodes_connected", "Edges and clients.", labels=["tier"])
        nodes.add_metric(["edge"], sum(edge.connected for edge in status.edges))
        nodes.add_metric(["client"], sum(client.state != "lost" for client in status.clients))
        yield nodes
        training = sum(client.state == "training" for client in status.clients)
        yield GaugeMetricFamily("espalier_clients_training", "Clients that train now.", training)
        yield GaugeMetricFamily(
            "espalier_run_active", "1 while a run is in progress.", float(status.run.status == "running")
        )
        yield GaugeMetricFamily("espalier_run_round", "The round that the run is in.", status.run.round)
        if status.run.losses:
            yield GaugeMetricFamily(
                "espalier_training_loss", "Loss of the last round.", status.run.losses[-1]
            )
        if status.HasField("cloud"):
            up = float(status.cloud.superlink)
            yield GaugeMetricFamily("espalier_superlink_up", "1 while the SuperLink serves.", up)


def seconds_summary(name: str, text: str, count: int, seconds: float) -> SummaryMetricFamily:
    """Return the metric ``espalier_<name>_seconds``: a number of durations and their sum."""
    return SummaryMetricFamily(f"espalier_{name}_seconds", text, count_value=count, sum_value=seconds)
