"""Megabytes of training until a Fréchet distance is reached: FedPhD over the tree against flat FedAvg.

Bytes are those of the record's links, up to a run's first evaluation at the smallest distance that all rows reach.
``python -m bench.bytes``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.comparison import EPOCHS, WINDOW, Entry, Measured, Settings
from bench.diffusion import colour, number
from bench.diffusion_command import comparison_of, diffusion_parser, run_command
from bench.report import Outcome, Row, Target
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "Bytes to equal Fréchet distance: FedPhD, with and without codecs, against flat FedAvg at E=1 and E=5"

CONTROL, FULL = "FedAvg E=1", "FedAvg E=5"
PLAIN, HALF, BEST = "FedPhD", "FedPhD, half precision", "FedPhD-OS, 8 bits"
_TREE: Settings = {"rg": WINDOW, "edge-choice": "auto"}
#: Both directions of both links; uplinks send differences, whose small values lose little in half precision.
_HALF: Settings = {"downlink": "fp16", "codec": "fp16", "edge-codec": "fp16"}
#: 127 levels and a sign take 8 bits; one norm per tensor.
_BITS: Settings = {
    "downlink": "fp16",
    "codec": "qsgd",
    "edge-codec": "qsgd",
    "codec-levels": 127,
    "codec-norm": "tensor",
}
ENTRIES = (
    Entry(CONTROL, 1, None, {"method": "fedavg"}),
    Entry(FULL, EPOCHS, None, {"method": "fedavg"}),
    Entry(PLAIN, 1, None, {**_TREE, "method": "fedphd"}),
    Entry(HALF, 1, None, {**_TREE, **_HALF, "method": "fedphd"}),
    Entry(BEST, 1, None, {**_TREE, **_BITS, "method": "fedphd-os"}),
)
PAPER, OURS = 0.88, 0.95

NOTES = (
    "below_MB, above_MB: on the links below and above the edges. star, tree, all: share of bytes saved against FedAvg "
    "at E=1 and E=5. star: on the link to the cloud, if flat FedAvg has no edges and its clients send to the cloud. "
    "tree: on the link to the cloud, if edges aggregate FedAvg every round. all: on both links, against the star.",
    "Bytes are those of training in both directions, with plans and reports, up to the first evaluation at the "
    "distance that every row reaches; evaluations are five rounds at E=1 apart.",
    "At the paper's sizes (dense 143.0 MB, pruned 81.4 MB, 2 edges, rg=5) the saving is 88 % against FedAvg E=5 in a "
    "star with 10 clients in a round, counting the link to the cloud alone; with 4 clients it is 71.5 %.",
)


@dataclass(frozen=True)
class Point:
    """An evaluation: its round, its distance, and the MB of training until then by link."""

    round: int
    frechet: float
    client_edge: float
    edge_cloud: float


def curve(run: Measured) -> list[Point]:
    """Return a run's evaluations with the MB sent until then."""
    return [
        Point(
            q.round,
            number(q.frechet),
            run.sent[q.window][CLIENT_EDGE] / 1e6,
            run.sent[q.window][EDGE_CLOUD] / 1e6,
        )
        for q in run.record.quality
    ]


def common_distance(curves: Mapping[str, Sequence[Point]]) -> float:
    """Return the smallest distance that every run reaches."""
    return max(min(p.frechet for p in points) for points in curves.values())


def reached(points: Sequence[Point], distance: float) -> Point:
    """Return a run's first evaluation at a distance or below."""
    return next(p for p in points if p.frechet <= distance)


def saved(spent: float, reference: float) -> float:
    """Return the share of a reference's bytes that was saved."""
    return 1 - spent / reference


