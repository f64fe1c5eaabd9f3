"""Wall time of a round without training, in seconds: our edge, our nodes at a stock SuperLink, and stock Flower.

Payloads are 4 KB and 10 MB with the tensor list of FedPhD's U-Net, for 2 and 8 clients; ratios are relative to stock
SuperNodes at a stock SuperLink. ``python -m bench.overhead``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from bench.edge_rounds import DEADLINE, client, one_tensor, plan_of, random_weights, setup, unet_layout
from bench.report import Outcome, Row, Target, run
from bench.stock import app_bundle, serverapp_grid, superlink, supernode, wait_until
from espalier.wire import control
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import Payload
from espalier_server.superlink.grid import TreeGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Wall time of a round of clients that return changed values without training"
SMALL, BIG = 4096, 10_000_000  # bytes
EDGE, TLS, MIXED = "edge, residents", "edge, residents, TLS", "SuperLink, residents"
STOCK, LISTED = "all stock, one array", "all stock, an array a tensor"
CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    own = np.float32(1 + context.node_id % 4096 / 4096)
    arrays = ArrayRecord({name: Array(array.numpy() + own) for name, array in message.content["arrays"].items()})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
"""


@dataclass(frozen=True)
class Case:
    """A payload, a number of clients, and the rounds per setup: ours, our nodes at a SuperLink, all stock."""

    clients: int
    layout: Layout
    ours: int
    mixed: int
    stock: int
    listed: int = 0

    @property
    def size(self) -> int:
        """Nominal bytes of the payload: `SMALL` or `BIG`."""
        return SMALL if self.layout.nbytes <= SMALL else BIG


def at_our_edge(folder: Path, case: Case, *, tls: bool) -> tuple[list[float], float]:
    """Return the seconds of rounds at an inline Fleet server, and its processor seconds per client and round."""
    with setup(folder, case.clients, tls=tls) as edge:
        for number in range(2):
            edge.round(number, random_weights(case.layout, number))
        rounds = [edge.round(2 + n, random_weights(case.layout, 2 + n)) for n in range(case.ours)]
    return [r.seconds for r in rounds], statistics.mean(r.server for r in rounds) / case.clients


def with_residents(folder: Path, case: Case) -> list[float]:
    """Return the seconds of rounds of our nodes at a stock SuperLink."""
    with ExitStack() as stack:
        link = stack.enter_context(superlink(folder / "superlink"))
        http = stack.enter_context(serverapp_grid(link, app_bundle(CLIENT)))
        for number in range(case.clients):
            stack.enter_context(client(folder / f"client-{number}", link.fleet))
        wait_until(lambda: len(list(http.get_node_ids())) == case.clients, 180, "the clients")
        grid = TreeGrid(http)

        def content(weights: Weights) -> RecordDict:
            return control.plan_content(plan_of(0, "client", case.layout), Payload.of(weights))

        def exchange(messages: list[Message]) -> list[Message]:
            return list(grid.exchange(messages, deadline=DEADLINE))

        return timed(http, exchange, content, case.layout, case.mixed)


def all_stock(folder: Path, case: Case, count: int, *, listed: bool) -> list[float]:
    """Return the seconds of rounds of stock SuperNodes at a stock SuperLink; `listed`: one Array per tensor."""
    with ExitStack() as stack:
        link = stack.enter_context(superlink(folder / "superlink"))
        http = stack.enter_context(serverapp_grid(link, app_bundle(CLIENT)))
        for number in range(case.clients):
            stack.enter_context(supernode(folder / f"node-{number}", link.fleet))
        wait_until(lambda: len(list(http.get_node_ids())) == case.clients, 180, "the clients")

        def content(weights: Weights) -> RecordDict:
            arrays = weights.views() if listed else weights.buffers
            return RecordDict({"arrays": ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()})})

        def exchange(messages: list[Message]) -> list[Message]:
            return list(http.send_and_receive(messages, timeout=DEADLINE))

        return timed(http, exchange, content, case.layout, count)


