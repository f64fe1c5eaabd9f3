"""The command `espalier edge`."""

from __future__ import annotations

from typing import Annotated

import typer

from espalier.commands.options import (
    Certificate,
    Format,
    Insecure,
    LogFormat,
    MetricsHost,
    MetricsPort,
    NodeKey,
    PrivateKey,
    Roots,
    StateFolder,
    TrustOnFirstUse,
    security_of,
    start_process,
)


def edge(
    name: Annotated[str, typer.Option(help="Name of the edge.")],
    cloud: Annotated[str, typer.Option(help="HOST:PORT of the cloud.")],
    state: StateFolder,
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = "127.0.0.1:9093",
    key: NodeKey = None,
    root_certificates: Roots = None,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    insecure: Insecure = False,
    monitor: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Serve the status of this edge and its clients.")
    ] = "",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    log_format: LogFormat = Format.TEXT,
    trust_on_first_use: TrustOnFirstUse = False,
) -> None:
    """Run an edge until it is interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    from espalier.environment import check_libraries
    from espalier.names import check_name
    from espalier.security.certificates import check_served
    from espalier.security.transport import parse_address

    check_libraries()
    check_name(name, "--name")
    parse_address(cloud)
    security = security_of(root_certificates, certificate, private_key, insecure, trust_on_first_use)
    check_served(security, listen)
    security.client_roots(cloud)

    from espalier_edge.service import run_edge

    run_edge(name, cloud, listen, state, key, security, monitor=monitor, metrics=metrics)
