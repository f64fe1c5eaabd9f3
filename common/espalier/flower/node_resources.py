"""Resources that the nodes of a process share: gRPC channels, a heartbeat scheduler, and a lock around app calls."""

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

from espalier.flower.upstreams import Upstream


@dataclass
class SharedChannel:
    """A gRPC channel and the number of connections that use it."""

    upstream: Upstream
    channel: grpc.Channel
    users: int = 0


class ChannelPool:
    """A pool of gRPC channels.

    Parameters
    ----------
    users : int
        How many connections to one server share a channel.
    """

    def __init__(self, users: int = 1) -> None:
        self._max_users = users
        self._lock = threading.Lock()
        self._open: dict[Upstream, list[SharedChannel]] = {}

    def acquire(self, upstream: Upstream) -> SharedChannel:
        """Return a channel to a server with capacity left; open one if there is none."""
        with self._lock:
            channels = self._open.setdefault(upstream, [])
            shared = next((shared for shared in channels if shared.users < self._max_users), None)
            if shared is None:
                shared = SharedChannel(upstream, _open_channel(upstream))
                channels.append(shared)
            shared.users += 1
            return shared

    def release(self, shared: SharedChannel) -> None:
        """Return a channel to the pool; the last user closes it, and it is never handed out again.

        A user releases its channel when it closes or when the connection is dead, which holds for all its users.
        """
        with self._lock:
            shared.users -= 1
            channels = self._open.get(shared.upstream, [])
            if shared in channels:
                channels.remove(shared)
            if not channels:
                self._open.pop(shared.upstream, None)
            last = shared.users == 0
        if last:
            shared.channel.close()


def _open_channel(upstream: Upstream) -> grpc.Channel:
    options = [
        ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
        ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
        # Otherwise all channels of this process to one address share one connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if upstream.insecure:
        return grpc.insecure_channel(upstream.address, options=options)
    credentials = grpc.ssl_channel_credentials(upstream.root_certificates)
    return grpc.secure_channel(upstream.address, credentials, options=options)


class HeartbeatScheduler:
    """A thread that runs callbacks at their due times; a callback must not block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Run a callback in so many seconds, unless the scheduler is stopped before."""
        with self._changed:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
                self._thread.start()
            heapq.heappush(self._queue, (time.monotonic() + seconds, next(self._count), call))
            self._changed.notify()

    def stop(self) -> None:
        """Run no further callback."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._queue or self._queue[0][0] > time.monotonic()):
                    self._changed.wait(
                        max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else None
                    )
                if self._stopped:
                    return
                call = heapq.heappop(self._queue)[2]
            try:
                call()
            except Exception:
                logging.getLogger(__name__).exception("unexpected error; continuing")


class NodeResources:
    """Resources that the nodes of a process share.

    Parameters
    ----------
    users : int
        How many nodes share a connection to a server.
    exclusive : bool
        Whether only one of the nodes may call its app at a time.
    exempt : frozenset of str
        Message types whose calls may run at any time.
    """

    def __init__(
        self, users: int = 1, *, exclusive: bool = False, exempt: frozenset[str] = frozenset()
    ) -> None:
        self.channels = ChannelPool(users)
        self.heartbeats = HeartbeatScheduler()
        self._app_lock = threading.Lock() if exclusive else None
        self._exempt = exempt

    @contextlib.contextmanager
    def app_turn(self, message_type: str) -> Iterator[None]:
        """Hold the lock that a call for a message of this type needs."""
        if self._app_lock is None or message_type in self._exempt:
            yield
        else:
            with self._app_lock:
                yield

    def stop(self) -> None:
        """Stop the scheduler; call it once the nodes are closed."""
        self.heartbeats.stop()
