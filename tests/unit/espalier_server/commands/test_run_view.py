"""The state of a run after its events, and its terminal view."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from espalier_server.commands.run_view import RunView
from espalier_server.run_state import RunState


def plan(window: int, rg: int = 2) -> dict[str, Any]:
    parts = [{"client": "c1", "edge": "e1"}, {"client": "c2", "edge": "e2"}]
    first = (window - 1) * rg + 1
    rounds = [{"round": first + i, "participants": parts} for i in range(rg)]
    return {"event": "window-start", "window": window, "rounds": rounds}


def progress(edge: str, round_: int, training: list[str], done: list[str], up: int) -> dict[str, Any]:
    counts = {"up_bytes": up, "down_bytes": 2 * up, "messages": 1}
    fields = {"edge": edge, "window": 1, "round": round_, "training": training, "done": done}
    return {"event": "progress", "loss": 0.5, "bytes": counts, **fields}


def end(window: int, losses: Mapping[str, float | None], up: int) -> dict[str, Any]:
    links = {link: {"up_bytes": up, "down_bytes": 0, "messages": 1} for link in ("client-edge", "edge-cloud")}
    return {"event": "window-end", "window": window, "losses": losses, "rho": {}, "mu": {}, "links": links}


RUN = {"event": "run", "run": "r-1", "config": {"method": "fedphd", "rounds": 5, "rg": 2}}
JOINED = {"event": "joined", "edges": ["e1", "e2"], "clients": ["c1", "c2"]}


def fed(*events: Mapping[str, Any]) -> RunState:
    state = RunState()
    for second, event in enumerate(events):
        state.feed({"time": 100.0 + 10 * second, **event})
    return state


def test_windows_are_counted_from_rounds() -> None:
    state = fed(RUN, JOINED)
    assert (state.rounds, state.windows, state.edges, state.clients) == (5, 3, ["e1", "e2"], ["c1", "c2"])


def test_rounds_done_inside_a_window() -> None:
    state = fed(RUN, JOINED, plan(1))
    assert state.rounds_done == 0
    assert state.seconds_left(130.0) is None
    # e1 is in round 2 with its client still training (1.0), e2 in round 1 with its client done (1.0).
    state.feed({"time": 130.0, **progress("e1", 2, ["c1"], [], 3)})
    state.feed({"time": 130.0, **progress("e2", 1, [], ["c2"], 4)})
    assert state.rounds_done == 1.0
    # Training began at 120: one round took 20 s, four are left.
    assert state.seconds_left(140.0) == pytest.approx(80.0)
    assert state.bytes_on("client-edge") == (7, 14)
    assert state.bytes_on("edge-cloud") == (0, 0)


def test_a_window_that_ended_replaces_its_progress() -> None:
    state = fed(RUN, JOINED, plan(1), progress("e1", 2, [], ["c1"], 3), end(1, {"1": 0.5, "2": None}, 11))
    assert state.rounds_done == 2
    assert state.losses == {1: 0.5, 2: None}
    assert state.bytes_on("client-edge") == (11, 0)


def test_a_resumed_run_estimates_from_where_it_resumed() -> None:
    state = fed(RUN, JOINED, plan(2))
    assert state.rounds_before == 2
    state.feed({"time": 140.0, **end(2, {"3": 0.1, "4": 0.1}, 1)})
    assert state.seconds_left(140.0) == pytest.approx(10.0)  # two rounds took 20 s, one is left


def test_stale_progress_and_unknown_events_change_nothing() -> None:
    state = fed(RUN, JOINED, plan(2), progress("e1", 2, [], ["c1"], 3), {"event": "from-the-future"})
    assert state.at_edges == {}


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    quality = {
        "window": 1,
        "round": 2,
        "features": "digits",
        "frechet": 7.5,
        "floor": {"frechet": 1.5},
        "noise": None,
    }
    fault = {"tier": "edge", "node": "c2", "kind": "straggler", "detail": "late [x]", "window": 1, "round": 2}
    events: list[dict[str, Any]] = [
        RUN,
        JOINED,
        plan(1),
        progress("e1", 1, ["c1"], [], 1),
        {"event": "fault", **fault},
        end(1, {"1": 0.5, "2": 0.25}, 1_500_000),
        {"event": "evaluation", **quality},
        {"event": "prune", "window": 1, "round": 2, "params": 700_000, "params_dense": 1_000_000},
        {"event": "failed", "reason": "all edges are gone"},
    ]
    with RunView(Console(file=output, force_terminal=False, width=60)) as view:
        for event in events:
            view.feed({"time": 0.0, **event})
    assert output.getvalue().splitlines() == [
        "run r-1: fedphd, 5 rounds in 3 windows",
        "joined: 2 edges, 2 clients",
        "window 1/3: rounds 1-2, 2 clients",
        "fault: straggler c2 (window 1, round 2): late [x]",
        "window 1 done: loss 0.2500; client-edge 1.5 MB, edge-cloud 1.5 MB",
        "window 1: Fréchet distance (digits) 7.5  (real 1.5, noise -)",
        "pruned after round 2: 0.70 M of 1.00 M parameters",
        "failed: all edges are gone",
    ]


def test_a_terminal_shows_the_progress() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, color_system=None)
    with RunView(console) as view:
        for event in (RUN, JOINED, plan(1), progress("e1", 2, ["c1"], [], 5_000_000)):
            view.feed({"time": 0.0, **event})
    shown = output.getvalue()
    for part in ("window 1/3", "round 1/5", "e1", "c1", "0.5000", "↑ 5.0 MB", "↓ 10.0 MB", "left"):
        assert part in shown
