"""The bench of a window's processor time runs, and its parts are the whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def test_the_parts_of_a_window_add_up() -> None:
    command = [sys.executable, "-m", "bench.window", "--tiny", "--json"]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    parts = {row["part"]: row["cpu_s"] for row in found["rows"]}
    assert parts.pop("all") == pytest.approx(sum(parts.values()))
    assert parts["training"] > 0
    assert parts["edges"] > 0
    assert found["targets"][0]["value"] == pytest.approx(parts["training"] / sum(parts.values()))
