"""Soak: hundreds of short windows with random kills and dropped stragglers; memory of each process, lost windows.

`python -m tests.chaos.soak --windows 200 [--seed 1] [--out FILE]` prints one JSON object, as the benches do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from espalier_server.records.events import EVENTS_FILE, read_from
from espalier_server.records.record import RunRecord
from tests.chaos.cluster import Cluster, ended

SETTINGS: dict[str, bool | int | float | str] = {
    "method": "scaffold",
    "model": "logistic",
    "rg": 1,
    "local-steps": 5,
    "min-edges": 1,
    "min-clients": 2,
    "round-deadline": 2.0,
    "window-deadline": 6.0,
    "hello-timeout": 120.0,
}
#: Windows in which a fresh process still fills its caches, and how many make a measure.
WARM, SPAN = 15, 10
#: A process is judged by its memory if it lived through so many windows at a stretch.
LONG = 60
FLAT = 5.0


@dataclass
class Life:
    """A process from its start to its end: resident memory in MiB after each window."""

    name: str
    pid: int
    windows: list[int] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)

    def growth(self, first: int) -> tuple[float, float] | None:
        """Return memory after warming up, from window `first` on, and its growth in percent; None if short."""
        begin = max(WARM, sum(w < first for w in self.windows))
        held = self.rss[begin:]
        if len(held) < LONG:
            return None
        before, after = statistics.median(held[:SPAN]), statistics.median(held[-SPAN:])
        return before, 100.0 * (after / before - 1.0)


class Soak:
    """One long run and the faults injected into it."""

    def __init__(self, cluster: Cluster, windows: int, seed: int) -> None:
        self.cluster, self.windows = cluster, windows
        self.out = cluster.folder / "runs" / f"soak-{seed}"
        self.lives: dict[tuple[str, int], Life] = {}
        self.done: dict[str, int] = {}
        self._timers: list[threading.Timer] = []
        self._plan = self._draw(random.Random(f"soak {seed}"))

    def _draw(self, rng: random.Random) -> dict[int, list[tuple[str, str]]]:
        """Draw the processes to kill or pause after each window.

        Cloud processes and the first edge are killed in the first quarter only, so that each tier has a process
        that lives through the windows that are judged; the others are killed all along.
        """
        plan: dict[int, list[tuple[str, str]]] = {}

        def at(window: int, action: str, name: str) -> None:
            plan.setdefault(max(1, window), []).append((action, name))

        quarter = self.windows // 4
        at(rng.randint(3, quarter // 2), "kill", "serverapp")
        at(rng.randint(quarter // 2 + 1, quarter), "kill", "superlink")
        at(rng.randint(3, quarter), "kill", self.cluster.edges[0])
        for window in range(5, self.windows - 3, 9):
            at(window + rng.randint(0, 4), "pause", rng.choice(self.cluster.clients))
        for window in range(8, self.windows - 5, 22):
            at(window + rng.randint(0, 12), "kill", rng.choice(self.cluster.clients[:2]))
            if rng.random() < 0.5:
                at(window + rng.randint(0, 12), "kill", self.cluster.edges[1])
        return plan

    def run(self, timeout: float) -> None:
        """Run to the end."""
        self.cluster.submit(self.out, {**SETTINGS, "rounds": self.windows})
        offset, seen = 0, 0
        end = time.monotonic() + timeout
        while ended(self.out) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"the run is at window {seen} after {timeout:g} s")
            events, offset = read_from(self.out / EVENTS_FILE, offset)
            for event in events:
                if event["event"] == "window-end" and event["window"] > seen:
                    seen = event["window"]
                    self._measure(seen)
                    for action, name in self._plan.get(seen, []):
                        self._do(action, name)
            time.sleep(0.02)
        for timer in self._timers:
            timer.join()

    def _measure(self, window: int) -> None:
        for name in ["superlink", "serverapp", *self.cluster.processes]:
            for pid in self.cluster.pids(name, self.out):
                try:
                    rss = psutil.Process(pid).memory_info().rss / 2**20
                except psutil.Error:
                    continue
                life = self.lives.setdefault((name, pid), Life(name, pid))
                life.windows.append(window)
                life.rss.append(rss)

    def _do(self, action: str, name: str) -> None:
        key = f"{action} {name.rstrip('0123456789-')}"
        self.done[key] = self.done.get(key, 0) + 1
        again: Callable[[], None] = self.cluster.go_on
        if action == "kill":
            self.cluster.kill(name, self.out)
            if name in self.cluster.processes:
                again = partial(self.cluster.start, name)
        else:
            self.cluster.pause(name, self.out)
        timer = threading.Timer(1.0 if action == "kill" else 3.0, again)
        timer.start()
        self._timers.append(timer)


def report(soak: Soak, seconds: float, left: list[str]) -> dict[str, Any]:
    """Return rows and targets."""
    record = RunRecord.read(soak.out)
    first = soak.windows - min(150, 3 * soak.windows // 4) + 1
    rows: list[dict[str, Any]] = [
        {
            "process": life.name,
            "windows": len(life.rss),
            "MiB": round(found[0], 1),
            "growth %": round(found[1], 2),
        }
        for life in soak.lives.values()
        if (found := life.growth(first)) is not None
    ]
    numbers = [w.window for w in record.windows]
    empty = [w.window for w in record.windows if not any(r.participants for r in w.rounds)]
    worst = max((row["growth %"] for row in rows), default=float("nan"))
    lost = len(set(range(1, soak.windows + 1)) - set(numbers)) + len(empty)
    return {
        "bench": "soak",
        "status": record.status,
        "seconds": round(seconds, 1),
        "seconds a window (median)": round(
            statistics.median(w.timings.get("train", 0.0) for w in record.windows), 3
        ),
        "done": soak.done,
        "faults": record.fault_counts,
        "empty windows": empty,
        "rows": rows,
        "targets": [
            {"name": "largest growth of a process, %", "value": worst, "limit": FLAT, "holds": worst <= FLAT},
            {"name": "lost windows", "value": lost, "limit": 0, "holds": lost == 0},
            {"name": "processes left over", "value": len(left), "limit": 0, "holds": not left},
        ],
    }


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--out", type=Path, help="write the JSON and every measure here, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="espalier-soak-") as scratch:
        cluster = Cluster(Path(scratch))
        try:
            soak = Soak(cluster, arguments.windows, arguments.seed)
            began = time.monotonic()
            soak.run(arguments.timeout)
            seconds = time.monotonic() - began
        finally:
            left = cluster.close()
        found = report(soak, seconds, left)
        print(json.dumps(found, indent=1))
        if arguments.out:
            lives = [life.__dict__ for life in soak.lives.values()]
            arguments.out.write_text(json.dumps({**found, "lives": lives}, indent=1))


if __name__ == "__main__":
    main()
