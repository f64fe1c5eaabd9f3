"""Beside a window: how far the edges are, which of them have lost it, and whether somebody asked for the end."""

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

#: Looks at a restarted edge that must find it without the window: at the first, its message may be on its way.
LOOKS = 2


class Watch:
    """Looks after a window while it runs; a context manager around it.

    It writes "progress" events, and finds edges that were started again in the middle of the window. Such an
    edge knows nothing of the window that its dead process had taken, and Flower delivers a message once, so
    the cloud need not wait for it until the deadline.

    Parameters
    ----------
    tree : Tree
        Edges to ask. To see who is connected since when is one HTTP call; to ask the edges how far they are costs the
        SuperLink seventeen, a window's largest part in its processor time, and is done more rarely.
    events : EventLog
        Where progress goes.
    window : int
        The window's number.
    """

    def __init__(self, tree: Tree, events: EventLog, window: int) -> None:
        self._tree, self._events, self._window = tree, events, window
        self._since: dict[int, str] = {}
        self._without: dict[int, int] = {}
        self._next_look = 0.0
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
        if self._without.get(node_id, 0) < LOOKS:
            return ""
        return "the edge was started again in the middle of the window"

    def _run(self) -> None:
        while not self._done.wait(WATCH):
            try:
                self.tick()
            except (WireError, *LINK_LOST) as error:
                log.warning("%s", error)

    def tick(self) -> None:
        """See who is connected; look at the edges if it is time, or if one of them was started again."""
        since = self._tree.since()
        again = any(since.get(node_id, at) != at for node_id, at in self._since.items())
        if again or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + PROGRESS
            self.look(since)

    def look(self, since: Mapping[int, str]) -> None:
        """Ask every edge how far it is, and note those that were started again and have no such window.

        Parameters
        ----------
        since : mapping of int to str
            Since when each node is connected.
        """
        for node_id, progress in self._tree.progress(self._window).items():
            has_it = progress.run == self._tree.run and progress.window == self._window
            if since.get(node_id) == self._since.get(node_id) or has_it:
                self._without.pop(node_id, None)
            else:
                self._without[node_id] = self._without.get(node_id, 0) + 1
            self._tell(progress)

    def _tell(self, progress: pb.Progress) -> None:
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
    """Whether `espalier stop` left its file in the run's folder."""
    return (out / STOP_FILE).exists()
