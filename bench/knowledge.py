"""Knowledge exchange between unlike models: every method of it on one tree, one client without a federation, FAug.

Cells run the tiers' own code on a tree in one process (`bench.cells`); FAug's own experiment counts a whole
run's bits (`bench.faug`).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

from bench import faug
from bench.cells import TRAIN_IMAGES, Cell, Measured, Setup, average, run_cells, spread
from bench.claims import Values, accuracies, percent, row
from bench.exchanges import (
    FAMILY,
    REGIMES,
    SHOTS,
    TRANSFER,
    Generators,
    cloud_edge_cells,
    make_generators,
    methods,
    table_cells,
)
from bench.methods import setup_of
from bench.report import Outcome, Row, Target, parser, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Knowledge exchange between unlike models: the clients' accuracy, bytes on each link, seconds"
PARTS = ("table", "cloud-edge", "faug")
LABELS = tuple(methods("cnn4", Generators(Path("a"), Path("b"))))
#: Rows of a tiny run: so few that they need no process of their own.
TINY = [("few-shot", label) for label in ("local only", "FD", "FedProto", "co-distillation", "FedKTL")]
TINY += [("Dirichlet 0.1", "FD + FAug")]
SMALL: Values = {"rounds": 1, "local-steps": 2, "faug-steps": 5, "alignment-epochs": 3}
#: Columns that say nothing here.
LEFT_OUT = ("accuracy", "accuracy_sd", "target", "rounds_to_target", "reached")

Table = Mapping[tuple[str, str], Sequence[Measured]]
"""(regime, method) -> what came of its seeds."""
Edge = Mapping[tuple[int, str], Sequence[Measured]]
"""(shots, method) -> what came of its seeds."""


def table_row(part: str, label: str, found: Sequence[Measured]) -> Row:
    """Return a row of the table."""
    return {k: v for k, v in row(part, label, found, 0.0).items() if k not in LEFT_OUT}


def over(results: Mapping[tuple[str, str], Sequence[Measured]], part: str, better: str, base: str) -> float:
    """Return by how many points the clients' mean accuracy of one method is above another's."""
    return accuracies(results[part, better], "mean") - accuracies(results[part, base], "mean")


def table_targets(results: Table) -> list[Target]:
    """Judge what is expected of the table, as far as its rows were run."""
    asked = [("few-shot", "FD", "local only"), ("Dirichlet 0.1", "FD", "local only")]
    asked += [("few-shot", "FedProto", "local only, FedProto's models")]
    asked += [("few-shot", "co-distillation", "local only")]
    asked += [("few-shot", "FedKTL", "FedKTL, mu=0"), ("few-shot", "FedKTL", "FedKTL, untrained generator")]
    found = []
    for part, better, base in asked:
        if (part, better) in results and (part, base) in results:
            value = over(results, part, better, base)
            found.append(Target(f"{part}: {better} over {base}, points, above 0", value, 0.0, value > 0))
    return found


def gains(results: Edge, base: str) -> dict[int, float]:
    """Return FedKTL's gain over another method by shots, in points."""
    return {
        shots: accuracies(results[shots, "FedKTL"], "mean") - accuracies(results[shots, base], "mean")
        for shots in dict.fromkeys(shots for shots, _ in results)
    }


def edge_targets(results: Edge) -> list[Target]:
    """Judge whether the gain grows as shots shrink: each against the next larger number of shots."""
    found = []
    for base in ("local only", "FedKTL, mu=0"):
        by = gains(results, base)
        for more, fewer in pairwise(by):
            name = f"cloud-edge: gain over {base} at {fewer} shots, points, above that at {more}"
            found.append(Target(name, by[fewer], by[more], by[fewer] > by[more]))
    return found


