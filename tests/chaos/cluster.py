"""A cluster of real processes with a proxy on every link, whose parts can be killed, paused and disconnected."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.events import EVENTS_FILE, FINAL, read_events
from espalier_server.superlink.clouds import CLOUD_FILE, Cloud
from espalier_server.superlink.submission import submit
from tests.chaos.proxy import Proxy
from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_until

MARK = "ESPALIER_CHAOS"


class Cluster:
    """A cloud, edges and clients as a service manager runs them, with restarts on request.

    Parameters
    ----------
    folder : Path
        States and logs.
    edges, clients : int
        Numbers of edges and clients; every client is connected to every edge.
    """

    def __init__(self, folder: Path, edges: int = 2, clients: int = 4) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.env = {
            **os.environ,
            **espalier_env(),
            "XDG_STATE_HOME": str(folder / "xdg"),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        self.edges = [f"edge-{i + 1}" for i in range(edges)]
        self.clients = [f"c{i}" for i in range(clients)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.paused: set[int] = set()
        ports = [free_port() for _ in range(2 + edges)]
        self._cloud_ports = ports[:2]
        self._edge_ports = dict(zip(self.edges, ports[2:], strict=True))
        self.up_links = {e: Proxy(f"127.0.0.1:{ports[0]}", i) for i, e in enumerate(self.edges)}
        self.links = {
            c: {e: Proxy(f"127.0.0.1:{p}", 100 + i) for e, p in self._edge_ports.items()}
            for i, c in enumerate(self.clients)
        }
        for name in ["cloud", *self.edges, *self.clients]:
            self.start(name)
        wait_until(lambda: "is ready" in self.log("cloud"), 90, "the cloud")

    # --- processes ---------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start a process, unless it runs."""
        if name in self.processes and self.processes[name].poll() is None:
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                espalier_command(*self._arguments(name)),
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _arguments(self, name: str) -> list[str]:
        state = ["--state", str(self.folder / "states" / name)]
        if name == "cloud":
            fleet, control = self._cloud_ports
            return ["cloud", f"--listen=127.0.0.1:{fleet}", f"--control=127.0.0.1:{control}", *state]
        if name in self.edges:
            listen = f"127.0.0.1:{self._edge_ports[name]}"
            return [
                "edge",
                "--name",
                name,
                "--cloud",
                self.up_links[name].address,
                "--listen",
                listen,
                *state,
            ]
        homes = [word for link in self.links[name].values() for word in ("--edge", link.address)]
        data = f"digits:{self.clients.index(name)}/16"
        return ["client", "--name", name, "--data", data, "--threads", "1", *homes, *state]

    def log(self, name: str) -> str:
        """Return what a process printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def pids(self, tier: str, out: Path) -> list[int]:
        """Return the processes of a tier: a name of an edge or client, "cloud", "superlink" or "serverapp"."""
        if tier == "serverapp":
            found = [int(e["pid"]) for e in read_events(out / EVENTS_FILE) if e["event"] == "run"][-1:]
            return [pid for pid in found if psutil.pid_exists(pid)]
        process = self.processes["cloud" if tier == "superlink" else tier]
        if process.poll() is not None:
            return []
        if tier != "superlink":
            return [process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                child.pid
                for child in psutil.Process(process.pid).children()
                if any("flower-superlink" in word for word in child.cmdline())
            ]
        return []

    def kill(self, tier: str, out: Path) -> bool:
        """Send SIGKILL; return whether there was a process to kill."""
        return self._signal(tier, out, signal.SIGKILL)

    def pause(self, tier: str, out: Path) -> bool:
        """Suspend a process (SIGSTOP) until :meth:`heal`."""
        self.paused.update(self.pids(tier, out))
        return self._signal(tier, out, signal.SIGSTOP)

    def _signal(self, tier: str, out: Path, number: signal.Signals) -> bool:
        pids = self.pids(tier, out)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number is signal.SIGKILL and tier in self.processes:
            self.processes[tier].wait(10)
        return bool(pids)

    def proxies(self, name: str) -> list[Proxy]:
        """Return the links of an edge to the cloud, or of a client to its edges."""
        return [self.up_links[name]] if name in self.up_links else list(self.links[name].values())

    def heal(self) -> None:
        """Resume paused processes, open all links, and restart processes that have ended."""
        self.go_on()
        for name in [*self.edges, *self.clients]:
            for proxy in self.proxies(name):
                if proxy.mode != "open":
                    proxy.set("open")
        for name in ["cloud", *self.edges, *self.clients]:
            self.start(name)

    def go_on(self) -> None:
        """Resume paused processes."""
        for pid in self.paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.paused.clear()

    # --- runs --------------------------------------------------------------------------------------

    def submit(self, out: Path, settings: Mapping[str, bool | int | float | str]) -> None:
        """Submit a run to the cloud."""
        path = self.folder / "states" / "cloud" / CLOUD_FILE
        cloud = Cloud(**json.loads(path.read_text()))
        submit(cloud, {"out": str(out), "run-id": out.name, **settings})

    # --- the end -----------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """Terminate all processes as a service manager would; return those that were left over."""
        self.go_on()
        for name in [*self.clients, *self.edges, "cloud"]:
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue
        left = self.left_over(10)
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for proxy in [p for name in [*self.edges, *self.clients] for p in self.proxies(name)]:
            proxy.close()
        return [f"{pid}: {words}" for pid, words in left]

    def left_over(self, patience: float) -> list[tuple[int, str]]:
        """Return the processes of this cluster that still live after some seconds."""
        end = time.monotonic() + patience
        while (left := self._marked()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def _marked(self) -> list[tuple[int, str]]:
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                held = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if wanted in held and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.pid, " ".join(process.cmdline())[:200]))
        return found


def ended(out: Path) -> dict[str, Any] | None:
    """Return a run's final event, None while it is running."""
    events = read_events(out / EVENTS_FILE)
    return next((event for event in reversed(events) if event["event"] in FINAL), None)
