"""Status snapshots as text: the problems of a tree, and a view of it that fits 80 columns."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from espalier_proto import monitor_pb2 as mpb
from espalier_server.commands.formatting import duration, size, spark

#: Exit statuses of `espalier status`.
GOING_ON, TROUBLE, IDLE = 0, 1, 3

_STYLES = {"training": "cyan", "done": "green", "lost": "red", "dead": "red", "failed": "red"}


def troubles(status: mpb.TreeStatus) -> list[str]:
    """Return the problems of a tree, one sentence each; faults that a run tolerates are not among them."""
    found = []
    run = status.run
    running = run.status == "running"
    if status.HasField("cloud") and not status.cloud.superlink:
        found.append("the SuperLink does not serve; see superlink.log in the cloud's --state")
    if run.status == "dead":
        found.append(
            f"the ServerApp of run {run.run} has ended; the cloud resumes the run from its checkpoint"
        )
    if run.status == "failed":
        found.append(f"run {run.run} failed: {run.reason or 'no reason given'}")
    if running:
        found += [f"edge {e.name} is not connected" for e in status.edges if not e.connected]
        lost = [c.name for c in status.clients if c.state == "lost"]
        found += [f"client {name} is lost" for name in lost]
    return found


def exit_status(status: mpb.TreeStatus) -> int:
    """Return 1 if there are problems, else 0 if a run is active or waiting to start, else 3."""
    if troubles(status):
        return TROUBLE
    return GOING_ON if status.run.status == "running" or status.cloud.waiting else IDLE


def render(status: mpb.TreeStatus, note: str = "") -> RenderableType:
    """Return the view of a snapshot for a terminal.

    Parameters
    ----------
    status : TreeStatus
        The snapshot.
    note : str
        Text of the last line, e.g. the key that ends the view.
    """
    parts: list[RenderableType] = [_run(status), _tree(status), _numbers(status)]
    parts += [Text(f"✗ {trouble}", style="red") for trouble in troubles(status)]
    parts += [
        Text(_fault(f, status.time), style="yellow", no_wrap=True, overflow="ellipsis")
        for f in _newest(status)
    ]
    if note:
        parts.append(Text(note, style="dim"))
    return Panel(Group(*parts), title=_title(status), title_align="left", border_style="dim")


def _title(status: mpb.TreeStatus) -> Text:
    if not status.HasField("cloud"):
        return Text("espalier  edge", style="bold")
    cloud = status.cloud
    link = ("SuperLink up", "green") if cloud.superlink else ("SuperLink down", "red")
    up = duration(status.time - cloud.started)
    return Text.assemble(
        ("espalier", "bold"),
        f"  cloud {cloud.name} {cloud.versions['espalier']}, up {up}, ",
        link,
        no_wrap=True,
    )


def _run(status: mpb.TreeStatus) -> RenderableType:
    run = status.run
    if not run.run:
        waiting = ", ".join(status.cloud.waiting)
        return Text(f"starting: {waiting}" if waiting else "no run yet", style="dim")
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    state = run.phase or run.status if run.status == "running" else run.status
    head = Text.assemble(
        (run.method or "run", "bold"), f"  {run.run}  ", (state, _STYLES.get(run.status, ""))
    )
    where = f"window {run.window}/{run.windows}  round {run.round}/{run.rounds}"
    left = f"{duration(run.seconds_left)} left" if run.HasField("seconds_left") else ""
    table.add_row(where, ProgressBar(total=max(1, run.rounds), completed=run.rounds_done), left)
    return Group(head, table)


def _tree(status: mpb.TreeStatus) -> RenderableType:
    """Return a row for each edge and, below it, its clients: those planned there, or connected to it first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
    for name in ("state", "round", "images", "loss", "steps/s", "seen", "faults"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    below: dict[str, list[mpb.ClientStatus]] = defaultdict(list)
    edges = {edge.name for edge in status.edges}
    for client in status.clients:
        place = client.edge or (client.edges[0] if client.edges else "")
        below[place if place in edges else ""].append(client)
    for edge in status.edges:
        state = Text("connected", "green") if edge.connected else Text("lost", "red")
        loss = f"{edge.loss:.4f}" if edge.HasField("loss") else "-"
        seen = _ago(status.time, edge.last_seen)
        table.add_row(
            Text(edge.name, "bold"), state, str(edge.round or "-"), "", loss, "", seen, _count(edge.faults)
        )
        _add_clients(table, below[edge.name], status.time)
    _add_clients(table, below[""], status.time)
    return table


def _add_clients(table: Table, clients: list[mpb.ClientStatus], now: float) -> None:
    for number, client in enumerate(clients, start=1):
        branch = "└ " if number == len(clients) else "├ "
        table.add_row(
            Text.assemble((branch, "dim"), client.name),
            Text(client.state, _STYLES.get(client.state, "")),
            "",
            str(client.samples or "-"),
            f"{client.loss:.4f}" if client.HasField("loss") else "-",
            f"{client.steps_per_second:.3g}" if client.HasField("steps_per_second") else "-",
            _ago(now, client.last_seen),
            _count(client.faults),
        )


def _numbers(status: mpb.TreeStatus) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    losses = list(status.run.losses)
    if losses:
        table.add_row(Text("loss", style="dim"), f"{losses[-1]:.4f}  {spark(losses)}")
    for name, value in sorted(status.run.measures.items()):
        shown = f"{100 * value:.1f} %" if name.startswith("accuracy") else f"{value:.3g}"
        table.add_row(Text(name, style="dim"), shown)
    for link in status.totals.links:
        table.add_row(Text(link.link, style="dim"), f"↑ {size(link.up_bytes)}   ↓ {size(link.down_bytes)}")
    if status.totals.HasField("last_window_seconds"):
        seconds = f"{duration(status.totals.last_window_seconds)}, {status.totals.windows} windows in all"
        table.add_row(Text("last window", style="dim"), seconds)
    return table


def _newest(status: mpb.TreeStatus) -> list[mpb.FaultNote]:
    return list(status.faults)[-3:]


def _fault(fault: mpb.FaultNote, now: float) -> str:
    where = f"window {fault.window}, round {fault.round}" if fault.window else f"{_ago(now, fault.time)} ago"
    return f"⚠ {fault.kind} {fault.node} ({where}): {fault.detail}"


def _count(faults: int) -> Text:
    return Text(str(faults), style="yellow" if faults else "dim")


def _ago(now: float, then: float) -> str:
    """Return the time since `then` in its largest unit: "5 s", "3 min", "2 h"; "-" if `then` is 0."""
    return " ".join(duration(max(0.0, now - then)).split()[:2]) if then else "-"
