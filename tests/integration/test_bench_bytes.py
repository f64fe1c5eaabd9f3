"""The bench of bytes counts up to one distance, and its savings are those of the ledger."""

from __future__ import annotations

import pytest
from bench.bytes import Point, common_distance, reached, saved

from tests.support.benches import RunBench


def test_bytes_are_counted_up_to_the_distance_that_all_reach() -> None:
    curves = {
        "a": [Point(5, 30.0, 10.0, 4.0), Point(10, 12.0, 20.0, 8.0), Point(15, 11.0, 30.0, 12.0)],
        "b": [Point(5, 20.0, 1.0, 0.5), Point(10, 14.0, 2.0, 1.0), Point(15, 15.0, 3.0, 1.5)],
    }
    assert common_distance(curves) == 14.0
    assert reached(curves["a"], 14.0).round == 10
    assert reached(curves["b"], 14.0).round == 10
    assert saved(1.0, 8.0) == pytest.approx(0.875)


def test_savings_are_those_of_the_ledger(run_bench: RunBench) -> None:
    rows_of = ["FedAvg E=1", "FedPhD-OS, 8 bits"]
    flat, best = run_bench("bytes", "--clients", "4", "--only", *rows_of)["rows"]
    dense, pruned = 4e-6 * flat["params"], 4e-6 * best["params"]
    # Four clients, five rounds, both ways; two edges every round.
    assert flat["below_MB"] == pytest.approx(40 * dense, rel=0.02)
    assert flat["above_MB"] == pytest.approx(20 * dense, rel=0.02)
    # One window of five rounds: half precision down, eight bits up.
    assert best["above_MB"] == pytest.approx(2 * (1 / 2 + 1 / 4) * pruned, rel=0.05)
    assert best["below_MB"] == pytest.approx(20 * (1 / 2 + 1 / 4) * pruned, rel=0.05)
    assert best["star_e1"] == pytest.approx(1 - best["above_MB"] / flat["below_MB"])
    assert best["tree_e1"] == pytest.approx(1 - best["above_MB"] / flat["above_MB"])
    spent = best["above_MB"] + best["below_MB"]
    assert best["all_e1"] == pytest.approx(1 - spent / flat["below_MB"])
