"""Measures what a round costs beside the training: our edge, our nodes at a stock SuperLink, and all stock."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from bench.report import Outcome, Target, run
from bench.stock import app_bundle, environment, running, serverapp_grid, superlink, supernode, wait_until
from common.flower.arrays import array_from_numpy
from common.flower.cloud_grid import TreeGrid
from common.flower.inline import InlineFleet, InlineGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Wall time of a round with a ClientApp that only sends its arrays back"
SMALL, BIG = 4096, 10_000_000  # bytes
DEADLINE = 300.0
CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
"""

Exchange = Callable[[list[Message]], Sequence[Message]]


@contextmanager
def residents(folder: Path, address: str, count: int) -> Iterator[list[int]]:
    """Run resident nodes, each a process; yield their process ids."""
    root = str(Path(__file__).parents[1])
    with ExitStack() as stack:
        pids = []
        for number in range(count):
            own = folder / f"client-{number}"
            own.mkdir(parents=True)
            command = [sys.executable, "-m", "bench.echo_client", str(own / "state"), address]
            process = stack.enter_context(running(command, own / "log", environment(own, PYTHONPATH=root)))
            pids.append(process.pid)
        yield pids


def rounds(grid: Grid, exchange: Exchange, size: int, count: int, warm: int) -> list[float]:
    """Time `count` rounds, after `warm` untimed ones, with a fresh payload of `size` bytes each; seconds."""
    nodes = sorted(grid.get_node_ids())
    generator = np.random.default_rng(0)
    seconds = []
    for number in range(warm + count):
        values = generator.standard_normal(size // 4).astype(np.float32)
        began = time.perf_counter()
        content = RecordDict({"arrays": ArrayRecord({"flat": array_from_numpy(values)})})
        messages = [Message(content, node, "train", ttl=DEADLINE) for node in nodes]
        replies = exchange(messages)
        taken = time.perf_counter() - began
        good = [reply for reply in replies if reply.has_content()]
        if len(good) != len(nodes):
            raise RuntimeError(f"{len(good)} of {len(nodes)} clients answered")
        if number >= warm:
            seconds.append(taken)
    return seconds


def streamed(grid: TreeGrid | InlineGrid) -> Exchange:
    """Return a round over a grid that yields replies as they arrive."""
    return lambda messages: list(grid.exchange(messages, deadline=DEADLINE))


def at_our_edge(folder: Path, clients: int, plan: dict[int, int]) -> dict[int, tuple[list[float], float]]:
    """Time rounds at an inline Fleet server; also the server's processor seconds per client and round."""
    server = InlineFleet("127.0.0.1:0")
    server.start()
    try:
        with residents(folder, f"127.0.0.1:{server.port}", clients):
            wait_until(lambda: len(server.nodes()) == clients, 120, "the clients")
            grid = server.open_run()
            measured = {}
            for size, count in plan.items():
                rounds(grid, streamed(grid), size, 0, 2)
                before = _processor_seconds()
                seconds = rounds(grid, streamed(grid), size, count, 0)
                measured[size] = (seconds, (_processor_seconds() - before) / clients / count)
            grid.close()
            return measured
    finally:
        server.stop(0.2)


def at_a_stock_superlink(
    folder: Path, clients: int, plan: dict[int, int], *, stock_nodes: bool, warm: int
) -> dict[int, list[float]]:
    """Time rounds at a stock SuperLink, with stock SuperNodes or with ours."""
    with ExitStack() as stack:
        link = stack.enter_context(superlink(folder / "superlink"))
        http = stack.enter_context(serverapp_grid(link, app_bundle(CLIENT)))
        if stock_nodes:
            for number in range(clients):
                stack.enter_context(supernode(folder / f"node-{number}", link.fleet))
        else:
            stack.enter_context(residents(folder, link.fleet, clients))
        wait_until(lambda: len(list(http.get_node_ids())) == clients, 180, "the clients")
        exchange: Exchange
        if stock_nodes:
            exchange = lambda messages: list(http.send_and_receive(messages, timeout=DEADLINE))  # noqa: E731
        else:
            exchange = streamed(TreeGrid(http))
        return {size: rounds(http, exchange, size, count, warm) for size, count in plan.items()}


def measure(tiny: bool) -> Outcome:
    """Measure everything; with `tiny` two clients and the small payload only."""
    outcome = Outcome()
    medians: dict[tuple[str, int, int], float] = {}
    for clients in (2,) if tiny else (2, 8):
        few = 1 if tiny else (4 if clients == 2 else 2)
        with tempfile.TemporaryDirectory(prefix="overhead-") as name:
            folder = Path(name)
            many = {SMALL: 10} if tiny else {SMALL: 30, BIG: 10}
            ours = at_our_edge(folder / "edge", clients, many)
            mixed = {}
            if not tiny:
                mixed = at_a_stock_superlink(
                    folder / "mixed", clients, {SMALL: 10, BIG: 5}, stock_nodes=False, warm=1
                )
            sizes = {SMALL: few} if tiny else {SMALL: few, BIG: few}
            stock = at_a_stock_superlink(
                folder / "stock", clients, sizes, stock_nodes=True, warm=0 if tiny else 1
            )
        for size in many:
            kinds = {"edge, residents": ours[size][0], "all stock": stock[size]}
            if mixed:
                kinds["SuperLink, residents"] = mixed[size]
            for kind, seconds in kinds.items():
                medians[kind, clients, size] = statistics.median(seconds)
                outcome.rows.append(
                    {  # stock_x: all stock over this; cpu_ms: the server's processor time per client and round
                        "setup": kind,
                        "clients": clients,
                        "bytes": size,
                        "median_s": statistics.median(seconds),
                        "min_s": min(seconds),
                        "max_s": max(seconds),
                        "stock_x": statistics.median(stock[size]) / statistics.median(seconds),
                        "cpu_ms": 1000 * ours[size][1] if kind.startswith("edge") else None,
                    }
                )
    edge, all_stock = (
        medians["edge, residents", 2, SMALL],
        medians["all stock", 2, SMALL],
    )
    outcome.targets = [
        Target.at_most("median round, 2 clients, 4 KB, s", edge, 0.1),
        Target.at_least("all stock over it, ratio", all_stock / edge, 20.0),
    ]
    outcome.plots["overhead"] = lambda figure: _draw(figure, medians)
    return outcome


def _processor_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def _draw(figure: Figure, medians: dict[tuple[str, int, int], float]) -> None:
    axes = figure.subplots()
    sizes = {SMALL: "4 KB", BIG: "10 MB"}
    labels = [f"{clients} clients, {sizes[size]}: {kind}" for kind, clients, size in medians]
    axes.barh(labels, list(medians.values()))
    axes.set_xscale("log")
    axes.set_xlabel("median wall time of a round, seconds")


if __name__ == "__main__":
    sys.exit(run("overhead", measure, ABOUT))
