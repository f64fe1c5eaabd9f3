"""The bench of a round's overhead runs, and our edge is far quicker than Flower's own processes in the same command."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_overhead(run_bench: RunBench) -> None:
    result = run_bench("overhead")
    rows = {row["setup"]: row for row in result["rows"]}
    assert set(rows) == {"edge, residents", "edge, residents, TLS", "all stock, one array"}
    assert all((row["clients"], row["bytes"]) == (2, 4096) for row in rows.values())
    limits = {target["name"]: target["limit"] for target in result["targets"]}
    # The targets are for a machine that does nothing else; here only that there is a wide gap.
    assert limits == {
        "median round, 2 clients, 4 KB, s": 0.05,
        "all stock over it, 2 clients, ratio": 100.0,
    }
    assert rows["edge, residents"]["stock_x"] > 20, result
