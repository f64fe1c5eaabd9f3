"""The bench of a window's processor time runs, and its parts are the whole."""

from __future__ import annotations

import pytest

from tests.support.benches import RunBench


def test_the_parts_of_a_window_add_up(run_bench: RunBench) -> None:
    found = run_bench("window")
    parts = {row["part"]: row["cpu_s"] for row in found["rows"]}
    assert parts.pop("all") == pytest.approx(sum(parts.values()))
    assert parts["training"] > 0
    assert parts["edges"] > 0
    assert found["targets"][0]["value"] == pytest.approx(parts["training"] / sum(parts.values()))
