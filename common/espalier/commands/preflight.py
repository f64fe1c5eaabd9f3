"""The command `espalier preflight TIER`: tells what would keep a tier, with its own options, from running."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from espalier.commands import tiers
from espalier.commands.options import Format, security_of

app = typer.Typer(
    name="preflight",
    help="Check addresses, TLS, keys, data, disk, memory, device and versions before a tier starts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Output = Annotated[Format, typer.Option("--format", help="text or json.")]


def _command(tier: str, command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `command`, and `--format`, that checks instead of serving."""

    def check(**options: Any) -> None:
        from espalier.preflight import tiers as checks

        output = options.pop("output")
        security = security_of(
            options.pop("root_certificates"),
            options.pop("certificate", None),
            options.pop("private_key", None),
            options.pop("insecure"),
            options.pop("trust_on_first_use", False),
        )
        found = {"cloud": checks.check_cloud, "edge": checks.check_edge, "client": checks.check_client}[tier](
            options, security
        )
        if output is Format.JSON:
            typer.echo(
                json.dumps({"tier": tier, "ok": not found.failed, "checks": found.as_dicts()}, indent=1)
            )
        else:
            _show(found.as_dicts())
        raise typer.Exit(int(found.failed))

    own = inspect.signature(command, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    output = inspect.Parameter("output", kind, default=Format.TEXT, annotation=Output)
    parameters = [p.replace(kind=kind) for p in own.parameters.values()]
    check.__signature__ = own.replace(parameters=[*parameters, output])  # type: ignore[attr-defined]
    check.__annotations__ = {p.name: p.annotation for p in (*parameters, output)}
    check.__doc__ = f"Check what `espalier {tier}` needs; the same options. Exit status 1 if anything fails."
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


for _tier, _function in (("cloud", tiers.cloud), ("edge", tiers.edge), ("client", tiers.client)):
    app.command(name=_tier)(_command(_tier, _function))
