"""The cloud's status snapshot: the tree as the events of a run report it."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.monitor.service import FAULTS_SHOWN, SCHEMA
from espalier.wire.traffic import LINKS
from espalier_proto import monitor_pb2 as mpb
from espalier_server.run_state import RunState

#: Number of the newest losses in a snapshot.
LOSSES_SHOWN = 40


@dataclass
class NodeRecord:
    """An edge or client in the events: the facts of its hello, its last round, and when it was last mentioned."""

    facts: dict[str, Any] = field(default_factory=dict)
    connected: bool = False
    last_seen: float = 0.0
    last_round: dict[str, Any] = field(default_factory=dict)
    faults: int = 0


class TreeView:
    """The tree as of the last event; only `feed` changes it."""

    def __init__(self) -> None:
        self.run = RunState()
        self.pid: int | None = None
        self.folder = ""
        self._edges: dict[str, NodeRecord] = {}
        self._clients: dict[str, NodeRecord] = {}
        self._faults: deque[mpb.FaultNote] = deque(maxlen=FAULTS_SHOWN)
        self._fault_counts: Counter[tuple[str, str]] = Counter()
        self._window_seconds: dict[int, float] = {}
        self._window_started = 0.0
        self._trainings = 0
        self._training_seconds = 0.0

    def feed(self, event: Mapping[str, Any]) -> None:
        """Apply an event of the log; an unknown one is ignored."""
        kind, now = event["event"], float(event.get("time") or 0.0)
        self.run.feed(event)
        if kind == "run":
            self.pid = event.get("pid")
        elif kind == "roster":
            self._apply_roster(event, now)
        elif kind == "window-start":
            self._window_started = now
        elif kind == "progress":
            self._touch(self._edges, event.get("edge"), now)
            for client in (*event.get("training", ()), *event.get("done", ())):
                self._touch(self._clients, client, now)
        elif kind == "window-end":
            self._window_seconds[int(event["window"])] = now - self._window_started
            self._apply_trainings(event.get("clients") or {}, now)
        elif kind == "fault":
            self._apply_fault(event, now)

    def status(self, now: float, *, alive: bool) -> mpb.TreeStatus:
        """Return the status snapshot.

        Parameters
        ----------
        now : float
            Unix seconds.
        alive : bool
            Whether the process of the run's ServerApp runs.
        """
        status = mpb.TreeStatus(schema=SCHEMA, time=now, tier="cloud", totals=self._totals())
        if self.run.run:
            status.run.CopyFrom(self._run_status(now, alive))
        status.edges.extend(self._edge(name) for name in sorted({*self._edges, *self.run.edges}))
        status.clients.extend(self._client(name) for name in sorted({*self._clients, *self.run.clients}))
        status.faults.extend(self._faults)
        return status

    # --- events ------------------------------------------------------------------------------------

    @staticmethod
    def _touch(group: dict[str, NodeRecord], name: object, now: float) -> NodeRecord:
        """Return the record of a node, and note the time of the event that mentions it."""
        node = group.setdefault(str(name), NodeRecord())
        node.last_seen = max(node.last_seen, now)
        return node

    def _apply_roster(self, event: Mapping[str, Any], now: float) -> None:
        for group, key in ((self._edges, "edges"), (self._clients, "clients")):
            present: Mapping[str, Any] = event.get(key) or {}
            for name, facts in present.items():
                node = self._touch(group, name, now)
                node.facts, node.connected = dict(facts), True
            for name in group.keys() - present.keys():
                group[name].connected = False

    def _apply_trainings(self, clients: Mapping[str, Any], now: float) -> None:
        for name, last in clients.items():
            self._touch(self._clients, name, now).last_round = dict(last)
            self._trainings += int(last.get("rounds") or 1)
            self._training_seconds += float(last.get("total_seconds") or last.get("seconds") or 0.0)

    def _apply_fault(self, event: Mapping[str, Any], now: float) -> None:
        note = {key: event.get(key) for key in ("tier", "node", "kind", "detail", "window", "round")}
        self._faults.append(mpb.FaultNote(time=now, **{k: v for k, v in note.items() if v is not None}))
        self._fault_counts[str(event.get("tier")), str(event.get("kind"))] += 1
        for group in (self._edges, self._clients):
            if node := group.get(str(event.get("node"))):
                node.faults += 1

    # --- the snapshot ------------------------------------------------------------------------------

    def _run_status(self, now: float, alive: bool) -> mpb.RunStatus:
        run = self.run
        losses = [loss for _, loss in sorted(run.losses.items()) if loss is not None]
        status = mpb.RunStatus(
            run=run.run,
            method=run.method,
            status=run.status or ("running" if alive else "dead"),
            phase=run.phase,
            reason=run.reason,
            window=run.window,
            windows=run.windows,
            round=min(int(run.rounds_done) + (not run.status), run.rounds),
            rounds=run.rounds,
            losses=losses[-LOSSES_SHOWN:],
            measures=measures(run.quality),
            folder=self.folder,
            rounds_done=run.rounds_done,
        )
        left = run.seconds_left(now)
        if left is not None:
            status.seconds_left = left
        return status

    def _edge(self, name: str) -> mpb.EdgeStatus:
        node, inside = self._edges.get(name, NodeRecord()), self.run.at_edges.get(name)
        status = mpb.EdgeStatus(
            name=name,
            connected=node.connected,
            versions=node.facts.get("versions") or {},
            window=self.run.window,
            faults=node.faults,
            last_seen=node.last_seen,
            clients=len(node.facts.get("clients") or ()),
        )
        if inside is not None:
            status.round = inside.round
            status.training.extend(inside.training)
            status.done.extend(inside.done)
            status.up_bytes = inside.bytes.get("up_bytes", 0)
            status.down_bytes = inside.bytes.get("down_bytes", 0)
            if inside.loss:
                status.loss = inside.loss
        return status

    def _client(self, name: str) -> mpb.ClientStatus:
        node = self._clients.get(name, NodeRecord())
        edge, state = self._place(name, node)
        status = mpb.ClientStatus(
            name=name,
            edges=node.facts.get("edges") or (),
            edge=edge,
            samples=int(node.facts.get("samples") or 0),
            state=state,
            last_seen=node.last_seen,
            device=str(node.facts.get("device") or ""),
            versions=node.facts.get("versions") or {},
            faults=node.faults,
        )
        seconds, steps = node.last_round.get("seconds"), node.last_round.get("steps")
        if seconds and steps:
            status.steps_per_second = steps / seconds
        loss = node.last_round.get("loss")
        if loss is not None:
            status.loss = loss
        return status

    def _place(self, name: str, node: NodeRecord) -> tuple[str, str]:
        """Return the edge of a client in the current round, "" if it does not participate, and the client's state."""
        for edge, inside in self.run.at_edges.items():
            if name in inside.training:
                return edge, "training"
            if name in inside.done:
                return edge, "done"
        planned = {
            part["client"]: part["edge"]
            for part in (self.run.plan or [{}])[0].get("participants", [])
            if self.run.phase == "training"
        }
        # Until an edge reports progress, the participants of its first round count as training.
        if name in planned and planned[name] not in self.run.at_edges:
            return planned[name], "training"
        return "", "idle" if node.connected else "lost"

    def _totals(self) -> mpb.Totals:
        run, totals = self.run, mpb.Totals()
        for link in LINKS:
            up, down = run.bytes_on(link)
            messages = run.links.get(link, {}).get("messages", 0)
            totals.links.add(link=link, up_bytes=up, down_bytes=down, messages=messages)
        for (tier, kind), count in sorted(self._fault_counts.items()):
            totals.faults.add(tier=tier, kind=kind, count=count)
        totals.rounds, totals.windows = len(run.losses), len(self._window_seconds)
        totals.window_seconds = sum(self._window_seconds.values())
        if self._window_seconds:
            totals.last_window_seconds = self._window_seconds[max(self._window_seconds)]
        totals.trainings, totals.training_seconds = self._trainings, self._training_seconds
        return totals


def measures(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an "evaluation" or "accuracy" event that snapshots show, by name."""
    found: dict[str, Any] = {"frechet": event.get("frechet")}
    found |= {
        f"accuracy/{name}": score.get("accuracy") for name, score in (event.get("models") or {}).items()
    }
    found |= {"accuracy/clients": event.get("mean"), "accuracy/worst10": event.get("worst10")}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
