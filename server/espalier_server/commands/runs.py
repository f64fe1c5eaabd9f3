"""Commands for runs: demo, run, stop, report."""

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
    data: Annotated[str, typer.Option(help="SOURCE or SOURCE:SCHEME, divided among the clients.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    settings: Settings = None,
) -> None:
    """Start a cloud, edges and clients on this machine, train one run, and stop them."""
    from espalier.config.assignments import parse_assignments
    from espalier.environment import check_libraries

    check_libraries("cloud", "client")

    from espalier_server.commands.demo import run_demo

    given = parse_assignments(settings or [])
    run_demo(edges, clients, data, out, {"method": method, **given} if method else given)


def run(
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Resume the run in this folder.")
    ] = None,
    cloud: Annotated[str, typer.Option(help="Name of a cloud on this machine.")] = "default",
    settings: Settings = None,
    detach: Annotated[bool, typer.Option(help="Submit the run and return.")] = False,
) -> None:
    """Submit a run to the cloud on this machine and show its progress; with --resume, one that did not finish."""
    from espalier.config.assignments import parse_assignments
    from espalier.environment import check_libraries
    from espalier_server.commands.run_view import RunView

    check_libraries("cloud")

    from espalier_server.commands.follow import describe_result, prepare, run_to_end
    from espalier_server.records.resume import resumed_settings
    from espalier_server.superlink.clouds import find_cloud
    from espalier_server.superlink.submission import submit

    if (out is None) == (resume is None):
        raise ConfigError("give --out DIR for a new run, or --resume RUN_DIR to resume one")
    given = parse_assignments(settings or [])
    config = prepare(given, out) if out is not None else resumed_settings(cast(Path, resume), given)
    running = find_cloud(cloud)
    if detach:
        typer.echo(submit(running, config).run)
        return
    view = RunView()
    with view:
        status = run_to_end(running, config, view)
    view.print_line(describe_result(Path(str(config["out"])), status))


def stop(
    run: Annotated[str, typer.Argument(help="Run id, as `espalier run` or `flwr list` prints it.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a clean end.")] = 60.0,
) -> None:
    """Stop a run; its results so far remain."""
    from espalier_server.superlink.submission import find_run, forget, stop_run

    cloud, submission = find_run(run)
    clean = stop_run(cloud, submission, timeout)
    forget(cloud, submission)
    how = "stopped" if clean else f"did not end within {timeout:g} s and was ended by Flower"
    typer.echo(f"run {submission.run} {how}; its results are in {submission.out}")


def report(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Rebuild report.html (and report.json) from the files of a run."""
    from espalier_server.records.report import build_report

    typer.echo(str(build_report(folder)))
