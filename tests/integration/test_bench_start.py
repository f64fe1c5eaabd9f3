"""The bench of starts runs in small."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_start(run_bench: RunBench) -> None:
    result = run_bench("start")
    imported, connected = result["rows"]
    assert imported["median_s"] > 0
    assert connected["cpu_s"] > 0
    assert [target["limit"] for target in result["targets"]] == [4.0]
