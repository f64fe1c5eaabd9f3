"""The bench of clients' memory runs in small."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT


def test_memory() -> None:
    command = [sys.executable, "-m", "bench.memory", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    one, three = result["rows"]
    assert (one["clients"], three["clients"]) == (1, 3)
    assert 0 < one["uss_mb"] <= one["pss_mb"] <= one["rss_mb"]
    # Three clients in a process are little more than one.
    assert three["uss_mb"] < 1.5 * one["uss_mb"]
    assert [target["limit"] for target in result["targets"]] == [15.0]
