"""The comparison of diffusion methods runs every row, and counts of each what its algorithm says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.benches import RunBench
from tests.support.paths import ROOT

METHODS = [
    "FedAvg E=1",
    "FedAvg E=5",
    "FedProx",
    "MOON",
    "SCAFFOLD",
    "FedAvg E=5, SGD",
    "USPLIT",
    "ULATDEC",
    "UDEC",
    "FedPhD",
    "FedPhD-OS",
]


def table(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result["rows"]}


def test_every_row_counts_the_bytes_of_its_algorithm(run_bench: RunBench, tmp_path: Path) -> None:
    result = run_bench("diffusion", "--clients", "4", "--out", str(tmp_path))
    rows = table(result)
    assert list(rows) == METHODS
    # Four clients of four: all took part in every round.
    assert "FedAvg E=1: 5 5 5 5; FedAvg E=5: 1 1 1 1" in result["notes"][-1]
    assert all(np.isfinite(row["frechet"]) and row["is"] >= 1 for row in rows.values())
    control, full = rows["FedAvg E=1"], rows["FedAvg E=5"]
    assert [control["rounds"], full["rounds"], rows["FedPhD"]["rounds"]] == [5, 1, 5]
    # Four clients, both ways, four bytes a parameter; plans and reports are the small rest.
    model = 4 * full["params"] / 1e6
    assert full["client_edge_mb"] == pytest.approx(8 * model, rel=0.02)
    assert control["client_edge_mb"] == pytest.approx(40 * model, rel=0.02)
    # USPLIT: the whole way down, and of every pair one network up.
    assert rows["USPLIT"]["client_edge_mb"] == pytest.approx(6 * model, rel=0.02)
    # SCAFFOLD: the control variate comes along on the way down.
    assert rows["SCAFFOLD"]["client_edge_mb"] == pytest.approx(12 * model, rel=0.02)
    # The shares of the parts, summed over the initial network by name.
    assert rows["ULATDEC"]["client_edge_mb"] == pytest.approx(8 * model * (1 - 0.1935), rel=0.02)
    assert rows["UDEC"]["client_edge_mb"] == pytest.approx(8 * model * 0.5476, rel=0.02)
    # One window of five rounds: the cloud and both edges exchange one network each way.
    assert rows["FedPhD"]["edge_cloud_mb"] == pytest.approx(4 * model, rel=0.02)
    assert control["edge_cloud_mb"] == pytest.approx(20 * model, rel=0.02)
    assert rows["FedPhD"]["params"] == rows["FedPhD-OS"]["params"] < 0.6 * full["params"]
    for stem in ("curves", "bytes", "samples"):
        assert np.asarray(Image.open(tmp_path / f"{stem}.png").convert("L")).std() > 5


def test_a_folder_of_colour_images(run_bench: RunBench, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    options = ["--data", str(tmp_path / "data"), "--model", "unet-tiny", "--only", "FedAvg E=5", "UDEC"]
    rows = table(run_bench("diffusion", "--clients", "4", *options))
    assert list(rows) == ["FedAvg E=5", "UDEC"]
    assert all(np.isfinite(row["frechet"]) for row in rows.values())


def test_rounds_that_five_epochs_do_not_divide_are_refused() -> None:
    command = [sys.executable, "-m", "bench.diffusion", "--clients", "4", "--rounds", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert done.returncode != 0
    assert "--rounds 7: give a multiple of 5" in done.stderr
    assert "Traceback" not in done.stderr
