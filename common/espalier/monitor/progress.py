"""A run as it is watched: a live view on a terminal, plain lines elsewhere, both fed by the run's events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from espalier.monitor.formatting import duration, names, size, spark
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, LINKS


@dataclass
class EdgeView:
    """What is known of an edge inside the running window."""

    round: int = 0
    training: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    loss: float | None = None
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class RunState:
    """A run as its events told it so far; `feed` is the only way it changes."""

    run: str = ""
    method: str = ""
    rounds: int = 0
    windows: int = 0
    edges: list[str] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    window: int = 0
    plan: list[dict[str, Any]] = field(default_factory=list)
    at_edges: dict[str, EdgeView] = field(default_factory=dict)
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
        """Take an event in; one this version does not know changes nothing."""
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
            self.at_edges[str(event["edge"])] = EdgeView(
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
        self.phase = "interrupted; the cloud brings the run back"

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.status, self.reason, self.phase = str(event["event"]), str(event.get("reason") or ""), ""

    _on_stopped = _on_failed = _on_finished

    @property
    def first_round(self) -> int:
        """First round of the running window."""
        return int(self.plan[0]["round"]) if self.plan else 1

    @property
    def rounds_done(self) -> float:
        """Rounds behind the run, with the parts of those that the edges are in."""
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
        """Estimate the time to the end from the rounds so far; None before the first part of one is done."""
        if self.training_since is None or self.status:
            return None
        done = self.rounds_done - self.rounds_before
        if done <= 0:
            return None
        return (now - self.training_since) / done * max(0.0, self.rounds - self.rounds_done)

    def bytes_on(self, link: str) -> tuple[int, int]:
        """Return payload bytes (up, down) on a link so far, the running window's as far as known."""
        counts = self.links.get(link, {})
        up, down = counts.get("up_bytes", 0), counts.get("down_bytes", 0)
        if link == CLIENT_EDGE:
            up += sum(view.bytes.get("up_bytes", 0) for view in self.at_edges.values())
            down += sum(view.bytes.get("down_bytes", 0) for view in self.at_edges.values())
        return up, down


