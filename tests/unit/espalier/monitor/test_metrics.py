"""Prometheus metrics: names, units and values, of a tree, of an edge for itself and of a client."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from espalier.errors import AddressError
from espalier.monitor.metrics import TreeCollector, serve_metrics
from espalier.monitor.node_status import NodeStatus
from espalier.security.transport import Address
from espalier_client.metrics import NodeCollector
from espalier_edge.edge_status import EdgeSource, EdgeTotals
from espalier_edge.roster import Member
from espalier_edge.rounds import EdgeProgress
from espalier_proto import espalier_pb2 as pb
from tests.support.event_log import status
from tests.support.processes import free_port

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(*collectors: Any) -> Samples:
    """Return what a Prometheus server would read."""
    address = Address("127.0.0.1", free_port())
    stop = serve_metrics(address, *collectors)
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        with pytest.raises(AddressError, match=f"--metrics-port: cannot listen on {address}"):
            serve_metrics(address)
    finally:
        stop()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, frozenset(s.labels.items())): s.value for s in samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_tree() -> None:
    found = scrape(TreeCollector(status))
    assert of(found, "espalier_rounds_total") == 2
    assert of(found, "espalier_windows_total") == 1
    assert of(found, "espalier_link_bytes_total", link="client-edge", direction="up") == 1030
    assert of(found, "espalier_link_bytes_total", link="edge-cloud", direction="down") == 2000
    assert of(found, "espalier_faults_total", kind="straggler", tier="edge") == 1
    assert of(found, "espalier_training_seconds_sum") == 16
    assert of(found, "espalier_training_seconds_count") == 4
    assert of(found, "espalier_window_seconds_sum") == 20
    assert of(found, "espalier_nodes_connected", tier="edge") == 2
    assert of(found, "espalier_nodes_connected", tier="client") == 2
    assert of(found, "espalier_run_active") == 1
    assert of(found, "espalier_training_loss") == 0.25
    assert of(found, "espalier_superlink_up") == 1
    assert of(found, "process_resident_memory_bytes") > 1e6


def test_a_client(tmp_path: Path) -> None:
    node = NodeStatus(tmp_path, ["a:1", "b:1"])
    node("connected", {"upstream": "a:1", "node_id": 1})
    for seconds in (1.5, 0.5):
        node("message", {"upstream": "a:1", "message_type": "train", "bytes": 100})
        node(
            "reply",
            {"upstream": "a:1", "message_type": "train", "seconds": seconds, "wanted": True, "bytes": 30},
        )
    node("message", {"upstream": "a:1", "message_type": "train", "bytes": 100})
    node("error", {"upstream": "a:1", "message_type": "train", "reason": "ValueError"})
    node("reply", {"upstream": "a:1", "message_type": "train", "seconds": 0.0, "wanted": True, "bytes": 0})
    found = scrape(NodeCollector(node))
    assert of(found, "espalier_rounds_total") == 2
    assert of(found, "espalier_training_seconds_sum") == 2
    assert of(found, "espalier_link_bytes_total", link="client-edge", direction="down") == 300
    assert of(found, "espalier_link_bytes_total", link="client-edge", direction="up") == 60
    assert of(found, "espalier_faults_total", kind="error", tier="client") == 1
    assert of(found, "espalier_servers_connected") == 1
    assert of(found, "espalier_training") == 0


class MadeUpRoster:
    """Two clients that are connected."""

    def clients(self) -> dict[str, Member]:
        return {
            n: Member(i, pb.ClientHello(name=n, samples=10 * (i + 1))) for i, n in enumerate(("c1", "c2"))
        }


def test_an_edge_for_itself(tmp_path: Path) -> None:
    totals = EdgeTotals()
    record = pb.RoundRecord(round=1, clients=[pb.ClientReport(client="c1", seconds=2.0, steps=6, loss=0.5)])
    report = pb.EdgeReport(
        rounds=[record],
        seconds=5.0,
        client_edge=pb.LinkBytes(up_bytes=30, down_bytes=40, messages=2),
        faults=[pb.Fault(tier="edge", node="c2", kind="straggler", window=1, round=1)],
    )
    totals.count_window_plan(9)
    totals.add(report, 7)
    uplink = NodeStatus(tmp_path, ["cloud:1"])
    uplink("connected", {"upstream": "cloud:1", "node_id": 1})
    progress = EdgeProgress(run="r-1", window=2, round=3, training=["c2"])
    source = EdgeSource("e1", cast(Any, MadeUpRoster()), lambda: progress, totals, uplink)
    [edge], [c1, c2] = source().edges, source().clients
    assert (edge.name, edge.connected, edge.round, edge.clients) == ("e1", True, 3, 2)
    assert (c1.state, c1.steps_per_second, c1.loss, c1.samples) == ("idle", 3.0, 0.5, 10)
    assert (c2.state, c2.edge, c2.HasField("loss")) == ("training", "e1", False)
    found = scrape(TreeCollector(source))
    assert of(found, "espalier_rounds_total") == 1
    assert of(found, "espalier_link_bytes_total", link="client-edge", direction="up") == 30
    assert of(found, "espalier_link_bytes_total", link="edge-cloud", direction="down") == 9
    assert of(found, "espalier_link_bytes_total", link="edge-cloud", direction="up") == 7
    assert of(found, "espalier_faults_total", kind="straggler", tier="edge") == 1
    assert ("espalier_superlink_up", frozenset()) not in found
