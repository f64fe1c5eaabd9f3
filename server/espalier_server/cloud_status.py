"""Status snapshots of the cloud: the newest run from its event log, the edges from the SuperLink."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from espalier import distribution
from espalier.errors import AddressError, EspalierError
from espalier.monitor.service import MonitorServer
from espalier.security.keys import EDGE_KEYS, KeyRegistry
from espalier.security.name_registry import EDGE_NAMES, NameRegistry
from espalier.security.transport import Security
from espalier.storage.json_file import write_json
from espalier_proto import monitor_pb2 as mpb
from espalier_server.processes import process_alive
from espalier_server.records.events import EVENTS_FILE, read_from
from espalier_server.superlink import submission as runs
from espalier_server.superlink.clouds import Cloud
from espalier_server.superlink.control_api import Node, list_nodes
from espalier_server.tree_view import TreeView

log = logging.getLogger("espalier.cloud")

#: Default address of the monitoring server; if its port is in use, a free port is taken.
DEFAULT_ADDRESS = "127.0.0.1:9094"
#: File in the cloud's state folder that names the run that was started last.
RUN_FILE = "run.json"
#: Age in seconds at which the list of nodes is requested again, and how long a snapshot waits for it.
NODES_AGE, NODES_WAIT = 4.0, 1.0


def remember_run(state: Path, run: str, folder: Path) -> None:
    """Write the run that was started last, for status snapshots."""
    write_json(state / RUN_FILE, {"run": run, "folder": str(folder)})


class Nodes:
    """The SuperLink's nodes, requested in the background when a snapshot is requested."""

    def __init__(self, ask: Callable[[], list[Node]]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._asked, self._busy = -NODES_AGE, False
        self._answered = threading.Event()
        self._nodes: list[Node] | None = None

    def get(self) -> list[Node] | None:
        """Return the newest list of nodes, None if there is none; waits at most `NODES_WAIT` seconds for a new one."""
        with self._lock:
            if not self._busy and time.monotonic() - self._asked > NODES_AGE:
                self._busy, self._asked = True, time.monotonic()
                self._answered.clear()
                threading.Thread(target=self._refresh, name="nodes", daemon=True).start()
        self._answered.wait(NODES_WAIT)
        return self._nodes

    def _refresh(self) -> None:
        try:
            self._nodes = self._ask()
        except AddressError as error:
            log.debug("%s", error)
            self._nodes = None
        finally:
            self._busy = False
            self._answered.set()


class CloudSource:
    """Creates status snapshots of the cloud.

    Parameters
    ----------
    name, listen : str
        Name of the cloud, and the address at which it serves edges.
    state : Path
        Its state folder.
    """

    def __init__(self, name: str, listen: str, state: Path) -> None:
        self.name, self.listen, self.state = name, listen, state
        self.started = time.time()
        self.cloud: Cloud | None = None
        self.ready = False
        self._lock = threading.Lock()
        self._view, self._folder, self._offset = TreeView(), Path(), 0
        self._nodes = Nodes(self._list_nodes)
        self._versions = distribution.versions("flwr")

    def __call__(self) -> mpb.TreeStatus:
        """Return a status snapshot of the tree."""
        nodes = self._nodes.get() if self.ready else None
        with self._lock:
            run = self._follow()
            status = self._view.status(time.time(), alive=process_alive(self._view.pid))
        status.cloud.CopyFrom(
            mpb.CloudStatus(
                name=self.name,
                versions=self._versions,
                started=self.started,
                superlink=self.ready,
                listen=self.listen,
                waiting=self._waiting(run),
            )
        )
        if nodes is not None:
            self._add_nodes(status, nodes)
        elif not self.ready:
            for edge in status.edges:
                edge.connected = False
        return status

    def _follow(self) -> str:
        """Read the events of the newest run since the last snapshot; return its id."""
        try:
            newest = json.loads((self.state / RUN_FILE).read_text(encoding="utf-8"))
            run, folder = str(newest["run"]), Path(newest["folder"])
        except (OSError, ValueError, TypeError, KeyError):
            return ""  # no run has started yet
        if folder != self._folder or run != self._view.run.run:
            self._view, self._folder, self._offset = TreeView(), folder, 0
            self._view.folder = str(folder)
        with contextlib.suppress(OSError):
            events, self._offset = read_from(folder / EVENTS_FILE, self._offset)
            for event in events:
                self._view.feed(event)
        return run

    def _waiting(self, started: str) -> list[str]:
        if self.cloud is None:
            return []
        return [s.run for s in runs.submissions(self.cloud) if s.run != started and not s.ended]

    def _list_nodes(self) -> list[Node]:
        if self.cloud is None:
            return []
        return list_nodes(self.cloud.control, self.cloud.root_certificates)

    def _add_nodes(self, status: mpb.TreeStatus, nodes: list[Node]) -> None:
        """Set which edges are connected according to the SuperLink, which also knows this between runs."""
        try:
            owners = (
                NameRegistry(self.state / EDGE_NAMES).owners() | KeyRegistry(self.state / EDGE_KEYS).owners()
            )
        except EspalierError as error:
            log.warning("%s", error)
            return
        found = {owners[n.public_key]: n for n in nodes if n.public_key in owners}
        for node in (n for n in nodes if n.online):
            if node.public_key in owners:
                found[owners[node.public_key]] = node
        for edge in status.edges:
            edge.connected = edge.name in found and found[edge.name].online
        known = {edge.name for edge in status.edges}
        for name in sorted(name for name, node in found.items() if node.online and name not in known):
            status.edges.add(name=name, connected=True)
        for edge in status.edges:
            if edge.name in found:
                edge.last_seen = max(edge.last_seen, found[edge.name].last_seen)


@contextlib.contextmanager
def monitored(source: CloudSource, address: str, security: Security) -> Iterator[MonitorServer | None]:
    """Serve a cloud's status snapshots within the context.

    Parameters
    ----------
    address : str
        HOST:PORT; "" for the default address, "none" for no monitoring server.
    security : Security
        The cloud's TLS files.

    Yields
    ------
    MonitorServer or None
        None for "none".

    Raises
    ------
    EspalierError
        The address cannot be bound, or requires TLS.
    """
    if address == "none":
        yield None
        return
    first = address or DEFAULT_ADDRESS
    with contextlib.ExitStack() as stack:
        server = MonitorServer(first, security.server_certificates(first), source, healthy=False)
        try:
            stack.enter_context(server)
        except AddressError:
            if address:
                raise
            certificates = security.server_certificates("127.0.0.1:0")
            server = stack.enter_context(MonitorServer("127.0.0.1:0", certificates, source, healthy=False))
        yield server
