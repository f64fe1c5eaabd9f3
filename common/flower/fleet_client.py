"""One node's connection to one server over Flower's Fleet gRPC, with errors that say what to do next."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
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
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from common.flower.backoff import Backoff
from common.flower.payloads import Packed, tree_ids, unpack

CALL_TIMEOUT = 20.0
HEARTBEAT_TIMEOUT = 5.0
PULL_TIMEOUT = 30.0  # a server of ours holds a pull for about a second
OBJECTS_IN_FLIGHT = 4


class HomeFault(Exception):  # noqa: N818 - an outcome to act upon
    """A call to a home failed."""


class HomeUnavailable(HomeFault):
    """Nobody answers, for now: try again."""


class NodeForgotten(HomeFault):
    """The server does not know this node (it was restarted): register and activate again."""


class MessageGone(HomeFault):
    """The run is over, or the server has given this message up: drop it."""


class HomeRefused(HomeFault):
    """The server answers, and refuses."""


@dataclass(frozen=True)
class Home:
    """One server to connect to.

    Parameters
    ----------
    address : str
        HOST:PORT of its Fleet API.
    root_certificates : bytes, optional
        PEM certificates that its own must be signed by; None means those of the system.
    insecure : bool
        Without TLS.
    """

    address: str
    root_certificates: bytes | None = None
    insecure: bool = False


class _VersionInterceptor(grpc.UnaryUnaryClientInterceptor):
    """Says which Flower version this is, as a SuperNode does.

    Flower's own interceptor ends the whole process when a server refuses the version; here it is one home's
    fault.
    """

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        metadata = self._metadata.append_to_grpc_metadata(details.metadata)
        return continuation(details._replace(metadata=metadata), request)


def fault_of(error: grpc.RpcError) -> HomeFault:
    """Translate a gRPC error into what to do next."""
    code = error.code()
    details = error.details() or ""
    said = FlowerError.from_json(details)
    if said is not None:
        if said.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return MessageGone("the run is over")
        extra = f" ({said.public_details})" if said.public_details else ""
        return HomeRefused(f"[{int(said.code)}] {said.message}{extra}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return HomeUnavailable(" ".join(details.split())[:300] or str(code.name))
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return NodeForgotten(details)
    return HomeRefused(f"{code.name}: {' '.join(details.split())[:300]}")


def _flower_code(error: grpc.RpcError) -> int | None:
    said = FlowerError.from_json(error.details())
    return None if said is None else int(said.code)


@dataclass
class Pulled:
    """A message as it was announced: metadata only, and the ids of its objects."""

    message: Message
    object_ids: list[str]


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
    """

    def __init__(self, home: Home, key: ec.EllipticCurvePrivateKey, stopped: threading.Event) -> None:
        self.home = home
        self._key = key
        self._public_key = public_key_to_bytes(key.public_key())
        self._stopped = stopped
        self._channel, self._stub = self._open()
        # Its own TCP connection: a heartbeat never waits behind a payload.
        self._beat_channel, self._beat_stub = self._open()
        self.node_id = 0

    def _open(self) -> tuple[grpc.Channel, FleetStub]:
        options = [
            ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
            ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
            # Without it gRPC gives every channel to one address the same connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
        ]
        if self.home.insecure:
            channel = grpc.insecure_channel(self.home.address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(self.home.root_certificates)
            channel = grpc.secure_channel(self.home.address, credentials, options=options)
        signed = NodeAuthClientInterceptor(self._key, self._key.public_key())
        channel = grpc.intercept_channel(channel, _VersionInterceptor(), signed)
        return channel, FleetStub(channel)

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None = CALL_TIMEOUT) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise fault_of(error) from error

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
            If the server does not answer or refuses.
        """
        known = (
            ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
            ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE,
        )
        try:
            self._stub.RegisterNode(
                RegisterNodeFleetRequest(public_key=self._public_key), timeout=CALL_TIMEOUT
            )
        except grpc.RpcError as error:
            if _flower_code(error) not in known:
                raise fault_of(error) from error
        activate = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            answer = self._stub.ActivateNode(activate, timeout=CALL_TIMEOUT)
        except grpc.RpcError as error:
            if _flower_code(error) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or remembered is None:
                raise fault_of(error) from error
            self._call(self._stub.DeactivateNode, DeactivateNodeRequest(node_id=remembered))
            answer = self._call(self._stub.ActivateNode, activate)
        self.node_id = answer.node_id
        return self.node_id

    def leave(self) -> None:
        """End this node's lease, if the server answers."""
        if self.node_id:
            try:
                self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id), timeout=2.0)
            except grpc.RpcError:
                return  # its lease ends by itself after two missed heartbeats

    def beat(self) -> None:
        """Send one heartbeat.

        Raises
        ------
        HomeFault
            NodeForgotten if the server does not know this node.
        """
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        answer = self._call(self._beat_stub.SendNodeHeartbeat, request, HEARTBEAT_TIMEOUT)
        if not answer.success:
            raise NodeForgotten("the server does not know this node")

    def close(self) -> None:
        """Close both connections; calls under way end with HomeUnavailable."""
        self._channel.close()
        self._beat_channel.close()

    # Messages -----------------------------------------------------------------------------------

    def pull(self) -> Pulled | None:
        """Ask for the next message; a server of ours holds the call for about a second."""
        answer = self._call(self._stub.PullMessages, PullMessagesRequest(node=self._node), PULL_TIMEOUT)
        if not answer.messages_list:
            return None
        return Pulled(message_from_proto(answer.messages_list[0]), tree_ids(answer.message_object_trees[0]))

    def fetch(self, pulled: Pulled, give_up_at: float) -> Message:
        """Fetch the objects of a message, tell the server so, and put the message together.

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
        contents: dict[str, bytes] = {}

        def request(object_id: str) -> PullObjectRequest:
            return PullObjectRequest(node=self._node, run_id=metadata.run_id, object_id=object_id)

        def took(object_id: str, answer: Any) -> bool:
            if not answer.object_found:
                raise MessageGone("the server has given the message up")
            if answer.object_available:
                contents[object_id] = answer.object_content
            return bool(answer.object_available)

        self._all(self._stub.PullObject, pulled.object_ids, request, took, give_up_at)
        confirm = ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self._call(self._stub.ConfirmMessageReceived, confirm)
        return unpack(metadata.message_id, contents)

    def push(self, reply: Message, packed: Packed, runtime: float, give_up_at: float) -> bool:
        """Send a reply: only those of its objects that the server lacks.

        Returns
        -------
        bool
            False if the server had no use for any of it, as it refuses late replies.
        """
        light = remove_content_from_message(reply)
        announce = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(light)],
            message_object_trees=[packed.tree],
            clientapp_runtime_list=[runtime],
        )
        # No timeout: a server of ours lets big uploads wait their turn. A dead one is seen by the heartbeat.
        answer = self._call(self._stub.PushMessages, announce, None)
        wanted = set(answer.objects_to_push)
        run_id = reply.metadata.run_id

        def request(object_id: str) -> PushObjectRequest:
            return PushObjectRequest(
                node=self._node,
                run_id=run_id,
                object_id=object_id,
                object_content=packed.content(object_id),
                session_id=answer.session_id,
            )

        def took(object_id: str, stored: Any) -> bool:
            if not stored.stored:
                raise MessageGone("the server has given the message up")
            return True

        ordered = [object_id for object_id in packed.objects if object_id in wanted]
        self._all(self._stub.PushObject, ordered, request, took, give_up_at)
        return bool(wanted)

    def _all(
        self,
        method: Any,
        object_ids: Iterable[str],
        request: Callable[[str], Any],
        took: Callable[[str, Any], bool],
        give_up_at: float,
    ) -> None:
        """Call `method` for each object, a few at a time; repeat what fails for now or `took` declines."""
        waiting = deque(object_ids)
        flying: deque[tuple[str, Any]] = deque()
        backoff = Backoff(first=0.05, cap=0.5)
        try:
            while waiting or flying:
                while waiting and len(flying) < OBJECTS_IN_FLIGHT:
                    object_id = waiting.popleft()
                    flying.append((object_id, method.future(request(object_id))))
                object_id, call = flying.popleft()
                try:
                    done = took(object_id, call.result())
                except grpc.RpcError as error:
                    fault = fault_of(error)
                    if not isinstance(fault, HomeUnavailable):
                        raise fault from error
                    done = False
                except grpc.FutureCancelledError as error:
                    raise HomeUnavailable("the connection was closed") from error
                if done:
                    backoff.reset()
                    continue
                waiting.append(object_id)
                if time.time() > give_up_at or self._stopped.wait(backoff.next()):
                    raise HomeUnavailable("its objects did not come in time")
        finally:
            for _, call in flying:
                call.cancel()

    # Runs ---------------------------------------------------------------------------------------

    def get_run(self, run_id: int) -> Run:
        """Ask for a run's record."""
        return run_from_proto(
            self._call(self._stub.GetRun, GetRunRequest(node=self._node, run_id=run_id)).run
        )

    def get_fab(self, run_id: int, fab_hash: str) -> Fab:
        """Ask for the bundle of a run's app."""
        request = GetFabRequest(node=self._node, hash_str=fab_hash, run_id=run_id)
        return fab_from_proto(self._call(self._stub.GetFab, request, PULL_TIMEOUT).fab)


def parse_run_record(values: Any) -> tuple[str, dict[str, bool | int | float | str]]:
    """Read the reserved record ``espalier.run``: the run id and the run configuration.

    Raises
    ------
    ValueError
        If it is malformed.
    """
    run, raw = values.get("run"), values.get("config")
    if not isinstance(run, str) or not run:
        raise ValueError("the record espalier.run has no run id")
    if not isinstance(raw, bytes):
        raise ValueError("the record espalier.run has no configuration")
    config = json.loads(raw)
    if not isinstance(config, dict):
        raise ValueError("the configuration in espalier.run is no JSON object")
    for key, value in config.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"the configuration in espalier.run gives {key!r} a {type(value).__name__}")
    return run, config
