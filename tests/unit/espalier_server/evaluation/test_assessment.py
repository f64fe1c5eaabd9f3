"""What the cloud looks at where it has no whole network: the images that clients draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bench.local_tree import LocalClient, LocalTree
from PIL import Image

SETTINGS: dict[str, bool | int | str] = {
    "method": "feddiffuse",
    "exchange": "udec",
    "rounds": 1,
    "local-steps": 1,
    "batch-size": 8,
    "eval-clients": True,
    "eval-samples": 6,
    "sample-count": 4,
    "sample-steps": 2,
    "min-clients": 2,
}


def test_clients_with_layers_of_their_own_draw_the_sample_grid(tmp_path: Path) -> None:
    tree = LocalTree(
        tmp_path, [LocalClient(f"c{i}", f"digits:{i}/40:similarity=100", (0,)) for i in range(2)], edges=1
    )
    record = tree.run("r", SETTINGS).recorder.record
    assert (record.status, record.faults) == ("finished", [])
    grid = np.asarray(Image.open(tmp_path / "runs/r/samples/window-0001.png"))
    # 2 x 2 images of 8 pixels, each four times as large, and 3 gaps of 2 pixels.
    assert grid.shape == (2 * 32 + 3 * 2, 2 * 32 + 3 * 2)
    tiles = [grid[2 + 34 * i : 34 + 34 * i, 2 + 34 * j : 34 + 34 * j] for i in (0, 1) for j in (0, 1)]
    assert len({tile.tobytes() for tile in tiles}) == 4
