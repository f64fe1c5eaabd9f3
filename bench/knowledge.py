"""Knowledge exchange between heterogeneous models: the clients' accuracy (%), KB per link and round, seconds.

Four parts: a table of all methods, FedKTL with a single client ("cloud-edge"), an ablation of FedKTL's pairs
("transfer", `bench.fedktl_ablation`), and FAug's experiment with the bits of a whole run (`bench.faug`). Cells run the
code of the tiers on a tree in one process. ``python -m bench.knowledge --data mnist --clients 20 --seeds 3``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

from bench import faug, fedktl_ablation
from bench.cell_command import cell_parser, results_file_of, setup_of
from bench.cells import Cell, Measured, Setup, average, run_cells
from bench.claims import Values, accuracies, percent, row
from bench.knowledge_plots import Edge, Table, draw_edge, draw_rounds, draw_table, gains
from bench.knowledge_setup import (
    FAMILY,
    GENERATOR_STEPS,
    REGIMES,
    ROUNDS,
    ROUNDS_ALONE,
    SHOTS,
    TRANSFER,
    Generators,
    cloud_edge_cells,
    make_generators,
    methods,
    table_cells,
)
from bench.report import Outcome, Row, Target, show

ABOUT = "Knowledge exchange between heterogeneous models: the clients' accuracy, bytes on each link, seconds"
PARTS = ("table", "cloud-edge", "transfer", "faug")
#: The parts with a single client.
SINGLE_CLIENT = ("cloud-edge", "transfer")
LABELS = tuple(methods("cnn4", Generators(Path("a"), Path("b"))))
#: Rows of a tiny run, few enough to run in this process.
TINY = [("few-shot", label) for label in ("local only", "FD", "FedProto", "co-distillation", "FedKTL")]
TINY += [("Dirichlet 0.1", "FD + FAug")]
SMALL: Values = {"rounds": 1, "local-steps": 2, "faug-steps": 5, "alignment-epochs": 3}
#: Columns that do not apply here.
LEFT_OUT = ("accuracy", "accuracy_sd", "target", "rounds_to_target", "reached")


def table_row(part: str, label: str, found: Sequence[Measured]) -> Row:
    """Return a row of the table; its column "best" is the clients' mean accuracy in a run's best round."""
    entry = {k: v for k, v in row(part, label, found, 0.0).items() if k not in LEFT_OUT}
    best = percent(average(m.best.mean for m in found))
    index = list(entry).index("worst10")
    return dict([*list(entry.items())[:index], ("best", best), *list(entry.items())[index:]])


def over(results: Table, part: str, better: str, base: str, *, best: bool = False) -> float:
    """Return the difference in points between the clients' mean accuracy of two methods."""
    first, second = (accuracies(results[part, label], "mean", best=best) for label in (better, base))
    return first - second


def table_targets(results: Table) -> list[Target]:
    """Return the targets of the table whose rows were run."""
    expected = [("few-shot", "FD", "local only"), ("Dirichlet 0.1", "FD", "local only")]
    expected += [("few-shot", "FedProto", "local only, FedProto's models")]
    expected += [("few-shot", "co-distillation", "local only")]
    expected += [
        ("few-shot", "FedKTL", "FedKTL, mu=0"),
        ("few-shot", "FedKTL", "FedKTL, untrained generator"),
    ]
    found = []
    for part, better, base in expected:
        if (part, better) in results and (part, base) in results:
            # The authors of FedKTL report the best round.
            for best in (False, True) if better == "FedKTL" else (False,):
                value = over(results, part, better, base, best=best)
                name = f"{part}: {better} over {base}, points{' of the best round' if best else ''}, above 0"
                found.append(Target(name, value, 0.0, value > 0))
    return found


