"""Checks after a chaos schedule: the run finished, lost no checkpointed window, and recorded every missing reply."""

from __future__ import annotations

import math
from pathlib import Path

from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.events import EVENTS_FILE, read_events
from espalier_server.records.record import RunRecord
from espalier_server.records.snapshot import Snapshot
from tests.chaos.cluster import ended
from tests.chaos.schedules import SETTINGS, WINDOWS, Conductor


def check_run(conductor: Conductor) -> RunRecord:
    """Check the event log, the report and the checkpoints of a run; raises AssertionError."""
    out = conductor.out
    last = ended(out)
    assert last is not None
    assert last["event"] == "finished", f"the run {last['event']}: {last.get('reason')}"
    record = RunRecord.read(out)
    assert record.status == "finished"
    assert (out / "report.html").stat().st_size > 1000
    assert [w.window for w in record.windows] == list(range(1, WINDOWS + 1))
    _check_kept(record, conductor.kept)
    _check_checkpoints(out)
    _check_participants(record, out)
    _check_restarts(record, out)
    return record


def _check_kept(record: RunRecord, kept: dict[int, str]) -> None:
    """Check that windows checkpointed before a fault are unchanged in the report."""
    for entry in record.windows:
        if entry.window in kept:
            assert repr({str(r.round): r.loss for r in entry.rounds}) == kept[entry.window]


def _check_checkpoints(out: Path) -> None:
    checkpoints = Checkpoints(out / "checkpoints")
    windows = checkpoints.windows()
    assert windows == sorted(windows)
    assert windows[-1] == WINDOWS
    for window in windows:
        state = Snapshot.unpack(*checkpoints.load(window)).state
        assert (state.window, state.round) == (window, window * int(SETTINGS["rg"]))


def _check_participants(record: RunRecord, out: Path) -> None:
    """Check that a fault names every planned client that did not take part, or its edge."""
    planned = {
        event["window"]: {
            (r["round"], p["client"], p["edge"]) for r in event["rounds"] for p in r["participants"]
        }
        for event in read_events(out / EVENTS_FILE)
        if event["event"] == "window-start"  # the newest plan of a window counts
    }
    for entry in record.windows:
        took_part = {(r.round, p.client, p.edge) for r in entry.rounds for p in r.participants}
        assert took_part <= planned[entry.window]
        blamed = {f.node for f in record.faults if f.window == entry.window}
        for round_, client, edge in planned[entry.window] - took_part:
            assert {client, edge} & blamed, f"no fault explains why {client} missed round {round_} at {edge}"
        for r in entry.rounds:
            assert r.loss is None or math.isfinite(r.loss)
            assert len({p.client for p in r.participants}) == len(r.participants)


def _check_restarts(record: RunRecord, out: Path) -> None:
    """Check that every restart of the run's ServerApp is recorded."""
    starts = sum(event["event"] == "run" for event in read_events(out / EVENTS_FILE))
    counted = sum(f.kind == "restart" for f in record.faults)
    assert counted == starts - 1