def rows_of(curves: Mapping[str, Sequence[Point]], runs: Mapping[str, Measured]) -> list[Row]:
    """Return a row for each run."""
    distance = common_distance(curves)
    at = {name: reached(points, distance) for name, points in curves.items()}
    found: list[Row] = []
    for name, point in at.items():
        row: Row = {
            "run": name,
            "rounds": point.round,
            "frechet": point.frechet,
            "best": min(p.frechet for p in curves[name]),
            "params": runs[name].record.model.params,
            "below_MB": point.client_edge,
            "above_MB": point.edge_cloud,
        }
        tree = runs[name].record.config["rg"] != 1
        spent = point.client_edge + point.edge_cloud if tree else point.client_edge
        for reference in (CONTROL, FULL):
            if reference in at and tree:
                star, flat = at[reference].client_edge, at[reference].edge_cloud
                row |= {
                    f"star_{_short(reference)}": saved(point.edge_cloud, star),
                    f"tree_{_short(reference)}": saved(point.edge_cloud, flat),
                    f"all_{_short(reference)}": saved(spent, star),
                }
        found.append(row)
    return found


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return targets: FedPhD's savings against the paper's, our best settings against `OURS`."""
    found = []
    for row in rows:
        for reference in (CONTROL, FULL):
            for way in ("star", "tree"):
                value = row.get(f"{way}_{_short(reference)}")
                if isinstance(value, float) and row["run"] in (PLAIN, BEST):
                    limit = PAPER if row["run"] == PLAIN else OURS
                    name = f"{row['run']}: bytes to the cloud saved against {reference} in a {way}"
                    found.append(Target.at_least(name, value, limit))
    return found


def _short(name: str) -> str:
    return name.removeprefix("FedAvg ").replace("=", "").lower()


def measure(arguments: argparse.Namespace) -> Outcome:
    """Run every selected row once and compare them."""
    runs: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="bytes-") as folder:
        comparison = comparison_of(arguments, Path(folder))
        for entry in ENTRIES:
            if arguments.only and entry.name not in arguments.only:
                continue
            rg = int(entry.settings.get("rg", 1))
            every = max(1, WINDOW // (rg * entry.epochs))
            runs[entry.name] = run = comparison.run(entry, arguments.seed, {"eval-every": every})
            print(f"{entry.name}: {run.frechet:.4g} after {run.seconds:.0f} s", file=sys.stderr)
    curves = {name: curve(run) for name, run in runs.items()}
    outcome = Outcome(rows=rows_of(curves, runs))
    outcome.targets = targets(outcome.rows)
    last = next(iter(runs.values())).last
    outcome.notes = [
        *NOTES,
        f"Distance that every row reaches: {common_distance(curves):.4g}; real images "
        f"{number(last.floor.frechet):.4g}, noise {number(last.noise.frechet):.4g}. {comparison.clients} clients, "
        f"{comparison.edges} edges, at most {comparison.passes:g} passes over the data, one seed.",
    ]
    outcome.plots["bytes"] = lambda figure: draw(figure, curves)
    return outcome


def draw(figure: Figure, curves: Mapping[str, Sequence[Point]]) -> None:
    """Draw distance over bytes: to the cloud in one panel, on all links in the other."""
    figure.set_size_inches(10, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, points) in enumerate(curves.items()):
        flat = name in (CONTROL, FULL)
        cloud = [p.client_edge if flat else p.edge_cloud for p in points]
        everything = [p.client_edge if flat else p.client_edge + p.edge_cloud for p in points]
        label = f"{name}, star" if flat else name
        for place, values in zip(axes, (cloud, everything), strict=True):
            place.plot(values, [p.frechet for p in points], marker=".", color=colour(i), label=label)
    distance = common_distance(curves)
    for place, title in zip(axes, ("to the cloud", "all links"), strict=True):
        if math.isfinite(distance):
            place.axhline(distance, linestyle=":", linewidth=1, color="grey")
        place.set_xscale("log")
        place.set_xlabel(f"MB of training, {title}")
        place.set_yscale("log")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("Fréchet distance")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")


def main() -> int:
    """Run the command."""
    options = diffusion_parser("bytes", ABOUT, ENTRIES, rounds=40)
    options.add_argument("--seed", type=int, default=0, help="index of the repetition (0)")
    return run_command("bytes", ABOUT, measure, options)


if __name__ == "__main__":
    sys.exit(main())
