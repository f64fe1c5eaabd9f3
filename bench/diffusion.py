"""FedPhD's comparison of diffusion methods at a small scale: Fréchet distance and MB of training per link.

All methods make equal passes over the data. FedAvg at one local epoch, which the paper's table does not have, is the
control. ``python -m bench.diffusion``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.comparison import (
    EPOCHS,
    PER_ROUND,
    WINDOW,
    Comparison,
    Entry,
    Measured,
    RunFailedError,
    Settings,
)
from bench.diffusion_command import comparison_of, diffusion_parser, run_command
from bench.report import Outcome, Row, Target
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = (
    "FedPhD's comparison at a small scale: diffusion models of every method after equal passes over the data"
)

#: Step sizes that the search for SCAFFOLD tries: its option II is defined for SGD, which other methods do not use.
RATES = (0.03, 0.1, 0.3)

CONTROL, FULL, SCAFFOLD = "FedAvg E=1", "FedAvg E=5", "SCAFFOLD"
HIERARCHICAL: Settings = {"rg": WINDOW, "edge-choice": "auto"}
_PARTS: Settings = {"method": "feddiffuse", "eval-clients": True}
ENTRIES = (
    Entry(CONTROL, 1, 17.00, {"method": "fedavg"}),
    Entry(FULL, EPOCHS, 21.63, {"method": "fedavg"}),
    Entry("FedProx", EPOCHS, 22.42, {"method": "fedprox"}),
    Entry("MOON", EPOCHS, 20.43, {"method": "moon"}),
    Entry(SCAFFOLD, EPOCHS, 29.54, {"method": "scaffold"}),
    Entry("FedAvg E=5, SGD", EPOCHS, None, {"method": "fedavg", "optimizer": "sgd"}),
    Entry("USPLIT", EPOCHS, 25.38, {**_PARTS, "exchange": "usplit"}),
    Entry("ULATDEC", EPOCHS, 25.38, {**_PARTS, "exchange": "ulatdec"}),
    Entry("UDEC", EPOCHS, 25.38, {**_PARTS, "exchange": "udec"}),
    Entry("FedPhD", 1, 16.74, {**HIERARCHICAL, "method": "fedphd"}),
    Entry("FedPhD-OS", 1, 17.03, {**HIERARCHICAL, "method": "fedphd-os"}),
)
#: Row, column, row to divide by, lower and upper bound of the ratio.
BOUNDS = (
    ("FedPhD", "edge_cloud_mb", CONTROL, 0.0, 0.3),
    ("FedPhD", "frechet", CONTROL, 0.0, 1.25),
    ("FedPhD", "frechet", FULL, 0.0, 1.0),
    ("FedPhD-OS", "frechet", CONTROL, 0.0, 1.25),
    ("USPLIT", "client_edge_mb", FULL, 0.7, 0.8),
    ("ULATDEC", "client_edge_mb", FULL, 0.0, 0.85),
    ("UDEC", "client_edge_mb", FULL, 0.0, 0.65),
)
#: Rows that train with SGD, at the step size found for SCAFFOLD.
WITH_SGD = (SCAFFOLD, "FedAvg E=5, SGD")

NOTES = (
    "All rows made equal passes over the data: E=5 had a fifth of the rounds of E=1, as in the paper. "
    "FedAvg E=1 is the control that the paper's table lacks.",
    "paper_fid: FID on CIFAR-10 in the paper's table (2 classes a client); that of FedAvg E=1 is read from a plot "
    "in its authors' repository. The paper does not say which variant of FedDiffuse it ran. In the authors' code, "
    "FedProx and MOON add no gradient; here they are as published.",
    "FULL of FedDiffuse is FedAvg E=5. With ULATDEC and UDEC every client has its own network, so clients sampled "
    "the images, each from its own network, and all images together were evaluated.",
    "Baselines are flat (rg=1): their clients' bytes would cross the link to the cloud if there were no edges. "
    "Bytes are those of training; mu of FedProx is 0.01, of MOON 1 with temperature 0.5.",
)


def _value(found: Row, key: str) -> float:
    value = found[key]
    assert isinstance(value, int | float)
    return float(value)


def number(value: float | None) -> float:
    """Return a measured value, or NaN for None."""
    return float("nan") if value is None else value


def row(entry: Entry, runs: Sequence[Measured]) -> Row:
    """Return the table row of an entry: means over the seeds."""
    first, last = runs[0], [run.last for run in runs]
    frechet = [run.frechet for run in runs]
    return {
        "method": entry.name,
        "rounds": len({r.round for w in first.record.windows for r in w.rounds}),
        "rg": int(first.record.config["rg"]),
        "frechet": statistics.mean(frechet),
        "frechet_sd": statistics.stdev(frechet) if len(frechet) > 1 else None,
        "real": statistics.mean(number(q.floor.frechet) for q in last),
        "noise": statistics.mean(number(q.noise.frechet) for q in last),
        "is": statistics.mean(number(q.inception_score) for q in last),
        "params": first.record.model.params,
        "macs": first.record.model.macs,
        "client_edge_mb": first.bytes[CLIENT_EDGE] / 1e6,
        "edge_cloud_mb": first.bytes[EDGE_CLOUD] / 1e6,
        "seconds": statistics.mean(run.seconds for run in runs),
        "paper_fid": entry.paper,
    }


def measure(arguments: argparse.Namespace) -> Outcome:
    """Run the selected rows with all seeds."""
    entries = [entry for entry in ENTRIES if not arguments.only or entry.name in arguments.only]
    runs: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="diffusion-") as folder:
        comparison = comparison_of(arguments, Path(folder))
        rates = RATES[:1] if arguments.tiny else RATES
        searched = search(comparison, rates) if {e.name for e in entries} & set(WITH_SGD) else {}
        for entry in entries:
            more: Settings = {}
            if entry.name in WITH_SGD:
                more = {"learning-rate": min(searched, key=lambda rate: searched[rate])}
            for seed in range(arguments.seeds):
                newest = comparison.run(entry, seed, more)
                runs.setdefault(entry.name, []).append(newest)
                print(f"{entry.name}: {newest.frechet:.4g} after {newest.seconds:.0f} s", file=sys.stderr)
    outcome = Outcome(rows=[row(entry, runs[entry.name]) for entry in entries])
    rows = {str(r["method"]): r for r in outcome.rows}
    outcome.targets = targets(rows, next(iter(runs.values()))[0].record.model.params_dense)
    outcome.notes = [*NOTES, *setup_notes(comparison, rows, searched), *participation_notes(runs)]
    outcome.plots = {
        "curves": lambda figure: draw_curves(figure, runs, comparison),
        "bytes": lambda figure: draw_bytes(figure, rows),
        "samples": lambda figure: draw_samples(figure, runs),
    }
    return outcome


def search(comparison: Comparison, rates: Sequence[float]) -> dict[float, float]:
    """Return SCAFFOLD's Fréchet distance by step size after two fifths of its rounds, at least one."""
    [entry] = [e for e in ENTRIES if e.name == SCAFFOLD]
    short = dataclasses.replace(comparison, rounds=max(EPOCHS, comparison.rounds * 2 // 5))
    found: dict[float, float] = {}
    for rate in rates:
        try:
            run = short.run(entry, 0, {"learning-rate": rate, "eval-every": short.rounds, "sample-count": 1})
            found[rate] = run.frechet
        except RunFailedError:  # the training diverged
            found[rate] = math.inf
    return found


def targets(rows: Mapping[str, Row], dense: int) -> list[Target]:
    """Return the targets whose rows were run."""
    found: list[Target] = []
    if "FedPhD" in rows:
        found.append(
            Target.at_most("FedPhD's parameters over dense", _value(rows["FedPhD"], "params") / dense, 0.6)
        )
    for name, key, other, low, high in BOUNDS:
        if name in rows and other in rows:
            value = _value(rows[name], key) / _value(rows[other], key)
            what = f"{name}'s {key} over that of {other}"
            found.append(Target.within(what, value, low, high) if low else Target.at_most(what, value, high))
    return found


def setup_notes(
    comparison: Comparison, rows: Mapping[str, Row], searched: Mapping[float, float]
) -> list[str]:
    """Return the notes that depend on the set-up and on the results."""
    per_round = min(PER_ROUND, comparison.clients)
    notes = [
        f"{comparison.clients} clients by FedPhD's partition (2 classes each, or 3 where they do not divide "
        f"evenly), {per_round} in a round, {comparison.edges} edges, {comparison.passes:g} passes over the data, "
        f"pruning-ratio {comparison.base['pruning-ratio']}."
    ]
    if searched:
        tried = ", ".join(f"{rate:g}: {found:.4g}" for rate, found in searched.items())
        reached = {name: _value(rows[name], "frechet") for name in (*WITH_SGD, FULL) if name in rows}
        notes.append(
            "SCAFFOLD trains with SGD by its definition (option II). Fréchet distance by step size after two fifths "
            f"of the rounds: {tried}; both rows with SGD use the best one, selected by the same measure as the table. "
            f"At the end: {', '.join(f'{name} {found:.4g}' for name, found in reached.items())}."
        )
    return notes


def participation_notes(runs: Mapping[str, list[Measured]]) -> list[str]:
    """Return a note on the clients' number of rounds, which is uneven when few rounds sample half of them."""
    notes = []
    for name in (CONTROL, FULL, "UDEC"):
        if name in runs:
            record = runs[name][0].record
            counts = dict.fromkeys(record.clients, 0)
            for window in record.windows:
                for entry in window.rounds:
                    for part in entry.participants:
                        counts[part.client] += 1
            notes.append(f"{name}: {' '.join(map(str, sorted(counts.values())))}")
    if not notes:
        return []
    return [
        f"Rounds that each client took part in (first seed), {'; '.join(notes)}. A client with 0 rounds does not "
        "influence the model, and with ULATDEC and UDEC samples with its initial layers."
    ]


def colour(i: int) -> str:
    """Return the colour of row i, unique among the rows."""
    return f"C{i}" if i < len(ENTRIES) - 1 else "black"


def draw_curves(figure: Figure, runs: Mapping[str, list[Measured]], comparison: Comparison) -> None:
    """Draw the Fréchet distances of the first seed over the passes."""
    axes = figure.subplots()
    epochs = {entry.name: entry.epochs for entry in ENTRIES}
    share = comparison.passes / comparison.rounds
    for i, (name, found) in enumerate(runs.items()):
        quality = found[0].record.quality
        passes = [q.round * epochs[name] * share for q in quality]
        marker, line = "osvD^P"[i % 6], "-" if epochs[name] == 1 else "--"
        found_at = [number(q.frechet) for q in quality]
        axes.plot(passes, found_at, marker=marker, linestyle=line, color=colour(i), label=name)
    last = next(iter(runs.values()))[0].last
    for label, value in {"noise": last.noise.frechet, "real images": last.floor.frechet}.items():
        axes.axhline(number(value), linestyle=":", linewidth=1, color="grey")
        axes.annotate(
            label, (0.01, number(value)), xycoords=("axes fraction", "data"), verticalalignment="bottom"
        )
    axes.set_yscale("log")
    axes.set_xlabel("passes over the data")
    axes.set_ylabel(f"Fréchet distance ({last.features})")
    figure.legend(loc="outside right upper", fontsize="small")


def draw_bytes(figure: Figure, rows: Mapping[str, Row]) -> None:
    """Draw each method's distance against its bytes, one panel per kind of link."""
    axes = figure.subplots(1, 2, sharey=True)
    for place, key, title in zip(
        axes, ("client_edge_mb", "edge_cloud_mb"), ("client-edge", "edge-cloud"), strict=True
    ):
        for i, (name, found) in enumerate(rows.items()):
            x, y = _value(found, key), _value(found, "frechet")
            label = name if place is axes[0] else None
            place.plot([x], [y], "osvD^P"[i % 6], color=colour(i), label=label)
        place.set_xlim(left=0)
        place.set_xlabel(f"MB of training, {title}")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("Fréchet distance")
    figure.legend(loc="outside right upper", fontsize="small")


def draw_samples(figure: Figure, runs: Mapping[str, list[Measured]]) -> None:
    """Draw the last sample grid of each method."""
    columns = 4
    figure.set_size_inches(8, 2.3 * -(-len(runs) // columns))
    places = figure.subplots(-(-len(runs) // columns), columns, squeeze=False).ravel()
    for place in places:
        place.axis("off")
    for place, (name, found) in zip(places, runs.items(), strict=False):
        place.imshow(found[0].grid, cmap="gray", vmin=0, vmax=255)
        place.set_title(f"{name}: {found[0].frechet:.3g}", fontsize="small")


def main() -> int:
    """Run the command."""
    options = diffusion_parser("diffusion", ABOUT, ENTRIES, rounds=25)
    options.add_argument("--seeds", type=int, default=1, help="number of repetitions (1)")
    return run_command("diffusion", ABOUT, measure, options)


if __name__ == "__main__":
    sys.exit(main())