def timed(
    grid: Grid,
    exchange: Callable[[list[Message]], list[Message]],
    content: Callable[[Weights], RecordDict],
    layout: Layout,
    count: int,
) -> list[float]:
    """Return the seconds of `count` rounds, after one that warms up."""
    nodes = sorted(grid.get_node_ids())
    seconds = []
    for number in range(1 + count):
        weights = random_weights(layout, number)
        began = time.perf_counter()
        shared = content(weights)
        replies = exchange([Message(shared, node, "train", ttl=DEADLINE) for node in nodes])
        seconds.append(time.perf_counter() - began)
        answered = [reply for reply in replies if reply.has_content()]
        if len(answered) != len(nodes):
            raise RuntimeError(f"{len(answered)} of {len(nodes)} clients answered")
        del replies, answered
    return seconds[1:]


def measure(tiny: bool) -> Outcome:
    """Measure all setups; with `tiny`, two clients and the small payload only."""
    small = one_tensor(SMALL)
    if tiny:
        cases = [Case(2, small, 10, 0, 1)]
    else:
        big = unet_layout(BIG)
        cases = [
            Case(2, small, 30, 10, 4),
            Case(2, big, 20, 5, 3, listed=2),
            Case(8, small, 20, 5, 2),
            Case(8, big, 10, 3, 2),
        ]
    outcome = Outcome()
    medians: dict[tuple[str, int, int], float] = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="overhead-") as name:
            folder = Path(name)
            found: dict[str, list[float]] = {}
            found[EDGE], work = at_our_edge(folder / "edge", case, tls=False)
            found[TLS], work_tls = at_our_edge(folder / "tls", case, tls=True)
            if case.mixed:
                found[MIXED] = with_residents(folder / "mixed", case)
            found[STOCK] = all_stock(folder / "stock", case, case.stock, listed=False)
            if case.listed:
                found[LISTED] = all_stock(folder / "listed", case, case.listed, listed=True)
        stock = statistics.median(found[STOCK])
        for kind, seconds in found.items():
            median = medians[kind, case.clients, case.size] = statistics.median(seconds)
            row: Row = {
                "setup": kind,
                "clients": case.clients,
                "bytes": case.size,
                "median_s": median,
                "min_s": min(seconds),
                "max_s": max(seconds),
                "stock_x": stock / median,
                "cpu_ms": 1000 * {EDGE: work, TLS: work_tls}[kind] if kind in (EDGE, TLS) else None,
            }
            outcome.rows.append(row)
    outcome.notes = [
        "stock_x: seconds of a round of all stock with one array, divided by this setup's",
        "cpu_ms: processor time of the edge process per client and round",
        "an array a tensor: the U-Net's 10 MB as stock Flower sends a state_dict, one object per tensor",
    ]
    outcome.targets = targets(medians)
    outcome.plots["overhead"] = lambda figure: _draw(figure, medians)
    return outcome


def targets(medians: dict[tuple[str, int, int], float]) -> list[Target]:
    """Compare the medians with the targets."""
    found = []
    for clients, limit in ((2, 0.05), (8, 0.15)):
        if (edge := medians.get((EDGE, clients, SMALL))) is not None:
            found.append(Target.at_most(f"median round, {clients} clients, 4 KB, s", edge, limit))
            ratio = medians[STOCK, clients, SMALL] / edge
            found.append(Target.at_least(f"all stock over it, {clients} clients, ratio", ratio, 100.0))
    if (edge := medians.get((EDGE, 2, BIG))) is not None:
        found.append(Target.at_most("median round, 2 clients, 10 MB of the U-Net's tensors, s", edge, 0.2))
    return found


def _draw(figure: Figure, medians: dict[tuple[str, int, int], float]) -> None:
    axes = figure.subplots()
    sizes = {SMALL: "4 KB", BIG: "10 MB"}
    labels = [f"{clients} clients, {sizes[size]}: {kind}" for kind, clients, size in medians]
    axes.barh(labels, list(medians.values()))
    axes.set_xscale("log")
    axes.set_xlabel("median wall time of a round, seconds")


if __name__ == "__main__":
    sys.exit(run("overhead", measure, ABOUT))
