"""The command line: collects the commands that the installed tiers contribute, runs one, and reports its errors.

A command is an entry point of the group ``espalier.commands``: a function with typer's options, or a `typer.Typer` of
subcommands. Loading one imports its options only; what the command runs is imported when it is called.
"""

from __future__ import annotations

import sys
from functools import cache

import click
import typer

from espalier.commands import COMMANDS
from espalier.distribution import entry_points
from espalier.environment import check_installation, explain
from espalier.errors import EspalierError
from espalier.monitor.logs import configure, say_error

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@cache
def command_line() -> typer.Typer:
    """Return the application with all commands."""
    app = typer.Typer(
        name="espalier",
        help="Train and prune models on a tree of real machines: cloud, edges, clients.",
        no_args_is_help=True,
        add_completion=False,
        suggest_commands=False,  # click suggests already
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for point in entry_points(COMMANDS):
        command = point.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=point.name)
        else:
            app.command(name=point.name)(command)
    return app


def main() -> None:
    """Run the command line; an `EspalierError` becomes one line on stderr and its exit status."""
    configure("text")
    try:
        check_installation()
        # Not standalone: typer would turn an interruption into an exit status of 1.
        status = command_line()(standalone_mode=False)
    except EspalierError as error:
        status = _report(error)
    except ModuleNotFoundError as error:
        missing = explain(error)
        if missing is None:
            raise
        status = _report(missing)
    except (KeyboardInterrupt, click.exceptions.Abort):
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = 0
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        status = error.exit_code
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: EspalierError) -> int:
    say_error(str(error))
    return error.exit_code


if __name__ == "__main__":
    main()
