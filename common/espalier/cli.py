"""The command line: which commands there are; each reads its options and imports what is heavy when needed."""

from __future__ import annotations

import sys

import click
import typer

from espalier.commands import certs, members, preflight, tiers
from espalier.commands import status as look
from espalier.errors import EspalierError
from espalier.monitor.logs import configure, say_error
from espalier_server.commands import models, runs

app = typer.Typer(
    name="espalier",
    help="Train and prune models on a tree of real machines: cloud, edges, clients.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click suggests already
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(runs.demo)
app.command()(tiers.cloud)
app.command()(tiers.edge)
app.command()(tiers.client)
app.command()(runs.run)
app.command()(runs.stop)
app.command()(runs.report)
app.command()(look.status)
app.command()(look.top)
app.command()(look.health)
app.add_typer(preflight.app)
app.command()(models.sample)
app.command(name="pretrain-generator")(models.pretrain_generator)
app.add_typer(certs.app, name="certs")
app.add_typer(members.clients, name="clients")
app.add_typer(members.edges, name="edges")

INTERRUPTED = 130


def main() -> None:
    """Run the command line; a person's mistake becomes one clear line and an exit status."""
    configure("text")
    try:
        # Not standalone: typer would turn an interruption into an exit status of 1.
        status = app(standalone_mode=False)
    except EspalierError as error:
        say_error(str(error))
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
