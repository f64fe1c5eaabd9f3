"""Every method that trains classifiers in one table, then the papers' claims and one open question.

Each cell (method, division of the data, seed) runs the tiers' own code on a tree in one process
(`bench.local_tree`); cells are independent, so they go through a pool of processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import question
from bench.cells import TRAIN_IMAGES, Cell, Measured, Setup, average, run_cells
from bench.claims import Claim, Values, row
from bench.question import draw_curve
from bench.regimes import CLAIMS
from bench.report import Outcome, parser, show
from espalier.methods.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = (
    "Methods that train classifiers, on one tree: accuracy, rounds to a target, bytes on each link, seconds"
)
PARTS = ("table", "claims", "question")

#: Divisions of the data in the table.
REGIMES = {"2 classes a client": "pathological=2", "Dirichlet 0.3": "dirichlet=0.3", "IID": "iid"}
#: Settings of every method in the table.
SETTINGS: Values = {"rounds": 16, "learning-rate": 0.2, "local-steps": 10, "eval-every": 2}
#: A step of a network with exits costs as much as a hundred of the small network, so it takes few small ones.
EXITS: Values = {
    "model": "depth-cnn",
    "levels": "1,0.67,0.34",
    "local-steps": 6,
    "batch-size": 25,
    "learning-rate": 0.1,
    "eval-every": 8,
}
#: What a method gets beyond them: what its name promises, e.g. clients to choose from.
OWN: Mapping[str, Values] = {
    "power-of-choice": {"fraction": 0.5, "candidates": 15},
    "divfl": {"fraction": 0.5},
    "split-mix": {"base-width": 0.25},
    "depthfl": EXITS,
    "inclusivefl": EXITS,
}
#: Share of FedAvg's last accuracy that rounds are counted to.
TARGET_SHARE = 0.9


def methods() -> list[str]:
    """Return the names of the methods that train classifiers by exchanging weights."""
    return [name for name, m in METHODS.items() if "classification" in m.tasks and not m.own_models]


def table_cells(setup: Setup, only: Sequence[str], tiny: bool) -> dict[tuple[str, str], list[Cell]]:
    """Return the cells of the table by regime and method."""
    regimes = dict(list(REGIMES.items())[:1]) if tiny else REGIMES
    small: Values = {"rounds": 3, "local-steps": 2, "eval-every": 2} if tiny else {}
    return {
        (regime, name): [
            Cell(setup, scheme, {**SETTINGS, **OWN.get(name, {}), **small, "method": name}, seed)
            for seed in range(1, setup.seeds + 1)
        ]
        for regime, scheme in regimes.items()
        for name in only
    }


def targets_of(results: Mapping[tuple[str, str], Sequence[Measured]]) -> dict[str, float]:
    """Return the accuracy that rounds are counted to, by regime: a share of what FedAvg reached."""
    found = {}
    for regime in dict.fromkeys(regime for regime, _ in results):
        base = results.get((regime, "fedavg")) or next(v for (r, _), v in results.items() if r == regime)
        found[regime] = round(TARGET_SHARE * (average(m.last.main for m in base if m.points) or 0.0), 3)
    return found


def measure(
    setup: Setup,
    parts: Sequence[str],
    only: Sequence[str],
    jobs: int,
    root: Path,
    kept: Path | None,
    tiny: bool,
) -> Outcome:
    """Run the parts that are asked for; see :func:`main` for the arguments."""
    table = table_cells(setup, only, tiny) if "table" in parts else {}
    claims = {} if "claims" not in parts else {c.name: (c, c.cells(setup)) for c in CLAIMS}
    asked = question.cells(setup) if "question" in parts else {}
    groups = [*table.values(), *asked.values(), *(v for _, by in claims.values() for v in by.values())]
    found = run_cells([cell for group in groups for cell in group], jobs, root, kept)

    def results(group: Sequence[Cell]) -> list[Measured]:
        return [found[cell.key()] for cell in group]

    outcome = Outcome()
    if table:
        measured = {key: results(group) for key, group in table.items()}
        targets = targets_of(measured)
        outcome.rows += [row(r, name, group, targets[r]) for (r, name), group in measured.items()]
        outcome.notes += [
            "accuracies are in per cent, means of a run's last three measurements; _sd is the spread over seeds. "
            "A method with several networks (ifca, cfl) has no global accuracy: its rounds are by the clients' mean",
            "kb are 1000 bytes of payload of a round on all links of a kind, without what measuring costs",
            "rounds_to_target is the mean over the runs that reached it",
            "depthfl and inclusivefl train depth-cnn by 6 steps of 25 images a round, the others mlp by 10 of 50",
        ]
        outcome.plots["methods"] = lambda figure: draw_table(figure, measured)
    judged: dict[str, tuple[Claim, dict[str, list[Measured]]]] = {}
    for name, (claim, by) in claims.items():
        judged[name] = claim, {label: results(group) for label, group in by.items()}
        outcome.rows += claim.rows(judged[name][1])
        outcome.targets += claim.judge(claim, judged[name][1])
        if claim.note:
            outcome.notes.append(f"{name}: {claim.note}")
    if judged:
        outcome.plots["claims"] = lambda figure: draw_claims(figure, judged)
    if asked:
        answers = {key: results(group) for key, group in asked.items()}
        outcome.rows += question.rows(answers)
        outcome.notes += question.notes(answers)
        outcome.plots["question"] = lambda figure: question.draw(figure, answers)
    return outcome


def draw_table(figure: Figure, results: Mapping[tuple[str, str], Sequence[Measured]]) -> None:
    """Draw accuracy and worst tenth of every method, a panel for each regime."""
    regimes = list(dict.fromkeys(regime for regime, _ in results))
    names = list(dict.fromkeys(name for _, name in results))
    figure.set_size_inches(4 * len(regimes) + 1.5, 0.32 * len(names) + 1.6)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        for place, name in enumerate(names):
            last = [m.last for m in results[regime, name]]
            for of, colour, mark, label in (
                ("accuracy", "tab:blue", "o", "global network"),
                ("mean", "tab:green", "|", "clients' mean"),
                ("worst", "tab:red", "x", "worst tenth"),
            ):
                values = [100 * v for v in (getattr(p, of) for p in last) if v is not None]
                axes.scatter(
                    values, [place] * len(values), c=colour, marker=mark, label=label if not place else None
                )
        axes.set_title(regime)
        axes.set_xlabel("accuracy, %")
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")


def draw_claims(figure: Figure, judged: Mapping[str, tuple[Claim, dict[str, list[Measured]]]]) -> None:
    """Draw every claim's variants over the rounds."""
    columns = min(3, len(judged))
    rows = -(-len(judged) // columns)
    figure.set_size_inches(4.2 * columns, 3.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    words = {"main": "accuracy, %", "mean": "clients' mean accuracy, %", "worst": "worst tenth, %"}
    for axes, (name, (claim, by)) in zip(panels, judged.items(), strict=False):
        for label, found in by.items():
            draw_curve(axes, found, label, claim.shown, dashed=label.endswith("whole only"))
        if claim.target:
            axes.axhline(100 * claim.target, color="grey", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("round")
        axes.set_ylabel(words[claim.shown])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in panels[len(judged) :]:
        axes.set_axis_off()


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a command."""
    made = parser("methods", ABOUT)
    made.add_argument(
        "--data", default="mnist", choices=sorted(TRAIN_IMAGES), help="digits where it is absent"
    )
    made.add_argument(
        "--root",
        type=Path,
        default=Path(
            os.environ.get("ESPALIER_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
        ),
        help="folder of the data files",
    )
    made.add_argument("--clients", type=int, default=20)
    made.add_argument("--edges", type=int, default=2)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--images", type=int, default=500, help="training images of a client, about")
    made.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="worker processes")
    made.add_argument("--only", nargs="+", metavar="METHOD", choices=methods(), help="methods of the table")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--resume", action="store_true", help="take what cells.jsonl in DIR holds already")
    arguments = made.parse_args(argv)
    outcome = Outcome()
    setup = setup_of(arguments, outcome)
    kept = arguments.out / "cells.jsonl" if arguments.out else None
    if kept and not arguments.resume:
        kept.unlink(missing_ok=True)
    only = arguments.only or (["fedavg", "scaffold", "ifca"] if arguments.tiny else methods())
    parts = ("table",) if arguments.tiny else arguments.parts
    measured = measure(setup, parts, only, arguments.jobs, arguments.root, kept, arguments.tiny)
    measured.notes[:0] = outcome.notes
    return show("methods", ABOUT, measured, arguments)


def setup_of(arguments: argparse.Namespace, outcome: Outcome) -> Setup:
    """Return data and tree that are asked for; digits stand in for files that are not there, and a note says so."""
    data = "digits" if arguments.tiny else arguments.data
    folders = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
    if data in folders and not (arguments.root / folders[data]).is_dir():
        outcome.notes.append(f"{data} is not in --root; these are digits")
        data = "digits"
    if arguments.tiny:
        return Setup(data, clients=4, edges=2, images=100, seeds=1)
    return Setup(data, arguments.clients, arguments.edges, arguments.images, arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
