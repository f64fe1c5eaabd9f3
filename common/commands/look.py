"""The commands that look on: health, status, top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.commands.options import Insecure, Roots, security_of
from common.errors import ConfigError, EspalierError

ServerName = Annotated[
    str, typer.Option(help="Name the server's certificate must hold, if not the address's host.")
]


def health(
    address: Annotated[
        str | None, typer.Argument(metavar="[HOST:PORT]", help="An edge, or a cloud's --monitor address.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="State folder of a client or edge: is it connected upwards?")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds the answer may take.")] = 5.0,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Tell whether a process is well, by the exit status: 0 or 1 (for a container's healthcheck)."""
    from common.monitor.health import check_health
    from common.monitor.node_status import connected_homes

    if (address is None) == (state is None):
        raise ConfigError("give either HOST:PORT or --state DIR")
    try:
        if address is not None:
            security = security_of(root_certificates, None, None, insecure)
            check_health(address, security, timeout=timeout, server_name=server_name)
            typer.echo(f"{address} is serving")
        elif state is not None:
            typer.echo(f"connected to {', '.join(connected_homes(state))}")
    except EspalierError as error:
        typer.echo(f"unhealthy: {error}", err=True)
        raise typer.Exit(1) from error
