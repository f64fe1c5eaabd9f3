"""The common form of the benches: command line, JSON object, table, optional plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a table that does not go to a terminal.
WIDTH = 180

Row = dict[str, str | int | float | bool | None]
"""One measurement; the keys are the columns of the table, units in their names."""


@dataclass(frozen=True)
class Target:
    """A limit for a measured value, and whether the value is within it.

    Attributes
    ----------
    name : str
        What is measured, with its unit.
    value : float
        The measured value.
    limit : float or [low, high]
        The limit, or both limits.
    holds : bool
        Whether the value is within the limit.
    """

    name: str
    value: float
    limit: float | list[float]
    holds: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Target:
        """Return a target that holds for values up to `limit`."""
        return cls(name, value, limit, value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float) -> Target:
        """Return a target that holds for values of at least `limit`."""
        return cls(name, value, limit, value >= limit)

    @classmethod
    def within(cls, name: str, value: float, low: float, high: float) -> Target:
        """Return a target that holds for values from `low` to `high`, inclusive."""
        return cls(name, value, [low, high], low <= value <= high)


@dataclass
class Outcome:
    """The result of a bench.

    Attributes
    ----------
    rows : list of Row
        The measurements, in the order of the table.
    targets : list of Target
        Limits, and whether they hold.
    plots : dict of str to callable
        File stem -> a function that draws into an empty matplotlib figure; used with ``--out``.
    notes : list of str
        Explanations of rows and columns; printed below the table.
    """

    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    plots: dict[str, Callable[[Figure], None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def machine() -> dict[str, str | int | float]:
    """Describe the machine without host or user names: processor, cores, memory, system, Python."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def run(name: str, measure: Callable[[bool], Outcome], about: str, argv: Sequence[str] | None = None) -> int:
    """Run a bench as a command.

    Parameters
    ----------
    name : str
        NAME in ``python -m bench.NAME``.
    measure : callable
        Returns the outcome; its argument says whether to run the tiny form (seconds, for tests).
    about : str
        One sentence for ``--help`` and the title of the table.
    argv : sequence of str, optional
        Command-line arguments; by default those of the process.

    Returns
    -------
    int
        Exit status: 0, whether or not the targets hold.
    """
    arguments = parser(name, about).parse_args(argv)
    return show(name, about, measure(arguments.tiny), arguments)


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benches, to which a bench adds its own."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options.add_argument("--tiny", action="store_true", help="a run of a few seconds, as a smoke test")
    options.add_argument("--out", type=Path, metavar="DIR", help="write plots into this folder")
    return options


def show(name: str, about: str, outcome: Outcome, arguments: argparse.Namespace) -> int:
    """Print the outcome as JSON or as a table, write plots if ``--out`` is given, and return 0."""
    if arguments.json:
        print(json.dumps(as_json(name, outcome)))
    else:
        _print_table(about, outcome)
    if arguments.out is not None:
        _save_plots(arguments.out, outcome)
    return 0


def as_json(name: str, outcome: Outcome) -> dict[str, Any]:
    """Return the JSON object of a bench."""
    return {
        "bench": name,
        "machine": machine(),
        "rows": outcome.rows,
        "targets": [vars(target) for target in outcome.targets],
        "notes": outcome.notes,
    }


def _print_table(about: str, outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)  # a file or a pipe: no terminal width to wrap at
    measurements = Table(title=about)
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    for column in columns:
        measurements.add_column(column, justify="right")
    for row in outcome.rows:
        measurements.add_row(*(_show(row.get(column)) for column in columns))
    console.print(measurements)
    targets = Table("target", "value", "limit", "", title="targets")
    for target in outcome.targets:
        limit = target.limit
        shown = f"{_show(limit[0])} … {_show(limit[1])}" if isinstance(limit, list) else _show(limit)
        targets.add_row(
            target.name, _show(target.value), shown, "holds" if target.holds else "[bold red]MISSED"
        )
    console.print(targets)
    for note in outcome.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def _save_plots(folder: Path, outcome: Outcome) -> None:
    if not outcome.plots:
        return
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for stem, draw in outcome.plots.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{stem}.png", dpi=150)


def _show(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
