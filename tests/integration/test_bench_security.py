"""The bench of what TLS and signatures cost runs: all three setups do the same rounds, side by side."""

from __future__ import annotations

from tests.support.benches import RunBench


def test_security(run_bench: RunBench) -> None:
    result = run_bench("security")
    setups = ["plain", "TLS", "TLS, signatures"]
    assert [row["setup"] for row in result["rows"]] == setups * 2
    assert [row["clients do"] for row in result["rows"]] == ["an epoch of training"] * 3 + ["nothing"] * 3
    assert {(row["rounds"], row["bytes"] // 50_000) for row in result["rows"]} == {(2, 1), (5, 2)}
    # The ratio at 10 MB is the full bench's; here only that the rounds were done and timed.
    assert [target["limit"] for target in result["targets"]] == [1.1, 1.1]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in result["rows"])
