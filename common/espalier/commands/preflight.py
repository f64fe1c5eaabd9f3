"""The command `espalier preflight TIER`: checks, with the tier's own options, whether the tier can start.

A tier contributes its checks as an entry point of the group ``espalier.preflight``, under the name of its command: a
function of the command's options (by parameter name, those of TLS left out) and the `Security` of its links that
returns `Findings`. It is loaded when the checks run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import typer

from espalier.commands import COMMANDS
from espalier.commands.options import Format, security_of
from espalier.distribution import entry_points

CHECKS = "espalier.preflight"
"""Entry-point group of the tiers' checks."""

Output = Annotated[Format, typer.Option("--format", help="text or json.")]


def command_line(checks: list[EntryPoint], commands: dict[str, EntryPoint]) -> typer.Typer:
    """Return the application with one subcommand a tier.

    Parameters
    ----------
    checks : list of EntryPoint
        The tiers' checks.
    commands : dict of str to EntryPoint
        The commands by name; that of a tier gives the options.
    """
    app = typer.Typer(
        name="preflight",
        help="Check addresses, TLS, keys, data, disk, memory, device and versions before a tier starts.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
    )
    for point in checks:
        app.command(name=point.name)(_command(point, commands[point.name].load()))
    return app


def _command(point: EntryPoint, tier: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `tier`, and `--format`, that runs the checks."""

    def check(**options: Any) -> None:
        output = options.pop("output")
        security = security_of(
            options.pop("root_certificates"),
            options.pop("certificate", None),
            options.pop("private_key", None),
            options.pop("insecure"),
            options.pop("trust_on_first_use", False),
        )
        found = point.load()(options, security)
        if output is Format.JSON:
            report = {"tier": point.name, "ok": not found.failed, "checks": found.as_dicts()}
            typer.echo(json.dumps(report, indent=1))
        else:
            _show(found.as_dicts())
        raise typer.Exit(int(found.failed))

    own = inspect.signature(tier, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    output = inspect.Parameter("output", kind, default=Format.TEXT, annotation=Output)
    parameters = [p.replace(kind=kind) for p in own.parameters.values()]
    check.__signature__ = own.replace(parameters=[*parameters, output])  # type: ignore[attr-defined]
    check.__annotations__ = {p.name: p.annotation for p in (*parameters, output)}
    check.__doc__ = (
        f"Check what `espalier {point.name}` needs; the same options. Exit status 1 if a check fails."
    )
    return check


def _show(findings: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=not name, overflow="fold")
    for finding in findings:
        said = Text(finding["said"])
        if finding["mend"]:
            said.append(f"\n→ {finding['mend']}", style=styles[finding["level"]])
        table.add_row(Text(finding["check"]), Text(finding["level"], style=styles[finding["level"]]), said)
    Console().print(table)


app = command_line(entry_points(CHECKS), {point.name: point for point in entry_points(COMMANDS)})
