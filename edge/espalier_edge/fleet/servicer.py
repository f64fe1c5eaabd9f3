"""Flower's Fleet servicer, extended to hold polls, queue uploads and report complete replies."""

# The methods of a gRPC servicer are named as in its .proto file.
# ruff: noqa: N802

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import cast

import grpc
from flwr.app.metadata import Metadata
from flwr.common.constant import PUBLIC_KEY_HEADER, Status
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.utils import get_metadata_bytes
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

from espalier.flower.framing import ObjectAnswer, ObjectPush
from espalier.flower.inline_objects import ACCEPTED, attach, detach
from espalier.flower.payloads import BIG_CHUNKS, HUGE_CHUNKS, PayloadError, count_chunks, tree_ids
from espalier.flower.upstreams import RECEIVED_HEADER
from espalier_edge.fleet.link_state import IndexedLinkState
from espalier_edge.fleet.object_store import PayloadStore
from espalier_edge.fleet.polling import LongPolls, header_of, poller_of
from espalier_edge.fleet.uploads import Upload, Uploads

UPLOADS_WAITING = 400
REDELIVERIES = 3


class FleetState:
    """State that the servicer and the grids of a server share: link state, object store, polls and uploads."""

    def __init__(self, upload_slots: int) -> None:
        self.store = PayloadStore()
        self.store_factory = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        self.store_factory.store_instance = self.store
        federation = NoOpFederationManager()
        self.state_factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, federation, self.store_factory)
        self.state = self.state_factory.state_instance = IndexedLinkState(federation, self.store)
        self.polls = LongPolls()
        self.uploads = Uploads(upload_slots)
        self.lock = threading.RLock()
        # Instructions that a grid waits for, each with the function to call when its reply is complete.
        self.outstanding: dict[str, Callable[[str], None]] = {}
        self.redelivered: dict[str, int] = {}
        # Objects of an instruction that are sent inline with its announcement to an Espalier node.
        self.inline: dict[str, list[bytes]] = {}
        self.on_late_reply: Callable[[int], None] = lambda run_id: None
        self.trust_after = (
            0.0  # monotonic time before which this process's own pause may explain missing heartbeats
        )
        # The message that a node's process received and has not confirmed; it is redelivered on the next poll.
        self.unconfirmed: dict[tuple[int, str], str] = {}
        self._delivered: dict[str, tuple[int, str]] = {}  # the inverse: by message id

    def wants(self, instruction_id: str) -> bool:
        """Return whether a grid still waits for the reply to an instruction."""
        with self.lock:
            return instruction_id in self.outstanding

    def abandon_upload(self, instruction_id: str) -> None:
        """Abandon an upload: free its slot and delete the objects received."""
        upload = self.uploads.release(instruction_id)
        if upload is None or not upload.reply_id:
            return
        with self.state.lock:
            self.state.message_res_store.pop(upload.reply_id, None)
            if self.state.message_ins_id_to_message_res_id.get(instruction_id) == upload.reply_id:
                del self.state.message_ins_id_to_message_res_id[instruction_id]
        self.forget_session(upload.session_id)
        self.store.delete(upload.reply_id)

    def forget_session(self, session_id: str) -> None:
        """Delete the record of a push session, which Flower never deletes for a refused reply."""
        self.state._cleanup_push_session(session_id, cleanup_messages=False)

    def redeliver(self, node_id: int) -> None:
        """Redeliver to a restarted node the unanswered messages that its previous process had pulled."""
        with self.state.lock, self.lock:
            for message_id, message in self.state.message_ins_store.items():
                if message.metadata.dst_node_id == node_id:
                    self._redeliver(message_id)

    def record_delivery(self, node_id: int, poller: str, message_id: str) -> None:
        """Record that a message is being sent to a node's process."""
        self.unconfirmed[node_id, poller] = message_id
        self._delivered[message_id] = (node_id, poller)

    def confirm(self, message_id: str) -> None:
        """Record that a message was received or is no longer wanted."""
        given = self._delivered.pop(message_id, None)
        if given is not None and self.unconfirmed.get(given) == message_id:
            self.unconfirmed.pop(given, None)

    def redeliver_unconfirmed(self, node_id: int, poller: str, got: str) -> None:
        """Redeliver the last message to a process that polls again without confirming it."""
        message_id = self.unconfirmed.get((node_id, poller))
        if message_id is None:
            return
        self.confirm(message_id)
        if message_id != got:
            with self.state.lock, self.lock:
                self._redeliver(message_id)

    def _redeliver(self, message_id: str) -> None:
        message = self.state.message_ins_store.get(message_id)
        if message is None or not message.metadata.delivered_at or message_id not in self.outstanding:
            return
        upload = self.uploads.of(message_id)
        if upload is not None and upload.complete:
            return
        times = self.redelivered.get(message_id, 0)
        if times < REDELIVERIES:
            self.redelivered[message_id] = times + 1
            message.metadata.delivered_at = ""
            self.polls.notify(message.metadata.dst_node_id)


