"""The Grid of the cloud over a stock SuperLink: yields replies as they arrive, and deletes abandoned payloads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from espalier.config.timeouts import CLOUD_UPLOAD_STALL
from espalier.flower.payloads import Content, PayloadError, chunk_ids, tree_ids, unpack
from espalier.flower.receive_buffers import ReceiveBuffers
from espalier.flower.streaming_grid import Countdown, StreamingGrid, error_reply, set_origin, set_ttl

#: Shortest and longest interval between polls, in seconds.
MIN_POLL, MAX_POLL = 0.02, 0.5
#: Interval between polls, as a fraction of the time since the last progress.
POLL_FRACTION = 0.15
#: Seconds for which the list of nodes is cached; planning a window reads it ten times.
NODES_CACHED = 0.2
#: Number of objects of a reply that are fetched in parallel: of small ones, and of chunks of 5 MiB.
PARALLEL_SMALL, PARALLEL_CHUNKS = 4, 2
#: Number of objects up to which a reply has no chunks.
SMALL_REPLY = 8
#: Seconds without progress of an upload after which to check that its node is online.
STALL_CHECK = 10.0

#: Exceptions of a call when the SuperLink does not answer, after all retries.
LINK_LOST = (httpx.HTTPError,)


@dataclass
class _Arriving:
    """An announced reply whose objects are being fetched."""

    sent: Message
    reply_id: str
    missing: list[str]
    contents: dict[str, Content] = field(default_factory=dict)
    buffers: ReceiveBuffers = field(default_factory=ReceiveBuffers)
    progress_at: float = field(default_factory=time.monotonic)
    checked_at: float = 0.0


class TreeGrid(StreamingGrid):
    """Wraps the Grid of a ServerApp at a stock SuperLink.

    Parameters
    ----------
    grid : Grid
        The grid that Flower passes to the main function of the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        if not isinstance(grid, HttpGrid):
            raise TypeError(f"TreeGrid wraps the HttpGrid of a ServerApp, not a {type(grid).__name__}")
        super().__init__()
        self._grid = grid
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._pool = ThreadPoolExecutor(PARALLEL_SMALL, thread_name_prefix="fetch")
        self._nodes: tuple[float, list[NodeInfo]] = (-NODES_CACHED, [])
        self._given_up: set[str] = set()

    # Flower's Grid ------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def _runtime(self) -> RuntimeHttpClient:
        """The client of the SuperLink's Runtime API, which Flower connects on first use."""
        return self._grid._runtime_client

    @property
    def run(self) -> Run:
        """The record of the run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create an instruction message of this run."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are online."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are online; the list is cached for `NODES_CACHED` seconds."""
        asked_at, nodes = self._nodes
        if time.monotonic() - asked_at >= NODES_CACHED:
            nodes = list(self._grid.get_nodes())
            self._nodes = time.monotonic(), nodes
        return list(nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived, and delete them at the SuperLink."""
        return self._grid.pull_messages(message_ids)

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
        first_wait: float = MIN_POLL,
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they arrive; see :meth:`StreamingGrid.exchange`.

        Parameters
        ----------
        messages, deadline, quorum, grace, cancelled
            As in :class:`StreamingGrid`.
        lost : callable, optional
            Called repeatedly with the node id of each outstanding message; returns why the node will not reply, or "".
        first_wait : float
            Seconds between the first two polls. Each poll is an HTTP call; the interval grows with the time waited.

        Yields
        ------
        Message
            A reply or an Error.

        Notes
        -----
        The payload of an abandoned message is deleted in the SuperLink immediately; a late reply once it has arrived
        (see :meth:`collect_late`).
        """
        self.collect_late()
        batch = list(messages)
        del messages
        for message in batch:
            set_ttl(message, deadline)
        countdown = Countdown(deadline, quorum, grace)
        waiting: dict[str, Message] = {}
        arriving: dict[str, _Arriving] = {}
        progress_at = time.monotonic()
        try:
            failed = []
            for message, message_id in zip(
                batch, list(self._grid.push_messages(batch)) if batch else [], strict=True
            ):
                if message_id:
                    waiting[message_id] = remove_content_from_message(message)
                else:
                    failed.append(error_reply(message, ErrorCode.NODE_UNAVAILABLE, "the node is unknown"))
            del batch
            yield from failed
            while waiting or arriving:
                for found in self._announced(waiting):
                    arriving[found.sent.metadata.message_id] = found
                    del waiting[found.sent.metadata.message_id]
                progress = False
                for message_id, one in list(arriving.items()):
                    before = len(one.missing)
                    reply = self._fetch(one)
                    progress = progress or reply is not None or len(one.missing) < before
                    if reply is None:
                        continue
                    del arriving[message_id]
                    if reply.has_error():
                        self._free(message_id)  # a node that was offline never fetched it
                    countdown.count(reply)
                    yield reply
                    del reply
                for message_id, sent in list(waiting.items()):
                    if lost is not None and (reason := lost(sent.metadata.dst_node_id)):
                        del waiting[message_id]
                        self._abandon({message_id: sent}, {})
                        yield error_reply(sent, ErrorCode.NODE_UNAVAILABLE, reason)
                left = countdown.left
                if left <= 0 or (cancelled is not None and cancelled()):
                    break
                progress_at = time.monotonic() if progress else progress_at
                wait = min(MAX_POLL, max(first_wait, POLL_FRACTION * (time.monotonic() - progress_at)))
                if waiting or arriving:
                    time.sleep(min(wait, left))
        finally:
            self._abandon(waiting, arriving)

    def collect_late(self) -> int:
        """Delete late replies in the SuperLink without fetching them.

        Call it repeatedly between windows: within a minute of its deadline, every abandoned message has had a late
        reply or has expired.

        Returns
        -------
        int
            Number of late replies since the last call.
        """
        with self._lock:
            given_up = sorted(self._given_up)
        if not given_up:
            return 0
        answer = self._runtime.PullMessages(PullAppMessagesRequest(message_ids=given_up))
        count = 0
        for reply in answer.messages_list:
            self._free(reply.metadata.message_id)
            with self._lock:
                self._given_up.discard(reply.metadata.reply_to_message_id)
                # An Error that the SuperLink created itself (message expired, node offline) is no late reply.
                if reply.metadata.src_node_id != SUPERLINK_NODE_ID:
                    count += 1
                    self.late += 1
        return count

    # Parts --------------------------------------------------------------------------------------

    def _announced(self, waiting: dict[str, Message]) -> list[_Arriving]:
        if not waiting:
            return []
        answer = self._runtime.PullMessages(PullAppMessagesRequest(message_ids=list(waiting)))
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
                missing.sort(key=chunks.__contains__)  # Espalier edges send descriptions before chunks
            except PayloadError:
                missing = []  # unpacking raises the error
            found.append(_Arriving(sent, reply.metadata.message_id, missing))
        return found

    def _fetch(self, one: _Arriving) -> Message | None:
        """Fetch the available objects of a reply; return the reply once it is complete, or an Error in its place."""
        run_id = one.sent.metadata.run_id
        small = len(one.missing) + len(one.contents) <= SMALL_REPLY
        at_once = PARALLEL_SMALL if small else PARALLEL_CHUNKS
        while one.missing:
            asked = one.missing[:at_once]
            for object_id, answer in zip(asked, self._pull_objects(run_id, asked), strict=True):
                if not answer.object_found:
                    self._free(one.reply_id)
                    return error_reply(
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
            if not self._stalled(one):
                return None
            self._free(one.reply_id)
            return error_reply(
                one.sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the upload of the reply stalled"
            )
        self._free(one.reply_id)
        try:
            reply = unpack(one.reply_id, one.contents)
        except PayloadError as fault:
            return error_reply(
                one.sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"its reply is refused: {fault}"
            )
        return set_origin(reply, one.sent, run_id)

    def _pull_objects(self, run_id: int, object_ids: Sequence[str]) -> list[PullObjectResponse]:
        """Fetch objects in parallel, as a call spends most of its time waiting for the SuperLink."""
        pull = self._runtime.PullObject
        requests = [PullObjectRequest(node=self._node, run_id=run_id, object_id=i) for i in object_ids]
        return list(self._pool.map(pull, requests))

    def _stalled(self, one: _Arriving) -> bool:
        now = time.monotonic()
        if now - max(one.progress_at, one.checked_at) < STALL_CHECK:
            return False
        one.checked_at = now
        one.missing.reverse()  # a stock node sends chunks first, so ask for those to see progress
        offline = one.sent.metadata.dst_node_id not in set(self._grid.get_node_ids())
        return offline or now - one.progress_at > CLOUD_UPLOAD_STALL

    def _abandon(self, waiting: dict[str, Message], arriving: dict[str, _Arriving]) -> None:
        with self._lock:
            self._given_up.update(waiting)
            self.abandoned += len(waiting) + len(arriving)
        # Delete the payloads sent, which may never be fetched, and partial replies. A SuperLink that does not answer
        # has lost both, as it stores them in memory.
        with contextlib.suppress(httpx.HTTPError):
            for object_id in [*waiting, *(one.reply_id for one in arriving.values())]:
                self._free(object_id)

    def _free(self, object_id: str) -> None:
        """Delete the objects of a message in the SuperLink's store."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._grid.run.run_id, message_object_id=object_id
        )
        self._runtime.ConfirmMessageReceived(request)
