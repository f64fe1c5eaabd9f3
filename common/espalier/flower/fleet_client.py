"""A node's client of one server's Fleet API (gRPC): registration, heartbeats, messages and their objects."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run

from espalier.config.timeouts import CALL, HEARTBEAT_CALL, PULL
from espalier.flower.backoff import Backoff
from espalier.flower.framing import ObjectPush
from espalier.flower.inline_objects import ACCEPTED, attach, detach, select_inline
from espalier.flower.node_resources import ChannelPool
from espalier.flower.payloads import HUGE_CHUNKS, Content, Packed, count_chunks, tree_ids, unpack
from espalier.flower.receive_buffers import ReceiveBuffers
from espalier.flower.signed_channel import SignedChannel
from espalier.flower.upstreams import (
    POLLER_HEADER,
    RECEIVED_HEADER,
    KeyRefusedError,
    MessageDiscardedError,
    NodeUnknownError,
    Upstream,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
    call_result,
    flower_error_code,
)

OBJECTS_IN_FLIGHT = 4
CHUNKS_IN_FLIGHT = 2  # of 5 MiB; both ends hold several copies of a chunk in transit
HUGE_UPLOAD_IN_FLIGHT = 1  # chunks of a huge reply to an Espalier edge, whose peak memory grows with each


@dataclass
class Pulled:
    """An announced message: its metadata, the ids of its objects, and the objects sent inline with it."""

    message: Message
    object_ids: list[str]
    inline: dict[str, bytes]


class FleetClient:
    """A node's connection to one server.

    Parameters
    ----------
    upstream : Upstream
        The server.
    key : EllipticCurvePrivateKey
        The node's key, which signs its calls.
    stopped : threading.Event
        Ends every wait once set.
    channels : ChannelPool, optional
        Shared with other nodes. By default the node has two connections of its own, so that a heartbeat never waits
        for a payload.
    """

    def __init__(
        self,
        upstream: Upstream,
        key: ec.EllipticCurvePrivateKey,
        stopped: threading.Event,
        channels: ChannelPool | None = None,
    ) -> None:
        self.upstream = upstream
        self._key = key
        self._public_key = public_key_to_bytes(key.public_key())
        self._stopped = stopped
        self._channels = channels or ChannelPool()
        self._channel = SignedChannel(upstream, key, self._channels)
        self._heartbeat_channel = SignedChannel(upstream, key, self._channels)
        self._poller = (POLLER_HEADER, secrets.token_hex(8))
        self._poll: Any = None
        self._received_id = ""  # the last message received, which the next poll confirms to an Espalier edge
        self._inline_supported = False  # whether the server sends and accepts inline objects
        self.node_id = 0

    def _call(self, method: str, request: Any, timeout: float | None = CALL) -> Any:
        return call_result(self._channel.begin(method, request, timeout))

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    # Joining and leaving ------------------------------------------------------------------------

    def join(self, remembered: int | None) -> int:
        """Register and activate this node; return the node id that the server assigns.

        A server that enforces node keys refuses the registration, and so does a server that knows this key already;
        activation follows in both cases. While the lease of a killed process lasts, activation is refused as well;
        deactivating the remembered node id ends that lease.

        Raises
        ------
        UpstreamError
            If the server does not answer or refuses; KeyRefusedError if it admits registered keys only.
        """
        keys_only, self._inline_supported = False, False
        try:
            self._call("RegisterNode", RegisterNodeFleetRequest(public_key=self._public_key))
        except UpstreamRefusedError as refused:
            keys_only = flower_error_code(refused) == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
            if not keys_only and flower_error_code(refused) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise
        try:
            self.node_id = self._activate(remembered)
        except UpstreamRefusedError as refused:
            if keys_only and flower_error_code(refused) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise KeyRefusedError(
                    "this node's key is not registered there, was revoked, or is used by another process"
                ) from refused.__cause__
            raise
        return self.node_id

    def _activate(self, remembered: int | None) -> int:
        activate = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            answer = self._call("ActivateNode", activate)
        except UpstreamRefusedError as refused:
            if flower_error_code(refused) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or remembered is None:
                raise
            # A restarted server assigns other ids; then the remembered one is not this node's.
            with contextlib.suppress(NodeUnknownError, UpstreamRefusedError):
                self._call("DeactivateNode", DeactivateNodeRequest(node_id=remembered))
            answer = self._call("ActivateNode", activate)
        return int(answer.node_id)

    def _leave(self) -> None:
        if self.node_id:
            # If this fails, the lease expires after two missed heartbeats.
            with contextlib.suppress(UpstreamError):
                call_result(
                    self._heartbeat_channel.begin(
                        "DeactivateNode", DeactivateNodeRequest(node_id=self.node_id), 2.0
                    )
                )

    def heartbeat(self, ended: Callable[[UpstreamError | None], None]) -> None:
        """Send one heartbeat; `ended` is called from another thread with None, or with the error.

        Raises
        ------
        UpstreamUnavailableError
            If the connection was closed.
        """
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        call = self._heartbeat_channel.begin("SendNodeHeartbeat", request, HEARTBEAT_CALL)

        def done(call: Any) -> None:
            try:
                known = call_result(call).success
            except UpstreamError as fault:
                ended(fault)
            else:
                ended(None if known else NodeUnknownError("the server does not know this node"))

        call.add_done_callback(done)

    def reconnect(self) -> None:
        """Cancel the calls in progress, which raise UpstreamUnavailableError, and use a new connection from now on.

        A server that loses power never closes its connections, so a call could wait forever.
        """
        dead, self._channel = self._channel, SignedChannel(self.upstream, self._key, self._channels)
        dead.close()

    def close(self) -> None:
        """Deactivate the node and close both connections; calls in progress raise UpstreamUnavailableError."""
        self._channel.close()
        self._leave()
        self._heartbeat_channel.close()

    # Messages -----------------------------------------------------------------------------------

    def pull(self) -> Pulled | None:
        """Poll for the next message; an Espalier edge holds the call for up to `POLL_HELD` seconds."""
        request = PullMessagesRequest(node=self._node)
        self._poll = self._channel.begin(
            "PullMessages", request, PULL, (self._poller, (RECEIVED_HEADER, self._received_id))
        )
        answer = call_result(self._poll)
        if not answer.messages_list:
            return None
        try:
            announcement, object_ids = answer.messages_list[0], tree_ids(answer.message_object_trees[0])
            inline = detach(announcement, set(object_ids))
            return Pulled(message_from_proto(announcement), object_ids, inline)
        except (ValueError, IndexError) as fault:
            raise UpstreamRefusedError(f"the server announced a malformed message: {fault}") from fault

    def end_poll(self) -> None:
        """Cancel the poll in progress, which raises UpstreamUnavailableError."""
        if self._poll is not None:
            self._poll.cancel()

    def fetch(self, pulled: Pulled, give_up_at: float) -> Message:
        """Fetch the missing objects of a message, confirm it to the server, and assemble it.

        Parameters
        ----------
        pulled : Pulled
            The result of :meth:`pull`.
        give_up_at : float
            Deadline (``time.time()``) for a server that does not answer or an object that is not there yet.

        Returns
        -------
        Message
            The message with its content.

        Raises
        ------
        MessageDiscardedError
            If the run has ended or an object was deleted.
        PayloadError
            If the objects do not form a message.
        """
        metadata = pulled.message.metadata
        contents: dict[str, Content] = dict(pulled.inline)
        buffers = ReceiveBuffers()
        for object_id, content in pulled.inline.items():
            buffers.allocate(object_id, content)
        missing = [object_id for object_id in pulled.object_ids if object_id not in contents]
        self._inline_supported = bool(contents)  # the message object itself is small, so it would be inline

        def request(object_id: str) -> PullObjectRequest:
            return PullObjectRequest(node=self._node, run_id=metadata.run_id, object_id=object_id)

        def accept(object_id: str, answer: Any) -> bool:
            if not answer.object_found:
                raise MessageDiscardedError("the server has deleted the message")
            if answer.object_available:
                contents[object_id] = buffers.place(object_id, answer.object_content)
            return bool(answer.object_available)

        self._call_for_each("PullObject", missing, request, accept, give_up_at)
        if self._inline_supported:  # the next poll confirms it
            self._received_id = metadata.message_id
        else:
            confirm = ConfirmMessageReceivedRequest(
                node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
            )
            call_result(self._channel.begin("ConfirmMessageReceived", confirm, CALL, (self._poller,)))
        return unpack(metadata.message_id, contents)

    def push(self, reply: Message, packed: Packed, runtime: float, give_up_at: float) -> bool:
        """Send a reply, and of its objects those that the server does not have.

        Returns
        -------
        bool
            Whether the server accepted the reply; it refuses late ones.
        """
        announcement = message_to_proto(remove_content_from_message(reply))
        if self._inline_supported:
            attach(announcement, select_inline(packed))
        announce = PushMessagesRequest(
            node=self._node,
            messages_list=[announcement],
            message_object_trees=[packed.tree],
            clientapp_runtime_list=[runtime],
        )
        # No timeout: an Espalier edge queues big uploads. The heartbeat detects a dead server.
        answer = self._call("PushMessages", announce, None)
        wanted = set(answer.objects_to_push)
        run_id = reply.metadata.run_id

        def request(object_id: str) -> ObjectPush:
            return ObjectPush(self._node, run_id, object_id, answer.session_id, packed.pieces(object_id))

        def accept(object_id: str, stored: Any) -> bool:
            if not stored.stored:
                raise MessageDiscardedError("the server has deleted the message")
            return True

        # Descriptions before chunks, so that the receiver can allocate an Array before its chunks arrive.
        ordered = [object_id for object_id in packed.objects if object_id in wanted]
        ordered.sort(key=lambda object_id: isinstance(packed.objects[object_id], ArrayChunk))
        huge = self._inline_supported and count_chunks(packed.tree) >= HUGE_CHUNKS
        self._call_for_each(
            "PushObject", ordered, request, accept, give_up_at, HUGE_UPLOAD_IN_FLIGHT if huge else None
        )
        return bool(wanted) or answer.results[reply.metadata.message_id] == ACCEPTED

    def _call_for_each(
        self,
        method: str,
        object_ids: Sequence[str],
        request: Callable[[str], Any],
        accept: Callable[[str, Any], bool],
        give_up_at: float,
        at_once: int | None = None,
    ) -> None:
        """Call `method` for each object, a few in parallel; repeat calls that fail or that `accept` declines."""
        many = len(object_ids) > 2 * OBJECTS_IN_FLIGHT
        in_flight = at_once or (CHUNKS_IN_FLIGHT if many else OBJECTS_IN_FLIGHT)
        waiting = deque(object_ids)
        flying: deque[tuple[str, Any, float]] = deque()
        backoff, rested_at = Backoff(first=0.01, cap=0.5), 0.0
        try:
            while waiting or flying:
                while waiting and len(flying) < in_flight:
                    object_id = waiting.popleft()
                    call = self._channel.begin(method, request(object_id))
                    flying.append((object_id, call, time.monotonic()))
                object_id, call, begun_at = flying.popleft()
                try:
                    done = accept(object_id, call_result(call))
                except UpstreamUnavailableError:
                    done = False
                if done:
                    backoff.reset()
                    continue
                waiting.append(object_id)
                if (
                    begun_at < rested_at
                ):  # started before the last wait, so its failure is no reason to wait again
                    continue
                if time.time() > give_up_at or self._stopped.wait(backoff.next()):
                    raise UpstreamUnavailableError("its objects did not arrive in time")
                rested_at = time.monotonic()
        finally:
            for _, call, _ in flying:
                call.cancel()

    # Runs ---------------------------------------------------------------------------------------

    def get_run(self, run_id: int) -> Run:
        """Fetch the record of a run."""
        return run_from_proto(self._call("GetRun", GetRunRequest(node=self._node, run_id=run_id)).run)

    def get_fab(self, run_id: int, fab_hash: str) -> Fab:
        """Fetch the Flower App Bundle (FAB) of a run."""
        request = GetFabRequest(node=self._node, hash_str=fab_hash, run_id=run_id)
        return fab_from_proto(self._call("GetFab", request, PULL).fab)
