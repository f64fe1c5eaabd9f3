"""Heartbeats of a node to one server: sent from a shared scheduler thread; a missing answer forces a reconnect."""

from __future__ import annotations

import random
import threading
import time

from espalier.config.timeouts import HEARTBEAT, SILENCE
from espalier.flower.fleet_client import FleetClient
from espalier.flower.node_resources import HeartbeatScheduler
from espalier.flower.upstreams import NodeUnknownError, UpstreamError


class Heartbeat:
    """Sends heartbeats while the node is activated.

    Parameters
    ----------
    client : FleetClient
        The node's connection to the server.
    heartbeats : HeartbeatScheduler
        Runs the next heartbeat when it is due.
    stopped : threading.Event
        Ends the heartbeats once set.

    Attributes
    ----------
    forgotten : threading.Event
        Set once the server reports that it does not know the node; cleared when the node has registered again.
    """

    def __init__(self, client: FleetClient, heartbeats: HeartbeatScheduler, stopped: threading.Event) -> None:
        self._client, self._scheduler, self._stopped = client, heartbeats, stopped
        self._answered = time.monotonic()
        self.forgotten = threading.Event()

    def start(self) -> None:
        """Schedule the first heartbeat, with jitter so that the nodes of a process do not send theirs together."""
        self._scheduler.after(random.uniform(0.5, 1.0), self._beat)

    def _beat(self) -> None:
        if self._stopped.is_set():
            return
        if not self._client.node_id or self.forgotten.is_set():
            self._answered = time.monotonic()
            self._scheduler.after(0.5, self._beat)
            return
        try:
            self._client.heartbeat(self._ended)
        except UpstreamError as fault:
            self._ended(fault)

    def _ended(self, fault: UpstreamError | None) -> None:
        """Handle the result of a heartbeat; called from a gRPC thread."""
        if fault is None:
            self._answered = time.monotonic()
            self._scheduler.after(HEARTBEAT * random.uniform(0.9, 1.0), self._beat)
        elif isinstance(fault, NodeUnknownError):
            self.forgotten.set()
            self._client.end_poll()  # the server holds it for up to 20 s and has no messages for an unknown node
            self._scheduler.after(0.5, self._beat)
        else:
            self._scheduler.after(2.0, self._beat)
            if time.monotonic() - self._answered > SILENCE and not self._stopped.is_set():
                self._answered = time.monotonic()
                self._scheduler.after(0.0, self._client.reconnect)
