"""The bench of what TLS and signatures cost runs: all three setups do the same rounds, side by side."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT


def test_security() -> None:
    command = [sys.executable, "-m", "bench.security", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bench"] == "security"
    setups = ["plain", "TLS", "TLS, signatures"]
    assert [row["setup"] for row in result["rows"]] == setups * 2
    assert [row["clients do"] for row in result["rows"]] == ["an epoch of training"] * 3 + ["nothing"] * 3
    assert {(row["rounds"], row["bytes"] // 50_000) for row in result["rows"]} == {(2, 1), (5, 2)}
    # The ratio at 10 MB is the full bench's; here only that the rounds were done and timed.
    assert [target["limit"] for target in result["targets"]] == [1.1, 1.1]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in result["rows"])
