"""``espalier health``: the health of a process, as an exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from espalier.commands.options import Insecure, Roots, ServerName, security_of
from espalier.errors import ConfigError, EspalierError


def health(
    address: Annotated[
        str | None, typer.Argument(metavar="[HOST:PORT]", help="An edge, or a cloud's --monitor address.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="State folder of a client or edge: is it connected to a server?")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Check the health of a process; exit status 0 or 1 (for a container's health check)."""
    from espalier.monitor.health import check_health
    from espalier.monitor.node_status import connected_upstreams

    if (address is None) == (state is None):
        raise ConfigError("give either HOST:PORT or --state DIR")
    try:
        if address is not None:
            security = security_of(root_certificates, None, None, insecure)
            check_health(address, security, timeout=timeout, server_name=server_name)
            typer.echo(f"{address} is serving")
        elif state is not None:
            typer.echo(f"connected to {', '.join(connected_upstreams(state))}")
    except EspalierError as error:
        typer.echo(f"unhealthy: {error}", err=True)
        raise typer.Exit(1) from error
