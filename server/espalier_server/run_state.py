"""The state of a run as its events report it: progress, traffic, quality, faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.wire.traffic import CLIENT_EDGE


@dataclass
class EdgeProgress:
    """Progress of an edge inside the current window."""

    round: int = 0
    training: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    loss: float | None = None
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class RunState:
    """State of a run after the events so far; only `feed` changes it."""

    run: str = ""
    method: str = ""
    rounds: int = 0
    windows: int = 0
    edges: list[str] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    window: int = 0
    plan: list[dict[str, Any]] = field(default_factory=list)
    at_edges: dict[str, EdgeProgress] = field(default_factory=dict)
    losses: dict[int, float | None] = field(default_factory=dict)
    links: dict[str, dict[str, int]] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    training_since: float | None = None
    rounds_before: int = 0
    phase: str = "waiting for edges and clients"
    status: str = ""
    reason: str = ""

    def feed(self, event: Mapping[str, Any]) -> None:
        """Apply an event; an unknown one is ignored."""
        handler = getattr(self, "_on_" + str(event["event"]).replace("-", "_"), None)
        if handler is not None:
            handler(event)

    def _on_run(self, event: Mapping[str, Any]) -> None:
        config = event.get("config", {})
        self.run, self.method = str(event.get("run", "")), str(config.get("method", ""))
        self.rounds = int(config.get("rounds", 0))
        self.windows = -(-self.rounds // max(1, int(config.get("rg", 1))))
        self.training_since, self.status = None, ""
        self.phase = "waiting for edges and clients"

    def _on_joined(self, event: Mapping[str, Any]) -> None:
        self.edges, self.clients = list(event.get("edges", [])), list(event.get("clients", []))
        self.phase = "preparing"

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        self.window = int(event.get("window", 0))
        self.losses = {
            round_: loss for round_, loss in self.losses.items() if round_ <= int(event.get("round", 0))
        }
        self.phase = "resuming"

    def _on_window_start(self, event: Mapping[str, Any]) -> None:
        self.window, self.plan, self.at_edges = int(event["window"]), list(event.get("rounds", [])), {}
        self.phase = "training"
        if self.training_since is None:
            self.training_since, self.rounds_before = float(event["time"]), self.first_round - 1

    def _on_progress(self, event: Mapping[str, Any]) -> None:
        if event.get("window") == self.window:
            self.at_edges[str(event["edge"])] = EdgeProgress(
                round=int(event.get("round", 0)),
                training=list(event.get("training", [])),
                done=list(event.get("done", [])),
                loss=event.get("loss"),
                bytes=dict(event.get("bytes") or {}),
            )

    def _on_window_end(self, event: Mapping[str, Any]) -> None:
        self.losses |= {int(round_): loss for round_, loss in (event.get("losses") or {}).items()}
        self.links = {link: dict(counts) for link, counts in (event.get("links") or {}).items()}
        self.at_edges, self.phase = {}, "measuring and saving"

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self.quality = dict(event)

    _on_accuracy = _on_evaluation

    def _on_prune(self, event: Mapping[str, Any]) -> None:
        self.model = dict(event)

    def _on_fault(self, event: Mapping[str, Any]) -> None:
        self.faults.append(dict(event))

    def _on_interrupted(self, event: Mapping[str, Any]) -> None:
        self.phase = "interrupted; the cloud restarts the run"

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.status, self.reason, self.phase = str(event["event"]), str(event.get("reason") or ""), ""

    _on_stopped = _on_failed = _on_finished

    @property
    def first_round(self) -> int:
        """First round of the current window."""
        return int(self.plan[0]["round"]) if self.plan else 1

    @property
    def rounds_done(self) -> float:
        """Rounds completed, including the completed part of the current ones."""
        if self.phase != "training" or not self.plan:
            return float(max(self.losses, default=0))
        parts = []
        for edge in {part["edge"] for entry in self.plan for part in entry.get("participants", [])}:
            view = self.at_edges.get(edge)
            if view is None or view.round < self.first_round:
                parts.append(0.0)
            else:
                share = len(view.done) / max(1, len(view.done) + len(view.training))
                parts.append(view.round - self.first_round + share)
        return self.first_round - 1 + (sum(parts) / len(parts) if parts else 0.0)

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds to the end from the rounds so far; None before any part of a round is completed."""
        if self.training_since is None or self.status:
            return None
        done = self.rounds_done - self.rounds_before
        if done <= 0:
            return None
        return (now - self.training_since) / done * max(0.0, self.rounds - self.rounds_done)

    def bytes_on(self, link: str) -> tuple[int, int]:
        """Return payload bytes (up, down) on a link so far, including what is known of the current window."""
        counts = self.links.get(link, {})
        up, down = counts.get("up_bytes", 0), counts.get("down_bytes", 0)
        if link == CLIENT_EDGE:
            up += sum(view.bytes.get("up_bytes", 0) for view in self.at_edges.values())
            down += sum(view.bytes.get("down_bytes", 0) for view in self.at_edges.values())
        return up, down
