"""What a resident node is doing, told by its own events and kept in its state folder for whoever looks on."""

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
#: Seconds between two signs of life, and how old the last one may be: a process that was stopped gives none.
SIGN_OF_LIFE, STALE = 10.0, 45.0

Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass
class UpstreamStatus:
    """A node's connection to one server: since when (Unix seconds) it is as it is, and why it is not there."""

    connected: bool = False
    since: float = 0.0
    reason: str = ""


class NodeStatus:
    """Listens to a ResidentNode and keeps ``STATE/status.json`` up to date; a context manager around its run.

    Parameters
    ----------
    state : Path
        The node's state folder.
    upstreams : list of str
        Addresses of its servers.
    then : callable, optional
        Told every event after this one.
    alone : bool
        Whether it gives signs of life by a thread of its own; else somebody calls :meth:`touch` often enough.

    Attributes
    ----------
    upstreams : dict of str to UpstreamStatus
        Connections by address.
    answered : Counter
        Messages answered, by message type; a failed one counts in `failed`.
    seconds : dict
        Seconds spent in the app, by message type.
    up_bytes, down_bytes : int
        Payload sent to and got from the servers.
    """

    def __init__(
        self, state: Path, upstreams: list[str], then: Listener | None = None, *, alone: bool = True
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
        self._thread = threading.Thread(target=self._live, name="status", daemon=True) if alone else None

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
        """Take in an event; the `on_event` of a ResidentNode."""
        with self._lock:
            changed = self._take(kind, facts)
        if changed:
            with contextlib.suppress(StateError):  # a full disk is told by what needs the disk
                self._write()
        if self._then is not None:
            self._then(kind, facts)

    def _take(self, kind: str, facts: Mapping[str, Any]) -> bool:
        """Note an event; tell whether the file changes by it."""
        message_type = str(facts.get("message_type", ""))
        if kind in ("connected", "disconnected", "unreachable", "refused"):
            reason = str(facts.get("reason", ""))
            old = self.upstreams.get(str(facts["upstream"]), UpstreamStatus())
            # A refusal of one call leaves the connection as it was.
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

    def _live(self) -> None:
        while not self._ended.wait(SIGN_OF_LIFE):
            self.touch()

    def touch(self) -> None:
        """Give a sign of life."""
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
        No process holds the folder, it gives no sign of life, or it is connected to no server; with the reason.
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
            f"{path} tells nothing ({error}); the process is starting, or of another version"
        ) from error
    if age > STALE:
        raise StateError(f"the process of {state} has given no sign of life for {age:.0f} s; start it again")
    connected = [address for address, home in found.items() if home.connected]
    if not connected:
        reasons = "; ".join(f"{address} ({home.reason or 'not yet'})" for address, home in found.items())
        raise StateError(
            f"connected to no server: {reasons}; see to the address, the network and the node key"
        )
    return connected