class InlineFleetServicer(FleetServicer):
    """Flower's Fleet servicer over :class:`FleetState`."""

    def __init__(
        self, fleet: FleetState, require_keys: bool, on_refused: Callable[[bytes, str], None]
    ) -> None:
        super().__init__(fleet.state_factory, fleet.store_factory, require_keys)
        self._fleet = fleet
        self._on_refused = on_refused

    def ActivateNode(
        self, request: ActivateNodeRequest, context: grpc.ServicerContext
    ) -> ActivateNodeResponse:
        """Activate a node, and redeliver what its previous process had pulled."""
        self._check_signer(request.public_key, context)
        if self._fleet.state.get_node_id_by_public_key(request.public_key) is None:
            self._on_refused(request.public_key, context.peer())
        answer: ActivateNodeResponse = super().ActivateNode(request, context)
        self._fleet.redeliver(answer.node_id)
        return answer

    def RegisterNode(
        self, request: RegisterNodeFleetRequest, context: grpc.ServicerContext
    ) -> RegisterNodeFleetResponse:
        """Register a node; Flower refuses it if keys are required."""
        self._check_signer(request.public_key, context)
        answer: RegisterNodeFleetResponse = super().RegisterNode(request, context)
        return answer

    @staticmethod
    def _check_signer(public_key: bytes, context: grpc.ServicerContext) -> None:
        """Refuse a request that names another node's key: Flower only checks that a call is signed by some key.

        Otherwise anyone could block a node by activating it first.
        """
        if get_metadata_bytes(context.invocation_metadata(), PUBLIC_KEY_HEADER) != public_key:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "the call is not signed with the key that it names"
            )

    def SendNodeHeartbeat(
        self, request: SendNodeHeartbeatRequest, context: grpc.ServicerContext
    ) -> SendNodeHeartbeatResponse:
        """Handle a heartbeat without Flower's log line for each: they are most calls of an idle edge."""
        answer: SendNodeHeartbeatResponse
        try:
            answer = message_handler.send_node_heartbeat(request, self._fleet.state)
        except message_handler.InvalidHeartbeatIntervalError:
            answer = super().SendNodeHeartbeat(request, context)  # Flower's servicer reports the error
        return answer

    def PullMessages(
        self, request: PullMessagesRequest, context: grpc.ServicerContext
    ) -> PullMessagesResponse:
        """Answer a poll immediately if there is a message; otherwise hold it until there is one or it times out."""
        fleet, node_id, poller = self._fleet, request.node.node_id, poller_of(context)
        fleet.redeliver_unconfirmed(node_id, poller, header_of(context, RECEIVED_HEADER))
        while fleet.polls.wait(node_id, context):
            fleet.polls.reset(node_id)
            # Not Flower's own servicer, which formats every request for its log, even if the log is off.
            answer: PullMessagesResponse = message_handler.pull_messages(request, fleet.state, fleet.store)
            if answer.messages_list:
                fleet.polls.notify(node_id)  # there may be further messages
                [announcement] = answer.messages_list
                message_id = announcement.metadata.message_id
                fleet.record_delivery(node_id, poller, message_id)
                if poller:  # a stock SuperNode fetches everything
                    attach(announcement, fleet.inline.get(message_id, ()))
                return answer
        return PullMessagesResponse()

    def PushMessages(
        self, request: PushMessagesRequest, context: grpc.ServicerContext
    ) -> PushMessagesResponse:
        """Accept a reply that a grid waits for, once it has an upload slot; refuse any other without an error."""
        fleet = self._fleet
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "one message and one object tree per call")
        announcement, tree = request.messages_list[0], request.message_object_trees[0]
        try:
            inline = detach(announcement, tree_ids(tree))
        except PayloadError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        metadata = message_from_proto(announcement).metadata
        node_id, instruction_id = request.node.node_id, metadata.reply_to_message_id
        refused = PushMessagesResponse(results={metadata.message_id: 0})
        instruction = fleet.state.message_ins_store.get(instruction_id)
        if instruction is None or not fleet.wants(instruction_id):
            fleet.on_late_reply(metadata.run_id)
            return refused
        if metadata.src_node_id != node_id or instruction.metadata.dst_node_id != node_id:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the instruction was sent to another node")
        if fleet.uploads.waiting >= UPLOADS_WAITING:
            context.abort(grpc.StatusCode.UNAVAILABLE, "too many uploads are queued")
        fleet.abandon_upload(instruction_id)
        chunks = count_chunks(tree)
        upload = Upload(node_id, instruction_id, chunks >= BIG_CHUNKS, chunks >= HUGE_CHUNKS)
        if not fleet.uploads.admit(upload, lambda: fleet.wants(instruction_id) and context.is_active()):
            if not fleet.wants(instruction_id):
                fleet.on_late_reply(metadata.run_id)
            return refused
        return self._accept(request, context, upload, metadata, inline)

    def _accept(
        self,
        request: PushMessagesRequest,
        context: grpc.ServicerContext,
        upload: Upload,
        metadata: Metadata,
        inline: Mapping[str, bytes],
    ) -> PushMessagesResponse:
        """Store an admitted reply and its inline objects; request the other objects."""
        fleet, reply_id = self._fleet, metadata.message_id
        accepted = False
        try:
            answer: PushMessagesResponse = super().PushMessages(request, context)
            accepted = reply_id in fleet.state.message_res_store
        finally:
            if not accepted:
                fleet.uploads.release(upload.instruction_id)
        if not accepted:
            fleet.forget_session(answer.session_id)
            return answer
        upload.session_id = answer.session_id
        wanted = set(answer.objects_to_push)
        stored = {
            object_id
            for object_id in wanted & inline.keys()
            if fleet.state.store_object(metadata.run_id, answer.session_id, object_id, inline[object_id])
        }
        upload.pending = wanted - stored
        if inline:
            del answer.objects_to_push[:]
            answer.objects_to_push.extend(upload.pending)
            answer.results[reply_id] = ACCEPTED
        upload.reply_id = reply_id
        if not fleet.wants(upload.instruction_id):  # abandoned in the meantime
            fleet.abandon_upload(upload.instruction_id)
        elif upload.complete:
            self._notify_grid(upload)
        return answer

    def PushObject(
        self, request: PushObjectRequest | ObjectPush, context: grpc.ServicerContext
    ) -> PushObjectResponse:
        """Store an object of a reply; notify the grid if it was the last one."""
        fleet = self._fleet
        upload = fleet.uploads.find(request.session_id)
        if upload is None or upload.node_id != request.node.node_id:
            return PushObjectResponse(stored=False)
        if request.object_id not in upload.pending:
            # Sent twice, because the response to the first call was lost.
            return PushObjectResponse(stored=request.object_id in fleet.store)
        upload.progress_at = time.monotonic()
        answer: PushObjectResponse = super().PushObject(cast(PushObjectRequest, request), context)
        if answer.stored and fleet.uploads.arrived(upload, request.object_id):
            self._notify_grid(upload)
        return answer

    def PullObject(self, request: PullObjectRequest, context: grpc.ServicerContext) -> PullObjectResponse:
        """Return an object; an outgoing one as buffers, which are copied only once, into the response's bytes."""
        fleet = self._fleet
        pieces = fleet.store.pieces(request.object_id)
        status = fleet.state.get_run_status({request.run_id}).get(request.run_id)
        if pieces is None or status is None or status.status != Status.RUNNING:
            return super().PullObject(request, context)
        size = sum(len(piece) for piece in pieces)
        fleet.state.store_traffic(request.run_id, bytes_sent=size, bytes_recv=0)
        answer = ObjectAnswer(object_found=True, object_available=True, pieces=pieces)
        return cast(PullObjectResponse, answer)  # its serialiser accepts both

    def ConfirmMessageReceived(
        self, request: ConfirmMessageReceivedRequest, context: grpc.ServicerContext
    ) -> ConfirmMessageReceivedResponse:
        """Keep the objects of a message until it is answered: its node may be killed and fetch them again."""
        given = (request.node.node_id, poller_of(context))
        if self._fleet.unconfirmed.get(given) == request.message_object_id:
            self._fleet.confirm(request.message_object_id)
        if self._fleet.wants(request.message_object_id):
            return ConfirmMessageReceivedResponse()
        answer: ConfirmMessageReceivedResponse = super().ConfirmMessageReceived(request, context)
        return answer

    def _notify_grid(self, upload: Upload) -> None:
        with self._fleet.lock:
            on_reply = self._fleet.outstanding.get(upload.instruction_id)
        if on_reply is not None:
            on_reply(upload.instruction_id)
