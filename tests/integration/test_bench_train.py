"""The bench of local training runs: our client, a plain loop and a pruned network, side by side."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.train import CHANNELS_LAST, COMPILED, PLAIN_ATTENTION, TINY, sides

from tests.support.paths import ROOT


def test_train() -> None:
    command = [sys.executable, "-m", "bench.train", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    [row] = result["rows"]
    assert row["network"] == "unet-tiny, 1 x 8 x 8, batches of 8"
    assert min(row["client_images_s"], row["loop_images_s"], row["pruned_images_s"]) > 0
    assert [target["limit"] for target in result["targets"]] == [0.97, 1.4]


def test_variants_train_but_for_compiling() -> None:
    """Compiling takes a C++ compiler and a minute, so its side is made here and not run."""
    made = sides(TINY[0], "cpu", variants=True)
    assert list(made) == ["loop", "client", "pruned", PLAIN_ATTENTION, CHANNELS_LAST, COMPILED]
    for name, turn in made.items():
        if name != COMPILED:
            turn(0)
