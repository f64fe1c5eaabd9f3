"""A tree of real processes on loopback for integration tests: a stock SuperLink, edges and clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.stock import (
    SuperLink,
    app_bundle,
    environment,
    running,
    serverapp_grid,
    superlink,
    wait_until,
)

from espalier.methods.run_config import RunConfig
from espalier_server.records.snapshot import Snapshot
from espalier_server.run import TreeRun
from espalier_server.superlink.grid import TreeGrid
from tests.support.paths import ROOT


def espalier(*arguments: str) -> list[str]:
    """Return the command line of one of our processes."""
    return [sys.executable, "-m", "espalier.cli", *arguments]


def process_environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of our processes: one thread each, the checkout importable."""
    path = [more.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    more["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return environment(folder / "flwr", OMP_NUM_THREADS="1", **more)


@dataclass
class LiveTree:
    """A running tree.

    Attributes
    ----------
    link : SuperLink
        The cloud.
    folder : Path
        Logs and states.
    edges : dict[str, str]
        Address of each edge by name.
    processes : list of Popen
        Edges and clients that were started.
    """

    link: SuperLink
    folder: Path
    edges: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def terminate(self) -> None:
        """Ask every process of the tree to end, so that they do so at the same time."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def log(self, name: str) -> str:
        """Return what a process printed."""
        return (self.folder / f"{name}.log").read_text()

    def run(self, name: str, **settings: bool | int | float | str) -> TreeRun:
        """Run the cloud's part in this process, start to end; keyword underscores are dashes."""
        return self.run_flat(name, {key.replace("_", "-"): value for key, value in settings.items()})

    def run_flat(
        self,
        name: str,
        flat: Mapping[str, bool | int | float | str],
        between: Callable[[TreeRun], None] | None = None,
    ) -> TreeRun:
        """Run as above by flat keys; `between` is called after each window, its checkpoint written."""
        config = RunConfig.from_flat({"run-id": name, **flat})
        out = self.folder / "runs" / name
        out.mkdir(parents=True, exist_ok=True)
        with serverapp_grid(self.link, app_bundle("")) as grid:
            run = TreeRun(config, TreeGrid(grid), out, self.folder / "cloud")
            if between is not None:
                call_between(run, between)
            run.run()
        return run


def call_between(run: TreeRun, action: Callable[[TreeRun], None]) -> None:
    """Have something done after each window of a run."""
    write = run.recorder.checkpoint

    def checkpoint(snapshot: Snapshot) -> None:
        write(snapshot)
        action(run)

    run.recorder.checkpoint = checkpoint  # type: ignore[method-assign]


@contextmanager
def start_edge(tree: LiveTree, name: str, *more: str) -> Iterator[str]:
    """Run an edge process; yields its address."""
    state = tree.folder / name
    state.mkdir(parents=True, exist_ok=True)
    address = state / "address"
    address.unlink(missing_ok=True)
    listen = tree.edges.get(name, "127.0.0.1:0")
    command = espalier(
        "edge", "--name", name, "--cloud", tree.link.fleet, "--listen", listen, "--state", str(state)
    )
    command += more
    with running(command, tree.folder / f"{name}.log", process_environment(tree.folder)) as process:
        tree.processes.append(process)

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended: {tree.log(name)[-2000:]}")
            return address.exists() and address.read_text().endswith("\n")

        wait_until(ready, 60, name)
        tree.edges[name] = address.read_text().strip()
        yield tree.edges[name]


@contextmanager
def start_client(
    tree: LiveTree, name: str, data: str, edges: Sequence[str], *more: str, **env: str
) -> Iterator[int]:
    """Run a client process towards the named edges; yields its process id."""
    command = espalier("client", "--name", name, "--state", str(tree.folder / name), "--threads", "1")
    command += ["--data", data] if data else []
    for edge in edges:
        command += ["--edge", tree.edges[edge]]
    with running(
        command + list(more), tree.folder / f"{name}.log", process_environment(tree.folder, **env)
    ) as process:
        tree.processes.append(process)
        yield process.pid


@contextmanager
def live_tree(
    folder: Path,
    *,
    edges: int = 2,
    clients: int = 4,
    data: str = "digits:{i}/16",
    levels: Sequence[float] = (),
    more: Sequence[str] = (),
) -> Iterator[LiveTree]:
    """Run a cloud, edges `edge-1`… and clients `c0`… that reach all edges, each with its part of the data.

    Where `levels` are given, the first clients are configured with them. `more` holds addresses of other servers that
    the clients connect to as well.
    """
    with ExitStack() as stack:
        tree = LiveTree(stack.enter_context(superlink(folder / "link")), folder)
        for number in range(1, edges + 1):
            stack.enter_context(start_edge(tree, f"edge-{number}"))
        names = [f"c{i}" for i in range(clients)]
        for i, name in enumerate(names):
            options = ["--level", str(levels[i])] if i < len(levels) else []
            options += [word for address in more for word in ("--edge", address)]
            stack.enter_context(start_client(tree, name, data.format(i=i), list(tree.edges), *options))
        servers = edges + len(more)
        wait_until(
            lambda: all(tree.log(n).count("connected to") >= servers for n in names), 90, "the clients"
        )
        stack.callback(tree.terminate)
        yield tree