def measure(
    setup: Setup,
    parts: Sequence[str],
    only: Collection[tuple[str, str]],
    shots: Sequence[int],
    families: str,
    more: Values,
    generators: Generators,
    jobs: int,
    root: Path,
    kept: Path | None,
) -> Outcome:
    """Run the table and the cloud-edge part as far as they are asked for; see :func:`main` for the arguments."""
    table = table_cells(setup, families, generators, more, only) if "table" in parts else {}
    edge = cloud_edge_cells(setup, generators, more, shots) if "cloud-edge" in parts else {}
    found = run_cells([c for group in (*table.values(), *edge.values()) for c in group], jobs, root, kept)

    def results(group: Sequence[Cell]) -> list[Measured]:
        return [found[cell.key()] for cell in group]

    outcome = Outcome()
    if table:
        measured = {key: results(group) for key, group in table.items()}
        outcome.rows += [table_row(part, label, runs) for (part, label), runs in measured.items()]
        outcome.targets += table_targets(measured)
        outcome.plots["knowledge"] = lambda figure: draw_table(figure, measured)
        outcome.plots["rounds"] = lambda figure: draw_rounds(figure, measured)
        outcome.notes += [
            f"models of the clients: {families}; FedProto's are those with features of one length; "
            "FL is FedAvg, whose clients all have the small cnn",
            "Dirichlet 0.1: a client's test images have its own label proportions, where it pays to know few labels; "
            "FAug makes training data IID, so its gain is to be looked for in FAug's set-up, tested on all labels",
            "accuracies are in per cent, on the clients' own test images, means of a run's last three measurements",
        ]
    if edge:
        alone = {key: results(group) for key, group in edge.items()}
        outcome.rows += [table_row(f"{few} shots", label, runs) for (few, label), runs in alone.items()]
        outcome.targets += edge_targets(alone)
        outcome.plots["cloud-edge"] = lambda figure: draw_edge(figure, alone)
        paper = ", ".join(f"{gain:+.2f} at {few}" for few, gain in SHOTS.items())
        outcome.notes.append(
            f"cloud-edge: the paper's gains over local training, on CIFAR-100: {paper} shots"
        )
    return outcome


def measure_faug(
    outcome: Outcome,
    data: str,
    only: Sequence[str],
    seeds: int,
    root: Path,
    rounds: int,
    steps: int,
    gan_steps: int,
) -> None:
    """Run FAug's own experiment, and add what came of it."""
    found = {
        label: [
            faug.run_paper(data, label, seed, root, rounds=rounds, steps=steps, gan_steps=gan_steps)
            for seed in range(1, seeds + 1)
        ]
        for label in only
    }
    if "FL" in only and data != "digits":
        found[faug.PAPERS] = [
            faug.run_paper(data, faug.PAPERS, 1, root, rounds=rounds, steps=1, gan_steps=gan_steps)
        ]
    outcome.rows += faug.rows(found, rounds)
    outcome.targets += faug.targets(found, data, rounds)
    outcome.notes += faug.notes(found, rounds, steps)


def draw_table(figure: Figure, results: Table) -> None:
    """Draw the clients' mean accuracy with its deviation, and the worst tenth, a panel for each regime."""
    regimes = list(dict.fromkeys(regime for regime, _ in results))
    names = list(dict.fromkeys(name for _, name in results))
    figure.set_size_inches(4.2 * len(regimes) + 2, 0.36 * len(names) + 1.6)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        here = [(place, results[regime, n]) for place, n in enumerate(names) if (regime, n) in results]
        for of, colour, mark, words in (
            ("mean", "tab:blue", "o", "mean"),
            ("worst", "tab:red", "x", "worst tenth"),
        ):
            last = [[getattr(m.last, of) for m in found] for _, found in here]
            values = [percent(average(part)) for part in last]
            known = [
                (place, v, part)
                for (place, _), v, part in zip(here, values, last, strict=True)
                if v is not None
            ]
            axes.errorbar(
                [v for _, v, _ in known],
                [place for place, _, _ in known],
                xerr=[100 * (spread(part) or 0.0) for _, _, part in known],
                fmt=mark,
                color=colour,
                capsize=3,
                label=words,
            )
        axes.set_title(regime)
        axes.set_xlabel("clients' accuracy, %")
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")


def draw_rounds(figure: Figure, results: Table) -> None:
    """Draw the clients' mean accuracy over the rounds, a panel for each regime."""
    regimes = list(dict.fromkeys(regime for regime, _ in results))
    names = list(dict.fromkeys(name for _, name in results))
    figure.set_size_inches(4.6 * len(regimes) + 2.4, 4)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        for place, name in enumerate(names):
            runs = [m for m in results.get((regime, name), ()) if m.points]
            rounds = [p.round for p in runs[0].points] if runs else []
            means = [average(m.points[i].mean for m in runs if i < len(m.points)) for i in range(len(rounds))]
            axes.plot(rounds, [percent(v) for v in means], color=f"C{place}", marker=".", label=name)
        axes.set_title(regime)
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("clients' mean accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")


