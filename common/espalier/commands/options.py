"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.errors import AddressError

if TYPE_CHECKING:
    from espalier.security.transport import Address, Security


class Format(StrEnum):
    """How a command answers, or a process logs."""

    TEXT = "text"
    JSON = "json"


Settings = Annotated[
    list[str] | None,
    typer.Option("-c", "--config", metavar="KEY=VALUE", help="A setting of the run; repeatable."),
]
StateFolder = Annotated[
    Path, typer.Option("--state", help="Folder of this process's own; one process at a time.")
]
Roots = Annotated[
    Path | None, typer.Option("--root-certificates", help="PEM file to check servers' certificates against.")
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", help="PEM file to show to those who connect.")
]
PrivateKey = Annotated[Path | None, typer.Option("--private-key", help="PEM file of the certificate's key.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow links without TLS beyond this machine.")]
NodeKey = Annotated[
    Path | None, typer.Option("--key", help="Private node key; one is made in --state otherwise.")
]
TrustOnFirstUse = Annotated[
    bool,
    typer.Option(
        "--trust-on-first-use",
        help="With TLS, too, let the first key that says a name have it; by default only registered keys connect.",
    ),
]

MetricsPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Answer Prometheus at this port; not at all without.")
]
MetricsHost = Annotated[str, typer.Option(help="Address of --metrics-port; plain HTTP.")]
LogFormat = Annotated[Format, typer.Option(help="text, or json: one object an event, on stderr.")]
ServerName = Annotated[
    str, typer.Option(help="Name the server's certificate must hold, if not the address's host.")
]


def start_process(
    log_format: Format, metrics_port: int | None = None, metrics_host: str = "127.0.0.1"
) -> Address | None:
    """Set up what every tier's process has: its log; return where it answers Prometheus, if it does."""
    from espalier.monitor.logs import configure
    from espalier.security.transport import Address, parse_address

    configure(log_format)
    if metrics_port is None:
        return None
    host = f"[{metrics_host}]" if ":" in metrics_host else metrics_host
    try:
        return Address(*parse_address(f"{host}:{metrics_port}"))
    except AddressError as error:
        raise AddressError(f"--metrics-host: {error}") from error


def security_of(
    roots: Path | None,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
    trust_on_first_use: bool = False,
) -> Security:
    """Return what the TLS options say."""
    from espalier.security.transport import Security

    return Security(roots, certificate, key, insecure, trust_on_first_use)
