"""Prometheus metrics of a process, on request: counted from the same facts as the live view."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from espalier.errors import AddressError
from espalier.monitor.node_status import NodeStatus
from espalier.security.transport import Address
from espalier.wire.traffic import CLIENT_EDGE
from espalier_proto import monitor_pb2 as mpb

TRAIN = "train"


def serve_metrics(address: Address, *collectors: Collector) -> Callable[[], None]:
    """Answer Prometheus at ``http://HOST:PORT/metrics``; return what ends it.

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
        """Nothing: asking for the names must not make a snapshot."""
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
            "espalier_faults", "Faults that the run went on without.", labels=["kind", "tier"]
        )
        for fault in totals.faults:
            faults.add_metric([fault.kind, fault.tier], fault.count)
        yield faults
        yield _summary("training", "Seconds of local training", totals.trainings, totals.training_seconds)
        yield _summary("window", "Seconds of a window", totals.windows, totals.window_seconds)
        nodes = GaugeMetricFamily("espalier_nodes_connected", "Edges and clients.", labels=["tier"])
        nodes.add_metric(["edge"], sum(edge.connected for edge in status.edges))
        nodes.add_metric(["client"], sum(client.state != "lost" for client in status.clients))
        yield nodes
        training = sum(client.state == "training" for client in status.clients)
        yield GaugeMetricFamily("espalier_clients_training", "Clients that train now.", training)
        yield GaugeMetricFamily(
            "espalier_run_active", "1 while a run goes on.", float(status.run.status == "running")
        )
        yield GaugeMetricFamily("espalier_run_round", "The round that the run is in.", status.run.round)
        if status.run.losses:
            yield GaugeMetricFamily(
                "espalier_training_loss", "Loss of the last round.", status.run.losses[-1]
            )
        if status.HasField("cloud"):
            up = float(status.cloud.superlink)
            yield GaugeMetricFamily("espalier_superlink_up", "1 while the SuperLink serves.", up)


class NodeCollector(Collector):
    """Metrics of a client.

    Parameters
    ----------
    status : NodeStatus
        What it did so far.
    """

    def __init__(self, status: NodeStatus) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: the values are made when asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
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
        yield _summary("training", "Seconds of local training", status.answered[TRAIN], status.seconds[TRAIN])
        connected = sum(upstream.connected for upstream in status.upstreams.values())
        yield GaugeMetricFamily(
            "espalier_servers_connected", "Edges that this client is connected to.", connected
        )
        yield GaugeMetricFamily("espalier_training", "1 while it trains.", float(status.busy_with == TRAIN))


def _summary(name: str, text: str, count: int, seconds: float) -> SummaryMetricFamily:
    return SummaryMetricFamily(f"espalier_{name}_seconds", text, count_value=count, sum_value=seconds)
