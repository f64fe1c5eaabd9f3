"""``espalier status`` and ``espalier top``: the state of a tree, once or continuously."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.commands.options import Format, Insecure, Roots, ServerName, security_of

if TYPE_CHECKING:
    from espalier.security.transport import Security

CloudName = Annotated[str, typer.Option("--cloud", help="Name of a cloud on this machine.")]
MonitorAddress = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Its --monitor address, if it runs on another machine."),
]


def status(
    cloud: CloudName = "default",
    address: MonitorAddress = None,
    output: Annotated[Format, typer.Option("--format", help="text or json.")] = Format.TEXT,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show the tree once. Exit status: 0 a run is active, 3 none is, 1 something is wrong, 4 no answer."""
    from rich.console import Console

    from espalier_server.commands.status_client import as_dict, ask_status
    from espalier_server.commands.status_text import exit_status, render, troubles

    where, security = _target(cloud, address, root_certificates, insecure)
    found = ask_status(where, security, server_name=server_name)
    if output is Format.JSON:
        typer.echo(json.dumps({**as_dict(found), "troubles": troubles(found)}, indent=1))
    else:
        Console().print(render(found))
    raise typer.Exit(exit_status(found))


def top(
    cloud: CloudName = "default",
    address: MonitorAddress = None,
    interval: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between updates.")] = 1.0,
    server_name: ServerName = "",
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show the status of the tree live, until q or Ctrl-C."""
    from espalier_server.commands.top import run_top

    where, security = _target(cloud, address, root_certificates, insecure)
    run_top(where, security, interval, server_name=server_name)


def _target(cloud: str, address: str | None, roots: Path | None, insecure: bool) -> tuple[str, Security]:
    """Return the address to ask, and how to connect."""
    from espalier_server.commands.status_client import monitor_of

    if address is None:
        return monitor_of(cloud)
    return address, security_of(roots, None, None, insecure)
