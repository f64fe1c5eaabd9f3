"""The commands of a run: demo, run, stop, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from espalier.commands.options import Settings
from espalier.errors import ConfigError


def demo(
    method: Annotated[str | None, typer.Option(help="Federated method.")] = None,
    edges: Annotated[int, typer.Option(help="Edge processes.")] = 2,
    clients: Annotated[int, typer.Option(help="Client processes.")] = 4,
    data: Annotated[str, typer.Option(help="SOURCE or SOURCE:SCHEME, shared among the clients.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    settings: Settings = None,
) -> None:
    """Start a whole tree on this machine, run once, stop it again."""
    from espalier.config.run_config import parse_assignments
    from espalier_server.commands.demo import run_demo

    given = parse_assignments(settings or [])
    run_demo(edges, clients, data, out, {"method": method, **given} if method else given)


def run(
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on with the run in this folder.")
    ] = None,
    cloud: Annotated[str, typer.Option(help="Name of a cloud on this machine.")] = "default",
    settings: Settings = None,
    detach: Annotated[bool, typer.Option(help="Submit only; do not watch the run.")] = False,
) -> None:
    """Submit a run to the cloud on this machine and watch it; with --resume, one that did not finish."""
    from espalier.config.run_config import parse_assignments
    from espalier.monitor.progress import RunView
    from espalier_server.commands.follow import describe_result, prepare, run_to_end
    from espalier_server.records.resume import resumed_settings
    from espalier_server.superlink.clouds import find_cloud
    from espalier_server.superlink.submission import submit

    if (out is None) == (resume is None):
        raise ConfigError("give --out DIR for a new run, or --resume RUN_DIR to go on with one")
    given = parse_assignments(settings or [])
    config = prepare(given, out) if out is not None else resumed_settings(cast(Path, resume), given)
    home = find_cloud(cloud)
    if detach:
        typer.echo(submit(home, config).run)
        return
    view = RunView()
    with view:
        status = run_to_end(home, config, view)
    view.say(describe_result(Path(str(config["out"])), status))


def stop(
    run: Annotated[str, typer.Argument(help="Run id, as `espalier run` or `flwr list` show it.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a clean end.")] = 60.0,
) -> None:
    """End a run; what it made so far stays."""
    from espalier_server.superlink.submission import find_run, forget, stop_run

    home, submission = find_run(run)
    clean = stop_run(home, submission, timeout)
    forget(home, submission)
    how = "stopped" if clean else f"ended by Flower, as it did not end by itself within {timeout:g} s"
    typer.echo(f"run {submission.run} {how}; what it made is in {submission.out}")


def report(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Build report.html (and report.json) anew from what a run left."""
    from espalier_server.records.report import build_report

    typer.echo(str(build_report(folder)))
