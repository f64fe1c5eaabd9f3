"""The cloud's Grid over a stock SuperLink: replies as they arrive, deadlines, and nothing left behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.date import now
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from espalier.config.timeouts import CLOUD_UPLOAD_STALL, TTL_MARGIN
from espalier.flower.memory import CycleCollector
from espalier.flower.payloads import Content, PayloadError, chunk_ids, tree_ids, unpack
from espalier.flower.receive_buffers import ReceiveBuffers

FASTEST = 0.02
SLOWEST = 0.5
SHARE = 0.15  # of the time waited so far until the next look for a reply: what comes late is seen late
FRESH = 0.2  # seconds for which an answer about the nodes is good: planning a window asks ten times
SMALL_AT_ONCE, CHUNKS_AT_ONCE = 4, 2  # objects of a reply that are fetched at a time
FEW = 8  # a reply of more objects has chunks of 5 MiB
UPLOAD_DOUBT = 10.0  # after so many seconds without progress, ask whether the uploader is still there

#: What a call raises when the SuperLink does not answer, all retries included.
LINK_LOST = (httpx.HTTPError,)


@dataclass
class _Arriving:
    """A reply that is announced and whose objects are being fetched."""

    sent: Message
    reply_id: str
    missing: list[str]
    contents: dict[str, Content] = field(default_factory=dict)
    buffers: ReceiveBuffers = field(default_factory=ReceiveBuffers)
    progress_at: float = field(default_factory=time.monotonic)
    doubted_at: float = 0.0


class TreeGrid(Grid):
    """Wraps the Grid of a ServerApp whose SuperLink is a stock one.

    Parameters
    ----------
    grid : Grid
        What Flower passed to the ServerApp's main function. Everything that has nothing to do with replies
        goes to it.

    Attributes
    ----------
    abandoned : int
        Messages whose reply was given up.
    late : int
        Replies that came for such messages; they are freed in the SuperLink without being fetched.
    """

    def __init__(self, grid: Grid) -> None:
        if not isinstance(grid, HttpGrid):
            raise TypeError(f"TreeGrid wraps the HttpGrid of a ServerApp, not a {type(grid).__name__}")
        self._grid = grid
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(SMALL_AT_ONCE, thread_name_prefix="fetch")
        self._nodes: tuple[float, list[NodeInfo]] = (-FRESH, [])
        self._given_up: set[str] = set()
        self.abandoned = 0
        self.late = 0

    # Flower's Grid ------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run's record."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make an instruction message of this run."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the nodes that are online."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes that are online, or were so just now."""
        asked_at, nodes = self._nodes
        if time.monotonic() - asked_at >= FRESH:
            nodes = list(self._grid.get_nodes())
            self._nodes = time.monotonic(), nodes
        return list(nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that have come."""
        return self._grid.pull_messages(message_ids)

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
        lost: Callable[[int], str] | None = None,
        first_wait: float = FASTEST,
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they arrive.

        Parameters
        ----------
        messages : iterable of Message
            An ArrayRecord or RecordDict that several of them share is stored once.
        deadline : float
            Seconds after which the outstanding ones are abandoned.
        quorum : int, optional
            So many replies with content start the `grace` period; None waits for all.
        grace : float
            Seconds to wait for the others once the quorum is there.
        cancelled : callable, optional
            Asked again and again; once it says True the outstanding ones are abandoned.
        lost : callable, optional
            Asked again and again with the node of an outstanding message: why it will not answer, or "".
        first_wait : float
            Seconds between the first two looks for a reply; each look is an HTTP call, and they grow rarer with time.

        Yields
        ------
        Message
            A reply, or an Error: from the node, NODE_UNAVAILABLE for a node that is gone, or
            REPLY_MESSAGE_UNAVAILABLE for a reply whose upload ended early or whose objects do not fit
            together.

        Notes
        -----
        What was abandoned is freed in the SuperLink as far as it allows: the payload sent down at once, a
        late reply when it has come (see :meth:`collect_late`).
        """
        self.collect_late()
        batch = list(messages)
        del messages
        for message in batch:
            message.metadata.ttl = now().timestamp() + deadline + TTL_MARGIN - message.metadata.created_at
        end = time.monotonic() + deadline
        waiting: dict[str, Message] = {}
        arriving: dict[str, _Arriving] = {}
        came, moved_at = 0, time.monotonic()
        collector = CycleCollector()
        try:
            failed = []
            for message, message_id in zip(
                batch, list(self._grid.push_messages(batch)) if batch else [], strict=True
            ):
                if message_id:
                    waiting[message_id] = remove_content_from_message(message)
                else:
                    failed.append(_error(message, ErrorCode.NODE_UNAVAILABLE, "the node is unknown"))
            del batch
            yield from failed
            while waiting or arriving:
                for found in self._announced(waiting):
                    arriving[found.sent.metadata.message_id] = found
                    del waiting[found.sent.metadata.message_id]
                moved = False
                for message_id, one in list(arriving.items()):
                    before = len(one.missing)
                    reply = self._fetch(one)
                    moved = moved or reply is not None or len(one.missing) < before
                    if reply is None:
                        continue
                    del arriving[message_id]
                    if reply.has_error():
                        self._free(message_id)  # a node that was gone never fetched it
                    came += reply.has_content()
                    if quorum is not None and came == quorum:
                        end = min(end, time.monotonic() + grace)
                    collector.collect(but_last=True)
                    collector.track(reply)
                    yield reply
                    del reply
                for message_id, sent in list(waiting.items()):
                    if lost is not None and (reason := lost(sent.metadata.dst_node_id)):
                        del waiting[message_id]
                        self._abandon({message_id: sent}, {})
                        yield _error(sent, ErrorCode.NODE_UNAVAILABLE, reason)
                left = end - time.monotonic()
                if left <= 0 or (cancelled is not None and cancelled()):
                    break
                moved_at = time.monotonic() if moved else moved_at
                wait = min(SLOWEST, max(first_wait, SHARE * (time.monotonic() - moved_at)))
                if waiting or arriving:
                    time.sleep(min(wait, left))
        finally:
            self._abandon(waiting, arriving)

    def collect_late(self) -> int:
        """Free the replies that came too late, without fetching them.

        Returns
        -------
        int
            How many came since the last call. Between windows, call it now and then: a message that was
            given up is settled, one way or the other, within a minute of its deadline.
        """
        with self._lock:
            given_up = sorted(self._given_up)
        if not given_up:
            return 0
        answer = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=given_up))
        came = 0
        for reply in answer.messages_list:
            self._free(reply.metadata.message_id)
            with self._lock:
                self._given_up.discard(reply.metadata.reply_to_message_id)
                # An error that the SuperLink made itself (expired, node gone) comes from no node.
                if reply.metadata.src_node_id != SUPERLINK_NODE_ID:
                    came += 1
                    self.late += 1
        return came

    # Parts --------------------------------------------------------------------------------------

    def _announced(self, waiting: dict[str, Message]) -> list[_Arriving]:
        if not waiting:
            return []
        answer = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=list(waiting)))
        found = []
        for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            reply = message_from_proto(proto)
            sent = waiting.get(reply.metadata.reply_to_message_id)
            if sent is None:
                self._free(reply.metadata.message_id)
                continue
            try:
                missing = tree_ids(tree)
                chunks = chunk_ids(tree)
                missing.sort(key=chunks.__contains__)  # our edges send what describes before the chunks
            except PayloadError:
                missing = []  # unpacking it will fail, and say so
            found.append(_Arriving(sent, reply.metadata.message_id, missing))
        return found

    def _fetch(self, one: _Arriving) -> Message | None:
        """Fetch what has come of a reply; return it when it is complete, or an Error in its place."""
        run_id = one.sent.metadata.run_id
        at_once = SMALL_AT_ONCE if len(one.missing) + len(one.contents) <= FEW else CHUNKS_AT_ONCE
        while one.missing:
            asked = one.missing[:at_once]
            for object_id, answer in zip(asked, self._pull_objects(run_id, asked), strict=True):
                if not answer.object_found:
                    self._free(one.reply_id)
                    return _error(
                        one.sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the upload of the reply ended early"
                    )
                if answer.object_available:
                    one.buffers.allocate(object_id, answer.object_content)
                    one.contents[object_id] = one.buffers.place(object_id, answer.object_content)
            before, one.missing = one.missing, [i for i in one.missing if i not in one.contents]
            if len(one.missing) < len(before):
                one.progress_at = time.monotonic()
            if one.contents.keys() >= set(asked):
                continue
            if not self._stands_still(one):
                return None
            self._free(one.reply_id)
            return _error(
                one.sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the upload of the reply stands still"
            )
        self._free(one.reply_id)
        try:
            reply = unpack(one.reply_id, one.contents)
        except PayloadError as fault:
            return _error(one.sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"its reply is refused: {fault}")
        own = reply.metadata.__dict__
        own["_src_node_id"], own["_dst_node_id"] = one.sent.metadata.dst_node_id, SUPERLINK_NODE_ID
        own["_run_id"], own["_reply_to_message_id"] = run_id, one.sent.metadata.message_id
        return reply

    def _pull_objects(self, run_id: int, object_ids: Sequence[str]) -> list[PullObjectResponse]:
        """Ask for some objects at a time: each call waits for the SuperLink longer than it works."""
        pull = self._grid._runtime_client.PullObject
        requests = [PullObjectRequest(node=self._node, run_id=run_id, object_id=i) for i in object_ids]
        return list(self._pool.map(pull, requests))

    def _stands_still(self, one: _Arriving) -> bool:
        now_ = time.monotonic()
        if now_ - max(one.progress_at, one.doubted_at) < UPLOAD_DOUBT:
            return False
        one.doubted_at = now_
        one.missing.reverse()  # a stock node sends chunks first, and so shows that it goes on
        gone = one.sent.metadata.dst_node_id not in set(self._grid.get_node_ids())
        return gone or now_ - one.progress_at > CLOUD_UPLOAD_STALL

    def _abandon(self, waiting: dict[str, Message], arriving: dict[str, _Arriving]) -> None:
        with self._lock:
            self._given_up.update(waiting)
            self.abandoned += len(waiting) + len(arriving)
        # The payload sent down, which nobody may ever fetch, and what has come of replies. If the SuperLink is gone,
        # so is what it held.
        with contextlib.suppress(httpx.HTTPError):
            for object_id in [*waiting, *(one.reply_id for one in arriving.values())]:
                self._free(object_id)

    def _free(self, object_id: str) -> None:
        """Delete a message's objects in the SuperLink's store."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._grid.run.run_id, message_object_id=object_id
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)


def _error(sent: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=sent)
