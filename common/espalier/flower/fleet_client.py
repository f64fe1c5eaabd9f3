"""One node's connection to one server over Flower's Fleet gRPC, with errors that say what to do next."""

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
from espalier.flower.inline_objects import TAKEN, attach, detach, early_objects
from espalier.flower.node_resources import Channels
from espalier.flower.payloads import HUGE_CHUNKS, Content, Packed, count_chunks, tree_ids, unpack
from espalier.flower.receive_buffers import Rooms
from espalier.flower.signed_channel import Line
from espalier.flower.upstreams import (
    GOT_HEADER,
    POLLER_HEADER,
    Home,
    HomeFault,
    HomeRefused,
    HomeUnavailable,
    KeyRefused,
    MessageGone,
    NodeForgotten,
    flower_code,
    outcome,
)

OBJECTS_IN_FLIGHT = 4
CHUNKS_IN_FLIGHT = 2  # of 5 MiB; both ends hold several copies of one that is under way
HUGE_IN_FLIGHT = 1  # of a huge reply to a server of ours, where each adds to the most that it ever holds


@dataclass
class Pulled:
    """A message as it was announced: metadata only, the ids of its objects, and those objects that came along."""

    message: Message
    object_ids: list[str]
    early: dict[str, bytes]


class FleetClient:
    """A node at one home.

    Parameters
    ----------
    home : Home
        The server.
    key : EllipticCurvePrivateKey
        The node's key; its calls are signed with it.
    stopped : threading.Event
        Ends every wait.
    channels : Channels, optional
        Shared with other nodes; by default this one has two connections to itself, so that a heartbeat never waits
        behind a payload.
    """

    def __init__(
        self,
        home: Home,
        key: ec.EllipticCurvePrivateKey,
        stopped: threading.Event,
        channels: Channels | None = None,
    ) -> None:
        self.home = home
        self._key = key
        self._public_key = public_key_to_bytes(key.public_key())
        self._stopped = stopped
        self._channels = channels or Channels()
        self._line = Line(home, key, self._channels)
        self._beat_line = Line(home, key, self._channels)
        self._poller = (POLLER_HEADER, secrets.token_hex(8))
        self._poll: Any = None
        self._got = ""  # the message that a server of ours is not told of yet
        self._ours = (
            False  # whether the server takes objects with a reply's announcement: it sends them with its own
        )
        self.node_id = 0

    def _call(self, method: str, request: Any, timeout: float | None = CALL) -> Any:
        return outcome(self._line.begin(method, request, timeout))

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    # Joining and leaving ------------------------------------------------------------------------

    def join(self, remembered: int | None) -> int:
        """Register and activate this node; return the node id that the server gives it.

        A server that enforces node keys registers them itself, and a server that is still up knows this key:
        both refuse the registration, and activation goes on. While the lease of a killed process lasts,
        activation is refused too; the remembered node id ends that lease.

        Raises
        ------
        HomeFault
            If the server does not answer or refuses; KeyRefused if it admits registered keys only.
        """
        keys_only, self._ours = False, False
        try:
            self._call("RegisterNode", RegisterNodeFleetRequest(public_key=self._public_key))
        except HomeRefused as refused:
            keys_only = flower_code(refused) == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
            if not keys_only and flower_code(refused) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise
        try:
            self.node_id = self._activate(remembered)
        except HomeRefused as refused:
            if keys_only and flower_code(refused) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise KeyRefused(
                    "this node's key is not registered there, was revoked, or is in use by another process"
                ) from refused.__cause__
            raise
        return self.node_id

    def _activate(self, remembered: int | None) -> int:
        activate = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            answer = self._call("ActivateNode", activate)
        except HomeRefused as refused:
            if flower_code(refused) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or remembered is None:
                raise
            # A server that was restarted gives other ids; then the lease is not ours to end.
            with contextlib.suppress(NodeForgotten, HomeRefused):
                self._call("DeactivateNode", DeactivateNodeRequest(node_id=remembered))
            answer = self._call("ActivateNode", activate)
        return int(answer.node_id)

    def _leave(self) -> None:
        if self.node_id:
            # Its lease ends by itself after two missed heartbeats.
            with contextlib.suppress(HomeFault):
                outcome(
                    self._beat_line.begin("DeactivateNode", DeactivateNodeRequest(node_id=self.node_id), 2.0)
                )

    def beat(self, ended: Callable[[HomeFault | None], None]) -> None:
        """Send one heartbeat, and tell its outcome from another thread: None, or what went wrong.

        Raises
        ------
        HomeUnavailable
            If the connection was closed.
        """
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        call = self._beat_line.begin("SendNodeHeartbeat", request, HEARTBEAT_CALL)

        def done(call: Any) -> None:
            try:
                known = outcome(call).success
            except HomeFault as fault:
                ended(fault)
            else:
                ended(None if known else NodeForgotten("the server does not know this node"))

        call.add_done_callback(done)

    def hang_up(self) -> None:
        """End the calls under way with HomeUnavailable; later ones use a new connection.

        A server whose machine lost power never closes a connection, so a call could wait for ever.
        """
        dead, self._line = self._line, Line(self.home, self._key, self._channels)
        dead.close()

    def close(self) -> None:
        """End this node's lease and close both connections; calls under way end with HomeUnavailable."""
        self._line.close()
        self._leave()
        self._beat_line.close()

    # Messages -----------------------------------------------------------------------------------

    def pull(self) -> Pulled | None:
        """Ask for the next message; a server of ours holds the call until there is one, at most `POLL_HELD` seconds."""
        request = PullMessagesRequest(node=self._node)
        self._poll = self._line.begin("PullMessages", request, PULL, (self._poller, (GOT_HEADER, self._got)))
        answer = outcome(self._poll)
        if not answer.messages_list:
            return None
        try:
            announcement, object_ids = answer.messages_list[0], tree_ids(answer.message_object_trees[0])
            early = detach(announcement, set(object_ids))
            return Pulled(message_from_proto(announcement), object_ids, early)
        except (ValueError, IndexError) as fault:
            raise HomeRefused(f"the server announced a message that is none: {fault}") from fault

    def end_poll(self) -> None:
        """End a poll under way with HomeUnavailable."""
        if self._poll is not None:
            self._poll.cancel()

    def fetch(self, pulled: Pulled, give_up_at: float) -> Message:
        """Fetch those objects of a message that did not come along, tell the server, and put the message together.

        Parameters
        ----------
        pulled : Pulled
            What :meth:`pull` brought.
        give_up_at : float
            Until when (``time.time()``) to wait for a server that does not answer or an object that is on
            its way.

        Raises
        ------
        MessageGone
            If the run is over or an object is gone.
        PayloadError
            If the objects do not fit together.
        """
        metadata = pulled.message.metadata
        contents: dict[str, Content] = dict(pulled.early)
        rooms = Rooms()
        for object_id, content in pulled.early.items():
            rooms.expect(object_id, content)
        missing = [object_id for object_id in pulled.object_ids if object_id not in contents]
        self._ours = bool(contents)  # at least the message itself is small

        def request(object_id: str) -> PullObjectRequest:
            return PullObjectRequest(node=self._node, run_id=metadata.run_id, object_id=object_id)

        def took(object_id: str, answer: Any) -> bool:
            if not answer.object_found:
                raise MessageGone("the server has given the message up")
            if answer.object_available:
                contents[object_id] = rooms.take(object_id, answer.object_content)
            return bool(answer.object_available)

        self._all("PullObject", missing, request, took, give_up_at)
        if self._ours:  # the next poll says it
            self._got = metadata.message_id
        else:
            confirm = ConfirmMessageReceivedRequest(
                node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
            )
            outcome(self._line.begin("ConfirmMessageReceived", confirm, CALL, (self._poller,)))
        return unpack(metadata.message_id, contents)

    def push(self, reply: Message, packed: Packed, runtime: float, give_up_at: float) -> bool:
        """Send a reply: only those of its objects that the server lacks.

        Returns
        -------
        bool
            False if the server had no use for any of it, as it refuses late replies.
        """
        light = message_to_proto(remove_content_from_message(reply))
        if self._ours:
            attach(light, early_objects(packed))
        announce = PushMessagesRequest(
            node=self._node,
            messages_list=[light],
            message_object_trees=[packed.tree],
            clientapp_runtime_list=[runtime],
        )
        # No timeout: a server of ours lets big uploads wait their turn. A dead one is seen by the heartbeat.
        answer = self._call("PushMessages", announce, None)
        wanted = set(answer.objects_to_push)
        run_id = reply.metadata.run_id

        def request(object_id: str) -> ObjectPush:
            return ObjectPush(self._node, run_id, object_id, answer.session_id, packed.pieces(object_id))

        def took(object_id: str, stored: Any) -> bool:
            if not stored.stored:
                raise MessageGone("the server has given the message up")
            return True

        # What describes comes first: so the receiver knows an Array before its chunks.
        ordered = [object_id for object_id in packed.objects if object_id in wanted]
        ordered.sort(key=lambda object_id: isinstance(packed.objects[object_id], ArrayChunk))
        huge = self._ours and count_chunks(packed.tree) >= HUGE_CHUNKS
        self._all("PushObject", ordered, request, took, give_up_at, HUGE_IN_FLIGHT if huge else None)
        return bool(wanted) or answer.results[reply.metadata.message_id] == TAKEN

    def _all(
        self,
        method: str,
        object_ids: Sequence[str],
        request: Callable[[str], Any],
        took: Callable[[str, Any], bool],
        give_up_at: float,
        at_once: int | None = None,
    ) -> None:
        """Call `method` for each object, a few at a time; repeat what fails for now or `took` declines."""
        many = len(object_ids) > 2 * OBJECTS_IN_FLIGHT
        in_flight = at_once or (CHUNKS_IN_FLIGHT if many else OBJECTS_IN_FLIGHT)
        waiting = deque(object_ids)
        flying: deque[tuple[str, Any, float]] = deque()
        backoff, rested_at = Backoff(first=0.01, cap=0.5), 0.0
        try:
            while waiting or flying:
                while waiting and len(flying) < in_flight:
                    object_id = waiting.popleft()
                    call = self._line.begin(method, request(object_id))
                    flying.append((object_id, call, time.monotonic()))
                object_id, call, begun_at = flying.popleft()
                try:
                    done = took(object_id, outcome(call))
                except HomeUnavailable:
                    done = False
                if done:
                    backoff.reset()
                    continue
                waiting.append(object_id)
                if begun_at < rested_at:  # no news: the rest was because of the calls made with this one
                    continue
                if time.time() > give_up_at or self._stopped.wait(backoff.next()):
                    raise HomeUnavailable("its objects did not come in time")
                rested_at = time.monotonic()
        finally:
            for _, call, _ in flying:
                call.cancel()

    # Runs ---------------------------------------------------------------------------------------

    def get_run(self, run_id: int) -> Run:
        """Ask for a run's record."""
        return run_from_proto(self._call("GetRun", GetRunRequest(node=self._node, run_id=run_id)).run)

    def get_fab(self, run_id: int, fab_hash: str) -> Fab:
        """Ask for the bundle of a run's app."""
        request = GetFabRequest(node=self._node, hash_str=fab_hash, run_id=run_id)
        return fab_from_proto(self._call("GetFab", request, PULL).fab)
