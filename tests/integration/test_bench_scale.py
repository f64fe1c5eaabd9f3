"""The bench of many clients runs in small."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_scale(run_bench: RunBench) -> None:
    result = run_bench("scale")
    [row] = result["rows"]
    assert row["clients"] == 4
    assert min(row["round_s"], row["edge_cpu_ms"], row["wake_ms"], row["client_mb"]) > 0
    assert row["wake_ms"] <= row["wake_max_ms"]
    assert [target["limit"] for target in result["targets"]] == [2.0, 0.1]
