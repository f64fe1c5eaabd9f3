"""The command line: reads options, and calls what does the work; everything heavy is imported when needed."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from common.errors import ConfigError, EspalierError

if TYPE_CHECKING:
    from common.security import Security

app = typer.Typer(
    name="espalier",
    help="Train and prune models on a tree of real machines: cloud, edges, clients.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click suggests already
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130

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


@app.command()
def demo(
    method: Annotated[str | None, typer.Option(help="Federated method.")] = None,
    edges: Annotated[int, typer.Option(help="Edge processes.")] = 2,
    clients: Annotated[int, typer.Option(help="Client processes.")] = 4,
    data: Annotated[str, typer.Option(help="SOURCE or SOURCE:SCHEME, shared among the clients.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    settings: Settings = None,
) -> None:
    """Start a whole tree on this machine, run once, stop it again."""
    from common.commands.demo import run_demo
    from common.run.config import parse_assignments

    given = parse_assignments(settings or [])
    run_demo(edges, clients, data, out, {"method": method, **given} if method else given)


@app.command()
def cloud(
    state: StateFolder,
    listen: Annotated[str, typer.Option(help="HOST:PORT for edges.")] = "127.0.0.1:9092",
    control: Annotated[str, typer.Option(help="HOST:PORT for commands on this machine.")] = "127.0.0.1:8000",
    name: Annotated[str, typer.Option(help="What `espalier run --cloud` calls it.")] = "default",
    expose_control: Annotated[
        bool, typer.Option(help="Allow --control beyond this machine: whoever reaches it can submit code.")
    ] = False,
    root_certificates: Roots = None,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    insecure: Insecure = False,
) -> None:
    """Serve as the cloud, until interrupted."""
    from common.run.processes import signals_interrupt
    from server.cloud import run_cloud

    security = _security(root_certificates, certificate, private_key, insecure)
    with signals_interrupt():
        run_cloud(listen, control, state, name, security, expose_control=expose_control)


@app.command()
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
) -> None:
    """Serve as an edge, until interrupted."""
    from common.run.names import check_name
    from common.security import parse_address

    check_name(name, "--name")
    parse_address(cloud)
    security = _security(root_certificates, certificate, private_key, insecure)
    security.server_certificates(listen)
    security.client_roots(cloud)

    from edge.service import run_edge

    run_edge(name, cloud, listen, state, key, security)


@app.command()
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
    key: NodeKey = None,
    user_app: Annotated[
        str | None, typer.Option("--app", metavar="MODULE:APP", help="A ClientApp of your own.")
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option("--node-config", metavar="'K=V …'", help="Settings for that ClientApp."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU.")] = None,
    root_certificates: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Serve as a client, until interrupted."""
    from common.run.config import parse_assignments
    from common.run.names import check_name
    from common.security import parse_address

    check_name(name, "--name")
    for address in edges:
        parse_address(address)
    security = _security(root_certificates, None, None, insecure)
    for address in edges:
        security.client_roots(address)
    if not data and user_app is None:
        raise ConfigError(
            "--data is missing; give the data to train on, e.g. --data ./photos or --data digits:0/4"
        )
    if data:
        from common.data.spec import parse_spec

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
        from common.models.presets import classifiers

        if model not in classifiers():
            raise ConfigError(f"--model {model} is no classifier; give one of {', '.join(classifiers())}")
        config["model"] = model

    from client.service import run_client

    run_client(name, edges, data, device, state, key, user_app, config, security, threads)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    cloud: Annotated[str, typer.Option(help="Name of a cloud on this machine.")] = "default",
    settings: Settings = None,
    detach: Annotated[bool, typer.Option(help="Submit only; do not watch the run.")] = False,
) -> None:
    """Submit a run to the cloud on this machine and watch it."""
    from common.commands.follow import describe_result, prepare, run_to_end
    from common.run.clouds import find_cloud
    from common.run.config import parse_assignments
    from common.run.progress import RunView
    from common.run.submission import submit

    config = prepare(parse_assignments(settings or []), out)
    home = find_cloud(cloud)
    if detach:
        typer.echo(submit(home, config).run)
        return
    view = RunView()
    with view:
        status = run_to_end(home, config, view)
    view.say(describe_result(Path(str(config["out"])), status))


@app.command()
def stop(
    run: Annotated[str, typer.Argument(help="Run id, as `espalier run` or `flwr list` show it.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a clean end.")] = 60.0,
) -> None:
    """End a run; what it made so far stays."""
    from common.run.submission import find_run, forget, stop_run

    home, submission = find_run(run)
    clean = stop_run(home, submission, timeout)
    forget(home, submission)
    how = "stopped" if clean else f"ended by Flower, as it did not end by itself within {timeout:g} s"
    typer.echo(f"run {submission.run} {how}; what it made is in {submission.out}")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="Model folder, e.g. runs/demo/model.")],
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
) -> None:
    """Draw images with a trained model."""
    from common.commands.sample import sample_model

    sample_model(model, count, steps, seed, out)
    typer.echo(str(out))


@app.command(name="pretrain-generator")
def pretrain_generator(
    data: Annotated[str, typer.Option(help="Data SPEC to learn from, e.g. digits or mnist.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    minutes: Annotated[float, typer.Option(help="How long to train, by the clock.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="How many steps instead: the same seed gives the same generator.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and noise.")] = 0,
    latent: Annotated[int, typer.Option(help="Length of a latent.")] = 128,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the data's own unless given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a small generator of images for FedKTL; a few minutes on a CPU."""
    from common.commands.pretrain import pretrain_generator as make

    make(
        data,
        out,
        minutes=minutes,
        steps=steps,
        seed=seed,
        latent_dim=latent,
        size=size,
        device=device,
        say=typer.echo,
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Build report.html (and report.json) anew from what a run left."""
    from common.run.report import build_report

    typer.echo(str(build_report(folder)))


def _security(roots: Path | None, certificate: Path | None, key: Path | None, insecure: bool) -> Security:
    from common.security import Security

    return Security(roots, certificate, key, insecure)


def main() -> None:
    """Run the command line; a person's mistake becomes one clear line and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("espalier").setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it prints by itself
    try:
        # Not standalone: typer would turn an interruption into an exit status of 1.
        status = app(standalone_mode=False)
    except EspalierError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except click.exceptions.Abort:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = 0
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        status = error.exit_code
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
