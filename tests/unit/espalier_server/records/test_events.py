"""The event log of a run: written, read and followed."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np

from espalier_server.records.events import EventLog, follow, read_events


def test_events_are_followed_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    stop, seen = threading.Event(), []

    def read() -> None:
        for event in follow(path, stop):
            seen.append(event)
            if event["event"] == "finished":
                stop.set()

    reader = threading.Thread(target=read)
    reader.start()
    log = EventLog(path)
    log.write("window-start", window=1, rounds=[{"round": 1}])
    log.write("window-end", window=1, losses={1: math.nan}, mu={"edge-1": np.float32(0.5)})
    log.write("finished")
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert [event["event"] for event in seen] == ["window-start", "window-end", "finished"]
    assert seen[1]["losses"] == {"1": None}
    assert seen[1]["mu"] == {"edge-1": 0.5}
    log.close()


def test_an_incomplete_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run"}\n{"event": "win')
    log = EventLog(path)
    log.write("checkpoint", window=1)
    log.close()
    assert [event["event"] for event in read_events(path)] == ["run", "checkpoint"]


def test_a_resumed_run_can_be_followed_from_its_resumption(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("failed", reason="power cut")
    start = path.stat().st_size
    log.write("run", run="r")
    done = threading.Event()
    done.set()
    assert [event["event"] for event in follow(path, done, offset=start)] == ["run"]
    log.close()