class RunView:
    """Shows a run; a context manager. `feed` events to it, and `tick` between them.

    Parameters
    ----------
    console : Console, optional
        Where to; a live view if it is a terminal, else one line for each event that matters.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.state = RunState()
        self._live = (
            Live(console=self.console, auto_refresh=False, transient=False)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> RunView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take an event in and show it."""
        self.state.feed(event)
        if self._live is None:
            line = describe(event, self.state)
            if line:
                self.say(line)
        else:
            self.tick()

    def tick(self) -> None:
        """Bring times and bars up to date."""
        if self._live is not None:
            self._live.update(self._render(), refresh=True)

    def say(self, line: str) -> None:
        """Print a line of its own, above a live view."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        state = self.state
        head = Text.assemble((state.method or "run", "bold"), f"  {state.run}", no_wrap=True)
        parts: list[RenderableType] = [_bar(state), _edges(state), _numbers(state)]
        if state.faults:
            parts.append(
                Text(f"⚠ {len(state.faults)} fault(s), last: {_fault(state.faults[-1])}", style="yellow")
            )
        if state.status:
            style = {"finished": "green", "failed": "red"}.get(state.status, "yellow")
            parts.append(Text(f"{state.status}{': ' + state.reason if state.reason else ''}", style=style))
        return Panel(Group(*parts), title=head, title_align="left", border_style="dim")


def describe(event: Mapping[str, Any], state: RunState) -> str:
    """Return one plain line for an event, or "" for one that is not worth it."""
    kind, window = event["event"], event.get("window")
    if kind == "run":
        return f"run {state.run}: {state.method}, {state.rounds} rounds in {state.windows} windows"
    if kind == "joined":
        return f"joined: {len(state.edges)} edges, {len(state.clients)} clients"
    if kind == "window-start":
        clients = {part["client"] for entry in state.plan for part in entry.get("participants", [])}
        last = state.first_round + len(state.plan) - 1
        return f"window {window}/{state.windows}: rounds {state.first_round}-{last}, {len(clients)} clients"
    if kind == "window-end":
        losses = [loss for loss in (event.get("losses") or {}).values() if loss is not None]
        traffic = ", ".join(f"{link} {size(sum(state.bytes_on(link)))}" for link in LINKS)
        left = state.seconds_left(float(event["time"]))
        return (
            f"window {window} done: loss {losses[-1]:.4f}; {traffic}"
            if losses
            else f"window {window} done: no reply"
        ) + (f"; {duration(left)} left" if left else "")
    if kind in ("evaluation", "accuracy"):
        return f"window {window}: {_quality(event)}"
    if kind == "prune":
        return f"pruned after round {event.get('round')}: {_model(event)}"
    if kind == "fault":
        return f"fault: {_fault(event)}"
    if kind == "resumed":
        return f"resumed after window {window}, round {event.get('round')}"
    if event.get("reason"):  # finished, stopped, failed, interrupted; without one the exit says enough
        return f"{kind}: {event['reason']}"
    return ""


def _bar(state: RunState) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    done = state.rounds_done
    left = state.seconds_left(time.time())
    where = f"window {state.window}/{state.windows}  round {min(int(done) + 1, state.rounds)}/{state.rounds}"
    label = where if state.window else state.phase
    note = f"{duration(left)} left" if left is not None else (state.phase if state.window else "")
    bar = ProgressBar(total=max(1, state.rounds), completed=done, pulse=not state.window and not state.status)
    table.add_row(label, bar, note)
    return table


def _edges(state: RunState) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("edge", "round", "training", "done", "loss"):
        table.add_column(name, justify="right" if name in ("round", "loss") else "left")
    for edge in state.edges:
        view = state.at_edges.get(edge, EdgeView())
        training, done = view.training, view.done
        if not view.round and state.phase == "training":
            training = sorted(
                {p["client"] for p in (state.plan or [{}])[0].get("participants", []) if p["edge"] == edge}
            )
        loss = f"{view.loss:.4f}" if view.loss else "-"
        table.add_row(edge, str(view.round or "-"), names(training), names(done), loss)
    return table


def _numbers(state: RunState) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    losses = [loss for _, loss in sorted(state.losses.items()) if loss is not None]
    if losses:
        table.add_row(Text("loss", style="dim"), f"{losses[-1]:.4f}  {spark(losses)}")
    for link in (CLIENT_EDGE, EDGE_CLOUD):
        up, down = state.bytes_on(link)
        table.add_row(Text(link, style="dim"), f"↑ {size(up)}   ↓ {size(down)}")
    if state.quality:
        table.add_row(Text("quality", style="dim"), _quality(state.quality))
    if state.model:
        table.add_row(Text("pruned", style="dim"), _model(state.model))
    if state.window and state.phase and state.phase != "training":
        table.add_row(Text("now", style="dim"), state.phase)
    return table


def _quality(event: Mapping[str, Any]) -> str:
    if event.get("event") == "accuracy":
        return _accuracy(event)

    def number(source: object) -> str:
        value = source.get("frechet") if isinstance(source, Mapping) else source
        return f"{value:.3g}" if isinstance(value, int | float) else "-"

    text = f"Fréchet distance ({event.get('features') or 'features'}) {number(event)}"
    return f"{text}  (real {number(event.get('floor'))}, noise {number(event.get('noise'))})"


def _accuracy(event: Mapping[str, Any]) -> str:
    found = {str(name): score.get("accuracy") for name, score in (event.get("models") or {}).items()}
    found |= {"clients' mean": event.get("mean"), "worst 10 %": event.get("worst10")}
    known = [f"{name} {100 * value:.1f} %" for name, value in found.items() if isinstance(value, int | float)]
    return f"accuracy: {', '.join(known) or '-'}"


def _model(event: Mapping[str, Any]) -> str:
    params, dense = float(event.get("params") or 0), float(event.get("params_dense") or 0)
    share = f" of {dense / 1e6:.2f} M" if dense else ""
    return f"{params / 1e6:.2f} M{share} parameters"


def _fault(event: Mapping[str, Any]) -> str:
    detail = f": {event['detail']}" if event.get("detail") else ""
    return f"{event.get('kind')} {event.get('node')} (window {event.get('window')}, round {event.get('round')}){detail}"
