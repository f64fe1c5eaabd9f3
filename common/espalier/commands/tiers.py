"""The commands that serve as a tier: cloud, edge, client."""

from __future__ import annotations

import os
import shlex
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
from espalier.errors import ConfigError


def cloud(
    state: StateFolder,
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges.")] = "127.0.0.1:9092",
    control: Annotated[str, typer.Option(help="HOST:PORT for commands on this machine.")] = "127.0.0.1:8000",
    name: Annotated[str, typer.Option(help="What `espalier run --cloud` calls it.")] = "default",
    expose_control: Annotated[
        bool, typer.Option(help="Allow --control beyond this machine: whoever reaches it can submit code.")
    ] = False,
    monitor: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT|none", help="Live view, for `espalier status` and `top`.  [127.0.0.1:9094]"
        ),
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
    """Serve as the cloud, until interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    # What it starts is another program, so gRPC's threads need no looking after in a fork. Read at its import.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from espalier.processes.supervise import signals_interrupt
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
        str, typer.Option(metavar="HOST:PORT", help="Live view of this edge and its clients.")
    ] = "",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    log_format: LogFormat = Format.TEXT,
    trust_on_first_use: TrustOnFirstUse = False,
) -> None:
    """Serve as an edge, until interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    from espalier.names import check_name
    from espalier.security.certificates import check_served
    from espalier.security.transport import parse_address

    check_name(name, "--name")
    parse_address(cloud)
    security = security_of(root_certificates, certificate, private_key, insecure, trust_on_first_use)
    check_served(security, listen)
    security.client_roots(cloud)

    from espalier_edge.service import run_edge

    run_edge(name, cloud, listen, state, key, security, monitor=monitor, metrics=metrics)


def client(
    name: Annotated[str, typer.Option(help="Name of the client.")],
    edges: Annotated[list[str], typer.Option("--edge", help="HOST:PORT of an edge; repeatable.")],
    state: StateFolder,
    data: Annotated[str, typer.Option(help="NAME[:I/N[:SCHEME]] or a folder of images per class.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    level: Annotated[
        float | None,
        typer.Option(help="Largest sub-model it trains, a share in (0, 1]; level-choice=device."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The classifier it keeps, in runs of unlike models; e.g. resnet10."
        ),
    ] = None,
    privacy_budget: Annotated[
        float | None,
        typer.Option(metavar="EPSILON", help="Most privacy this device may spend, over all runs."),
    ] = None,
    key: NodeKey = None,
    user_app: Annotated[
        str | None, typer.Option("--app", metavar="MODULE:APP", help="A ClientApp of your own.")
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option("--node-config", metavar="'K=V …'", help="Settings for that ClientApp."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU.")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="For test beds: N clients NAME-000… with N shares of the data."
        ),
    ] = None,
    root_certificates: Roots = None,
    insecure: Insecure = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    log_format: LogFormat = Format.TEXT,
) -> None:
    """Serve as a client, until interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    from espalier.config.run_config import parse_assignments
    from espalier.names import check_name
    from espalier.security.transport import parse_address

    check_name(name, "--name")
    for address in edges:
        parse_address(address)
    security = security_of(root_certificates, None, None, insecure)
    for address in edges:
        security.client_roots(address)
    if not data and user_app is None:
        raise ConfigError(
            "--data is missing; give the data to train on, e.g. --data ./photos or --data digits:0/4"
        )
    if data:
        from espalier.data.spec import parse_spec

        parse_spec(data)
    try:
        words = [word for text in node_config or [] for word in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"--node-config: {error}; write it as 'key=value key=value'") from error
    config = parse_assignments(words)
    if level is not None:
        if not 0 < level <= 1:
            raise ConfigError(f"--level {level:g} is no share in (0, 1]; give e.g. --level 0.5")
        config["level"] = level
    if model is not None:
        from espalier.models.presets import classifiers

        if model not in classifiers():
            raise ConfigError(f"--model {model} is no classifier; give one of {', '.join(classifiers())}")
        config["model"] = model
    if privacy_budget is not None:
        if not privacy_budget > 0:
            raise ConfigError(
                f"--privacy-budget {privacy_budget:g} is not above 0; give e.g. --privacy-budget 8"
            )
        config["privacy-budget"] = privacy_budget

    if replicas is not None:
        if key is not None or user_app is not None or metrics is not None:
            raise ConfigError("--replicas goes without --key, --app and --metrics-port; leave them out")
        from espalier_client.replicas import plan_replicas, run_replicas

        run_replicas(plan_replicas(name, data, state, replicas), edges, device, config, security, threads)
        return

    from espalier_client.service import run_client

    run_client(name, edges, data, device, state, key, user_app, config, security, threads, metrics)
