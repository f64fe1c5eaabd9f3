"""Start-up times in seconds: `espalier demo` to its first training step, `espalier client` to its connection.

Also the import time of each tier's service, against importing torch alone. ``python -m bench.start``.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.report import Outcome, Row, Target, run
from bench.stock import environment, running, wait_until
from espalier_edge.fleet.server import InlineFleet
from espalier_server.processes import espalier_command, espalier_env

ABOUT = "Start-up times: seconds from a command to its first useful step"
LIMIT_SECONDS = 300.0
TRAINED = re.compile(r"round 1: trained (\d+\.\d) s")
TIERS = {
    "espalier edge": "espalier_edge.service",
    "torch alone": "torch",
    "espalier client": "espalier_client.app",
}


def imports(module: str) -> float:
    """Return the seconds of a process that only imports a module."""
    began = time.perf_counter()
    env = {**os.environ, **espalier_env()}
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=env)
    return time.perf_counter() - began


def client(folder: Path) -> tuple[float, float]:
    """Return wall and processor seconds from `espalier client` until its edge lists it as connected."""
    server = InlineFleet("127.0.0.1:0")
    server.start()
    try:
        command = espalier_command("client", "--name", "c", "--edge", f"127.0.0.1:{server.port}")
        command += ["--data", "digits:0/4", "--state", str(folder / "state"), "--device", "cpu"]
        began = time.perf_counter()
        with running(command, folder / "log", environment(folder, **espalier_env())) as process:
            wait_until(server.nodes, LIMIT_SECONDS, "the client")
            seconds = time.perf_counter() - began
            return seconds, _processor_seconds(psutil.Process(process.pid))
    finally:
        server.stop(0.2)


def demo(folder: Path, clients: int) -> tuple[float, float]:
    """Return wall and processor seconds from `espalier demo` to its first training step.

    Clients log the end of their first training and its duration, in tenths of a second.
    """
    out = folder / "run"
    command = espalier_command("demo", "--clients", str(clients), "--out", str(out), "-c", "rounds=1")
    command += ["-c", "rg=1", "-c", "prune-at=1", "-c", "eval-samples=16", "-c", "sample-steps=1"]
    env = {**os.environ, **espalier_env(), "XDG_STATE_HOME": str(folder)}
    began = time.perf_counter()
    first: list[float] = []
    cpu = [0.0]
    with running(command, folder / "log", env) as process:
        tree = psutil.Process(process.pid)

        def trained() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"the demonstration ended: {(folder / 'log').read_text()[-800:]}")
            for log in (out / "processes").glob("client-*.log"):
                if found := TRAINED.search(log.read_text(encoding="utf-8", errors="replace")):
                    cpu[0] = _processor_seconds(tree)
                    first.append(time.perf_counter() - began - float(found[1]))
            return bool(first)

        wait_until(trained, LIMIT_SECONDS, "the first training")
    return min(first), cpu[0]


def _processor_seconds(tree: psutil.Process) -> float:
    """Return the processor seconds of a process tree, including children that have ended."""
    total = 0.0
    for process in (tree, *tree.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(tiny: bool) -> Outcome:
    """Time each start several times; the first client, which fills the file cache, is not counted."""
    outcome = Outcome()
    times = 1 if tiny else 3
    for name, module in list(TIERS.items())[: 1 if tiny else None]:
        outcome.rows.append(row(f"import for {name}", [imports(module) for _ in range(times)], []))
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder = Path(name)
        found = []
        for number in range(times + (not tiny)):
            (folder / str(number)).mkdir()
            found.append(client(folder / str(number)))
        found = found[not tiny :]
        outcome.rows.append(row("espalier client, connected", *_columns(found)))
        connected = statistics.median(wall for wall, _ in found)
        outcome.targets.append(Target.at_most("espalier client to connected, s", connected, 4.0))
        if not tiny:
            demos = []
            for number in range(2):
                (folder / f"demo{number}").mkdir()
                demos.append(demo(folder / f"demo{number}", 4))
            outcome.rows.append(row("espalier demo, first training step", *_columns(demos)))
            stepped = statistics.median(wall for wall, _ in demos)
            outcome.targets.append(Target.at_most("espalier demo to first training step, s", stepped, 25.0))
    outcome.notes = [
        "cpu_s: processor time of the processes until then; for the demonstration, until its first training ended",
    ]
    return outcome


def _columns(found: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [wall for wall, _ in found], [cpu for _, cpu in found]


def row(what: str, walls: Sequence[float], cpus: Sequence[float]) -> Row:
    """Return the row of a start."""
    return {
        "start": what,
        "times": len(walls),
        "median_s": statistics.median(walls),
        "min_s": min(walls),
        "max_s": max(walls),
        "cpu_s": statistics.median(cpus) if cpus else None,
    }


if __name__ == "__main__":
    sys.exit(run("start", measure, ABOUT))
