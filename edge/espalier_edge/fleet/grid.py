"""The inline server's Grid: stores messages directly, yields replies as they arrive, leaves nothing behind."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial

from flwr.app import Error, Message, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.run import Run

from espalier.config.timeouts import OFFLINE_GRACE, TTL_MARGIN
from espalier.flower.inline_objects import select_inline
from espalier.flower.memory import CycleCollector
from espalier.flower.payloads import PayloadError, pack, tree_ids, unpack
from espalier_edge.fleet.servicer import FleetState

TICK = 0.5


class InlineGrid(Grid):
    """A run's Grid over the fleet of an :class:`~espalier_edge.fleet.server.InlineFleet`.

    Attributes
    ----------
    abandoned : int
        Messages whose reply was given up.
    late : int
        Replies that came for such messages; they are refused before their payload is sent.
    """

    def __init__(self, fleet: FleetState, run_id: int, task_id: int, on_close: Callable[[int], None]) -> None:
        self._fleet = fleet
        self._run_id = run_id
        self._task_id = task_id
        self._on_close = on_close
        self._lock = threading.Lock()
        self._pulled_by_hand: dict[str, Message] = {}
        self._complete: set[str] = set()
        self.abandoned = 0
        self.late = 0
        self.closed = False

    # Flower's Grid ------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Accept this grid's own run; it has no other."""
        if run.run_id != self._run_id:
            raise ValueError(f"this grid serves run {self._run_id}, not {run.run_id}")

    @property
    def run(self) -> Run:
        """The run's record."""
        return self._fleet.state.get_run_info(run_ids=[self._run_id])[0]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make an instruction message of this run."""
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
        """Node ids of the nodes that are online."""
        return sorted(self._fleet.state.get_nodes(self._run_id))

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online."""
        with self._fleet.state.lock:
            return deepcopy(list(self._fleet.state.get_node_info(node_ids=list(self.get_node_ids()))))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids, "" for one whose node is unknown."""
        ids = []
        for message in messages:
            message_id = self._send(message, self._arrived_by_hand)
            if message_id:
                self._pulled_by_hand[message_id] = remove_content_from_message(message)
            ids.append(message_id)
        return ids

    def _arrived_by_hand(self, message_id: str) -> None:
        with self._lock:
            self._complete.add(message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to pushed messages that are complete; nodes that went offline give an Error."""
        replies = []
        for message_id in set(message_ids):
            sent = self._pulled_by_hand.get(message_id)
            if sent is None:
                continue
            with self._lock:
                complete = message_id in self._complete
            reply = self._take(sent) if complete else None
            if reply is None and (gone := self._gone(sent)):
                reply = self._abandon(sent, ErrorCode.NODE_UNAVAILABLE, gone)
            if reply is None and sent.metadata.created_at + sent.metadata.ttl < now().timestamp():
                reply = self._abandon(sent, ErrorCode.MESSAGE_UNAVAILABLE, "the message has expired")
            if reply is not None:
                self._fleet.give_up_upload(message_id)
                self._pulled_by_hand.pop(message_id, None)
                with self._lock:
                    self._complete.discard(message_id)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and collect the replies that come within `timeout` seconds."""
        return list(self.exchange(messages, deadline=DEFAULT_TTL if timeout is None else timeout))

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
        """Send messages and yield the replies as they arrive.

        Parameters
        ----------
        messages : iterable of Message
            An ArrayRecord or RecordDict that several of them share is serialised and stored once.
        deadline : float
            Seconds after which the outstanding ones are abandoned.
        quorum : int, optional
            So many replies with content start the `grace` period; None waits for all.
        grace : float
            Seconds to wait for the others once the quorum is there.
        cancelled : callable, optional
            Asked about twice a second; once it says True the outstanding ones are abandoned.

        Yields
        ------
        Message
            A reply, or an Error: from the node's app, NODE_UNAVAILABLE for a node that is gone, or
            REPLY_MESSAGE_UNAVAILABLE for a reply whose objects do not fit together.

        Notes
        -----
        However it ends (all came, deadline, quorum, the caller closes it), every message, reply and object
        of the exchange is deleted. Late replies are refused and counted.
        """
        arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
        waiting: dict[str, Message] = {}
        end = time.monotonic() + deadline
        came = 0
        collector = CycleCollector()
        try:
            failed = []
            for message in messages:
                message.metadata.ttl = now().timestamp() + deadline + TTL_MARGIN - message.metadata.created_at
                message_id = self._send(message, arrivals.put)
                if message_id:
                    waiting[message_id] = remove_content_from_message(message)
                else:
                    failed.append(_error(message, ErrorCode.NODE_UNAVAILABLE, "the node is unknown"))
            del messages
            yield from failed
            while waiting:
                left = end - time.monotonic()
                if self.closed or (left <= 0 and arrivals.empty()):  # what came in time is taken in any case
                    break
                if cancelled is not None and cancelled():
                    break
                try:
                    message_id = arrivals.get(timeout=max(0.0, min(left, TICK)))
                except queue.Empty:
                    for message_id, sent in list(waiting.items()):
                        if gone := self._gone(sent):
                            del waiting[message_id]
                            yield self._abandon(sent, ErrorCode.NODE_UNAVAILABLE, gone)
                    continue
                if message_id not in waiting:
                    continue
                reply = self._take(waiting[message_id])
                if reply is None:
                    continue
                del waiting[message_id]
                came += reply.has_content()
                if quorum is not None and came == quorum:
                    end = min(end, time.monotonic() + grace)
                collector.collect(but_last=True)
                collector.track(reply)
                try:
                    yield reply
                finally:
                    del reply
                    self._fleet.give_up_upload(message_id)  # its slot: the next one may come now
        finally:
            for sent in waiting.values():
                self._abandon(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "abandoned")

    def count_late(self) -> None:
        """Count a reply that came too late."""
        with self._lock:
            self.late += 1

    def close(self) -> None:
        """Finish the run and delete everything of it."""
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

    def _send(self, message: Message, tell: Callable[[str], None]) -> str:
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
        # Objects first: whoever is given the message finds all of them.
        for object_id in store.preregister(self._run_id, packed.tree):
            store.offer(object_id, partial(packed.pieces, object_id))
        light = make_message(metadata=deepcopy(message.metadata), content=RecordDict())
        light.metadata.delivered_at = ""
        with fleet.lock:
            fleet.outstanding[packed.message_id] = tell
            fleet.early[packed.message_id] = select_inline(packed)
        if state.store_message_ins(light) is None:
            self._forget(packed.message_id)
            return ""
        fleet.mail.put(message.metadata.dst_node_id)
        return packed.message_id

    def _take(self, sent: Message) -> Message | None:
        """Take a complete reply out of the store, which keeps its upload slot; None if it was given up meanwhile."""
        fleet, state, store = self._fleet, self._fleet.state, self._fleet.store
        message_id = sent.metadata.message_id
        with state.lock:
            reply_id = state.message_ins_id_to_message_res_id.get(message_id)
            upload = fleet.uploads.of(message_id)
            if reply_id is None or upload is None or not upload.complete:
                return None
            tree = store.get_object_tree(reply_id)
        contents = {object_id: store.held(object_id) for object_id in tree_ids(tree)}
        with fleet.lock:
            fleet.outstanding.pop(message_id, None)
        state.delete_messages({message_id})
        store.delete(reply_id)
        try:
            reply = unpack(reply_id, contents, verified=True)  # by the store, as they came
        except PayloadError as fault:
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"its reply is refused: {fault}")
        finally:
            self._forget(message_id, but_slot=True)
        # What the objects say of sender and run is the sender's word; what was checked is the announcement.
        own = reply.metadata.__dict__
        own["_src_node_id"], own["_dst_node_id"] = sent.metadata.dst_node_id, SUPERLINK_NODE_ID
        own["_run_id"], own["_reply_to_message_id"] = self._run_id, message_id
        return reply

    def _gone(self, sent: Message) -> str:
        """Return why a message's node will not answer, or ""."""
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
        """Give a message up, delete everything of it, and return an Error in the reply's place."""
        self._forget(sent.metadata.message_id)
        with self._lock:
            self.abandoned += 1
        return _error(sent, code, reason)

    def _forget(self, message_id: str, *, but_slot: bool = False) -> None:
        """Delete a message, its reply and the objects of both, and free its upload slot unless that is still held."""
        fleet = self._fleet
        with fleet.lock:
            fleet.outstanding.pop(message_id, None)
            fleet.redelivered.pop(message_id, None)
            fleet.early.pop(message_id, None)
        fleet.settle(message_id)
        if not but_slot:
            fleet.give_up_upload(message_id)
        fleet.state.delete_messages({message_id})
        fleet.store.delete(message_id)
        fleet.uploads.wake()


def _error(sent: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=sent)
