"""Options that the commands of several tiers share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.errors import AddressError

if TYPE_CHECKING:
    from espalier.security.transport import Address, Security


class Format(StrEnum):
    """Format of a command's output or of a log."""

    TEXT = "text"
    JSON = "json"


Settings = Annotated[
    list[str] | None,
    typer.Option("-c", "--config", metavar="KEY=VALUE", help="A setting of the run; repeatable."),
]
StateFolder = Annotated[
    Path, typer.Option("--state", help="State folder of this process; one process at a time.")
]
Roots = Annotated[
    Path | None,
    typer.Option(
        "--root-certificates",
        help="PEM file of the authorities to verify servers with.",
    ),
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", help="PEM file of the certificate to present.")
]
PrivateKey = Annotated[
    Path | None, typer.Option("--private-key", help="PEM file of the certificate's private key.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow connections without TLS to and from other machines.")
]
NodeKey = Annotated[
    Path | None, typer.Option("--key", help="Private node key; by default one is generated in --state.")
]
TrustOnFirstUse = Annotated[
    bool,
    typer.Option(
        "--trust-on-first-use",
        help="With TLS, bind a name to the first key that uses it; by default only registered keys connect.",
    ),
]

MetricsPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port for Prometheus; without it no metrics are served.")
]
MetricsHost = Annotated[str, typer.Option(help="Address for --metrics-port; HTTP without TLS.")]
LogFormat = Annotated[Format, typer.Option(help="text, or json: one object per event, on stderr.")]
ServerName = Annotated[
    str, typer.Option(help="Name in the server's certificate, if it is not the host of the address.")
]


def start_process(
    log_format: Format, metrics_port: int | None = None, metrics_host: str = "127.0.0.1"
) -> Address | None:
    """Configure the log of a tier's process; return the address for Prometheus, None without one."""
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
    """Return the TLS options as one value."""
    from espalier.security.transport import Security

    return Security(roots, certificate, key, insecure, trust_on_first_use)
