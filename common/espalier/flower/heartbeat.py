"""A node's heartbeats to one home: without a thread of its own, and what their silence means."""

from __future__ import annotations

import random
import threading
import time

from espalier.config.timeouts import HEARTBEAT, SILENCE
from espalier.flower.fleet_client import FleetClient
from espalier.flower.node_resources import Pulse
from espalier.flower.upstreams import HomeFault, NodeForgotten


class Heartbeat:
    """Sends heartbeats while the node is joined.

    Parameters
    ----------
    client : FleetClient
        The node at its home.
    pulse : Pulse
        Says when the next one is due.
    stopped : threading.Event
        Ends them.

    Attributes
    ----------
    forgotten : threading.Event
        Set once the server says that it does not know the node; whoever joins it again clears it.
    """

    def __init__(self, client: FleetClient, pulse: Pulse, stopped: threading.Event) -> None:
        self._client, self._pulse, self._stopped = client, pulse, stopped
        self._answered = time.monotonic()
        self.forgotten = threading.Event()

    def start(self) -> None:
        """Begin; the nodes of a process do not beat in step."""
        self._pulse.after(random.uniform(0.5, 1.0), self._beat)

    def _beat(self) -> None:
        if self._stopped.is_set():
            return
        if not self._client.node_id or self.forgotten.is_set():
            self._answered = time.monotonic()
            self._pulse.after(0.5, self._beat)
            return
        try:
            self._client.beat(self._ended)
        except HomeFault as fault:
            self._ended(fault)

    def _ended(self, fault: HomeFault | None) -> None:
        """Take the outcome of a heartbeat, in a thread of gRPC's."""
        if fault is None:
            self._answered = time.monotonic()
            self._pulse.after(HEARTBEAT * random.uniform(0.9, 1.0), self._beat)
        elif isinstance(fault, NodeForgotten):
            self.forgotten.set()
            self._client.end_poll()  # it is held for long, and would bring nothing
            self._pulse.after(0.5, self._beat)
        else:
            self._pulse.after(2.0, self._beat)
            if time.monotonic() - self._answered > SILENCE and not self._stopped.is_set():
                self._answered = time.monotonic()
                self._pulse.after(0.0, self._client.hang_up)
