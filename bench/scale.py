"""Cost of many clients: seconds of a round, idle processor share, wake-up latency (ms) and memory (MB) per client.

Clients reply without training (`bench.echo_clients`); cloud and edges are real processes. ``python -m bench.scale``.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from flwr.app import Message, RecordDict

from bench.echo_clients import WAKE
from bench.report import Outcome, Row, Target, run
from bench.stock import SuperLink, app_bundle, environment, running, serverapp_grid, superlink, wait_until
from espalier.config.fields import FlatValue
from espalier.methods.run_config import RunConfig
from espalier_edge.fleet.server import InlineFleet
from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.snapshot import Snapshot
from espalier_server.run import TreeRun
from espalier_server.superlink.grid import TreeGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Virtual clients without training over edge processes: a round, idle time, wake-ups, memory"
SETTINGS: Mapping[str, FlatValue] = {"method": "fedavg", "model": "cnn"}
MB = 1 << 20


@dataclass(frozen=True)
class Size:
    """The extent of a measurement: client counts, edges, windows of a run, idle seconds, wake-ups."""

    clients: tuple[int, ...]
    edges: int
    windows: int
    idle: float
    wakes: int


WHOLE = Size((100, 250, 500), 4, 7, 30.0, 50)
TINY = Size((4,), 2, 2, 1.0, 5)


@dataclass
class Tree:
    """A running tree: its folder, the cloud's SuperLink, and the processes of each tier."""

    folder: Path
    link: SuperLink
    tiers: dict[str, list[psutil.Process]]

    def cpu(self) -> dict[str, float]:
        """Return the processor seconds of each tier so far."""
        return {
            tier: sum(t.user + t.system for t in (p.cpu_times() for p in processes))
            for tier, processes in self.tiers.items()
        }

    def memory(self, tier: str) -> float:
        """Return the unique memory (USS) of the processes of a tier, in bytes."""
        return float(sum(p.memory_full_info().uss for p in self.tiers[tier]))


@dataclass(frozen=True)
class Rounds:
    """Cost of windows of one round, without the first.

    Attributes
    ----------
    seconds : list of float
        From one window's checkpoint to the next.
    work : dict of str to float
        Processor seconds of each tier in a window.
    trained : list of float
        Seconds of the windows themselves: without evaluation, sample images and checkpoint.
    nbytes : int
        Bytes of the model.
    """

    seconds: list[float]
    work: dict[str, float]
    trained: list[float]
    nbytes: int


