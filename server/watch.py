"""Beside a window: how far the edges are, and whether somebody asked for the end."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from common.errors import WireError
from common.run.events import STOP_FILE, EventLog
from server.tree import Tree

log = logging.getLogger("espalier.cloud")

#: Seconds between two looks at the edges; each costs a small message an edge.
INTERVAL = 2.0


class Watch:
    """Writes "progress" events while a window runs; a context manager around the window.

    Parameters
    ----------
    tree : Tree
        Edges to ask.
    events : EventLog
        Where progress goes.
    """

    def __init__(self, tree: Tree, events: EventLog) -> None:
        self._tree, self._events = tree, events
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                found = self._tree.progress()
            except WireError as error:
                log.warning("%s", error)
                continue
            for progress in found:
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
