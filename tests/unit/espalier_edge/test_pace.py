"""Round deadlines follow what clients took and how fast they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.config.timeouts import LEAST_ROUND
from espalier.methods.run_config import RunConfig
from espalier_edge.pace import MARGIN, SMOOTHING, Pace, work_of


def test_the_work_of_a_round() -> None:
    assert work_of(RunConfig(local_epochs=3), samples=50, numbers=8) == 3 * 50 * 8
    assert work_of(RunConfig(local_steps=7, batch_size=16), samples=50, numbers=8) == 7 * 16 * 8


def test_nothing_known_is_the_limit() -> None:
    pace = Pace()
    assert pace.deadline({"a": 10.0}, {"a": 5.0}, 600.0) == 600.0
    assert pace.deadline({}, {}, 600.0) == 600.0
    pace.record("a", 10.0, 20.0)
    # Nothing ties b's time to a's without both speeds.
    assert pace.deadline({"a": 10.0, "b": 10.0}, {"a": 5.0}, 600.0) == 600.0


def test_the_slowest_participant_counts() -> None:
    pace = Pace()
    pace.record("a", 10.0, 20.0)
    pace.record("b", 10.0, 60.0)
    assert pace.deadline({"a": 10.0}, {}, 600.0) == MARGIN * 20.0
    assert pace.deadline({"a": 10.0, "b": 10.0}, {}, 600.0) == MARGIN * 60.0
    assert pace.deadline({"a": 10.0, "b": 10.0}, {}, 100.0) == 100.0
    assert pace.deadline({"a": 0.1}, {}, 600.0) == LEAST_ROUND
    # Twice the work takes twice as long: a larger sub-model, more samples.
    assert pace.deadline({"a": 20.0}, {}, 600.0) == MARGIN * 40.0


def test_a_newcomer_is_judged_by_its_speed() -> None:
    pace = Pace()
    pace.record("a", 10.0, 20.0)
    # c is four times as slow as a.
    assert pace.deadline({"c": 10.0}, {"a": 8.0, "c": 2.0}, 600.0) == MARGIN * 80.0


def test_slower_counts_at_once_and_faster_by_and_by() -> None:
    pace = Pace()
    pace.record("a", 1.0, 20.0)
    pace.record("a", 1.0, 40.0)
    assert pace.deadline({"a": 1.0}, {}, 600.0) == MARGIN * 40.0
    pace.record("a", 1.0, 10.0)
    assert pace.deadline({"a": 1.0}, {}, 600.0) == pytest.approx(MARGIN * (40 - SMOOTHING * 30))


def test_who_missed_a_deadline_gets_a_longer_one_up_to_the_limit() -> None:
    pace, deadlines = Pace(), []
    pace.record("a", 2.0, 5.0)
    for _ in range(6):
        deadlines.append(pace.deadline({"a": 2.0}, {}, 200.0))
        pace.record_miss("a", 2.0, deadlines[-1])
    assert deadlines == [15.0, 30.0, 60.0, 120.0, 200.0, 200.0]


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=8), st.floats(1.0, 1e3))
def test_a_deadline_is_between_the_least_and_the_limit(times: list[float], limit: float) -> None:
    pace = Pace()
    for seconds in times:
        pace.record("a", 3.0, seconds)
    deadline = pace.deadline({"a": 3.0}, {}, limit)
    assert min(limit, LEAST_ROUND) <= deadline <= limit
    assert deadline >= min(limit, MARGIN * times[-1] * 0.999999)
