"""What happens in a run, as it happens: JSON lines that the ServerApp appends and `espalier run` follows."""

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
"""A file of this name in the run's folder asks the ServerApp to end the run."""

FINAL = frozenset({"finished", "stopped", "failed"})
"""Events after which a run says nothing more."""

_POLL_SECONDS = 0.2


class EventLog:
    """Append-only log of a run's events, safe to write from several threads.

    Each line is an object with ``event``, ``time`` (Unix seconds) and the event's own fields:

    - ``run``: run, config, pid (of the writer, added here)
    - ``joined``: edges, clients
    - ``roster``: edges: {name: {versions, clients}}, clients: {name: {samples, edges, device, versions}}; who is
      connected, written when it changes
    - ``resumed``: window, round (of the checkpoint the run goes on from)
    - ``window-start``: window, rounds: [{round, participants: [{client, edge}]}]
    - ``progress``: edge, window, round, training, done, loss, bytes: {up_bytes, down_bytes, messages}
    - ``window-end``: window, losses: {round: loss}, rho, mu, links: {link: {up_bytes, down_bytes, messages}},
      assignments: {client: cluster or level} where the method groups clients,
      clients: {name: {loss, steps, seconds, rounds, total_seconds, total_cpu_seconds}}, of each one's last round
      and in all
    - ``evaluation``: window, round, frechet, inception_score, kid, features, floor, noise
    - ``accuracy``: window, round, models: {name: {accuracy, loss, classes}}, clients: {client: accuracy}, mean,
      worst10, samples
    - ``prune``: window, round, params, macs, params_dense, macs_dense
    - ``fault``: tier, node, kind, detail, window, round
    - ``checkpoint``: window
    - ``interrupted``: reason (the cloud went away; the run is brought back from its checkpoint)
    - ``finished``, ``stopped``, ``failed``: reason

    Parameters
    ----------
    path : Path
        The log; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._torn = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error}; give the folder to this user") from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; readers see it at once and never a part of it.

        Raises
        ------
        StateError
            It cannot be written, e.g. because the disk is full.
        """
        if event == "run":
            fields = {
                **fields,
                "pid": os.getpid(),
            }  # so that a reader sees when the writer dies without a word
        line = json.dumps({"event": event, "time": time.time(), **jsonable(fields)}) + "\n"
        with self._lock:
            try:
                self._append(line.encode())
            except OSError as error:
                raise write_error(self.path, error) from error

    def _append(self, data: bytes) -> None:
        data = b"\n" + data if self._torn else data
        self._torn = True  # a disk that is almost full may take a part of a line
        while data:
            data = data[os.write(self._file.fileno(), data) :]
        self._torn = False

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()


def follow(path: Path, stop: threading.Event, *, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Yield events as they are written, from byte `offset` on, until `stop` is set and all is read.

    The file may not exist yet. A line that does not parse (torn by a crash of the writer) is passed over.
    """
    while True:
        ending = stop.is_set()  # read before the file, so that what was written before `stop` is not lost
        events, offset = read_from(path, offset)
        yield from events
        if ending:
            return
        stop.wait(_POLL_SECONDS)


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the events whose lines are complete from byte `offset` on, and the offset to go on from."""
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
    """Return all events of a log so far; none if there is no log."""
    return read_from(path, 0)[0]


def interruptions(path: Path) -> int:
    """Return how often a run's ServerApp was started after one that had ended without a last word."""
    found, open_ = 0, False
    for event in read_events(path):
        if event["event"] == "run":
            found += open_
            open_ = True
        elif event["event"] in FINAL:
            open_ = False
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _end_torn_line(path: Path) -> None:
    """Close a line that a killed writer left open, so that the next event starts its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
