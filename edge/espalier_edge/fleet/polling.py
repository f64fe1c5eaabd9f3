"""Which messages wait for which node: found without a look at the others', and polls held until there is one."""

from __future__ import annotations

import threading
from collections import defaultdict

import grpc
from flwr.app import Message
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStore
from flwr.superlink.federation.federation_manager import FederationManager

from espalier.config.timeouts import POLL_HELD, POLL_HELD_STOCK, PULL
from espalier.flower.upstreams import POLLER_HEADER

POLLS_HELD = 3000  # threads that may wait in polls; a poll beyond them is answered at once
MARGIN = PULL - POLL_HELD  # seconds before its caller's deadline at which a held poll is answered
ENDLESS = 86_400.0  # gRPC gives a call without a deadline one in the distant future


class IndexedLinkState(InMemoryLinkState):
    """Flower's link state with an index by node: without it every poll looks at the messages of all nodes."""

    def __init__(self, federation_manager: FederationManager, object_store: ObjectStore) -> None:
        super().__init__(federation_manager, object_store)
        self._by_node: defaultdict[int, dict[str, None]] = defaultdict(dict)

    def store_message_ins(self, message: Message) -> str | None:
        """Store an instruction message; None if its node or run is unknown."""
        with self.lock:
            message_id = super().store_message_ins(message)
            if message_id is not None:
                self._by_node[message.metadata.dst_node_id][message_id] = None
            return message_id

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Take at most `limit` messages to a node that were not delivered yet; they count as delivered."""
        with self.lock:
            own = self._by_node.get(node_id, {})
            self._check_stored_messages(set(own))
            found: list[Message] = []
            for message_id in list(own):
                message = self.message_ins_store.get(message_id)
                if message is None:
                    own.pop(message_id, None)
                elif not message.metadata.delivered_at and run_id in (None, message.metadata.run_id):
                    found.append(message)
            if not own:
                self._by_node.pop(node_id, None)
            found = found[:limit]
            for message in found:
                message.metadata.delivered_at = now().isoformat()
            return found

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Delete messages and their replies."""
        with self.lock:
            for message_id in message_ins_ids:
                if (message := self.message_ins_store.get(message_id)) is not None:
                    self._by_node[message.metadata.dst_node_id].pop(message_id, None)
            super().delete_messages(message_ins_ids)


class LongPolls:
    """Tells the polls of nodes that there is mail.

    A poll is held as long as its caller says, by its deadline, that it waits: an idle node then costs a call in 20 s
    and is awake at once. A stock SuperNode names no deadline and is held for a second. Of two polls of one process
    only the later one may take mail: it has hung up the earlier one, even where no packet told us so.
    """

    def __init__(self, most: int = POLLS_HELD) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._full: set[int] = set()
        self._held: dict[int, dict[str, threading.Event]] = {}
        self._count = 0

    @property
    def held(self) -> int:
        """How many polls are held now."""
        return self._count

    def put(self, node_id: int) -> None:
        """Say that there is a message for a node."""
        with self._lock:
            self._full.add(node_id)
            for held in self._held.get(node_id, {}).values():
                held.set()

    def take(self, node_id: int) -> None:
        """Say that a node's messages are being looked through: what comes from now on is news."""
        with self._lock:
            self._full.discard(node_id)

    def wait(self, node_id: int, context: grpc.ServicerContext) -> bool:
        """Hold a poll; return True once there may be a message for it and its caller is still there."""
        mine, poller = threading.Event(), poller_of(context)
        with self._lock:
            self._let_go(node_id, poller)
            if node_id in self._full:
                return bool(context.is_active())
            if self._count >= self._most:
                return False
            self._held.setdefault(node_id, {})[poller] = mine
            self._count += 1
        # Called at once when the caller hangs up: its thread is needed by others.
        if context.add_callback(mine.set):
            mine.wait(patience(context.time_remaining()))
        with self._lock:
            if self._held.get(node_id, {}).get(poller) is not mine:
                return False
            self._let_go(node_id, poller)
            full = node_id in self._full
        # A message given to a call whose caller is gone would be lost.
        return full and bool(context.is_active())

    def _let_go(self, node_id: int, poller: str) -> None:
        held = self._held.get(node_id, {})
        older = held.pop(poller, None)
        if older is not None:
            older.set()
            self._count -= 1
        if not held:
            self._held.pop(node_id, None)


def poller_of(context: grpc.ServicerContext) -> str:
    """Return which process polls; "" if it does not say, as a stock SuperNode."""
    return said(context, POLLER_HEADER)


def said(context: grpc.ServicerContext, header: str) -> str:
    """Return what a caller put into a header, "" if nothing."""
    return next((str(value) for key, value in context.invocation_metadata() if key == header), "")


def patience(remaining: float | None) -> float:
    """Return for how many seconds to hold a poll whose caller waits `remaining` seconds; None: it does not say."""
    if remaining is None or remaining > ENDLESS:
        return POLL_HELD_STOCK
    return min(POLL_HELD, max(0.0, remaining - MARGIN))
