"""The bench of starts runs in small."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.paths import ROOT


def test_start() -> None:
    command = [sys.executable, "-m", "bench.start", "--tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    imported, connected = result["rows"]
    assert imported["median_s"] > 0
    assert connected["cpu_s"] > 0
    assert [target["limit"] for target in result["targets"]] == [4.0]
