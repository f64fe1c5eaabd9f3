"""The bench of many clients runs in small."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT


def test_scale() -> None:
    command = [sys.executable, "-m", "bench.scale", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    [row] = result["rows"]
    assert row["clients"] == 4
    assert min(row["round_s"], row["edge_cpu_ms"], row["wake_ms"], row["client_mb"]) > 0
    assert row["wake_ms"] <= row["wake_max_ms"]
    assert [target["limit"] for target in result["targets"]] == [2.0, 0.1]
