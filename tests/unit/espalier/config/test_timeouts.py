"""The table of time limits is in order, and a run whose deadlines are not is refused."""

from __future__ import annotations

import pytest

from espalier.config import timeouts
from espalier.config.timeouts import Limit, chains, order_faults, window_seconds
from espalier.errors import ConfigError
from espalier.methods.run_config import RunConfig
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def test_the_table_is_in_order() -> None:
    settings = RunConfig()
    assert order_faults(chains(settings.round_deadline, settings.window_deadline, settings.rg)) == []


def test_flowers_lease_is_as_the_table_says() -> None:
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE

    assert timeouts.LEASE == HEARTBEAT_MIN_INTERVAL * HEARTBEAT_PATIENCE


def test_a_window_lasts_its_rounds_and_a_margin() -> None:
    assert window_seconds(5, 600.0, 0.0) == 3060.0
    assert window_seconds(5, 600.0, 700.0) == 700.0


def test_limits_out_of_order_are_named() -> None:
    table = [[Limit("a", 1, "one"), Limit("b", 3, "three"), Limit("c", 3, "also three")]]
    [fault] = order_faults(table)
    assert fault == "b: 3 s (three) must be less than c, 3 s (also three)"


def test_a_window_shorter_than_its_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"round-deadline: 600 s .* less than window-deadline, 100 s"):
        RunConfig.from_flat({"window-deadline": 100.0})
    RunConfig.from_flat({"window-deadline": 100.0, "round-deadline": 30.0})


def test_the_page_has_every_limit_of_the_table() -> None:
    said = {cell.strip() for line in PAGE.splitlines() if line.startswith("|") for cell in line.split("|")}
    for chain in chains(RunConfig().round_deadline, 0.0, 1):
        for limit in chain:
            fixed = limit.name not in ("round-deadline", "window-deadline", "message ttl")
            assert limit.name in said or f"`{limit.name}`" in said, limit.name
            assert not fixed or f"{limit.seconds:g} s" in said, limit