def draw_edge(figure: Figure, results: Edge) -> None:
    """Draw FedKTL's gains by shots, each seed a dot, beside the paper's."""
    axes = figure.subplots()
    places = {shots: place for place, shots in enumerate(gains(results, "local only"))}
    for base, colour, shift in (("local only", "tab:blue", -0.08), ("FedKTL, mu=0", "tab:green", 0.08)):
        for shots, place in places.items():
            pairs = zip(results[shots, "FedKTL"], results[shots, base], strict=True)
            change = [100 * ((a.last.mean or 0.0) - (b.last.mean or 0.0)) for a, b in pairs]
            axes.scatter([place + shift] * len(change), change, color=colour, alpha=0.5, s=16)
        means = gains(results, base)
        axes.plot(
            [p + shift for p in places.values()], list(means.values()), color=colour, label=f"over {base}"
        )
    axes.plot(
        list(places.values()),
        [SHOTS[shots] for shots in places],
        "k:",
        label="paper, CIFAR-100, over local only",
    )
    axes.set_xticks(list(places.values()), [str(shots) for shots in places])
    axes.set_xlabel("training images of each class")
    axes.set_ylabel("FedKTL's gain, points")
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a command."""
    made = parser("knowledge", ABOUT)
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
    made.add_argument("--clients", type=int, default=20, help="1: the cloud-edge part, without a federation")
    made.add_argument("--edges", type=int, default=2)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument(
        "--images", type=int, default=500, help="images of a client, about; few-shot is cut out of them"
    )
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--families", help="models of the clients, e.g. HtFE-img-8; small ones unless given")
    made.add_argument("--generator-minutes", type=float, default=3.0, help="training of FedKTL's generator")
    made.add_argument(
        "--faug-steps", type=int, default=20, help="local steps in FAug's set-up; the paper's: 250"
    )
    made.add_argument("--gan-steps", type=int, default=1000, help="training of FAug's generator there")
    made.add_argument("--jobs", type=int, default=1, help="worker processes")
    made.add_argument("--only", nargs="+", metavar="METHOD", choices=LABELS, help="methods of the table")
    made.add_argument(
        "--regimes", nargs="+", choices=tuple(REGIMES), default=tuple(REGIMES), help="of the table"
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, help="table and faug unless given; or cloud-edge")
    made.add_argument("--resume", action="store_true", help="take what cells.jsonl in DIR holds already")
    arguments = made.parse_args(argv)
    outcome = Outcome()
    setup = setup_of(arguments, outcome)
    tiny, out = arguments.tiny, arguments.out
    alone = arguments.clients == 1
    parts = arguments.parts or (("cloud-edge",) if alone else ("table", "faug"))
    if alone and tuple(parts) != ("cloud-edge",):
        made.error("--clients 1 is the cloud-edge part; leave --parts out")
    kept = out / "cells.jsonl" if out else None
    if kept and not arguments.resume:
        kept.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        needed = set(parts) & {"table", "cloud-edge"}
        generators = Generators(Path(scratch), Path(scratch))
        if needed:
            place = (out or Path(scratch)) / "generator"
            steps = 3 if tiny else None
            generators = make_generators(
                place, setup.data, arguments.root, arguments.generator_minutes, steps
            )
        measured = measure(
            replace(setup, seeds=1) if tiny else setup,
            parts,
            TINY if tiny else list(product(arguments.regimes, arguments.only or LABELS)),
            list(SHOTS)[:2] if tiny else list(SHOTS),
            arguments.families or FAMILY,
            SMALL if tiny else {"rounds": arguments.rounds},
            generators,
            arguments.jobs,
            arguments.root,
            kept,
        )
    if "faug" in parts:
        rounds, steps, gan = (2, 1, 5) if tiny else (faug.ROUNDS, arguments.faug_steps, arguments.gan_steps)
        labels = ["FD", "FD + FAug"] if tiny else list(faug.METHODS)
        measure_faug(measured, setup.data, labels, setup.seeds, arguments.root, rounds, steps, gan)
    if needed:
        measured.notes.append(
            "FedKTL's generator learnt from the training split of the same data, clients' images included: "
            f"the best case for a transfer; mu is {TRANSFER:g}, as the authors' 50 is too much for steps this long"
        )
    measured.notes[:0] = outcome.notes
    return show("knowledge", ABOUT, measured, arguments)


if __name__ == "__main__":
    sys.exit(main())
