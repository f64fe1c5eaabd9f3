"""Polls the progress of the edges and detects restarted edges while a window runs; reads stop requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from espalier.config.timeouts import PROGRESS, WATCH
from espalier.errors import WireError
from espalier_proto import espalier_pb2 as pb
from espalier_server.planning.tree import Tree
from espalier_server.records.events import STOP_FILE, EventLog
from espalier_server.superlink.grid import LINK_LOST

log = logging.getLogger("espalier.cloud")

#: Polls of a restarted edge without the window after which it has lost it; at the first, its message may be in transit.
POLLS_UNTIL_LOST = 2


class Watch:
    """Observes a window while it runs; a context manager around it.

    It writes "progress" events and detects edges that restarted during the window. Flower delivers a message only once,
    so a restarted edge does not have the window's plan, and the cloud need not wait for it until the deadline.

    Parameters
    ----------
    tree : Tree
        The edges. Reading their connection times takes one HTTP request; requesting their progress takes seventeen,
        most of the SuperLink's processor time in a window, and is done less often.
    events : EventLog
        Log for "progress" events.
    window : int
        The window's number.
    """

    def __init__(self, tree: Tree, events: EventLog, window: int) -> None:
        self._tree, self._events, self._window = tree, events, window
        self._since: dict[int, str] = {}
        self._polls_without: dict[int, int] = {}
        self._next_poll = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._since = self._tree.since()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def lost(self, node_id: int) -> str:
        """Return why an edge will not report on the window, or ""."""
        if self._polls_without.get(node_id, 0) < POLLS_UNTIL_LOST:
            return ""
        return "the edge restarted during the window"

    def _run(self) -> None:
        while not self._done.wait(WATCH):
            try:
                self.tick()
            except (WireError, *LINK_LOST) as error:
                log.warning("%s", error)

    def tick(self) -> None:
        """Read the edges' connection times; poll their progress if it is due or if an edge restarted."""
        since = self._tree.since()
        restarted = any(since.get(node_id, at) != at for node_id, at in self._since.items())
        if restarted or time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + PROGRESS
            self.poll(since)

    def poll(self, since: Mapping[int, str]) -> None:
        """Poll the progress of all edges, and count the polls in which a restarted edge did not have the window.

        Parameters
        ----------
        since : mapping of int to str
            The connection time of each node.
        """
        for node_id, progress in self._tree.progress(self._window).items():
            has_window = progress.run == self._tree.run and progress.window == self._window
            if since.get(node_id) == self._since.get(node_id) or has_window:
                self._polls_without.pop(node_id, None)
            else:
                self._polls_without[node_id] = self._polls_without.get(node_id, 0) + 1
            self._write_event(progress)

    def _write_event(self, progress: pb.Progress) -> None:
        self._events.write(
            "progress",
            edge=progress.edge,
            window=progress.window,
            round=progress.round,
            training=list(progress.training),
            done=list(progress.done),
            loss=progress.loss,
            bytes={
                "up_bytes": progress.client_edge.up_bytes,
                "down_bytes": progress.client_edge.down_bytes,
                "messages": progress.client_edge.messages,
            },
        )


def stop_requested(out: Path) -> bool:
    """Whether `espalier stop` has requested to stop the run in a folder."""
    return (out / STOP_FILE).exists()
