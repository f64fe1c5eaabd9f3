"""Measures adding up big updates at an edge: peak memory, time, the add step alone, and Flower's FedAvg beside it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report import Outcome, Row, Target, run
from bench.stock import environment, running, wait_until
from espalier.methods.accumulate import add_scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Updates of one size added up: by an edge's process as they arrive, and by Flower's FedAvg when all are there"
MODEL, TENSORS = 142_984_000, 10  # bytes, as FedPhD's U-Net
A_PROCESS = 16  # clients
ROOT = Path(__file__).parents[1]


def at_an_edge(folder: Path, clients: int, size: int) -> dict[str, float]:
    """Run an edge's process and its clients'; return what the edge measured of itself."""
    folder.mkdir(parents=True)
    env = environment(folder, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    log = folder / "edge.log"
    command = [sys.executable, "-m", "bench.aggregating", "edge", str(folder / "edge")]
    with ExitStack() as stack:
        edge = stack.enter_context(running([*command, str(clients), str(size), str(TENSORS)], log, env))

        def printed() -> list[str]:
            if edge.poll() not in (None, 0):
                raise RuntimeError(f"the edge ended: {log.read_text()[-2000:]}")
            return [line for line in log.read_text().splitlines() if line[:1] in "{0123456789"]

        wait_until(printed, 60, "the edge")
        address = f"127.0.0.1:{printed()[0]}"
        for number, first in enumerate(range(0, clients, A_PROCESS)):
            own = folder / f"crowd{number}"
            crowd = [
                sys.executable,
                "-m",
                "bench.crowd",
                str(own),
                str(min(A_PROCESS, clients - first)),
                address,
            ]
            stack.enter_context(running(crowd, folder / f"crowd{number}.log", env))
        wait_until(lambda: len(printed()) == 2, 900, "the round")
        found: dict[str, float] = json.loads(printed()[1])
        return found


def by_fedavg(folder: Path, clients: int, size: int) -> dict[str, float]:
    """Have FedAvg aggregate replies of its own process."""
    command = [sys.executable, "-m", "bench.aggregating", "fedavg", str(clients), str(size), str(TENSORS)]
    env = environment(folder, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bandwidths(size: int, repeats: int) -> dict[str, float]:
    """Measure memory bandwidths in bytes a second: of copies by all cores, and of the add step."""
    parts = min(os.cpu_count() or 1, 4)
    generator = np.random.default_rng(0)
    source, target = generator.random(size // 4, np.float32), np.zeros(size // 4, np.float32)
    slices = [slice(i * target.size // parts, (i + 1) * target.size // parts) for i in range(parts)]
    with ThreadPoolExecutor(parts) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), slices))

        def add() -> None:
            add_scaled(target, 0.5, source)

        found = _alternately({"copy": copy, "add": add}, repeats)
    # A copy reads and writes each number, a sum reads two and writes one.
    return {"copy": 2 * size / found["copy"], "add": 3 * size / found["add"]}


def _alternately(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return each action's median seconds, timed in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(tiny: bool) -> Outcome:
    """Measure an edge with more and more clients, FedAvg with few, and the add step."""
    size, crowds, stock, repeats = (4_000_000, (2, 4), (2,), 3) if tiny else (MODEL, (4, 16, 64), (4, 8), 15)
    outcome = Outcome()
    found: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="aggregate-") as name:
        folder = Path(name)
        for clients in crowds:
            found["edge", clients] = at_an_edge(folder / f"edge-{clients}", clients, size)
        for clients in stock:
            found["FedAvg", clients] = by_fedavg(folder, clients, size)
    for (kind, clients), took in found.items():
        row: Row = {
            "by": kind,
            "updates": clients,
            "bytes": size,
            "idle_mb": took["idle"] / 1e6,
            "peak_mb": took["peak"] / 1e6,
            "peak_models": took["peak"] / size,
            "above_idle_models": (took["peak"] - took["idle"]) / size,
            "seconds": took["seconds"],
            "cpu_s": took["cpu_s"],
        }
        outcome.rows.append(row)
    speeds = bandwidths(size, repeats)
    for kind, speed in speeds.items():
        outcome.rows.append({"by": f"{kind}, {speed / 1e9:.3g} GB/s", "bytes": size})
    most = max(found["edge", clients]["peak"] for clients in crowds) / size
    outcome.targets = [
        Target.at_most(
            f"peak memory of the edge's process, {crowds[0]} to {crowds[-1]} updates, models", most, 4.0
        ),
        Target.at_least("add step, share of the copy's bandwidth", speeds["add"] / speeds["copy"], 0.6),
    ]
    outcome.notes = [
        "peak_models counts all of the process, interpreter and libraries (idle_mb) included; that of the edge "
        "holds the cloud's payload already",
        "seconds of the edge: the whole round over the links; of FedAvg: its aggregate_train alone, of replies in "
        "memory",
        "the add step reads two numbers and writes one (12 bytes), the copy reads and writes one, on all cores",
    ]
    outcome.plots["aggregate"] = lambda figure: _draw(figure, found, size)
    return outcome


def _draw(figure: Figure, found: dict[tuple[str, int], dict[str, float]], size: int) -> None:
    axes: Any = figure.subplots()
    for kind in ("edge", "FedAvg"):
        points = [(clients, took["peak"] / size) for (by, clients), took in found.items() if by == kind]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.axhline(4, color="gray", linestyle=":")
    axes.set_xlabel("updates")
    axes.set_ylabel("peak memory of the process, models")
    axes.legend()


if __name__ == "__main__":
    sys.exit(run("aggregate", measure, ABOUT))
