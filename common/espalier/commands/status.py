"""The commands that look on: health, status, top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.commands.options import Format, Insecure, Roots, security_of
from espalier.errors import ConfigError, EspalierError

if TYPE_CHECKING:
    from espalier.security.transport import Security

ServerName = Annotated[
    str, typer.Option(help="Name the server's certificate must hold, if not the address's host.")
]

CloudName = Annotated[str, typer.Option("--cloud", help="Name of a cloud on this machine.")]
MonitorAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Its --monitor address, where it runs elsewhere.")
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


def status(
    cloud: CloudName = "default",
    address: MonitorAddress = None,
    output: Annotated[Format, typer.Option("--format", help="text or json.")] = Format.TEXT,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show the tree once. Exit status: 0 a run goes on, 3 none does, 1 something is wrong, 4 nobody answers."""
    from rich.console import Console

    from espalier.monitor.ask import as_dict, ask_status
    from espalier.monitor.text import exit_status, render, troubles

    where, security = _place(cloud, address, root_certificates, insecure)
    found = ask_status(where, security, server_name=server_name)
    if output is Format.JSON:
        typer.echo(json.dumps({**as_dict(found), "troubles": troubles(found)}, indent=1))
    else:
        Console().print(render(found))
    raise typer.Exit(exit_status(found))


def top(
    cloud: CloudName = "default",
    address: MonitorAddress = None,
    interval: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between two looks.")] = 1.0,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Watch the tree live, until q or Ctrl-C."""
    from espalier.monitor.top import run_top

    where, security = _place(cloud, address, root_certificates, insecure)
    run_top(where, security, interval, server_name=server_name)


def _place(cloud: str, address: str | None, roots: Path | None, insecure: bool) -> tuple[str, Security]:
    """Return where to look, and how to connect."""
    from espalier.monitor.ask import monitor_of

    if address is None:
        return monitor_of(cloud)
    return address, security_of(roots, None, None, insecure)
