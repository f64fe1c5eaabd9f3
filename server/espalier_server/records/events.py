"""The event log of a run: JSON lines that the ServerApp appends and `espalier run` follows."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.errors import StateError
from espalier.storage.atomic import write_error
from espalier.storage.json_file import jsonable

EVENTS_FILE = "events.jsonl"
STOP_FILE = "stop"
"""Name of the file in the run's folder that requests the ServerApp to stop the run."""

FINAL = frozenset({"finished", "stopped", "failed"})
"""Events that are the last of a run."""

_POLL_SECONDS = 0.2


class EventLog:
    """Append-only log of a run's events, safe to write from several threads.

    Each line is an object with ``event``, ``time`` (Unix seconds) and the event's own fields:

    - ``run``: run, config, pid (of the writer, added here)
    - ``joined``: edges, clients
    - ``roster``: edges: {name: {versions, clients}}, clients: {name: {samples, edges, device, versions}}; the
      connected edges and clients, written when they change
    - ``resumed``: window, round (of the checkpoint that the run resumes from)
    - ``window-start``: window, rounds: [{round, participants: [{client, edge}]}]
    - ``progress``: edge, window, round, training, done, loss, bytes: {up_bytes, down_bytes, messages}
    - ``window-end``: window, losses: {round: loss}, rho, mu, links: {link: {up_bytes, down_bytes, messages}},
      assignments: {client: cluster or level} where the method groups clients,
      clients: {name: {loss, steps, seconds, rounds, total_seconds, total_cpu_seconds}}, of each client's last round
      and in total
    - ``evaluation``: window, round, frechet, inception_score, kid, features, floor, noise
    - ``accuracy``: window, round, models: {name: {accuracy, loss, classes}}, clients: {client: accuracy}, mean,
      worst10, samples
    - ``prune``: window, round, params, macs, params_dense, macs_dense
    - ``fault``: tier, node, kind, detail, window, round
    - ``checkpoint``: window
    - ``interrupted``: reason (the cloud ended; its next start resumes the run from its checkpoint)
    - ``finished``, ``stopped``, ``failed``: reason

    Parameters
    ----------
    path : Path
        The log file; its folder is created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._incomplete = False  # the last line of the file lacks its end
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_incomplete_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StateError(
                f"cannot write {path}: {error}; make the folder writable for this user"
            ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one event as one line; readers ignore a line until it is complete.

        Raises
        ------
        StateError
            The file cannot be written, e.g. because the disk is full.
        """
        if event == "run":
            # With the process id, readers can detect that the writer ended without a final event.
            fields = {**fields, "pid": os.getpid()}
        line = json.dumps({"event": event, "time": time.time(), **jsonable(fields)}) + "\n"
        with self._lock:
            try:
                self._append(line.encode())
            except OSError as error:
                raise write_error(self.path, error) from error

    def _append(self, data: bytes) -> None:
        data = b"\n" + data if self._incomplete else data
        self._incomplete = True  # on a full disk only a part of the line may be written
        while data:
            data = data[os.write(self._file.fileno(), data) :]
        self._incomplete = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def follow(path: Path, stop: threading.Event, *, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Yield events as they are written, from byte `offset` on, until `stop` is set and all events are read.

    The file may not exist yet. Lines that cannot be parsed, e.g. after a crash of the writer, are skipped.
    """
    while True:
        stopping = stop.is_set()  # before reading, so that events written before `stop` was set are not lost
        events, offset = read_from(path, offset)
        yield from events
        if stopping:
            return
        stop.wait(_POLL_SECONDS)


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the events of the complete lines from byte `offset` on, and the offset after them."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    events = [event for line in complete.splitlines() if (event := _parse(line)) is not None]
    return events, offset + len(complete)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all events of a log; an empty list if there is no log."""
    return read_from(path, 0)[0]


def interruptions(path: Path) -> int:
    """Return how often a run's ServerApp was started after a previous one had ended without a final event."""
    count, running = 0, False
    for event in read_events(path):
        if event["event"] == "run":
            count += running
            running = True
        elif event["event"] in FINAL:
            running = False
    return count


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _end_incomplete_line(path: Path) -> None:
    """End the incomplete line of a killed writer, so that the next event starts on a new line."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
