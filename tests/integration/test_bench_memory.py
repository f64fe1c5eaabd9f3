"""The bench of clients' memory runs in small."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_memory(run_bench: RunBench) -> None:
    result = run_bench("memory")
    one, three = result["rows"]
    assert (one["clients"], three["clients"]) == (1, 3)
    assert 0 < one["uss_mb"] <= one["pss_mb"] <= one["rss_mb"]
    # Three clients in a process are little more than one.
    assert three["uss_mb"] < 1.5 * one["uss_mb"]
    assert [target["limit"] for target in result["targets"]] == [15.0]
