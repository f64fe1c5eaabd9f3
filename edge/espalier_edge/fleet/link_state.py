"""Flower's in-memory link state with an index of the messages by node."""

from __future__ import annotations

from collections import defaultdict

from flwr.app import Message
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStore
from flwr.superlink.federation.federation_manager import FederationManager


class IndexedLinkState(InMemoryLinkState):
    """Flower's in-memory link state with an index by node; without it, every poll scans the messages of all nodes."""

    def __init__(self, federation_manager: FederationManager, object_store: ObjectStore) -> None:
        super().__init__(federation_manager, object_store)
        self._by_node: defaultdict[int, dict[str, None]] = defaultdict(dict)

    def store_message_ins(self, message: Message) -> str | None:
        """Store an instruction message and return its id; None if its node or run is unknown."""
        with self.lock:
            message_id = super().store_message_ins(message)
            if message_id is not None:
                self._by_node[message.metadata.dst_node_id][message_id] = None
            return message_id

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Return at most `limit` undelivered messages to a node, and mark them as delivered."""
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
