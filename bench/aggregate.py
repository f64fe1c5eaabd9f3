"""Peak memory and time of the aggregation of large updates at an edge, against Flower's FedAvg.

Peak resident memory (in model sizes) and seconds of an edge process that aggregates updates as they arrive and of
FedAvg, which needs all replies at once; and the memory bandwidth of the add step relative to a plain copy.
``python -m bench.aggregate``.
"""

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

ABOUT = "Aggregation of updates of one size: by an edge process as they arrive, and by Flower's FedAvg once all arrived"
MODEL, TENSORS = 142_984_000, 10  # bytes of FedPhD's U-Net, and tensors that they are divided into
CLIENTS_PER_PROCESS = 16
ROOT = Path(__file__).parents[1]


def measure_edge(folder: Path, clients: int, size: int) -> dict[str, float]:
    """Run an edge process and its client processes; return the edge's measurements of itself (bytes, seconds)."""
    folder.mkdir(parents=True)
    env = environment(folder, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    log = folder / "edge.log"
    command = [sys.executable, "-m", "bench.aggregation_process", "edge", str(folder / "edge")]
    with ExitStack() as stack:
        edge = stack.enter_context(running([*command, str(clients), str(size), str(TENSORS)], log, env))

        def printed() -> list[str]:
            if edge.poll() not in (None, 0):
                raise RuntimeError(f"the edge ended: {log.read_text()[-2000:]}")
            return [line for line in log.read_text().splitlines() if line[:1] in "{0123456789"]

        wait_until(printed, 60, "the edge")
        address = f"127.0.0.1:{printed()[0]}"
        for number, first in enumerate(range(0, clients, CLIENTS_PER_PROCESS)):
            state = folder / f"clients{number}"
            command_line = [
                sys.executable,
                "-m",
                "bench.buffer_clients",
                str(state),
                str(min(CLIENTS_PER_PROCESS, clients - first)),
                address,
            ]
            stack.enter_context(running(command_line, folder / f"clients{number}.log", env))
        wait_until(lambda: len(printed()) == 2, 900, "the round")
        found: dict[str, float] = json.loads(printed()[1])
        return found


def measure_fedavg(folder: Path, clients: int, size: int) -> dict[str, float]:
    """Aggregate replies with FedAvg in a process of its own, which creates them; return its measurements."""
    command = [
        sys.executable,
        "-m",
        "bench.aggregation_process",
        "fedavg",
        str(clients),
        str(size),
        str(TENSORS),
    ]
    env = environment(folder, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bandwidths(size: int, repeats: int) -> dict[str, float]:
    """Measure memory bandwidths in bytes per second: of copies by all cores, and of the add step."""
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
    # A copy reads and writes each value; a sum reads two values and writes one.
    return {"copy": 2 * size / found["copy"], "add": 3 * size / found["add"]}


def _alternately(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return each action's median seconds, with the actions timed alternately."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(tiny: bool) -> Outcome:
    """Measure an edge with increasing numbers of clients, FedAvg with few, and the add step."""
    size, client_counts, stock, repeats = (
        (4_000_000, (2, 4), (2,), 3) if tiny else (MODEL, (4, 16, 64), (4, 8), 15)
    )
    outcome = Outcome()
    found: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="aggregate-") as name:
        folder = Path(name)
        for clients in client_counts:
            found["edge", clients] = measure_edge(folder / f"edge-{clients}", clients, size)
        for clients in stock:
            found["FedAvg", clients] = measure_fedavg(folder, clients, size)
    for (kind, clients), measured in found.items():
        row: Row = {
            "by": kind,
            "updates": clients,
            "bytes": size,
            "idle_mb": measured["idle"] / 1e6,
            "peak_mb": measured["peak"] / 1e6,
            "peak_models": measured["peak"] / size,
            "above_idle_models": (measured["peak"] - measured["idle"]) / size,
            "seconds": measured["seconds"],
            "cpu_s": measured["cpu_s"],
        }
        outcome.rows.append(row)
    speeds = bandwidths(size, repeats)
    for kind, speed in speeds.items():
        outcome.rows.append({"by": f"{kind}, {speed / 1e9:.3g} GB/s", "bytes": size})
    most = max(found["edge", clients]["peak"] for clients in client_counts) / size
    outcome.targets = [
        Target.at_most(
            f"peak memory of the edge's process, {client_counts[0]} to {client_counts[-1]} updates, models",
            most,
            4.0,
        ),
        Target.at_least("add step, share of the copy's bandwidth", speeds["add"] / speeds["copy"], 0.6),
    ]
    outcome.notes = [
        "peak_models covers the whole process with interpreter and libraries (idle_mb); at the edge, the idle memory "
        "includes the cloud's payload",
        "seconds of the edge: the whole round over the links; of FedAvg: aggregate_train alone, with the replies in "
        "memory",
        "the add step reads two values and writes one (12 bytes), the copy reads and writes one, on all cores",
    ]
    outcome.plots["aggregate"] = lambda figure: _draw(figure, found, size)
    return outcome


def _draw(figure: Figure, found: dict[tuple[str, int], dict[str, float]], size: int) -> None:
    axes: Any = figure.subplots()
    for kind in ("edge", "FedAvg"):
        points = [
            (clients, measured["peak"] / size) for (by, clients), measured in found.items() if by == kind
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.axhline(4, color="gray", linestyle=":")
    axes.set_xlabel("updates")
    axes.set_ylabel("peak memory of the process, models")
    axes.legend()


if __name__ == "__main__":
    sys.exit(run("aggregate", measure, ABOUT))
