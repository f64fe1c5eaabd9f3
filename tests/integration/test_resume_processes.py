"""Real processes killed with -9 in the middle of a reproducible run: it ends with the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench.local_tree import LocalClient, LocalTree
from bench.stock import running

from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.events import read_events
from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")

#: SCAFFOLD keeps state at clients and cloud; six windows of two rounds.
SETTINGS: dict[str, bool | int | float | str] = {
    "method": "scaffold",
    "model": "cnn",
    "reproducible": True,
    "rounds": 12,
    "rg": 2,
    "min-edges": 2,
    "min-clients": 2,
    "fraction": 0.6,
    "edge-choice": "random",
    "keep-checkpoints": 9,
}
DATA = "digits:{i}/8"


class Tree:
    """A cloud, two edges and two clients, as a user starts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet, self.control, *edges = (free_port() for _ in range(4))
        self.edges = {f"edge-{i + 1}": f"127.0.0.1:{port}" for i, port in enumerate(edges)}
        self.env = {
            **os.environ,
            **espalier_env(),
            "XDG_STATE_HOME": str(folder / "xdg"),
            "OMP_NUM_THREADS": "1",
        }
        self.stack = ExitStack()
        self.cloud = self.start_cloud("state")
        cloud = f"127.0.0.1:{self.fleet}"
        for name, address in self.edges.items():
            self.start(name, "edge", "--name", name, "--cloud", cloud, "--listen", address)
        links = [word for address in self.edges.values() for word in ("--edge", address)]
        for i in range(2):
            self.start(f"c{i}", "client", "--name", f"c{i}", "--data", DATA.format(i=i), *links)

    def start(self, name: str, *words: str) -> None:
        command = espalier_command(*words, "--state", str(self.folder / name))
        self.stack.enter_context(running(command, self.folder / f"{name}.log", self.env))

    def start_cloud(self, state: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"cloud-{state}.log"
        addresses = ("--listen", f"127.0.0.1:{self.fleet}", "--control", f"127.0.0.1:{self.control}")
        with log.open("wb") as output:
            cloud = subprocess.Popen(
                espalier_command("cloud", *addresses, "--state", str(self.folder / state)),
                cwd=ROOT,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: "is ready" in log.read_text(), 60, "the cloud")
        return cloud

    def run(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            espalier_command("run", *words),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_cloud(self) -> None:
        """Kill it and everything it started, at once."""
        family = [psutil.Process(self.cloud.pid), *psutil.Process(self.cloud.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        self.cloud.wait(30)
        psutil.wait_procs(family, 30)

    def close(self) -> None:
        if self.cloud.poll() is None:
            self.cloud.send_signal(signal.SIGTERM)
            self.cloud.wait(30)
        self.stack.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    live = Tree(tmp_path_factory.mktemp("resume"))
    try:
        yield live
    finally:
        live.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what the same run in this process makes, without links, kills or threads."""
    clients = [LocalClient(f"c{i}", DATA.format(i=i), (0, 1), {"homes": 2}) for i in range(2)]
    done = LocalTree(tmp_path_factory.mktemp("unbroken"), clients, 2).run("whole", SETTINGS)
    return checkpoint(done.out)


def checkpoint(out: Path) -> dict[str, bytes]:
    checkpoints = Checkpoints(out / "checkpoints", keep=9)
    window = checkpoints.latest()
    assert window == 6
    return {name: array.tobytes() for name, array in checkpoints.load(window)[0].items()}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "events.jsonl") if event["event"] == kind]


def words(name: str) -> list[str]:
    flat = {**SETTINGS, "run-id": name}
    return [word for key, value in flat.items() for word in ("-c", f"{key}={str(value).lower()}")]


def test_a_killed_serverapp_is_brought_back_and_costs_no_bit(tree: Tree, unbroken: dict[str, bytes]) -> None:
    out = tree.folder / "first"
    run = tree.run("--out", str(out), *words("first"))
    wait_until(lambda: len(events(out, "checkpoint")) >= 2, 240, "two windows")
    os.kill(events(out, "run")[0]["pid"], signal.SIGKILL)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    assert len(events(out, "run")) == 2
    assert events(out, "resumed")[0]["window"] >= 2
    assert checkpoint(out) == unbroken


def test_a_killed_cloud_is_replaced_and_its_run_resumed(tree: Tree, unbroken: dict[str, bytes]) -> None:
    out = tree.folder / "second"
    run = tree.run("--out", str(out), *words("second"))
    wait_until(lambda: events(out, "checkpoint"), 240, "a window")
    again = tree.run("--resume", str(out))
    said, _ = again.communicate(timeout=60)
    assert (again.returncode, "still running" in said) == (2, True), said
    tree.kill_cloud()
    assert "start it again" in run.communicate(timeout=60)[0]
    # Another cloud, which never heard of the run: its state was on the disk that broke.
    tree.cloud = tree.start_cloud("other")
    resumed = tree.run("--resume", str(out))
    said, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, said
    assert checkpoint(out) == unbroken
    finished = tree.run("--resume", str(out))
    assert "is finished: 12 of 12 rounds" in finished.communicate(timeout=60)[0]
