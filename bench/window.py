"""Share of training in a window: processor seconds of training against those of all processes of a tree.

Measured with `espalier demo`: FedPhD on digits, two edges, four clients each. ``python -m bench.window``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench.report import Outcome, Target, run
from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.events import EVENTS_FILE, read_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Share of training in the processor time of windows: FedPhD on digits, 2 edges, 4 clients each"
CLIENTS = 8
#: Evaluation is not part of a window; measuring stops at the end of the last window.
SETTINGS = ["rounds=30", "rg=5", "eval-every=1000", "eval-samples=16", "sample-steps=1"]
TINY = ["rounds=2", "rg=1", "prune-at=1", "local-steps=2", *SETTINGS[2:]]
LIMIT_SECONDS = 900.0
TRAINING = "training"


@dataclass
class WindowEnd:
    """Processor seconds by tier since the start, at the end of a window, and those of training in the window."""

    window: int
    at: float
    by_tier: dict[str, float]
    training: float


def measure(tiny: bool) -> Outcome:
    """Run `espalier demo` and sample its processes at the end of each window."""
    ends = watch(TINY if tiny else SETTINGS, 2 if tiny else CLIENTS)
    first, last = ends[0], ends[-1]
    cpu_seconds = {tier: seconds - first.by_tier.get(tier, 0.0) for tier, seconds in last.by_tier.items()}
    training = sum(end.training for end in ends[1:])
    whole = sum(cpu_seconds.values())
    parts = {TRAINING: training, **cpu_seconds, "clients": cpu_seconds["clients"] - training}
    outcome = Outcome()
    outcome.rows = [
        {"part": part, "cpu_s": seconds, "share": seconds / whole} for part, seconds in parts.items()
    ]
    outcome.rows.append({"part": "all", "cpu_s": whole, "share": 1.0, "wall_s": last.at - first.at})
    outcome.targets = [Target.at_least("training's share of all processor time", training / whole, 0.85)]
    outcome.notes = [
        f"From the end of window {first.window} to the end of window {last.window}, including the time between "
        "windows, without evaluation. clients: work of their processes other than training. demo: the command that "
        "starts the tree and displays the run.",
    ]
    outcome.plots["window"] = lambda figure: draw(figure, parts)
    return outcome


def watch(settings: list[str], clients: int) -> list[WindowEnd]:
    """Run the demonstration to its end; return the processor time at the end of each window.

    Raises
    ------
    RuntimeError
        The demonstration failed (with the end of its log), or fewer than two windows were seen.
    """
    with tempfile.TemporaryDirectory(prefix="window-") as name:
        folder = Path(name)
        out, log = folder / "run", folder / "log"
        command = espalier_command("demo", "--clients", str(clients), "--edges", "2", "--out", str(out))
        command += [word for setting in settings for word in ("-c", setting)]
        # A registry of clouds of its own, so that clouds of this user's other runs do not interfere.
        env = {**os.environ, **espalier_env(), "XDG_STATE_HOME": name}
        found: list[WindowEnd] = []
        with log.open("wb") as stream:
            demo = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
            try:
                _sample(psutil.Process(demo.pid), out / EVENTS_FILE, found)
                demo.wait(60)
            finally:
                if demo.poll() is None:
                    demo.terminate()
                    demo.wait(60)
        if demo.returncode != 0 or len(found) < 2:
            raise RuntimeError(f"the demonstration failed: {log.read_text(encoding='utf-8')[-800:]}")
        return found


def _sample(demo: psutil.Process, events: Path, found: list[WindowEnd]) -> None:
    """Record the processor time of all processes whenever a window ends, until the run ends."""
    position, deadline = 0, time.monotonic() + LIMIT_SECONDS
    while demo.is_running() and demo.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        new, position = read_from(events, position)
        for event in new:
            if event["event"] == "window-end":
                clients: Mapping[str, Any] = event["clients"]
                trained = sum(float(c["total_cpu_seconds"]) for c in clients.values())
                found.append(WindowEnd(int(event["window"]), time.monotonic(), by_tier(demo), trained))
        time.sleep(0.02)


def by_tier(demo: psutil.Process) -> dict[str, float]:
    """Return the processor seconds of a demonstration's processes by tier; ended ones count in their parents."""
    cpu_seconds = {"cloud": 0.0, "edges": 0.0, "clients": 0.0, "demo": 0.0}
    for process in (demo, *demo.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            own = times.user + times.system
            ended = times.children_user + times.children_system
            cpu_seconds[_tier(process, demo)] += own + (ended if process != demo else 0.0)
    return cpu_seconds


def _tier(process: psutil.Process, demo: psutil.Process) -> str:
    if process == demo:
        return "demo"
    command = process.cmdline()
    return "edges" if "edge" in command else "clients" if "client" in command else "cloud"


def draw(figure: Figure, parts: Mapping[str, float]) -> None:
    """Draw the processor seconds of each part."""
    figure.set_size_inches(7, 1.9)
    axes = figure.subplots()
    left = 0.0
    for part, seconds in parts.items():
        axes.barh(["processor time"], [seconds], left=left, label=f"{part} {seconds:.1f} s")
        left += seconds
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")


if __name__ == "__main__":
    sys.exit(run("window", measure, ABOUT))
