"""The Grid of the inline Fleet server: stores messages directly, and yields replies as they arrive."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial

from flwr.app import Message, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.run import Run

from espalier.config.timeouts import OFFLINE_GRACE
from espalier.flower.inline_objects import select_inline
from espalier.flower.payloads import PayloadError, pack, tree_ids, unpack
from espalier.flower.streaming_grid import Countdown, StreamingGrid, error_reply, set_origin, set_ttl
from espalier_edge.fleet.servicer import FleetState

TICK = 0.5


class InlineGrid(StreamingGrid):
    """The Grid of a run at an :class:`~espalier_edge.fleet.server.InlineFleet`."""

    def __init__(self, fleet: FleetState, run_id: int, task_id: int, on_close: Callable[[int], None]) -> None:
        super().__init__()
        self._fleet = fleet
        self._run_id = run_id
        self._task_id = task_id
        self._on_close = on_close
        self._pushed: dict[str, Message] = {}
        self._complete: set[str] = set()
        self.closed = False

    # Flower's Grid ------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Accept this grid's own run; it serves no other."""
        if run.run_id != self._run_id:
            raise ValueError(f"this grid serves run {self._run_id}, not {run.run_id}")

    @property
    def run(self) -> Run:
        """The record of the run."""
        return self._fleet.state.get_run_info(run_ids=[self._run_id])[0]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create an instruction message of this run."""
        metadata = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=now().timestamp(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
            src_task_id=self._task_id,
        )
        return make_message(metadata=metadata, content=content)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are online."""
        return sorted(self._fleet.state.get_nodes(self._run_id))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are online."""
        with self._fleet.state.lock:
            return deepcopy(list(self._fleet.state.get_node_info(node_ids=list(self.get_node_ids()))))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids, "" for one whose node is unknown."""
        ids = []
        for message in messages:
            message_id = self._send(message, self._set_complete)
            if message_id:
                self._pushed[message_id] = remove_content_from_message(message)
            ids.append(message_id)
        return ids

    def _set_complete(self, message_id: str) -> None:
        with self._lock:
            self._complete.add(message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the complete replies to pushed messages, and an Error for each node that went offline."""
        replies = []
        for message_id in set(message_ids):
            sent = self._pushed.get(message_id)
            if sent is None:
                continue
            with self._lock:
                complete = message_id in self._complete
            reply = self._take(sent) if complete else None
            if reply is None and (reason := self._unavailable(sent)):
                reply = self._abandon(sent, ErrorCode.NODE_UNAVAILABLE, reason)
            if reply is None and sent.metadata.created_at + sent.metadata.ttl < now().timestamp():
                reply = self._abandon(sent, ErrorCode.MESSAGE_UNAVAILABLE, "the message has expired")
            if reply is not None:
                self._fleet.abandon_upload(message_id)
                self._pushed.pop(message_id, None)
                with self._lock:
                    self._complete.discard(message_id)
                replies.append(reply)
        return replies

    # Streaming ----------------------------------------------------------------------------------

    def exchange(
        self,
        messages: Iterable[Message],
        *,
        deadline: float,
        quorum: int | None = None,
        grace: float = 0.0,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they arrive; see :meth:`StreamingGrid.exchange`."""
        arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
        waiting: dict[str, Message] = {}
        countdown = Countdown(deadline, quorum, grace)
        try:
            failed = []
            for message in messages:
                set_ttl(message, deadline)
                message_id = self._send(message, arrivals.put)
                if message_id:
                    waiting[message_id] = remove_content_from_message(message)
                else:
                    failed.append(error_reply(message, ErrorCode.NODE_UNAVAILABLE, "the node is unknown"))
            del messages
            yield from failed
            while waiting:
                left = countdown.left
                if self.closed or (
                    left <= 0 and arrivals.empty()
                ):  # replies that arrived in time are not lost
                    break
                if cancelled is not None and cancelled():
                    break
                try:
                    message_id = arrivals.get(timeout=max(0.0, min(left, TICK)))
                except queue.Empty:
                    for message_id, sent in list(waiting.items()):
                        if reason := self._unavailable(sent):
                            del waiting[message_id]
                            yield self._abandon(sent, ErrorCode.NODE_UNAVAILABLE, reason)
                    continue
                if message_id not in waiting:
                    continue
                reply = self._take(waiting[message_id])
                if reply is None:
                    continue
                del waiting[message_id]
                countdown.count(reply)
                try:
                    yield reply
                finally:
                    del reply
                    self._fleet.abandon_upload(message_id)  # free its slot for the next upload
        finally:
            for sent in waiting.values():
                self._abandon(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "abandoned")

    def count_late(self) -> None:
        """Count a reply that arrived after its message was abandoned."""
        with self._lock:
            self.late += 1

    def close(self) -> None:
        """Finish the run and delete its messages and objects."""
        if self.closed:
            return
        self.closed = True
        fleet = self._fleet
        with fleet.lock:
            own = [
                message_id
                for message_id in fleet.outstanding
                if (message := fleet.state.message_ins_store.get(message_id)) is None
                or message.metadata.run_id == self._run_id
            ]
        for message_id in own:
            self._forget(message_id)
        fleet.state.finish_task(self._task_id, SubStatus.COMPLETED, "")
        fleet.state.cleanup_run(self._run_id)
        self._on_close(self._run_id)

    # One message --------------------------------------------------------------------------------

    def _send(self, message: Message, on_reply: Callable[[str], None]) -> str:
        """Store a message and its objects, and wake its node; return its id, or "" if the node is unknown."""
        if self.closed:
            raise RuntimeError("this run is closed")
        fleet, state, store = self._fleet, self._fleet.state, self._fleet.store
        own = message.metadata.__dict__
        own["_run_id"], own["_src_node_id"], own["_src_task_id"] = (
            self._run_id,
            SUPERLINK_NODE_ID,
            self._task_id,
        )
        packed = pack(message)
        # Objects before the message, so that a node that receives it finds all of them.
        for object_id in store.preregister(self._run_id, packed.tree):
            store.offer(object_id, partial(packed.pieces, object_id))
        light = make_message(metadata=deepcopy(message.metadata), content=RecordDict())
        light.metadata.delivered_at = ""
        with fleet.lock:
            fleet.outstanding[packed.message_id] = on_reply
            fleet.inline[packed.message_id] = select_inline(packed)
        if state.store_message_ins(light) is None:
            self._forget(packed.message_id)
            return ""
        fleet.polls.notify(message.metadata.dst_node_id)
        return packed.message_id

    def _take(self, sent: Message) -> Message | None:
        """Remove a complete reply from the store, keeping its upload slot; None if its upload was abandoned."""
        fleet, state, store = self._fleet, self._fleet.state, self._fleet.store
        message_id = sent.metadata.message_id
        with state.lock:
            reply_id = state.message_ins_id_to_message_res_id.get(message_id)
            upload = fleet.uploads.of(message_id)
            if reply_id is None or upload is None or not upload.complete:
                return None
            tree = store.get_object_tree(reply_id)
        contents = {object_id: store.content(object_id) for object_id in tree_ids(tree)}
        with fleet.lock:
            fleet.outstanding.pop(message_id, None)
        state.delete_messages({message_id})
        store.delete(reply_id)
        try:
            reply = unpack(reply_id, contents, verified=True)  # the store verified them on arrival
        except PayloadError as fault:
            return error_reply(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"its reply is refused: {fault}")
        finally:
            self._forget(message_id, but_slot=True)
        return set_origin(reply, sent, self._run_id)

    def _unavailable(self, sent: Message) -> str:
        """Return why the node of a message will not reply, or ""."""
        fleet = self._fleet
        if time.monotonic() < fleet.trust_after:
            return ""
        node = fleet.state.nodes.get(sent.metadata.dst_node_id)
        if node is None or node.status == NodeStatus.UNREGISTERED:
            return "the node is unknown"
        if node.online_until is not None and node.online_until + OFFLINE_GRACE < now().timestamp():
            return "the node is offline"
        return ""

    def _abandon(self, sent: Message, code: int, reason: str) -> Message:
        """Abandon a message, delete its objects, and return an Error in place of the reply."""
        self._forget(sent.metadata.message_id)
        with self._lock:
            self.abandoned += 1
        return error_reply(sent, code, reason)

    def _forget(self, message_id: str, *, but_slot: bool = False) -> None:
        """Delete a message, its reply and the objects of both; free its upload slot unless `but_slot`."""
        fleet = self._fleet
        with fleet.lock:
            fleet.outstanding.pop(message_id, None)
            fleet.redelivered.pop(message_id, None)
            fleet.inline.pop(message_id, None)
        fleet.confirm(message_id)
        if not but_slot:
            fleet.abandon_upload(message_id)
        fleet.state.delete_messages({message_id})
        fleet.store.delete(message_id)
        fleet.uploads.wake()
