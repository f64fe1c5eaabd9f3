"""The status of a resident node, from its events, in its state folder for health checks."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.errors import StateError
from espalier.storage.json_file import write_json
from espalier.storage.lock import is_locked

STATUS_FILE = "status.json"
#: Seconds between two updates of the status file's time, and the age from which the process counts as hung.
TOUCH_SECONDS, STALE = 10.0, 45.0

Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass
class UpstreamStatus:
    """A node's connection to one server: since when (Unix seconds) its state lasts, and why it is not connected."""

    connected: bool = False
    since: float = 0.0
    reason: str = ""


class NodeStatus:
    """Updates ``STATE/status.json`` from the events of a ResidentNode; a context manager around its run.

    Parameters
    ----------
    state : Path
        The node's state folder.
    upstreams : list of str
        Addresses of its servers.
    then : callable, optional
        Also called with every event.
    own_thread : bool
        Whether a thread calls :meth:`touch`; otherwise the caller must, at least every `STALE` seconds.

    Attributes
    ----------
    upstreams : dict of str to UpstreamStatus
        Connections by address.
    answered : Counter
        Messages answered, by message type; a failed one counts in `failed`.
    seconds : dict
        Seconds spent in the app, by message type.
    up_bytes, down_bytes : int
        Payload sent to and received from the servers.
    """

    def __init__(
        self, state: Path, upstreams: list[str], then: Listener | None = None, *, own_thread: bool = True
    ) -> None:
        self.path = state / STATUS_FILE
        self.upstreams = {address: UpstreamStatus() for address in upstreams}
        self.answered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.up_bytes, self.down_bytes = 0, 0
        self.busy_with = ""
        self._then = then
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = (
            threading.Thread(target=self._touch_regularly, name="status", daemon=True) if own_thread else None
        )

    def __enter__(self) -> NodeStatus:
        self._write()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.path.unlink(missing_ok=True)

    def __call__(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Apply an event; the `on_event` of a ResidentNode."""
        with self._lock:
            changed = self._apply(kind, facts)
        if changed:
            with contextlib.suppress(StateError):  # the code that needs the disk reports that it is full
                self._write()
        if self._then is not None:
            self._then(kind, facts)

    def _apply(self, kind: str, facts: Mapping[str, Any]) -> bool:
        """Apply an event; return whether the file changes."""
        message_type = str(facts.get("message_type", ""))
        if kind in ("connected", "disconnected", "unreachable", "refused"):
            reason = str(facts.get("reason", ""))
            old = self.upstreams.get(str(facts["upstream"]), UpstreamStatus())
            # A refusal of one call does not change the connection.
            connected = kind == "connected" or (kind == "refused" and old.connected)
            since = old.since if connected == old.connected and old.since else time.time()
            self.upstreams[str(facts["upstream"])] = UpstreamStatus(
                connected, since, "" if connected else reason
            )
            return True
        if kind == "message":
            self.busy_with = message_type
            self.down_bytes += int(facts.get("bytes", 0))
        elif kind == "reply":
            self.answered[message_type] += 1
            self.seconds[message_type] += float(facts.get("seconds", 0.0))
            self.up_bytes += int(facts.get("bytes", 0))
            self.busy_with = ""
        elif kind == "error":
            self.failed[message_type] += 1
            self.busy_with = ""
        return False

    def _touch_regularly(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            self.touch()

    def touch(self) -> None:
        """Update the time of the status file, which shows that the process is not hung."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def _write(self) -> None:
        with self._lock:
            content = {"pid": os.getpid(), "homes": {a: vars(h) for a, h in self.upstreams.items()}}
        write_json(self.path, content)


def connected_upstreams(state: Path) -> list[str]:
    """Return the servers that the node of a state folder is connected to now.

    Parameters
    ----------
    state : Path
        State folder of a client or an edge.

    Raises
    ------
    StateError
        No process holds the folder, the process is hung, or it is connected to no server; with the reason.
    """
    path = state / STATUS_FILE
    if not is_locked(state):
        raise StateError(f"no process holds the state folder {state}; start the client or edge")
    try:
        age = time.time() - path.stat().st_mtime
        homes = json.loads(path.read_text(encoding="utf-8"))["homes"]
        found = {str(address): UpstreamStatus(**home) for address, home in homes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(
            f"{path} cannot be read ({error}); the process is starting, or of another version"
        ) from error
    if age > STALE:
        raise StateError(f"the process of {state} has not responded for {age:.0f} s; start it again")
    connected = [address for address, home in found.items() if home.connected]
    if not connected:
        reasons = "; ".join(f"{address} ({home.reason or 'not yet'})" for address, home in found.items())
        raise StateError(
            f"connected to no server: {reasons}; check the address, the network and the node key"
        )
    return connected
