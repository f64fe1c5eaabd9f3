"""The tree as a run's event log tells it: what the Monitor service answers at the cloud."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.monitor.run_state import RunState
from espalier.wire.traffic import LINKS
from espalier_proto import monitor_pb2 as mpb

#: Version of proto/espalier_proto/monitor.proto; raised when a message changes its meaning.
SCHEMA = 1
LOSSES_SHOWN, FAULTS_SHOWN = 40, 10


@dataclass
class Seen:
    """What is known of an edge or client beside the plan: facts of its hello, and its last sign of life."""

    facts: dict[str, Any] = field(default_factory=dict)
    connected: bool = False
    last_seen: float = 0.0
    last_round: dict[str, Any] = field(default_factory=dict)
    faults: int = 0


class TreeView:
    """A tree as it was at the last event; `feed` is the only way it changes."""

    def __init__(self) -> None:
        self.run = RunState()
        self.pid: int | None = None
        self.folder = ""
        self._edges: dict[str, Seen] = {}
        self._clients: dict[str, Seen] = {}
        self._faults: deque[mpb.FaultNote] = deque(maxlen=FAULTS_SHOWN)
        self._fault_counts: Counter[tuple[str, str]] = Counter()
        self._window_seconds: dict[int, float] = {}
        self._window_started = 0.0
        self._trainings = 0
        self._training_seconds = 0.0

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take in an event of the log; one this version does not know changes nothing."""
        kind, now = event["event"], float(event.get("time") or 0.0)
        self.run.feed(event)
        if kind == "run":
            self.pid = event.get("pid")
        elif kind == "roster":
            self._take_roster(event, now)
        elif kind == "window-start":
            self._window_started = now
        elif kind == "progress":
            self._saw(self._edges, event.get("edge"), now)
            for client in (*event.get("training", ()), *event.get("done", ())):
                self._saw(self._clients, client, now)
        elif kind == "window-end":
            self._window_seconds[int(event["window"])] = now - self._window_started
            self._take_trainings(event.get("clients") or {}, now)
        elif kind == "fault":
            self._take_fault(event, now)

    def status(self, now: float, *, alive: bool) -> mpb.TreeStatus:
        """Return what an onlooker is told.

        Parameters
        ----------
        now : float
            Unix seconds.
        alive : bool
            Whether the run's ServerApp lives.
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
    def _saw(group: dict[str, Seen], name: object, now: float) -> Seen:
        seen = group.setdefault(str(name), Seen())
        seen.last_seen = max(seen.last_seen, now)
        return seen

    def _take_roster(self, event: Mapping[str, Any], now: float) -> None:
        for group, key in ((self._edges, "edges"), (self._clients, "clients")):
            present: Mapping[str, Any] = event.get(key) or {}
            for name, facts in present.items():
                seen = self._saw(group, name, now)
                seen.facts, seen.connected = dict(facts), True
            for name in group.keys() - present.keys():
                group[name].connected = False

    def _take_trainings(self, clients: Mapping[str, Any], now: float) -> None:
        for name, last in clients.items():
            self._saw(self._clients, name, now).last_round = dict(last)
            self._trainings += int(last.get("rounds") or 1)
            self._training_seconds += float(last.get("total_seconds") or last.get("seconds") or 0.0)

    def _take_fault(self, event: Mapping[str, Any], now: float) -> None:
        note = {key: event.get(key) for key in ("tier", "node", "kind", "detail", "window", "round")}
        self._faults.append(mpb.FaultNote(time=now, **{k: v for k, v in note.items() if v is not None}))
        self._fault_counts[str(event.get("tier")), str(event.get("kind"))] += 1
        for group in (self._edges, self._clients):
            if seen := group.get(str(event.get("node"))):
                seen.faults += 1

    # --- the answer --------------------------------------------------------------------------------

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
        seen, inside = self._edges.get(name, Seen()), self.run.at_edges.get(name)
        status = mpb.EdgeStatus(
            name=name,
            connected=seen.connected,
            versions=seen.facts.get("versions") or {},
            window=self.run.window,
            faults=seen.faults,
            last_seen=seen.last_seen,
            clients=len(seen.facts.get("clients") or ()),
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
        seen = self._clients.get(name, Seen())
        edge, state = self._place(name, seen)
        status = mpb.ClientStatus(
            name=name,
            edges=seen.facts.get("edges") or (),
            edge=edge,
            samples=int(seen.facts.get("samples") or 0),
            state=state,
            last_seen=seen.last_seen,
            device=str(seen.facts.get("device") or ""),
            versions=seen.facts.get("versions") or {},
            faults=seen.faults,
        )
        seconds, steps = seen.last_round.get("seconds"), seen.last_round.get("steps")
        if seconds and steps:
            status.steps_per_second = steps / seconds
        loss = seen.last_round.get("loss")
        if loss is not None:
            status.loss = loss
        return status

    def _place(self, name: str, seen: Seen) -> tuple[str, str]:
        """Return the edge at which a client is now, if it is planned, and its state."""
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
        # Before an edge's first word, those whom its first round plans are on their way.
        if name in planned and planned[name] not in self.run.at_edges:
            return planned[name], "training"
        return "", "idle" if seen.connected else "lost"

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
    """Return the figures of an "evaluation" or "accuracy" event that an onlooker is shown, by name."""
    found: dict[str, Any] = {"frechet": event.get("frechet")}
    found |= {
        f"accuracy/{name}": score.get("accuracy") for name, score in (event.get("models") or {}).items()
    }
    found |= {"accuracy/clients": event.get("mean"), "accuracy/worst10": event.get("worst10")}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
