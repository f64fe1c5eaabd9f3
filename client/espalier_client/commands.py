"""The command `espalier client`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from espalier.commands.options import (
    Format,
    Insecure,
    LogFormat,
    MetricsHost,
    MetricsPort,
    NodeKey,
    Roots,
    StateFolder,
    security_of,
    start_process,
)
from espalier.errors import ConfigError


def client(
    name: Annotated[str, typer.Option(help="Name of the client.")],
    edges: Annotated[list[str], typer.Option("--edge", help="HOST:PORT of an edge; repeatable.")],
    state: StateFolder,
    data: Annotated[str, typer.Option(help="NAME[:I/N[:SCHEME]] or a folder of images per class.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    level: Annotated[
        float | None,
        typer.Option(help="Largest sub-model that it trains, a share in (0, 1]; with level-choice=device."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its own classifier, in runs of unlike models; e.g. resnet10."),
    ] = None,
    privacy_budget: Annotated[
        float | None,
        typer.Option(metavar="EPSILON", help="Largest epsilon that this device may spend over all runs."),
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
    """Run a client until it is interrupted."""
    metrics = start_process(log_format, metrics_port, metrics_host)
    from espalier.environment import check_libraries
    from espalier.names import check_name
    from espalier.security.transport import parse_address

    # A ClientApp of the user's own needs what it imports itself.
    check_libraries(*(["client"] if user_app is None else []))
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
    config = _node_config(data, node_config or [], level, model, privacy_budget)
    if replicas is not None:
        if key is not None or user_app is not None or metrics is not None:
            raise ConfigError("--replicas excludes --key, --app and --metrics-port; leave them out")
        from espalier_client.replicas import plan_replicas, run_replicas

        run_replicas(plan_replicas(name, data, state, replicas), edges, device, config, security, threads)
        return

    from espalier_client.service import run_client

    run_client(name, edges, data, device, state, key, user_app, config, security, threads, metrics)


def _node_config(
    data: str, words: list[str], level: float | None, model: str | None, privacy_budget: float | None
) -> dict[str, bool | int | float | str]:
    """Return the entries of the node config that options give, each checked."""
    from espalier.config.assignments import parse_assignments

    if data:
        from espalier.data.spec import parse_spec

        parse_spec(data)
    try:
        config = parse_assignments([word for text in words for word in shlex.split(text)])
    except ValueError as error:
        raise ConfigError(f"--node-config: {error}; write it as 'key=value key=value'") from error
    if level is not None:
        if not 0 < level <= 1:
            raise ConfigError(f"--level {level:g} is not a share in (0, 1]; give e.g. --level 0.5")
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
    return config
