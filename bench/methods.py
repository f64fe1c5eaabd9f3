"""Methods that train classifiers by exchanging weights: accuracy, rounds to a target, bytes per link, seconds.

Three parts: a table of all methods, the papers' claims (`bench.regimes`), and an open question (`bench.loss_ranking`).
Each cell (method, partition of the data, seed) runs the code of the tiers on a tree in one process; cells are
independent and run in a pool of processes. Accuracies are in per cent, bytes in KB per round.
``python -m bench.methods --data mnist --clients 20 --seeds 3``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import loss_ranking
from bench.cell_command import cell_parser, results_file_of, setup_of
from bench.cells import Cell, Measured, Setup, average, run_cells
from bench.claims import Claim, Values, row
from bench.loss_ranking import draw_curve
from bench.regimes import CLAIMS
from bench.report import Outcome, show
from espalier.methods.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = (
    "Methods that train classifiers, on one tree: accuracy, rounds to a target, bytes on each link, seconds"
)
PARTS = ("table", "claims", "question")

#: Partitions of the data in the table.
REGIMES = {"2 classes a client": "pathological=2", "Dirichlet 0.3": "dirichlet=0.3", "IID": "iid"}
#: Settings of every method in the table.
SETTINGS: Values = {"rounds": 16, "learning-rate": 0.2, "local-steps": 10, "eval-every": 2}
#: A step of a network with exits takes as long as a hundred steps of the small network, so its rounds have few.
EXITS: Values = {
    "model": "depth-cnn",
    "levels": "1,0.67,0.34",
    "local-steps": 6,
    "batch-size": 25,
    "learning-rate": 0.1,
    "eval-every": 8,
}
#: Additional settings by method, without which it would be another one, e.g. candidates to choose from.
OWN: Mapping[str, Values] = {
    "power-of-choice": {"fraction": 0.5, "candidates": 15},
    "divfl": {"fraction": 0.5},
    "split-mix": {"base-width": 0.25},
    "depthfl": EXITS,
    "inclusivefl": EXITS,
}
#: Target accuracy of "rounds to target", as a share of FedAvg's last accuracy.
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
    """Return the target accuracy by regime: a share of FedAvg's last accuracy."""
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
    results_file: Path | None,
    tiny: bool,
) -> Outcome:
    """Run the selected parts; see :func:`main` for the arguments."""
    table = table_cells(setup, only, tiny) if "table" in parts else {}
    claims = {} if "claims" not in parts else {c.name: (c, c.cells(setup)) for c in CLAIMS}
    questions = loss_ranking.cells(setup) if "question" in parts else {}
    groups = [*table.values(), *questions.values(), *(v for _, by in claims.values() for v in by.values())]
    found = run_cells([cell for group in groups for cell in group], jobs, root, results_file)

    def results(group: Sequence[Cell]) -> list[Measured]:
        return [found[cell.key()] for cell in group]

    outcome = Outcome()
    if table:
        measured = {key: results(group) for key, group in table.items()}
        targets = targets_of(measured)
        outcome.rows += [row(r, name, group, targets[r]) for (r, name), group in measured.items()]
        outcome.notes += [
            "accuracies are in per cent, means of a run's last three measurements; _sd is their "
            "standard deviation over seeds. "
            "Methods with several models (ifca, cfl) have no global accuracy: the clients' mean counts instead",
            "kb are 1000 bytes of payload of a round on all links of a kind, without evaluation",
            "rounds_to_target is the mean over the runs that reached the target",
            "depthfl and inclusivefl train depth-cnn with 6 steps of 25 images per round, the others mlp with 10 of 50",
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
    if questions:
        answers = {key: results(group) for key, group in questions.items()}
        outcome.rows += loss_ranking.rows(answers)
        outcome.notes += loss_ranking.notes(answers)
        outcome.plots["question"] = lambda figure: loss_ranking.draw(figure, answers)
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
    """Draw the curves of every claim's variants over the rounds."""
    columns = min(3, len(judged))
    rows = -(-len(judged) // columns)
    figure.set_size_inches(4.2 * columns, 3.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    labels = {"main": "accuracy, %", "mean": "clients' mean accuracy, %", "worst": "worst tenth, %"}
    for axes, (name, (claim, by)) in zip(panels, judged.items(), strict=False):
        for label, found in by.items():
            draw_curve(axes, found, label, claim.shown, dashed=label.endswith("whole only"))
        if claim.target:
            axes.axhline(100 * claim.target, color="grey", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("round")
        axes.set_ylabel(labels[claim.shown])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in panels[len(judged) :]:
        axes.set_axis_off()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = cell_parser("methods", ABOUT, jobs=max(1, os.cpu_count() or 1))
    options.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=methods(), help="methods of the table"
    )
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = options.parse_args(argv)
    outcome = Outcome()
    setup = setup_of(arguments, outcome)
    only = arguments.only or (["fedavg", "scaffold", "ifca"] if arguments.tiny else methods())
    parts = ("table",) if arguments.tiny else arguments.parts
    results_file = results_file_of(arguments)
    measured = measure(setup, parts, only, arguments.jobs, arguments.root, results_file, arguments.tiny)
    measured.notes[:0] = outcome.notes
    return show("methods", ABOUT, measured, arguments)


if __name__ == "__main__":
    sys.exit(main())
