"""What the nodes of one process share: connections, a clock for heartbeats, and turns at the processor."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH

from espalier.flower.upstreams import Home


@dataclass
class Trunk:
    """A gRPC channel and how many lines use it."""

    home: Home
    channel: grpc.Channel
    lines: int = 0


class Channels:
    """Gives out gRPC channels.

    Parameters
    ----------
    lines : int
        How many lines to one server share a channel.
    """

    def __init__(self, lines: int = 1) -> None:
        self._most = lines
        self._lock = threading.Lock()
        self._open: dict[Home, list[Trunk]] = {}

    def take(self, home: Home) -> Trunk:
        """Return a channel to a home with a place left, a new one if there is none."""
        with self._lock:
            trunks = self._open.setdefault(home, [])
            trunk = next((trunk for trunk in trunks if trunk.lines < self._most), None)
            if trunk is None:
                trunk = Trunk(home, _open_channel(home))
                trunks.append(trunk)
            trunk.lines += 1
            return trunk

    def leave(self, trunk: Trunk) -> None:
        """Give a place back; the last one to leave closes the channel. Nobody takes a place beside one who left.

        A line leaves when it is closed or found dead, and a channel that is dead for one is dead for all.
        """
        with self._lock:
            trunk.lines -= 1
            trunks = self._open.get(trunk.home, [])
            if trunk in trunks:
                trunks.remove(trunk)
            if not trunks:
                self._open.pop(trunk.home, None)
            last = trunk.lines == 0
        if last:
            trunk.channel.close()


def _open_channel(home: Home) -> grpc.Channel:
    options = [
        ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
        ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
        # Without it gRPC gives every channel to one address the same connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if home.insecure:
        return grpc.insecure_channel(home.address, options=options)
    credentials = grpc.ssl_channel_credentials(home.root_certificates)
    return grpc.secure_channel(home.address, credentials, options=options)


class Pulse:
    """One thread that makes calls when their time has come; a call must not block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Make a call in so many seconds; none is made any more once this is stopped."""
        with self._changed:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
                self._thread.start()
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._count), call))
            self._changed.notify()

    def stop(self) -> None:
        """Make no further call."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
                if self._stopped:
                    return
                call = heapq.heappop(self._due)[2]
            try:
                call()
            except Exception:
                logging.getLogger(__name__).exception("unforeseen fault; going on")


class Crew:
    """What the nodes of a process share.

    Parameters
    ----------
    lines : int
        How many nodes share a connection to a server.
    one_at_a_time : bool
        Whether only one of the nodes calls its app at a time.
    at_once : frozenset of str
        Message types that do not wait for that turn.
    """

    def __init__(
        self, lines: int = 1, *, one_at_a_time: bool = False, at_once: frozenset[str] = frozenset()
    ) -> None:
        self.channels = Channels(lines)
        self.pulse = Pulse()
        self._turn = threading.Lock() if one_at_a_time else None
        self._at_once = at_once

    @contextlib.contextmanager
    def turn(self, message_type: str) -> Iterator[None]:
        """Wait for the turn at the processor that a message of this type needs."""
        if self._turn is None or message_type in self._at_once:
            yield
        else:
            with self._turn:
                yield

    def stop(self) -> None:
        """End the heartbeats, once the nodes are closed."""
        self.pulse.stop()
