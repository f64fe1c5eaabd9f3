"""What the cloud tells those who look on: its newest run by the event log, its edges by the SuperLink."""

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

#: Where the live view is without `--monitor`; a free port if another process has this one.
DEFAULT_ADDRESS = "127.0.0.1:9094"
#: In the cloud's state: which run its ServerApp began last.
RUN_FILE = "run.json"
#: Seconds after which the SuperLink is asked again for its nodes, and that a snapshot waits for it.
NODES_AGE, NODES_WAIT = 4.0, 1.0


def remember_run(state: Path, run: str, folder: Path) -> None:
    """Note which run began last, for those who look on."""
    write_json(state / RUN_FILE, {"run": run, "folder": str(folder)})


class Nodes:
    """The SuperLink's nodes, asked for in the background and only while somebody looks on."""

    def __init__(self, ask: Callable[[], list[Node]]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._asked, self._busy = -NODES_AGE, False
        self._answered = threading.Event()
        self._nodes: list[Node] | None = None

    def get(self) -> list[Node] | None:
        """Return the newest answer; None while there is none. A SuperLink that hangs is not waited for."""
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
    """Makes the cloud's snapshots.

    Parameters
    ----------
    name, listen : str
        What the cloud is called, and where it serves edges.
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
        """Return the tree as it is now."""
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
        """Read what the newest run wrote since the last look; return its id."""
        try:
            newest = json.loads((self.state / RUN_FILE).read_text(encoding="utf-8"))
            run, folder = str(newest["run"]), Path(newest["folder"])
        except (OSError, ValueError, TypeError, KeyError):
            return ""  # no run has begun yet
        if folder != self._folder or run != self._view.run.run:
            self._view, self._folder, self._offset = TreeView(), folder, 0
            self._view.folder = str(folder)
        with contextlib.suppress(OSError):
            events, self._offset = read_from(folder / EVENTS_FILE, self._offset)
            for event in events:
                self._view.feed(event)
        return run

    def _waiting(self, begun: str) -> list[str]:
        if self.cloud is None:
            return []
        return [s.run for s in runs.submissions(self.cloud) if s.run != begun and not s.ended]

    def _list_nodes(self) -> list[Node]:
        if self.cloud is None:
            return []
        return list_nodes(self.cloud.control, self.cloud.root_certificates)

    def _add_nodes(self, status: mpb.TreeStatus, nodes: list[Node]) -> None:
        """Enter which edges are connected, which the SuperLink knows best and also between runs."""
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
    """Serve a cloud's live view while the context lasts.

    Parameters
    ----------
    address : str
        HOST:PORT; "" for the default one, "none" for no live view.
    security : Security
        TLS files, the cloud's own.

    Yields
    ------
    MonitorServer or None
        None for "none".

    Raises
    ------
    EspalierError
        The address cannot be served, or not without TLS.
    """
    if address == "none":
        yield None
        return
    first = address or DEFAULT_ADDRESS
    with contextlib.ExitStack() as stack:
        server = MonitorServer(first, security.server_certificates(first), source, well=False)
        try:
            stack.enter_context(server)
        except AddressError:
            if address:
                raise
            certificates = security.server_certificates("127.0.0.1:0")
            server = stack.enter_context(MonitorServer("127.0.0.1:0", certificates, source, well=False))
        yield server
