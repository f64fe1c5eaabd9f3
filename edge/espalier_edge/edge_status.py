"""Monitoring of an edge: snapshots of the edge, its clients and the run that it serves."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from espalier.monitor.metrics import TreeCollector, serve_metrics
from espalier.monitor.node_status import NodeStatus
from espalier.monitor.service import FAULTS_SHOWN, SCHEMA, MonitorServer
from espalier.security.transport import Address, Security
from espalier.wire.hello import own_versions
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD
from espalier_edge.roster import Roster
from espalier_edge.rounds import EdgeProgress
from espalier_proto import espalier_pb2 as pb
from espalier_proto import monitor_pb2 as mpb


class EdgeTotals:
    """Totals of an edge since it started; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = mpb.Totals()
        self._links = {CLIENT_EDGE: pb.LinkBytes(), EDGE_CLOUD: pb.LinkBytes()}
        self._faults: Counter[tuple[str, str]] = Counter()
        self._newest: deque[mpb.FaultNote] = deque(maxlen=FAULTS_SHOWN)
        self._last: dict[str, pb.ClientReport] = {}

    def add(self, report: pb.EdgeReport, up_bytes: int) -> None:
        """Count a finished window, and the payload bytes of its report."""
        with self._lock:
            totals, clients = self._totals, self._links[CLIENT_EDGE]
            clients.up_bytes += report.client_edge.up_bytes
            clients.down_bytes += report.client_edge.down_bytes
            clients.messages += report.client_edge.messages
            self._links[EDGE_CLOUD].up_bytes += up_bytes
            self._links[EDGE_CLOUD].messages += 1
            totals.windows += 1
            totals.rounds += len(report.rounds)
            totals.window_seconds += report.seconds
            totals.last_window_seconds = report.seconds
            for record in report.rounds:
                for client in record.clients:
                    self._last[client.client] = client
                    totals.trainings += 1
                    totals.training_seconds += client.seconds
        self.count(report.faults)

    def count_window_plan(self, size: int) -> None:
        """Count the payload bytes of a window plan."""
        with self._lock:
            self._links[EDGE_CLOUD].down_bytes += size
            self._links[EDGE_CLOUD].messages += 1

    def count(self, faults: Iterable[pb.Fault]) -> None:
        """Count faults."""
        with self._lock:
            for fault in faults:
                self._faults[fault.tier, fault.kind] += 1
                self._newest.append(
                    mpb.FaultNote(
                        time=time.time(),
                        tier=fault.tier,
                        node=fault.node,
                        kind=fault.kind,
                        detail=fault.detail,
                        window=fault.window,
                        round=fault.round,
                    )
                )

    def last_report(self, client: str) -> pb.ClientReport | None:
        """Return a client's last accepted report."""
        with self._lock:
            return self._last.get(client)

    def fill(self, status: mpb.TreeStatus) -> None:
        """Add the totals to a snapshot."""
        with self._lock:
            status.totals.CopyFrom(self._totals)
            for link, count in self._links.items():
                status.totals.links.add(
                    link=link, up_bytes=count.up_bytes, down_bytes=count.down_bytes, messages=count.messages
                )
            for (tier, kind), number in sorted(self._faults.items()):
                status.totals.faults.add(tier=tier, kind=kind, count=number)
            status.faults.extend(self._newest)


class EdgeSource:
    """Builds the snapshots of an edge.

    Parameters
    ----------
    name : str
        The edge's name.
    roster : Roster
        Its clients.
    progress : callable
        Returns the progress of the current window.
    totals : EdgeTotals
        Totals since the edge started.
    uplink : NodeStatus
        Its connection to the cloud.
    """

    def __init__(
        self,
        name: str,
        roster: Roster,
        progress: Callable[[], EdgeProgress],
        totals: EdgeTotals,
        uplink: NodeStatus,
    ) -> None:
        self.name, self.roster, self.totals, self.uplink = name, roster, totals, uplink
        self._progress = progress

    def __call__(self) -> mpb.TreeStatus:
        """Return the current state of the edge and its clients."""
        now, progress, clients = time.time(), self._progress(), self.roster.clients()
        status = mpb.TreeStatus(schema=SCHEMA, time=now, tier="edge")
        self.totals.fill(status)
        edge = status.edges.add(
            name=self.name,
            connected=any(upstream.connected for upstream in self.uplink.upstreams.values()),
            versions=own_versions(),
            window=progress.window,
            round=progress.round,
            training=list(progress.training),
            done=list(progress.done),
            up_bytes=progress.links.up_bytes,
            down_bytes=progress.links.down_bytes,
            last_seen=now,
            clients=len(clients),
        )
        if progress.loss:
            edge.loss = progress.loss
        if progress.run:
            status.run.CopyFrom(
                mpb.RunStatus(
                    run=progress.run, status="running", window=progress.window, round=progress.round
                )
            )
        for name, member in sorted(clients.items()):
            state = "training" if name in edge.training else "done" if name in edge.done else "idle"
            client = status.clients.add(
                name=name,
                edges=[self.name],
                edge=self.name if state != "idle" else "",
                samples=member.hello.samples,
                state=state,
                last_seen=now,
                device=member.hello.facts.device,
                versions=member.hello.facts.versions,
            )
            last = self.totals.last_report(name)
            if last is not None:
                if not math.isnan(last.loss):
                    client.loss = last.loss
                if last.seconds and last.steps:
                    client.steps_per_second = last.steps / last.seconds
        return status


@contextmanager
def monitored(
    source: EdgeSource, monitor: str, metrics: Address | None, security: Security
) -> Iterator[None]:
    """Serve an edge's monitoring API and metrics, if enabled, while the context is open.

    Raises
    ------
    EspalierError
        An address cannot be served, or needs TLS.
    """
    with ExitStack() as stack:
        if monitor and monitor != "none":
            stack.enter_context(MonitorServer(monitor, security.server_certificates(monitor), source))
        if metrics is not None:
            stack.callback(serve_metrics(metrics, TreeCollector(source)))
        yield
