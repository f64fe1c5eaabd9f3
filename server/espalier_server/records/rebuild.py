"""Reconstruction of a run's record from its event log, for a run whose ServerApp ended without writing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from espalier.errors import StateError
from espalier.storage.run_folder import REPORT_FILE
from espalier_server.records.events import EVENTS_FILE, FINAL
from espalier_server.records.record import (
    AccuracyEntry,
    ClientEntry,
    Evaluation,
    FaultEntry,
    ModelSize,
    Participation,
    RoundEntry,
    RunRecord,
    Traffic,
    WindowEntry,
)


def record_of(folder: Path, events: Sequence[Mapping[str, Any]]) -> RunRecord:
    """Return the record of a run, from report.json or else from its events, with the status of its final event.

    Raises
    ------
    StateError
        The folder holds neither, or the file that was read is damaged.
    """
    if (folder / REPORT_FILE).exists():
        record = RunRecord.read(folder)
    elif events:
        record = from_events(events)
    else:
        raise StateError(
            f"{folder} holds neither {REPORT_FILE} nor {EVENTS_FILE}; give the --out folder of a run"
        )
    if record.status == "running" and events and events[-1]["event"] in FINAL:
        record.status = events[-1]["event"]
        record.reason = str(events[-1].get("reason") or "")
    return record


def from_events(events: Sequence[Mapping[str, Any]]) -> RunRecord:
    """Return a record from events, which contain no labels, samples or timings.

    Raises
    ------
    StateError
        An event lacks a field or has one of the wrong type.
    """
    record = RunRecord()
    try:
        for event in events:
            _apply(record, event)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise StateError(f"{EVENTS_FILE} is damaged ({error!r}); there is no report of its run") from error
    if events:
        record.seconds = float(events[-1]["time"]) - float(events[0]["time"])
    return record


def _apply(record: RunRecord, event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "run":
        record.run, record.config = str(event["run"]), dict(event["config"])
        record.method = str(record.config.get("method", ""))
        record.started = record.started or datetime.fromtimestamp(event["time"], UTC).isoformat(
            timespec="seconds"
        )
    elif kind == "joined":
        record.edges = sorted(event["edges"])
        record.clients = {str(name): record.clients.get(name) or ClientEntry() for name in event["clients"]}
    elif kind == "window-start":
        # A resumed run repeats the windows after its checkpoint, which replace the earlier ones.
        record.windows = [window for window in record.windows if window.window < event["window"]]
        record.quality = [entry for entry in record.quality if entry.window < event["window"]]
        record.accuracy = [entry for entry in record.accuracy if entry.window < event["window"]]
        rounds = [
            RoundEntry(round=entry["round"], participants=[Participation(**p) for p in entry["participants"]])
            for entry in event["rounds"]
        ]
        record.windows.append(WindowEntry(window=event["window"], rounds=rounds))
    elif kind == "window-end":
        _end_window(record, event)
    elif kind == "evaluation":
        record.quality.append(Evaluation.model_validate(event))
    elif kind == "accuracy":
        record.accuracy.append(AccuracyEntry.model_validate(event))
    elif kind == "prune":
        record.model = ModelSize.model_validate(event)
        record.model.pruned_at_window, record.model.pruned_at_round = event["window"], event["round"]
    elif kind == "fault":
        record.faults.append(FaultEntry.model_validate(event))


def _end_window(record: RunRecord, event: Mapping[str, Any]) -> None:
    window = next(entry for entry in reversed(record.windows) if entry.window == event["window"])
    window.rho, window.mu = dict(event["rho"]), dict(event["mu"])
    window.assignments = dict(event.get("assignments") or {})
    for entry in window.rounds:
        entry.loss = event["losses"].get(str(entry.round))
    # Events contain the totals of the run, a window entry only its own traffic.
    totals = {link: Traffic.model_validate(counts) for link, counts in event["links"].items()}
    window.links = {
        link: Traffic(
            **{name: value - getattr(record.links.get(link, Traffic()), name) for name, value in total}
        )
        for link, total in totals.items()
    }
    record.links = totals
