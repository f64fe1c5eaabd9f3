"""Long polling: a poll of a node is held until there is a message for it."""

from __future__ import annotations

import threading

import grpc

from espalier.config.timeouts import POLL_HELD, POLL_HELD_STOCK, PULL
from espalier.flower.upstreams import POLLER_HEADER

POLLS_HELD = 3000  # maximum number of held polls, each a thread; further polls are answered immediately
MARGIN = PULL - POLL_HELD  # a held poll is answered this many seconds before its caller's deadline
ENDLESS = 86_400.0  # gRPC gives a call without a deadline one in the distant future


class LongPolls:
    """Holds the polls of nodes, and wakes them when there is a message.

    A poll is held until shortly before the deadline of its call: an idle node then makes one call in 20 s, and receives
    a message without delay. A stock SuperNode sets no deadline; its polls are held for a second. Of two polls of one
    process only the later one may receive a message, as the process has abandoned the earlier one, even if the
    connection did not report it.
    """

    def __init__(self, most: int = POLLS_HELD) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._pending: set[int] = set()
        self._held: dict[int, dict[str, threading.Event]] = {}
        self._count = 0

    @property
    def held(self) -> int:
        """Number of polls that are held now."""
        return self._count

    def notify(self, node_id: int) -> None:
        """Wake the polls of a node: there is a message for it."""
        with self._lock:
            self._pending.add(node_id)
            for held in self._held.get(node_id, {}).values():
                held.set()

    def reset(self, node_id: int) -> None:
        """Reset the flag of a node, before its messages are read."""
        with self._lock:
            self._pending.discard(node_id)

    def wait(self, node_id: int, context: grpc.ServicerContext) -> bool:
        """Hold a poll; return True once there may be a message for it and its caller is still connected."""
        mine, poller = threading.Event(), poller_of(context)
        with self._lock:
            self._release(node_id, poller)
            if node_id in self._pending:
                return bool(context.is_active())
            if self._count >= self._most:
                return False
            self._held.setdefault(node_id, {})[poller] = mine
            self._count += 1
        # The callback runs when the caller disconnects, which frees the thread.
        if context.add_callback(mine.set):
            mine.wait(hold_time(context.time_remaining()))
        with self._lock:
            if self._held.get(node_id, {}).get(poller) is not mine:
                return False
            self._release(node_id, poller)
            pending = node_id in self._pending
        # A message returned to a disconnected caller would be lost.
        return pending and bool(context.is_active())

    def _release(self, node_id: int, poller: str) -> None:
        held = self._held.get(node_id, {})
        older = held.pop(poller, None)
        if older is not None:
            older.set()
            self._count -= 1
        if not held:
            self._held.pop(node_id, None)


def poller_of(context: grpc.ServicerContext) -> str:
    """Return the id of the polling process; "" for a stock SuperNode, which sends none."""
    return header_of(context, POLLER_HEADER)


def header_of(context: grpc.ServicerContext, header: str) -> str:
    """Return the value of a header of a call, "" if it is absent."""
    return next((str(value) for key, value in context.invocation_metadata() if key == header), "")


def hold_time(remaining: float | None) -> float:
    """Return for how many seconds to hold a poll whose deadline is in `remaining` seconds; None if it has none."""
    if remaining is None or remaining > ENDLESS:
        return POLL_HELD_STOCK
    return min(POLL_HELD, max(0.0, remaining - MARGIN))
