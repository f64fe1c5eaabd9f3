"""The view of a run: redrawn in place on a terminal, one line per event otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, LINKS
from espalier_server.commands.formatting import duration, names, size, spark
from espalier_server.run_state import EdgeProgress, RunState


class RunView:
    """Shows a run; a context manager. Call `feed` with each event, and `tick` between them.

    Parameters
    ----------
    console : Console, optional
        Where to print: a live view on a terminal, else one line per relevant event.
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
        """Apply an event and show it."""
        self.state.feed(event)
        if self._live is None:
            line = describe(event, self.state)
            if line:
                self.print_line(line)
        else:
            self.tick()

    def tick(self) -> None:
        """Redraw the times and progress bars."""
        if self._live is not None:
            self._live.update(self._render(), refresh=True)

    def print_line(self, line: str) -> None:
        """Print a line above the live view."""
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
    """Return one line of text for an event, or "" for an event that is not shown."""
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
    # finished, stopped, failed or interrupted; without a reason the command's exit status says enough
    if event.get("reason"):
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
        view = state.at_edges.get(edge, EdgeProgress())
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
