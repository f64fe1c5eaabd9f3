"""The resident node: one process that serves the messages of its homes with one app, called in place."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.supercore.fab import Fab

from espalier.config.timeouts import STOP_CALL
from espalier.errors import StateError
from espalier.flower.node_resources import Crew
from espalier.flower.node_state import ContextStates, HomeIds, load_key, load_or_make_key
from espalier.flower.run_info import RUN_RECORD, UserConfig
from espalier.flower.upstream_session import App, Desk, HomeLoop
from espalier.flower.upstreams import Home, HomeFault, HomeRefused, MessageGone
from espalier.storage.lock import FolderLock

__all__ = ["RUN_RECORD", "Fab", "Home", "ResidentNode"]


class ResidentNode:
    """A Flower node that stays: it keeps one process, many homes, and the state of its runs.

    Parameters
    ----------
    app : callable
        A Flower ClientApp or any ``(Message, Context) -> Message``. Called in this process, one call at a time over
        all homes; calls for `side_types` may overlap with one other call, and their changes to ``context.state`` are
        not written to disk.
    homes : sequence of Home
        The servers to connect to.
    state : Path
        Folder for the node key, node ids and run states; held by one process at a time.
    node_config : mapping
        Given to the app as ``context.node_config``.
    key : Path, optional
        Private EC key (PEM or OpenSSH); by default ``state/node.key``, made on the first start.
    side_types : frozenset of str
        Message types that are served while a long call runs, e.g. ``{"query.progress"}``.
    crew : Crew, optional
        What it shares with other nodes of this process; by default nothing.
    on_event : callable, optional
        Called, from several threads, with a kind and its facts (all with "home"): connected (node_id), disconnected
        (reason), unreachable (reason, untrusted), refused (reason, by_key), message (message_type, run_id, group_id,
        bytes of Arrays), reply (message_type, seconds, wanted, bytes of Arrays),
        dropped (message_type, reason), error (message_type, reason).

    Raises
    ------
    StateError
        If another process holds `state`, or the key or folder cannot be used.
    ValueError
        If no home is given, or one twice.
    """

    def __init__(
        self,
        app: App,
        homes: Sequence[Home],
        state: Path,
        *,
        node_config: Mapping[str, bool | int | float | str],
        key: Path | None = None,
        side_types: frozenset[str] = frozenset(),
        crew: Crew | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        if not homes or len({home.address for home in homes}) < len(homes):
            raise ValueError("a node needs at least one home, and none twice")
        self._lock_file = FolderLock(state)
        try:
            self._desk = Desk(
                app=app,
                node_config=dict(node_config),
                side_types=side_types,
                key=load_key(key) if key else load_or_make_key(state / "node.key"),
                ids=HomeIds(state / "homes.json"),
                contexts=ContextStates(state / "runs"),
                crew=crew or Crew(),
                tell=on_event or (lambda kind, facts: None),
            )
        except StateError:
            self._lock_file.release()
            raise
        self._own_crew = crew is None
        # Not an Event: a signal may come while this thread holds an Event's own lock, and then waits for ever.
        self._stop_asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._homes = {home.address: HomeLoop(self._desk, home) for home in homes}

    def run(self) -> None:
        """Serve until :meth:`stop`; the failure of one home never ends it."""
        try:
            self.start()
            while True:
                with contextlib.suppress(queue.Empty):
                    # A signal that another thread took is only seen when this one wakes.
                    self._stop_asked.get(timeout=1.0)
                    break
        finally:
            self.close()

    def start(self) -> None:
        """Connect to the homes and serve them, in threads."""
        for loop in self._homes.values():
            loop.start()

    def close(self) -> None:
        """Leave the homes; a call under way is waited for a few seconds."""
        self._desk.stopped.set()
        self._desk.wake()
        end = time.monotonic() + STOP_CALL
        for loop in self._homes.values():
            loop.close(max(0.0, end - time.monotonic()))
        if self._own_crew:
            self._desk.crew.stop()
        self._lock_file.release()

    def stop(self) -> None:
        """Make :meth:`run` return, from any thread or signal handler; a call is waited for a few seconds."""
        self._stop_asked.put(None)

    def wait_connected(self, timeout: float, homes: int | None = None) -> bool:
        """Wait at most `timeout` seconds until `homes` homes (default: all) are connected; tell if they are."""
        wanted = len(self._homes) if homes is None else homes

        def enough() -> bool:
            return sum(loop.connected for loop in self._homes.values()) >= wanted

        with self._desk.connection_changed:
            self._desk.connection_changed.wait_for(lambda: enough() or self._desk.stopped.is_set(), timeout)
            return enough()

    def fetch_fab(self, home: Home, run_id: int) -> Fab | None:
        """Fetch the bundle of a run's app from a home; None if the run has none.

        Raises
        ------
        HomeFault
            If the home does not answer or refuses.
        """
        return self._homes[home.address].runs.get(run_id)[0]

    def run_is_over(self, home: Home, run_id: int) -> bool:
        """Whether a home says that a run has ended, or knows it no more; False while nobody answers."""
        try:
            self._homes[home.address].client.get_run(run_id)
        except (MessageGone, HomeRefused):
            return True
        except HomeFault:
            return False
        return False

    def run_config(self, home: Home, run_id: int) -> UserConfig:
        """Return a run's configuration: the app's defaults with the run's overrides.

        Raises
        ------
        HomeFault
            If the home does not answer or refuses.
        """
        return dict(self._homes[home.address].runs.get(run_id)[1])
