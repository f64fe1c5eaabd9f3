"""The bench of a round's overhead runs, and our edge is far quicker than Flower's own processes in the same command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_overhead() -> None:
    command = [sys.executable, "-m", "bench.overhead", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bench"] == "overhead"
    edge, stock = result["rows"]
    assert (edge["clients"], edge["bytes"]) == (stock["clients"], stock["bytes"]) == (2, 4096)
    targets = {target["name"]: target for target in result["targets"]}
    # The absolute target, 0.1 s, is for a machine that does nothing else; the ratio holds on any.
    assert targets["median round, 2 clients, 4 KB, s"]["limit"] == 0.1
    assert targets["all stock over it, ratio"]["holds"], result
