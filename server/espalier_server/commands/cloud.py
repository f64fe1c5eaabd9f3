"""The command `espalier cloud`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from espalier.commands.options import (
    Certificate,
    Format,
    Insecure,
    LogFormat,
    MetricsHost,
    MetricsPort,
    PrivateKey,
    Roots,
    StateFolder,
    TrustOnFirstUse,
    security_of,
    start_process,
)


def cloud(
    state: StateFolder,
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges.")] = "127.0.0.1:9092",
    control: Annotated[str, typer.Option(help="HOST:PORT for commands on this machine.")] = "127.0.0.1:8000",
    name: Annotated[str, typer.Option(help="Name for `espalier run --cloud`.")] = "default",
    expose_control: Annotated[
        bool, typer.Option(help="Allow --control beyond this machine: whoever reaches it can submit code.")
    ] = False,
    monitor: Annotated[
        str,
        typer.Option(metavar="HOST:PORT|none", help="Serve `espalier status` and `top`.  [127.0.0.1:9094]"),
    ] = "",
    root_certificates: Roots = None,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    insecure: Insecure = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    log_format: LogFormat = Format.TEXT,
    trust_on_first_use: TrustOnFirstUse = False,
) -> None:
    """Run the cloud until it is interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    # gRPC reads this when it is imported. The cloud's children are other programs (exec), so no thread of gRPC has to
    # survive a fork.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from espalier.environment import check_libraries
    from espalier_server.processes import signals_interrupt

    check_libraries("cloud")

    from espalier_server.superlink.supervisor import run_cloud

    security = security_of(root_certificates, certificate, private_key, insecure, trust_on_first_use)
    with signals_interrupt():
        run_cloud(
            listen,
            control,
            state,
            name,
            security,
            expose_control=expose_control,
            monitor=monitor,
            metrics=metrics,
        )
