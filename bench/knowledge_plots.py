"""Plots of `bench.knowledge`, and FedKTL's gains that one of them shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.cells import Measured, average, spread
from bench.claims import accuracies, percent
from bench.knowledge_setup import SHOTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = Mapping[tuple[str, str], Sequence[Measured]]
"""(regime, method) -> results of its seeds."""
Edge = Mapping[tuple[int, str], Sequence[Measured]]
"""(shots, method) -> results of its seeds."""


def gains(results: Edge, base: str, *, best: bool = False) -> dict[int, float]:
    """Return FedKTL's gain over another method by shots, in points, at the last measurements or at the best ones."""
    return {
        shots: accuracies(results[shots, "FedKTL"], "mean", best=best)
        - accuracies(results[shots, base], "mean", best=best)
        for shots in dict.fromkeys(shots for shots, _ in results)
    }


def draw_table(figure: Figure, results: Table) -> None:
    """Draw the clients' mean accuracy with its deviation, and the worst tenth, a panel for each regime."""
    regimes = list(dict.fromkeys(regime for regime, _ in results))
    names = list(dict.fromkeys(name for _, name in results))
    figure.set_size_inches(4.2 * len(regimes) + 2, 0.36 * len(names) + 1.6)
    panels = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        here = [(place, results[regime, n]) for place, n in enumerate(names) if (regime, n) in results]
        for of, colour, mark, label in (
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
                label=label,
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
            colour = f"C{place}" if place < 10 else "black"  # C0 to C9 exist
            axes.plot(rounds, [percent(v) for v in means], color=colour, marker=".", label=name)
        axes.set_title(regime)
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("clients' mean accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")


def draw_edge(figure: Figure, results: Edge) -> None:
    """Draw FedKTL's gains by shots, a dot per seed, with the paper's gains as reference."""
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
