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
    """A number that is asked for, and whether it was reached.

    Attributes
    ----------
    name : str
        What is measured, with its unit.
    value : float
        What came out.
    limit : float or [low, high]
        What it is held against.
    holds : bool
        Whether it is on the right side.
    """

    name: str
    value: float
    limit: float | list[float]
    holds: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Target:
        """Ask for a value of `limit` or less."""
        return cls(name, value, limit, value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float) -> Target:
        """Ask for a value of `limit` or more."""
        return cls(name, value, limit, value >= limit)

    @classmethod
    def within(cls, name: str, value: float, low: float, high: float) -> Target:
        """Ask for a value between `low` and `high`, both allowed."""
        return cls(name, value, [low, high], low <= value <= high)


@dataclass
class Outcome:
    """What a bench measured.

    Attributes
    ----------
    rows : list of Row
        The measurements, in the order of the table.
    targets : list of Target
        What was asked for.
    plots : dict of str to callable
        File stem -> a function that draws into an empty matplotlib figure; used with ``--out``.
    notes : list of str
        What a reader of the table must know; printed below it.
    """

    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    plots: dict[str, Callable[[Figure], None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def machine() -> dict[str, str | int | float]:
    """Describe the machine in words that name nobody: processor, cores, memory, system, Python."""
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
        Of ``python -m bench.NAME``.
    measure : callable
        Takes whether it is to be tiny (seconds, for the tests) and returns what it measured.
    about : str
        One sentence for ``--help`` and above the table.
    argv : sequence of str, optional
        Arguments; those of the process when left out.

    Returns
    -------
    int
        Exit status: 0, whatever holds.
    """
    arguments = parser(name, about).parse_args(argv)
    return show(name, about, measure(arguments.tiny), arguments)


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return the parser of the options that all benches have; a bench may add its own."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    made.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    made.add_argument("--out", type=Path, metavar="DIR", help="write plots into this folder")
    return made


def show(name: str, about: str, outcome: Outcome, arguments: argparse.Namespace) -> int:
    """Print what was measured as `arguments` of :func:`parser` ask, write the plots, and return 0."""
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
        console = Console(width=WIDTH)  # a file or a pipe has no width that columns must be cut to
    measured = Table(title=about)
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    for column in columns:
        measured.add_column(column, justify="right")
    for row in outcome.rows:
        measured.add_row(*(_show(row.get(column)) for column in columns))
    console.print(measured)
    asked = Table("target", "value", "limit", "", title="targets")
    for target in outcome.targets:
        limit = target.limit
        shown = f"{_show(limit[0])} … {_show(limit[1])}" if isinstance(limit, list) else _show(limit)
        asked.add_row(
            target.name, _show(target.value), shown, "holds" if target.holds else "[bold red]MISSED"
        )
    console.print(asked)
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
