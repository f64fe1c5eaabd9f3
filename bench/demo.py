"""Quality and cost of `espalier demo`, pruned against dense: Fréchet distance, parameters, MB per link, seconds.

Fréchet distances are compared with those of noise and of a fitted Gaussian. ``python -m bench.demo``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Outcome, Row, Target, run
from espalier_server.processes import espalier_command, espalier_env

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT = "The demonstration: FedPhD on digits over two edges and four clients, pruned and dense"

TINY = ["rounds=2", "rg=1", "prune-at=1", "eval-samples=60", "sample-steps=3", "sample-count=4"]
LIMIT_SECONDS = 360.0


def measure(tiny: bool) -> Outcome:
    """Run `espalier demo` with the pruning ratio of the defaults and without pruning."""
    reports = {
        name: demonstrate([*(TINY if tiny else []), *settings], clients=2 if tiny else 4)
        for name, settings in {"pruned 0.2": [], "dense": ["pruning-ratio=0"]}.items()
    }
    outcome = Outcome(rows=[row(name, report) for name, report in reports.items()])
    pruned, dense = (report["quality"][-1] for report in reports.values())
    outcome.targets = [
        Target.at_most(
            "Fréchet distance, pruned, over noise's", pruned["frechet"] / pruned["noise"]["frechet"], 0.2
        ),
        Target.at_most(
            "Fréchet distance, pruned, over a Gaussian fit's",
            pruned["frechet"] / pruned["gaussian"]["frechet"],
            1.0,
        ),
        Target.at_most("Fréchet distance, pruned over dense", pruned["frechet"] / dense["frechet"], 1.25),
        Target.at_most("seconds of the run, pruned", reports["pruned 0.2"]["seconds"], LIMIT_SECONDS),
    ]
    outcome.plots["demo"] = lambda figure: draw(figure, reports)
    return outcome


def demonstrate(settings: list[str], clients: int) -> dict[str, Any]:
    """Run the demonstration and return its report.

    Raises
    ------
    RuntimeError
        The demonstration failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        out = Path(folder) / "run"
        command = espalier_command("demo", "--clients", str(clients), "--out", str(out))
        command += [word for setting in settings for word in ("-c", setting)]
        # A registry of clouds of its own, so that clouds of this user's other runs do not interfere.
        env = {**os.environ, **espalier_env(), "XDG_STATE_HOME": folder}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the demonstration failed: {done.stdout[-500:]}{done.stderr[-500:]}")
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return report


def row(name: str, report: dict[str, Any]) -> Row:
    """Return the table row of a run."""
    quality, model = report["quality"][-1], report["model"]
    links = report["links"]
    return {
        "model": name,
        "rounds": report["config"]["rounds"],
        "params": model["params"],
        "macs": model["macs"],
        "frechet": quality["frechet"],
        "is": quality["inception_score"],
        "kid": quality["kid"],
        "real": quality["floor"]["frechet"],
        "gaussian": quality["gaussian"]["frechet"],
        "noise": quality["noise"]["frechet"],
        "client_edge_mb": (links["client-edge"]["up_bytes"] + links["client-edge"]["down_bytes"]) / 1e6,
        "edge_cloud_mb": (links["edge-cloud"]["up_bytes"] + links["edge-cloud"]["down_bytes"]) / 1e6,
        "seconds": report["seconds"],
    }


def draw(figure: Figure, reports: dict[str, dict[str, Any]]) -> None:
    """Draw the distances over the rounds."""
    axes = figure.subplots()
    for name, report in reports.items():
        quality = report["quality"]
        axes.plot([q["round"] for q in quality], [q["frechet"] for q in quality], marker="o", label=name)
    last = reports["dense"]["quality"][-1]
    for key, label in {"noise": "noise", "gaussian": "Gaussian fit", "floor": "real images"}.items():
        axes.axhline(last[key]["frechet"], linestyle="--", linewidth=1, color="grey")
        axes.annotate(
            label,
            (0.01, last[key]["frechet"]),
            xycoords=("axes fraction", "data"),
            verticalalignment="bottom",
        )
    axes.set_yscale("log")
    axes.set_xlabel("round")
    axes.set_ylabel("Fréchet distance (digits features)")
    axes.legend()


if __name__ == "__main__":
    sys.exit(run("demo", measure, ABOUT))
