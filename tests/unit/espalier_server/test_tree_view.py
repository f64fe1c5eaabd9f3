"""The status snapshot, counted from the event log of a run."""

from __future__ import annotations

import pytest

from tests.support.event_log import VERSIONS, status


def test_run_and_totals_are_counted_from_the_log() -> None:
    found = status()
    run, totals = found.run, found.totals
    assert (run.run, run.method, run.status, run.phase) == ("r-1", "fedphd", "running", "training")
    assert (run.window, run.windows, run.round, run.rounds) == (2, 2, 3, 4)
    assert list(run.losses) == [0.5, 0.25]
    assert dict(run.measures) == {"frechet": 7.5}
    # e1 has done all of round 3, e2 nothing yet: 2 rounds and a half in 40 s since 110, 1.5 are left.
    assert run.rounds_done == 2.5
    assert run.seconds_left == pytest.approx(40 / 2.5 * 1.5)
    by_link = {link.link: (link.up_bytes, link.down_bytes) for link in totals.links}
    assert by_link == {"client-edge": (1030, 2040), "edge-cloud": (1000, 2000)}
    assert [(f.tier, f.kind, f.count) for f in totals.faults] == [("edge", "straggler", 1)]
    assert (totals.rounds, totals.windows, totals.window_seconds, totals.last_window_seconds) == (
        2,
        1,
        20,
        20,
    )
    assert (totals.trainings, totals.training_seconds) == (4, 16)


def test_edges_and_clients() -> None:
    found = status()
    e1, e2 = found.edges
    assert (e1.name, e1.connected, dict(e1.versions), e1.clients) == ("e1", True, VERSIONS, 1)
    assert (e1.window, e1.round, list(e1.training), list(e1.done)) == (2, 3, [], ["c1"])
    assert (e1.loss, e1.up_bytes, e1.down_bytes, e1.last_seen) == (0.2, 30, 40, 145)
    assert (e2.round, e2.HasField("loss")) == (0, False)
    c1, c2, c3 = found.clients
    assert (c1.edge, c1.state, c1.samples, c1.steps_per_second, c1.loss) == ("e1", "done", 50, 4.0, 0.25)
    assert (c1.last_seen, c1.faults) == (145, 0)
    # c2 is on no roster any more; c3's edge has not spoken yet, and its first round plans c3.
    assert (c2.state, c2.faults, c2.last_seen, c2.HasField("steps_per_second")) == ("lost", 1, 101, False)
    assert (c3.edge, c3.state, c3.steps_per_second, c3.last_seen) == ("e2", "training", 2.0, 132)
