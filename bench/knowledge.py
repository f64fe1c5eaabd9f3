"""Knowledge exchange between unlike models: every method of it on one tree, one client without a federation, FAug.

Cells run the tiers' own code on a tree in one process (`bench.cells`); FAug's own experiment counts a whole
run's bits (`bench.faug`).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

from bench import faug, transfer
from bench.cells import TRAIN_IMAGES, Cell, Measured, Setup, average, run_cells
from bench.claims import Values, accuracies, percent, row
from bench.exchanges import (
    ALONE,
    FAMILY,
    GENERATOR_STEPS,
    REGIMES,
    ROUNDS,
    SHOTS,
    TRANSFER,
    Generators,
    cloud_edge_cells,
    make_generators,
    methods,
    table_cells,
)
from bench.knowledge_plots import Edge, Table, draw_edge, draw_rounds, draw_table, gains
from bench.methods import setup_of
from bench.report import Outcome, Row, Target, parser, show

ABOUT = "Knowledge exchange between unlike models: the clients' accuracy, bytes on each link, seconds"
PARTS = ("table", "cloud-edge", "transfer", "faug")
#: Those of one client.
OF_ONE = ("cloud-edge", "transfer")
LABELS = tuple(methods("cnn4", Generators(Path("a"), Path("b"))))
#: Rows of a tiny run: so few that they need no process of their own.
TINY = [("few-shot", label) for label in ("local only", "FD", "FedProto", "co-distillation", "FedKTL")]
TINY += [("Dirichlet 0.1", "FD + FAug")]
SMALL: Values = {"rounds": 1, "local-steps": 2, "faug-steps": 5, "alignment-epochs": 3}
#: Columns that say nothing here.
LEFT_OUT = ("accuracy", "accuracy_sd", "target", "rounds_to_target", "reached")


def table_row(part: str, label: str, found: Sequence[Measured]) -> Row:
    """Return a row of the table; `best` is the clients' mean accuracy in a run's best round."""
    entry = {k: v for k, v in row(part, label, found, 0.0).items() if k not in LEFT_OUT}
    best = percent(average(m.best.mean for m in found))
    place = list(entry).index("worst10")
    return dict([*list(entry.items())[:place], ("best", best), *list(entry.items())[place:]])


def over(results: Table, part: str, better: str, base: str, *, best: bool = False) -> float:
    """Return by how many points the clients' mean accuracy of one method is above another's."""
    first, second = (accuracies(results[part, label], "mean", best=best) for label in (better, base))
    return first - second


def table_targets(results: Table) -> list[Target]:
    """Judge what is expected of the table, as far as its rows were run."""
    asked = [("few-shot", "FD", "local only"), ("Dirichlet 0.1", "FD", "local only")]
    asked += [("few-shot", "FedProto", "local only, FedProto's models")]
    asked += [("few-shot", "co-distillation", "local only")]
    asked += [("few-shot", "FedKTL", "FedKTL, mu=0"), ("few-shot", "FedKTL", "FedKTL, untrained generator")]
    found = []
    for part, better, base in asked:
        if (part, better) in results and (part, base) in results:
            # The authors of FedKTL report the best round.
            for best in (False, True) if better == "FedKTL" else (False,):
                value = over(results, part, better, base, best=best)
                name = f"{part}: {better} over {base}, points{' of the best round' if best else ''}, above 0"
                found.append(Target(name, value, 0.0, value > 0))
    return found


def edge_targets(results: Edge) -> list[Target]:
    """Judge whether the gain grows as shots shrink: each against the next larger number of shots."""
    found = []
    for base, best in product(("local only", "FedKTL, mu=0"), (False, True)):
        by = gains(results, base, best=best)
        words = ", best rounds" if best else ""
        for more, fewer in pairwise(by):
            name = f"cloud-edge: gain over {base} at {fewer} shots, points{words}, above that at {more}"
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
    made.add_argument(
        "--rounds", type=int, help=f"{ROUNDS} unless given, {ALONE} in the parts with one client"
    )
    made.add_argument("--families", help="models of the clients, e.g. HtFE-img-8; small ones unless given")
    made.add_argument(
        "--generator-steps", type=int, default=GENERATOR_STEPS, help="training of FedKTL's generator"
    )
    made.add_argument(
        "--generator-minutes", type=float, help="by the clock instead, which a busy machine shows in"
    )
    made.add_argument(
        "--faug-steps", type=int, default=20, help="local steps in FAug's set-up; the paper's: 250"
    )
    made.add_argument("--gan-steps", type=int, default=1000, help="training of FAug's generator there")
    made.add_argument("--jobs", type=int, default=1, help="worker processes")
    made.add_argument("--only", nargs="+", metavar="METHOD", choices=LABELS, help="methods of the table")
    made.add_argument(
        "--regimes", nargs="+", choices=tuple(REGIMES), default=tuple(REGIMES), help="of the table"
    )
    made.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="unless given table and faug, or cloud-edge where there is one client; transfer looks into FedKTL's term",
    )
    made.add_argument("--resume", action="store_true", help="take what cells.jsonl in DIR holds already")
    arguments = made.parse_args(argv)
    outcome = Outcome()
    setup = setup_of(arguments, outcome)
    tiny, out = arguments.tiny, arguments.out
    alone = arguments.clients == 1
    parts = arguments.parts or (("cloud-edge",) if alone else ("table", "faug"))
    if alone and not set(parts) <= set(OF_ONE):
        made.error(f"--clients 1 has the parts {' and '.join(OF_ONE)}")
    kept = out / "cells.jsonl" if out else None
    if kept and not arguments.resume:
        kept.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        needed = set(parts) & {"table", *OF_ONE}
        generators = Generators(Path(scratch), Path(scratch))
        if needed:
            place = (out or Path(scratch)) / "generator"
            generators = make_generators(
                place,
                setup.data,
                arguments.root,
                steps=3 if tiny else arguments.generator_steps,
                minutes=None if tiny else arguments.generator_minutes,
            )
        setup = replace(setup, seeds=1) if tiny else setup
        more = SMALL if tiny else {"rounds": arguments.rounds} if arguments.rounds else {}
        measured = measure(
            setup,
            parts,
            TINY if tiny else list(product(arguments.regimes, arguments.only or LABELS)),
            list(SHOTS)[:2] if tiny else list(SHOTS),
            arguments.families or FAMILY,
            more,
            generators,
            arguments.jobs,
            arguments.root,
            kept,
        )
        if "transfer" in parts:
            found = transfer.measure(
                setup, generators, more, arguments.root, 5 if tiny else transfer.JUDGE_STEPS
            )
            measured.rows += transfer.rows(found)
            measured.targets += transfer.targets(found)
            measured.notes += transfer.notes(found)
    if "faug" in parts:
        rounds, steps, gan = (2, 1, 5) if tiny else (faug.ROUNDS, arguments.faug_steps, arguments.gan_steps)
        labels = ["FD", "FD + FAug"] if tiny else list(faug.METHODS)
        measure_faug(measured, setup.data, labels, setup.seeds, arguments.root, rounds, steps, gan)
    if needed:
        measured.notes.append(
            "FedKTL's generator learnt from the training split of the same data, clients' images included: "
            f"the best case for a transfer; its rows have mu={TRANSFER:g}, steps of 0.01 and clip-norm=100; "
            "best is the clients' mean accuracy in a run's best round, which its authors report"
        )
    measured.notes[:0] = outcome.notes
    return show("knowledge", ABOUT, measured, arguments)


if __name__ == "__main__":
    sys.exit(main())
