"""The benches of large payloads run: rounds against a plain stream, and aggregation in a process of its own."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_payload(run_bench: RunBench) -> None:
    result = run_bench("payload")
    rows = {row["setup"]: row for row in result["rows"]}
    assert [target["limit"] for target in result["targets"]] == [0.3]
    timed = ["plain gRPC stream", "plain gRPC stream, TLS", "edge", "edge, TLS", "edge, fp16"]
    assert list(rows)[:5] == timed
    assert all(0 < rows[setup]["min_s"] <= rows[setup]["max_s"] for setup in timed)
    assert rows["edge, fp16"]["bytes"] * 2 == rows["edge"]["bytes"]
    tree = rows["tree 2x2, small"]
    assert tree["bytes"] == 4 * 10 * (64 + 1)  # logistic regression on 8 x 8 pixels
    assert tree["rounds"] == 2
    assert tree["min_s"] > 0
    steps = [row for setup, row in rows.items() if setup.startswith("step: ")]
    assert len(steps) == 9
    assert all(row["median_s"] > 0 for row in steps)


def test_aggregate(run_bench: RunBench) -> None:
    result = run_bench("aggregate")
    edges = [row for row in result["rows"] if row["by"] == "edge"]
    assert [row["updates"] for row in edges] == [2, 4]
    assert all(row["idle_mb"] < row["peak_mb"] for row in edges)
    # Whether four models suffice can be told for models that are larger than an interpreter.
    assert [target["limit"] for target in result["targets"]] == [4.0, 0.6]
