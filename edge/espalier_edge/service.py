"""The edge process: an inline Fleet server for its clients, and a resident node as its uplink to the cloud."""

from __future__ import annotations

import logging
from pathlib import Path

from espalier.errors import ConfigError
from espalier.flower.resident import Fab, ResidentNode, Upstream
from espalier.monitor.node_log import event_logger
from espalier.monitor.node_status import NodeStatus
from espalier.names import is_name
from espalier.processes.signals import stop_on_signals
from espalier.security.keys import CLIENT_KEYS, KeyRegistry
from espalier.security.refusals import Refusals
from espalier.security.transport import Address, Security
from espalier_edge.app import SIDE_TYPES, EdgeApp
from espalier_edge.edge_status import EdgeSource, monitored
from espalier_edge.fleet.server import InlineFleet
from espalier_edge.key_admission import KeyAdmission

log = logging.getLogger("espalier.edge")


def run_edge(
    name: str,
    cloud: str,
    listen: str,
    state: Path,
    key: Path | None,
    security: Security,
    *,
    monitor: str = "",
    metrics: Address | None = None,
) -> None:
    """Run an edge until SIGTERM or Ctrl-C.

    Parameters
    ----------
    name : str
        The edge's name.
    cloud : str
        HOST:PORT of the cloud's Fleet API.
    listen : str
        HOST:PORT to serve clients at; port 0 selects a free one, which is written to `state`/address.
    state : Path
        Folder for the node key and the client names; locked by one process at a time.
    key : Path or None
        Private node key; by default one below `state`.
    security : Security
        Certificates of both links. With a server certificate the edge admits only clients registered in
        `state`/clients.json.
    monitor : str
        HOST:PORT of the monitoring API of this edge; "": none.
    metrics : Address, optional
        Address to serve Prometheus metrics at.

    Raises
    ------
    EspalierError
        If the name is invalid, the state folder is in use, or an address cannot be served.
    """
    if not is_name(name):
        raise ConfigError(f"--name {name!r} is not a valid edge name; use letters, digits, '.', '-', '_'")
    roots = security.client_roots(cloud)
    upstream = Upstream(cloud, root_certificates=roots, insecure=roots is None)
    registry = KeyRegistry(state / CLIENT_KEYS) if security.keys_only else None
    fleet = InlineFleet(
        listen,
        certificates=security.server_certificates(listen),
        require_keys=registry is not None,
        on_refused=Refusals(registry, "espalier clients add", log) if registry else None,
    )
    admission = KeyAdmission(fleet, registry) if registry else None

    class Cloud:
        """Requests of the edge app to the cloud, over the uplink."""

        def fetch_fab(self, run_id: int) -> Fab | None:
            return node.fetch_fab(upstream, run_id)

        def run_is_over(self, run_id: int) -> bool:
            return node.run_is_over(upstream, run_id)

    app = EdgeApp(name, fleet, state, Cloud(), registry)
    public = (key or state / "node.key").with_suffix(".pub")
    admit = f"espalier edges add {name} {public} --state DIR"
    status = NodeStatus(state, [cloud], event_logger(log, admit))
    node = ResidentNode(
        app,
        [upstream],
        state,
        node_config={"name": name},
        key=key,
        side_types=SIDE_TYPES,
        on_event=status,
    )
    if admission is not None:
        admission.start()
    fleet.start()
    host = listen.rpartition(":")[0]
    (state / "address").write_text(f"{host}:{fleet.port}\n")
    log.info("edge %s serves clients at %s:%d, cloud %s", name, host, fleet.port, cloud)
    stop_on_signals(node.stop)
    try:
        source = EdgeSource(name, app.roster, lambda: app.progress, app.totals, status)
        with status, monitored(source, monitor, metrics, security):
            node.run()
    finally:
        if admission is not None:
            admission.stop()
        app.close()
        fleet.stop()
