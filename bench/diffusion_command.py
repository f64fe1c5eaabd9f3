"""The command line that `bench.diffusion` and `bench.bytes` share, and the set-up that its options describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.comparison import EPOCHS, MODELS, PER_ROUND, REGIMES, TINY, Comparison, Entry
from bench.report import Outcome, parser, show
from espalier.config.fields import FlatValue
from espalier.errors import ConfigError, EspalierError


def diffusion_parser(name: str, about: str, entries: Iterable[Entry], rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of both benches; `rounds` is the default of ``--rounds``."""
    options = parser(name, about)
    options.add_argument("--data", default="digits", help="NAME or FOLDER of the data (digits)")
    options.add_argument(
        "--model", choices=sorted(REGIMES), help="the U-Net; by default the one for the data"
    )
    options.add_argument(
        "--clients", type=int, default=8, help=f"number of clients; {PER_ROUND} train in a round (8)"
    )
    options.add_argument("--edges", type=int, default=2, help="number of edges (2)")
    options.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"rounds at one epoch; rows with E=5 run a fifth ({rounds})",
    )
    options.add_argument("--device", default="auto", help="device to train and sample on (auto)")
    options.add_argument("--features", choices=("classifier", "inception"), default="classifier")
    options.add_argument(
        "--only", nargs="+", metavar="ROW", choices=[e.name for e in entries], help="run only these rows"
    )
    return options


def run_command(
    name: str, about: str, measure: Callable[[argparse.Namespace], Outcome], options: argparse.ArgumentParser
) -> int:
    """Parse the command line, measure and print; an error of the user is one line and an exit status."""
    arguments = options.parse_args()
    try:
        return show(name, about, measure(arguments), arguments)
    except EspalierError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def comparison_of(arguments: argparse.Namespace, folder: Path) -> Comparison:
    """Return the set-up that the options describe.

    Raises
    ------
    ConfigError
        The rounds are not a multiple of five.
    """
    if arguments.rounds < EPOCHS or arguments.rounds % EPOCHS:
        raise ConfigError(
            f"--rounds {arguments.rounds}: give a multiple of {EPOCHS}, for methods with E={EPOCHS}"
        )
    model = arguments.model or MODELS.get(arguments.data, "unet-small")
    base: dict[str, FlatValue] = {
        **REGIMES[model],
        "model": model,
        "fraction": min(1.0, PER_ROUND / arguments.clients),
        "min-edges": arguments.edges,
        "min-clients": arguments.clients,
        "eval-data": arguments.data,
        "features": arguments.features,
        "sample-count": 16,
        "device": arguments.device,
    }
    if arguments.tiny:
        base |= TINY
    rounds = EPOCHS if arguments.tiny else arguments.rounds
    return Comparison(arguments.data, arguments.clients, arguments.edges, rounds, base, folder)
