"""The resident node: one long-lived process that runs an app in place for the messages of several servers."""

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
from espalier.flower.node_resources import NodeResources
from espalier.flower.node_state import ContextStates, NodeIds, load_key, load_or_make_key
from espalier.flower.run_info import RUN_RECORD, UserConfig
from espalier.flower.upstream_session import App, SharedNodeState, UpstreamSession
from espalier.flower.upstreams import MessageDiscardedError, Upstream, UpstreamError, UpstreamRefusedError
from espalier.storage.lock import FolderLock

__all__ = ["RUN_RECORD", "Fab", "ResidentNode", "Upstream"]


class ResidentNode:
    """A Flower node that serves all its messages, from any number of servers, in one long-lived process.

    A stock SuperNode starts a process for every message; this node imports the app once and calls it in place.

    Parameters
    ----------
    app : callable
        A Flower ClientApp or any ``(Message, Context) -> Message``. Called in this process, one call at a time across
        all upstreams. Calls for `side_types` may overlap with one other call, and their changes to ``context.state``
        are not written to disk.
    upstreams : sequence of Upstream
        The servers to connect to.
    state : Path
        Folder for the node key, node ids and run states; locked by one process at a time.
    node_config : mapping
        Passed to the app as ``context.node_config``.
    key : Path, optional
        Private EC key (PEM or OpenSSH); by default ``state/node.key``, generated on the first start.
    side_types : frozenset of str
        Message types that are answered while another call runs, e.g. ``{"query.progress"}``.
    resources : NodeResources, optional
        Connections and scheduler shared with other nodes of this process; by default the node has its own.
    on_event : callable, optional
        Called, from several threads, with the kind of an event and its fields (all have "upstream"): connected
        (node_id), disconnected (reason), unreachable (reason, untrusted), refused (reason, by_key), message
        (message_type, run_id, group_id, bytes of Arrays), reply (message_type, seconds, wanted, bytes of Arrays),
        dropped (message_type, reason), error (message_type, reason).

    Raises
    ------
    StateError
        If another process has locked `state`, or the key or folder cannot be used.
    ValueError
        If `upstreams` is empty or has duplicate addresses.
    """

    def __init__(
        self,
        app: App,
        upstreams: Sequence[Upstream],
        state: Path,
        *,
        node_config: Mapping[str, bool | int | float | str],
        key: Path | None = None,
        side_types: frozenset[str] = frozenset(),
        resources: NodeResources | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        if not upstreams or len({upstream.address for upstream in upstreams}) < len(upstreams):
            raise ValueError("a node needs at least one upstream server, each given once")
        self._lock_file = FolderLock(state)
        try:
            self._shared = SharedNodeState(
                app=app,
                node_config=dict(node_config),
                side_types=side_types,
                key=load_key(key) if key else load_or_make_key(state / "node.key"),
                ids=NodeIds(state / "homes.json"),
                contexts=ContextStates(state / "runs"),
                resources=resources or NodeResources(),
                on_event=on_event or (lambda kind, facts: None),
            )
        except StateError:
            self._lock_file.release()
            raise
        self._owns_resources = resources is None
        # Not an Event: a signal handler that runs while this thread holds the Event's internal lock would deadlock.
        self._stop_requested: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._upstreams = {
            upstream.address: UpstreamSession(self._shared, upstream) for upstream in upstreams
        }

    def run(self) -> None:
        """Serve until :meth:`stop` is called; failures of single servers do not end the node."""
        try:
            self.start()
            while True:
                with contextlib.suppress(queue.Empty):
                    # A signal delivered to another thread is handled only when the main thread wakes up.
                    self._stop_requested.get(timeout=1.0)
                    break
        finally:
            self.close()

    def start(self) -> None:
        """Start the sessions, each with threads of its own."""
        for session in self._upstreams.values():
            session.start()

    def close(self) -> None:
        """Close all sessions; wait a few seconds for a running app call."""
        self._shared.stopped.set()
        self._shared.wake()
        end = time.monotonic() + STOP_CALL
        for session in self._upstreams.values():
            session.close(max(0.0, end - time.monotonic()))
        if self._owns_resources:
            self._shared.resources.stop()
        self._lock_file.release()

    def stop(self) -> None:
        """Make :meth:`run` return; may be called from any thread or signal handler."""
        self._stop_requested.put(None)

    def wait_connected(self, timeout: float, upstreams: int | None = None) -> bool:
        """Wait until a number of sessions are connected.

        Parameters
        ----------
        timeout : float
            Maximum wait in seconds.
        upstreams : int, optional
            How many; by default all.

        Returns
        -------
        bool
            Whether they are connected.
        """
        wanted = len(self._upstreams) if upstreams is None else upstreams

        def enough() -> bool:
            return sum(session.connected for session in self._upstreams.values()) >= wanted

        with self._shared.connection_changed:
            self._shared.connection_changed.wait_for(
                lambda: enough() or self._shared.stopped.is_set(), timeout
            )
            return enough()

    def fetch_fab(self, upstream: Upstream, run_id: int) -> Fab | None:
        """Fetch the Flower App Bundle (FAB) of a run from a server; None if the run has none.

        Raises
        ------
        UpstreamError
            If the server does not answer or refuses.
        """
        return self._upstreams[upstream.address].runs.get(run_id)[0]

    def run_is_over(self, upstream: Upstream, run_id: int) -> bool:
        """Return whether a server reports that a run has ended or is unknown; False while it does not answer."""
        try:
            self._upstreams[upstream.address].client.get_run(run_id)
        except (MessageDiscardedError, UpstreamRefusedError):
            return True
        except UpstreamError:
            return False
        return False

    def run_config(self, upstream: Upstream, run_id: int) -> UserConfig:
        """Return the configuration of a run: the app's defaults with the run's overrides.

        Raises
        ------
        UpstreamError
            If the server does not answer or refuses.
        """
        return dict(self._upstreams[upstream.address].runs.get(run_id)[1])
