"""Memory of clients in MB (RSS, PSS, USS), idle and training: one process per client against replicas in one.

The clients are those of `espalier demo` on digits. ``python -m bench.memory``.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.report import Outcome, Target, run
from bench.scale import MB, edge_processes
from bench.stock import SuperLink, app_bundle, environment, running, serverapp_grid, superlink, wait_until
from espalier.methods.run_config import RunConfig
from espalier.monitor.node_status import connected_upstreams
from espalier_edge.fleet.server import InlineFleet
from espalier_server.processes import espalier_command, espalier_env
from espalier_server.run import TreeRun
from espalier_server.superlink.grid import TreeGrid

ABOUT = "Memory of clients of the digits demonstration, idle and training: processes, and replicas in one"
SETTINGS = {"method": "fedphd", "rounds": 2, "rg": 1, "batch-size": 16, "prune-at": 1}
MANY = 20
INTERVAL = 0.5  # seconds between two samples of the memory of training processes


@dataclass(frozen=True)
class Memory:
    """Memory of processes in bytes: resident (shared pages count in each), proportional, and unique set size."""

    rss: int
    pss: int
    uss: int

    @classmethod
    def of(cls, processes: Sequence[psutil.Process]) -> Memory:
        """Return the current sum over processes."""
        found = [process.memory_full_info() for process in processes]
        return cls(*(sum(getattr(one, kind) for one in found) for kind in ("rss", "pss", "uss")))


class Peak:
    """Samples the memory of processes in a background thread and keeps the maximum of each kind."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.memory = Memory.of(processes)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(INTERVAL):
            with suppress(psutil.NoSuchProcess):
                now = Memory.of(self._processes)
                self.memory = Memory(
                    max(now.rss, self.memory.rss),
                    max(now.pss, self.memory.pss),
                    max(now.uss, self.memory.uss),
                )


@contextmanager
def clients(
    folder: Path, edge: str, count: int, *, replicas: bool, of: int
) -> Iterator[list[psutil.Process]]:
    """Run `count` clients, each with one of `of` shares of the digits; yield their processes once all are connected."""
    with ExitStack() as stack:
        processes, states = [], []
        for number in range(1 if replicas else count):
            state = folder / f"c{number}"
            command = espalier_command("client", "--name", f"c{number}", "--edge", edge, "--threads", "1")
            command += ["--data", f"digits:{number}/{of}", "--state", str(state), "--device", "cpu"]
            command += ["--replicas", str(count)] if replicas else []
            env = environment(folder / "home", **espalier_env(), OMP_NUM_THREADS="1")
            process = stack.enter_context(running(command, folder / f"c{number}.log", env))
            processes.append(psutil.Process(process.pid))
            states += [state / f"c0-{i:03d}" for i in range(count)] if replicas else [state]

        def connected() -> bool:
            for process in processes:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    raise RuntimeError(f"a client ended; see {folder}")
            with suppress(Exception):
                return all(connected_upstreams(state) for state in states)
            return False

        wait_until(connected, 300, "the clients")
        yield processes


def train(folder: Path, link: SuperLink, count: int) -> None:
    """Run two rounds with all clients, the second one after pruning."""
    config = RunConfig.from_flat({**SETTINGS, "run-id": "memory", "min-edges": 1, "min-clients": count})
    out = folder / "run"
    out.mkdir()
    with serverapp_grid(link, app_bundle("")) as grid:
        served = TreeRun(config, TreeGrid(grid), out, folder / "cloud")
        served.run()
    counts = [len(r.participants) for window in served.recorder.record.windows for r in window.rounds]
    if set(counts) != {count}:
        raise RuntimeError(f"not all clients took part: {counts} of {count}")


def idle_and_training(folder: Path, count: int, *, replicas: bool, of: int) -> tuple[Memory, Memory]:
    """Return the memory of `count` clients: idle with an edge, and the maximum during training."""
    with superlink(folder / "link") as link, edge_processes(folder, link.fleet, 1) as (_, [edge]):
        (folder / "clients").mkdir()
        with clients(folder / "clients", edge, count, replicas=replicas, of=of) as processes:
            idle = Memory.of(processes)
            with Peak(processes) as peak:
                train(folder, link, count)
            return idle, peak.memory


def idle_alone(folder: Path, count: int, of: int) -> Memory:
    """Return the memory of `count` idle replicas."""
    server = InlineFleet("127.0.0.1:0")
    server.start()
    try:
        with clients(folder, f"127.0.0.1:{server.port}", count, replicas=True, of=of) as processes:
            return Memory.of(processes)
    finally:
        server.stop(0.2)


def measure(tiny: bool) -> Outcome:
    """Measure processes, and replicas in two numbers, whose difference gives the cost of an additional one."""
    few, more, of = (1, 3, 8) if tiny else (1, 101, 200)
    outcome = Outcome()

    def note(kind: str, count: int, **states: Memory) -> None:
        for state, memory in states.items():
            rss, pss, uss = (size / MB for size in (memory.rss, memory.pss, memory.uss))
            each = {"rss_mb": rss, "pss_mb": pss, "uss_mb": uss, "pss_mb_per_client": pss / count}
            outcome.rows.append({"clients": count, "as": kind, "state": state, **each})

    peaks: dict[str, Memory] = {}
    if not tiny:
        for kind, count in (("processes", 1), ("processes", MANY), ("replicas", MANY)):
            with tempfile.TemporaryDirectory(prefix="memory-") as name:
                idle, peak = idle_and_training(Path(name), count, replicas=kind == "replicas", of=of)
            peaks[kind] = peak
            note(kind, count, idle=idle, training=peak)
    alone: dict[int, Memory] = {}
    for count in (few, more):
        with tempfile.TemporaryDirectory(prefix="memory-") as name:
            alone[count] = idle_alone(Path(name), count, of)
        note("replicas", count, idle=alone[count])
    further = (alone[more].uss - alone[few].uss) / (more - few) / MB
    outcome.targets = [Target.at_most("USS of a further idle replica, MB", further, 15.0)]
    if not tiny:
        top = peaks["processes"]
        outcome.targets += [
            Target.at_most(f"{MANY} client processes that train, PSS sum, GB", top.pss / 2**30, 8.0),
            Target.at_most(f"{MANY} client processes that train, RSS sum, GB", top.rss / 2**30, 8.0),
        ]
    outcome.notes = [
        "pages shared between processes count fully in each (rss), in equal parts (pss), or not at all (uss)",
        f"digits divided among {of} clients; the demonstration's network, batches of 16; training: the maximum of "
        f"samples taken every {INTERVAL:g} s",
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(run("memory", measure, ABOUT))