def edge_targets(results: Edge) -> list[Target]:
    """Return targets: the gain grows with fewer shots, compared with the next larger number of shots."""
    found = []
    for base, best in product(("local only", "FedKTL, mu=0"), (False, True)):
        by = gains(results, base, best=best)
        suffix = ", best rounds" if best else ""
        for more, fewer in pairwise(by):
            name = f"cloud-edge: gain over {base} at {fewer} shots, points{suffix}, above that at {more}"
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
    results_file: Path | None,
) -> Outcome:
    """Run the parts "table" and "cloud-edge" if selected; see :func:`main` for the arguments."""
    table = table_cells(setup, families, generators, more, only) if "table" in parts else {}
    edge = cloud_edge_cells(setup, generators, more, shots) if "cloud-edge" in parts else {}
    found = run_cells(
        [c for group in (*table.values(), *edge.values()) for c in group], jobs, root, results_file
    )

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
            f"models of the clients: {families}; FedProto's are those with features of equal length; "
            "FL is FedAvg, whose clients all have the small cnn",
            "Dirichlet 0.1: a client's test images have its own label proportions, which favours models of few labels; "
            "FAug makes training data IID, so its gain shows in FAug's set-up, which tests on all labels",
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
    """Run FAug's experiment and add its rows, targets and notes to the outcome."""
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
    """Run the command."""
    options = cell_parser("knowledge", ABOUT, jobs=1)
    options.add_argument(
        "--rounds", type=int, help=f"rounds of a run ({ROUNDS}; {ROUNDS_ALONE} in the parts with one client)"
    )
    options.add_argument("--families", help=f"models of the clients, e.g. HtFE-img-8 ({FAMILY})")
    options.add_argument(
        "--generator-steps", type=int, default=GENERATOR_STEPS, help="training steps of FedKTL's generator"
    )
    options.add_argument(
        "--generator-minutes", type=float, help="train it for a time instead, which depends on load"
    )
    options.add_argument(
        "--faug-steps", type=int, default=20, help="local steps in FAug's set-up (20; the paper: 250)"
    )
    options.add_argument("--gan-steps", type=int, default=1000, help="training steps of FAug's generator")
    options.add_argument("--only", nargs="+", metavar="METHOD", choices=LABELS, help="methods of the table")
    options.add_argument(
        "--regimes", nargs="+", choices=tuple(REGIMES), default=tuple(REGIMES), help="of the table"
    )
    options.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="default: table and faug; with one client: cloud-edge. transfer is an ablation of FedKTL's pairs",
    )
    arguments = options.parse_args(argv)
    outcome = Outcome()
    setup = setup_of(arguments, outcome)
    tiny, out = arguments.tiny, arguments.out
    alone = arguments.clients == 1
    parts = arguments.parts or (("cloud-edge",) if alone else ("table", "faug"))
    if alone and not set(parts) <= set(SINGLE_CLIENT):
        options.error(f"--clients 1 runs the parts {' and '.join(SINGLE_CLIENT)}")
    results_file = results_file_of(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        needed = set(parts) & {"table", *SINGLE_CLIENT}
        generators = Generators(Path(scratch), Path(scratch))
        if needed:
            folder = (out or Path(scratch)) / "generator"
            generators = make_generators(
                folder,
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
            results_file,
        )
        if "transfer" in parts:
            found = fedktl_ablation.measure(
                setup, generators, more, arguments.root, 5 if tiny else fedktl_ablation.JUDGE_STEPS
            )
            measured.rows += fedktl_ablation.rows(found)
            measured.targets += fedktl_ablation.targets(found)
            measured.notes += fedktl_ablation.notes(found)
    if "faug" in parts:
        rounds, steps, gan = (2, 1, 5) if tiny else (faug.ROUNDS, arguments.faug_steps, arguments.gan_steps)
        labels = ["FD", "FD + FAug"] if tiny else list(faug.METHODS)
        measure_faug(measured, setup.data, labels, setup.seeds, arguments.root, rounds, steps, gan)
    if needed:
        measured.notes.append(
            "FedKTL's generator was trained on the training split of the same data, including the clients' images: "
            f"the best case for a transfer; its rows have mu={TRANSFER:g}, step size 0.01 and clip-norm=100; "
            "best is the clients' mean accuracy in a run's best round, which its authors report"
        )
    measured.notes[:0] = outcome.notes
    return show("knowledge", ABOUT, measured, arguments)


if __name__ == "__main__":
    sys.exit(main())
