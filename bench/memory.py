"""Measures the memory of clients, idle and training: processes of their own, and replicas in one process."""

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
LOOK = 0.5  # seconds between two looks at the memory of processes that train


@dataclass(frozen=True)
class Held:
    """Memory of processes, bytes: resident (shared pages counted in each), proportional, and their own."""

    rss: int
    pss: int
    uss: int

    @classmethod
    def of(cls, processes: Sequence[psutil.Process]) -> Held:
        """Add up what processes hold now."""
        found = [process.memory_full_info() for process in processes]
        return cls(*(sum(getattr(one, kind) for one in found) for kind in ("rss", "pss", "uss")))


class Peak:
    """Looks at processes again and again until it is left, and keeps the largest sum of each kind."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.held = Held.of(processes)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._left.wait(LOOK):
            with suppress(psutil.NoSuchProcess):
                now = Held.of(self._processes)
                self.held = Held(
                    max(now.rss, self.held.rss), max(now.pss, self.held.pss), max(now.uss, self.held.uss)
                )


@contextmanager
def clients(
    folder: Path, edge: str, count: int, *, replicas: bool, of: int
) -> Iterator[list[psutil.Process]]:
    """Run `count` clients with shares of `of`, in as many processes or in one; yield once all are connected."""
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
    """Run two rounds, one of them after pruning, in which every client trains."""
    config = RunConfig.from_flat({**SETTINGS, "run-id": "memory", "min-edges": 1, "min-clients": count})
    out = folder / "run"
    out.mkdir()
    with serverapp_grid(link, app_bundle("")) as grid:
        served = TreeRun(config, TreeGrid(grid), out, folder / "cloud")
        served.run()
    took = [len(r.participants) for window in served.recorder.record.windows for r in window.rounds]
    if set(took) != {count}:
        raise RuntimeError(f"not all clients took part: {took} of {count}")


def idle_and_training(folder: Path, count: int, *, replicas: bool, of: int) -> tuple[Held, Held]:
    """Return what `count` clients hold while idle below an edge, and at most while they train."""
    with superlink(folder / "link") as link, edge_processes(folder, link.fleet, 1) as (_, [edge]):
        (folder / "clients").mkdir()
        with clients(folder / "clients", edge, count, replicas=replicas, of=of) as processes:
            idle = Held.of(processes)
            with Peak(processes) as peak:
                train(folder, link, count)
            return idle, peak.held


def idle_alone(folder: Path, count: int, of: int) -> Held:
    """Return what `count` replicas hold while idle."""
    server = InlineFleet("127.0.0.1:0")
    server.start()
    try:
        with clients(folder, f"127.0.0.1:{server.port}", count, replicas=True, of=of) as processes:
            return Held.of(processes)
    finally:
        server.stop(0.2)


def measure(tiny: bool) -> Outcome:
    """Measure processes, and replicas of two numbers, whose difference is what further ones cost."""
    few, more, of = (1, 3, 8) if tiny else (1, 101, 200)
    outcome = Outcome()

    def note(kind: str, count: int, **states: Held) -> None:
        for state, held in states.items():
            rss, pss, uss = (size / MB for size in (held.rss, held.pss, held.uss))
            each = {"rss_mb": rss, "pss_mb": pss, "uss_mb": uss, "pss_mb_per_client": pss / count}
            outcome.rows.append({"clients": count, "as": kind, "state": state, **each})

    peaks: dict[str, Held] = {}
    if not tiny:
        for kind, count in (("processes", 1), ("processes", MANY), ("replicas", MANY)):
            with tempfile.TemporaryDirectory(prefix="memory-") as name:
                idle, peak = idle_and_training(Path(name), count, replicas=kind == "replicas", of=of)
            peaks[kind] = peak
            note(kind, count, idle=idle, training=peak)
    alone: dict[int, Held] = {}
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
        "rss counts pages that processes share once in each, pss in equal parts, uss not at all",
        f"digits dealt to {of} clients; FedPhD's demonstration network, batches of 16; training: the largest sum seen, "
        f"looked at every {LOOK:g} s",
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(run("memory", measure, ABOUT))
