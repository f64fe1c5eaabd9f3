"""An experiment: Power-of-Choice that ranks clients by F_k against n_k F_k, on devices of different resources.

Power-of-Choice selects the clients with the largest local loss F_k. The global loss is Σ p_k F_k, so a client
contributes p_k F_k to it; and a client with many images may be able to train only a small sub-model. Numbers of images
are log-normal, and clients train HeteroFL's widths 1, 1/2 and 1/4, assigned in the order of their data or against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.cells import Cell, Measured, Setup, average
from bench.claims import Values, row
from bench.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEME = "dirichlet=0.3+lognormal=1.0"
SETTINGS: Values = {
    "method": "heterofl",
    "masked-loss": False,
    "levels": "1,0.5,0.25",
    "level-choice": "device",
    "fraction": 0.2,
    "rounds": 24,
    "learning-rate": 0.2,
    "local-steps": 10,
    "eval-every": 4,
}
#: Power-of-Choice: the clients of largest loss of ten candidates.
RANK: Values = {"selection": "pow-d", "candidates": 10}
#: Selection rule, and weighting of the mean.
STRATEGIES: Mapping[str, Values] = {
    "uniform draw, mean by n_k": {"selection": "uniform", "weighting": "samples"},
    "draw by n_k, plain mean": {"selection": "proportional", "weighting": "uniform"},
    "rank by F_k, plain mean": {**RANK, "weighting": "uniform"},
    "rank by n_k F_k, plain mean": {**RANK, "weighting": "uniform", "loss-weight": "samples"},
    "rank by F_k, mean by n_k": {**RANK, "weighting": "samples"},
    "rank by n_k F_k, mean by n_k": {**RANK, "weighting": "samples", "loss-weight": "samples"},
}
#: How widths are assigned.
DEVICES = {"with-data": "large data on strong devices", "against-data": "large data on weak devices"}
TARGET = 0.6


def cells(setup: Setup) -> dict[tuple[str, str], list[Cell]]:
    """Return the cells by device order and strategy."""
    return {
        (devices, label): [
            Cell(setup, SCHEME, {**SETTINGS, **settings}, seed, devices=devices)
            for seed in range(1, setup.seeds + 1)
        ]
        for devices in DEVICES
        for label, settings in STRATEGIES.items()
    }


def rows(results: Mapping[tuple[str, str], Sequence[Measured]]) -> list[Row]:
    """Return a row for each strategy and order of devices."""
    return [
        row(f"question: {DEVICES[devices]}", label, found, TARGET)
        for (devices, label), found in results.items()
    ]


def notes(results: Mapping[tuple[str, str], Sequence[Measured]]) -> list[str]:
    """Return the differences between ranking by n_k F_k and by F_k, by seed."""
    found = []
    for devices, description in DEVICES.items():
        for mean in ("plain mean", "mean by n_k"):
            weighted, plain = (results[devices, f"rank by {rank}, {mean}"] for rank in ("n_k F_k", "F_k"))
            parts = []
            for of, what in (("accuracy", "accuracy"), ("worst", "worst tenth")):
                changes = [
                    100 * (a - b)
                    for a, b in (
                        (getattr(x.last, of), getattr(y.last, of))
                        for x, y in zip(weighted, plain, strict=True)
                    )
                    if a is not None and b is not None
                ]
                if changes:
                    by_seed = ", ".join(f"{c:+.1f}" for c in changes)
                    parts.append(f"{what} {sum(changes) / len(changes):+.1f} points ({by_seed})")
            found.append(
                f"question, {description}, {mean}: n_k F_k instead of F_k changes {'; '.join(parts)}"
            )
    return found


def draw(figure: Figure, results: Mapping[tuple[str, str], Sequence[Measured]]) -> None:
    """Draw the mean accuracy of the seeds over the rounds, a panel for each order of devices."""
    figure.set_size_inches(11, 4.6)
    axes = figure.subplots(1, len(DEVICES), sharey=True)
    for place, (devices, description) in zip(axes, DEVICES.items(), strict=True):
        for label in STRATEGIES:
            draw_curve(place, results[devices, label], label)
        place.set_title(description)
        place.set_xlabel("round")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy of the whole network, %")
    axes[0].legend(fontsize="small")


def draw_curve(
    axes: Axes, found: Sequence[Measured], label: str, of: str = "main", dashed: bool = False
) -> None:
    """Draw the mean over the seeds of an attribute of `Point` against the rounds."""
    from matplotlib.ticker import MaxNLocator

    whole = [m for m in found if len(m.points) == len(found[0].points)]
    means = [
        average(getattr(p, of) for p in points) for points in zip(*(m.points for m in whole), strict=True)
    ]
    drawn = [
        (p.round, 100 * value) for p, value in zip(found[0].points, means, strict=True) if value is not None
    ]
    axes.plot(*zip(*drawn, strict=True), label=label, linewidth=1.4, linestyle="--" if dashed else "-")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
