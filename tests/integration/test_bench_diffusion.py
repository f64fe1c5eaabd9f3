"""The comparison of diffusion methods runs every row, and counts of each what its algorithm says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.diffusion", "--clients", "4", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def table(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {row["method"]: row for row in json.loads(done.stdout)["rows"]}


def test_every_row_is_measured_and_its_bytes_are_what_its_algorithm_exchanges(tmp_path: Path) -> None:
    done = bench("--tiny", "--json", "--out", str(tmp_path))
    rows = table(done)
    assert list(rows) == METHODS
    # Four clients of four: everybody took part in every round.
    assert "FedAvg E=1: 5 5 5 5; FedAvg E=5: 1 1 1 1" in json.loads(done.stdout)["notes"][-1]
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


def test_colour_images_of_a_folder_stand_for_cifar(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    options = ["--data", str(tmp_path / "data"), "--model", "unet-tiny", "--only", "FedAvg E=5", "UDEC"]
    rows = table(bench("--tiny", "--json", *options))
    assert list(rows) == ["FedAvg E=5", "UDEC"]
    assert all(np.isfinite(row["frechet"]) for row in rows.values())


def test_rounds_that_five_epochs_do_not_divide_are_refused() -> None:
    done = bench("--rounds", "7")
    assert done.returncode != 0
    assert "--rounds 7: give a multiple of 5" in done.stderr
    assert "Traceback" not in done.stderr