@contextmanager
def echo_clients(folder: Path, clients: int, edges: Sequence[str]) -> Iterator[psutil.Process]:
    """Run `clients` echo clients in one process; yield it once all are connected."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.echo_clients", str(folder), str(clients), *edges]
    with running(command, folder / "log", environment(folder, **espalier_env())) as process:

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the clients ended: {(folder / 'log').read_text()[-2000:]}")
            return (folder / "ready").exists()

        wait_until(ready, 240, "the clients")
        yield psutil.Process(process.pid)


@contextmanager
def edge_processes(folder: Path, cloud: str, count: int) -> Iterator[tuple[list[psutil.Process], list[str]]]:
    """Run edges connected to a cloud; yield their processes and addresses."""
    with ExitStack() as stack:
        files, processes = [], []
        for number in range(1, count + 1):
            name = f"edge-{number}"
            state = folder / name
            command = espalier_command("edge", "--name", name, "--cloud", cloud)
            command += ["--listen", "127.0.0.1:0", "--state", str(state)]
            process = stack.enter_context(
                running(command, folder / f"{name}.log", environment(folder / "home", **espalier_env()))
            )
            processes.append(psutil.Process(process.pid))
            files.append(state / "address")
        wait_until(lambda: all(f.exists() and f.read_text().endswith("\n") for f in files), 120, "the edges")
        yield processes, [file.read_text().strip() for file in files]


@contextmanager
def tree(folder: Path, clients: int, edges: int, *, separate: bool = False) -> Iterator[Tree]:
    """Run a stock SuperLink, edge processes and clients; this process is the cloud's ServerApp.

    The clients share one process, or run in one process each with `separate`.
    """
    with ExitStack() as stack:
        link = stack.enter_context(superlink(folder / "link"))
        processes, addresses = stack.enter_context(edge_processes(folder, link.fleet, edges))
        groups = [(1, [addresses[n % edges]]) for n in range(clients)] if separate else [(clients, addresses)]
        members = [
            stack.enter_context(echo_clients(folder / f"c{number}", count, edge_addresses))
            for number, (count, edge_addresses) in enumerate(groups)
        ]
        tiers = {"edges": processes, "clients": members, "link": [psutil.Process(link.pid)]}
        yield Tree(folder, link, tiers | {"cloud": [psutil.Process()]})


def idle(tree: Tree, seconds: float) -> dict[str, float]:
    """Return the processor time of each tier while idle, as a share of one core."""
    before, began = tree.cpu(), time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    return {tier: (after - before[tier]) / elapsed for tier, after in tree.cpu().items()}


def rounds(
    tree: Tree, clients: int, edges: int, windows: int, settings: Mapping[str, FlatValue] = SETTINGS
) -> Rounds:
    """Run windows of one round."""
    ends: list[float] = []
    cpu: list[dict[str, float]] = []
    config = RunConfig.from_flat(
        {**settings, "run-id": f"scale-{clients}", "rounds": windows, "rg": 1}
        | {"min-edges": edges, "min-clients": clients}
    )
    out = tree.folder / "run"
    out.mkdir()
    with serverapp_grid(tree.link, app_bundle("")) as grid:
        served = TreeRun(config, TreeGrid(grid), out, tree.folder / "cloud")
        write = served.recorder.checkpoint

        def checkpoint(snapshot: Snapshot) -> None:
            write(snapshot)
            ends.append(time.perf_counter())
            cpu.append(tree.cpu())

        served.recorder.checkpoint = checkpoint  # type: ignore[method-assign]
        served.run()
    counts = [len(r.participants) for window in served.recorder.record.windows for r in window.rounds]
    if set(counts) != {clients}:
        raise RuntimeError(f"not all clients took part: {counts} of {clients}")
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    work = {tier: (cpu[-1][tier] - cpu[0][tier]) / len(seconds) for tier in cpu[0]}
    assert served.state is not None
    trained = [window.timings["train"] for window in served.recorder.record.windows[1:]]
    return Rounds(seconds, work, trained, served.state.weights.nbytes)


def wake_ups(folder: Path, clients: int, count: int, pause: float) -> list[float]:
    """Return the latencies, in seconds, from a query to an idle client until its app is called, for `count` queries."""
    server = InlineFleet("127.0.0.1:0")
    server.start()
    found = []
    try:
        with echo_clients(folder, clients, [f"127.0.0.1:{server.port}"]):
            grid = server.open_run()
            nodes = [node.node_id for node in server.nodes()]
            for node in random.Random(0).choices(nodes, k=count):
                time.sleep(pause)
                began = time.time()
                message = Message(RecordDict(), node, WAKE)
                (reply,) = grid.exchange([message], deadline=30.0)
                found.append(float(str(reply.content.config_records["came"]["at"])) - began)
            grid.close()
    finally:
        server.stop(0.2)
    return found


def measure(tiny: bool) -> Outcome:
    """Measure each number of clients, with new processes for each."""
    size = TINY if tiny else WHOLE
    outcome = Outcome()
    for clients in size.clients:
        with tempfile.TemporaryDirectory(prefix="scale-") as name:
            folder = Path(name)
            with tree(folder / "tree", clients, size.edges) as live:
                memory = {tier: live.memory(tier) for tier in ("edges", "clients")}
                idling = idle(live, size.idle)
                found = rounds(live, clients, size.edges, size.windows)
            per_edge = -(-clients // size.edges)
            waking = wake_ups(folder / "w", per_edge, size.wakes, 0.0 if tiny else 0.2)
        outcome.rows.append(row(clients, found.seconds, found.work, idling, memory, waking))
    _set_targets(outcome, size)
    outcome.notes = [
        f"{size.edges} edge processes, a stock SuperLink, the clients in one process, each at one edge; fedavg, rg=1",
        "round_s: from one window's checkpoint to the next, the cloud's part included; cpu_ms: per client and round",
        "idle_cores: processor share of all edges together, after all have joined and before the first message",
        "wake_ms: from a query to an idle client until its app is called, at an edge with its share of the clients",
        "MB: unique memory (USS) before the first message per client, including imports",
    ]
    outcome.plots["scale"] = lambda figure: _draw(figure, outcome.rows)
    return outcome


def row(
    clients: int,
    seconds: Sequence[float],
    work: dict[str, float],
    idling: dict[str, float],
    memory: dict[str, float],
    waking: Sequence[float],
) -> Row:
    """Return the row for a number of clients."""
    median = statistics.median(seconds)
    return {
        "clients": clients,
        "round_s": median,
        "max_s": max(seconds),
        "rounds_per_s": 1 / median,
        "round_ms_per_client": 1000 * median / clients,
        "edge_cpu_ms": 1000 * work["edges"] / clients,
        "client_cpu_ms": 1000 * work["clients"] / clients,
        "cloud_cpu_ms": 1000 * (work["cloud"] + work["link"]) / clients,
        "idle_cores": idling["edges"],
        "idle_client_cores": idling["clients"],
        "wake_ms": 1000 * statistics.median(waking),
        "wake_max_ms": 1000 * max(waking),
        "edge_mb": memory["edges"] / MB / clients,
        "client_mb": memory["clients"] / MB / clients,
    }


def _set_targets(outcome: Outcome, size: Size) -> None:
    first, last = outcome.rows[0], outcome.rows[-1]
    outcome.targets = [
        Target.at_most(f"round of {first['clients']} clients, s", float(first["round_s"] or 0), 2.0),
        Target.at_most(f"idle edges, {last['clients']} clients, cores", float(last["idle_cores"] or 0), 0.1),
    ]
    if len(size.clients) > 1:
        grown = float(last["round_ms_per_client"] or 0) / float(first["round_ms_per_client"] or 1)
        name = f"round time a client, {last['clients']} over {first['clients']} clients, ratio"
        outcome.targets.append(Target.at_most(name, grown, 1.25))


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2)
    clients = [float(row["clients"] or 0) for row in rows]
    left.plot(clients, [float(row["round_s"] or 0) for row in rows], marker="o")
    left.set(xlabel="clients", ylabel="seconds a round", xlim=(0, None), ylim=(0, None))
    for tier in ("edge", "client", "cloud"):
        right.plot(clients, [float(row[f"{tier}_cpu_ms"] or 0) for row in rows], marker="o", label=tier)
    right.set(xlabel="clients", ylabel="processor ms a client and round", xlim=(0, None), ylim=(0, None))
    right.legend()


if __name__ == "__main__":
    sys.exit(run("scale", measure, ABOUT))
