"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.security import Security

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


def security_of(roots: Path | None, certificate: Path | None, key: Path | None, insecure: bool) -> Security:
    """Return what the TLS options say."""
    from common.security import Security

    return Security(roots, certificate, key, insecure)
