"""Serialisation of the two calls that transfer objects (PushObject, PullObject), with fewer copies than protobuf makes.

Protobuf copies an object's content into the request and the request into its bytes, and both again on receipt. Here
the same bytes are produced by one join of pieces, and parsed so that the content is a view of the received bytes. The
parser accepts only the form that protobuf writes; anything else is passed to protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node

Buffer: TypeAlias = bytes | memoryview

SERVICE = "flwr.proto.Fleet"
#: Smaller contents are copied, so that they do not keep the bytes of the whole call alive.
MIN_VIEW_BYTES = 64 << 10
_LENGTH, _VARINT = 2, 0
_CONTENT_OF_PUSH = PushObjectRequest.DESCRIPTOR.fields_by_name["object_content"].number
_CONTENT_OF_PULL = PullObjectResponse.DESCRIPTOR.fields_by_name["object_content"].number


@dataclass(frozen=True, slots=True)
class ObjectPush:
    """A PushObjectRequest whose content is a sequence of buffers, or a view of the received bytes."""

    node: Node
    run_id: int
    object_id: str
    session_id: str
    pieces: Sequence[Buffer]

    @property
    def object_content(self) -> Buffer:
        """The content in one buffer."""
        return _as_one_buffer(self.pieces)


@dataclass(frozen=True, slots=True)
class ObjectAnswer:
    """A PullObjectResponse whose content is a sequence of buffers, or a view of the received bytes."""

    object_found: bool
    object_available: bool
    pieces: Sequence[Buffer]

    @property
    def object_content(self) -> Buffer:
        """The content in one buffer."""
        return _as_one_buffer(self.pieces)


def push_to_bytes(request: ObjectPush | PushObjectRequest) -> bytes:
    """Serialise a request to the bytes that protobuf produces."""
    if isinstance(request, PushObjectRequest):
        return bytes(request.SerializeToString())
    before = PushObjectRequest(node=request.node, run_id=request.run_id, object_id=request.object_id)
    after = PushObjectRequest(session_id=request.session_id)
    return _serialise(before, _CONTENT_OF_PUSH, request.pieces, after)


def push_from_bytes(data: bytes) -> ObjectPush | PushObjectRequest:
    """Parse a request; raises DecodeError where protobuf would."""
    found = _split_content(data, _CONTENT_OF_PUSH)
    if found is None:
        return PushObjectRequest.FromString(data)
    rest, content = found
    request = PushObjectRequest.FromString(rest)
    return ObjectPush(request.node, request.run_id, request.object_id, request.session_id, (content,))


def answer_to_bytes(answer: ObjectAnswer | PullObjectResponse) -> bytes:
    """Serialise a response to the bytes that protobuf produces."""
    if isinstance(answer, PullObjectResponse):
        return bytes(answer.SerializeToString())
    before = PullObjectResponse(object_found=answer.object_found, object_available=answer.object_available)
    return _serialise(before, _CONTENT_OF_PULL, answer.pieces, PullObjectResponse())


def answer_from_bytes(data: bytes) -> ObjectAnswer | PullObjectResponse:
    """Parse a response; raises DecodeError where protobuf would."""
    found = _split_content(data, _CONTENT_OF_PULL)
    if found is None:
        return PullObjectResponse.FromString(data)
    rest, content = found
    answer = PullObjectResponse.FromString(rest)
    return ObjectAnswer(answer.object_found, answer.object_available, (content,))


def object_calls(channel: Any) -> dict[str, Any]:
    """Return the two calls that transfer objects, on a channel."""
    return {
        "PushObject": channel.unary_unary(
            f"/{SERVICE}/PushObject",
            request_serializer=push_to_bytes,
            response_deserializer=PushObjectResponse.FromString,
        ),
        "PullObject": channel.unary_unary(
            f"/{SERVICE}/PullObject",
            request_serializer=PullObjectRequest.SerializeToString,
            response_deserializer=answer_from_bytes,
        ),
    }


def add_fleet(servicer: Any, server: grpc.Server) -> None:
    """Register the Fleet service with a server, with this module's serialisers for the object calls."""
    add_FleetServicer_to_server(servicer, _Registrar(servicer, server))


class _Registrar:
    """Passed in place of the server to Flower's generated registration code, whose handlers it modifies."""

    def __init__(self, servicer: Any, server: grpc.Server) -> None:
        self._servicer, self._server = servicer, server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Ignore them: the same handlers are registered by name."""

    def add_registered_method_handlers(self, service: str, methods: dict[str, grpc.RpcMethodHandler]) -> None:
        """Replace the handlers of the two object calls, and register all."""
        methods = methods | {
            "PushObject": grpc.unary_unary_rpc_method_handler(
                self._servicer.PushObject,
                request_deserializer=push_from_bytes,
                response_serializer=PushObjectResponse.SerializeToString,
            ),
            "PullObject": grpc.unary_unary_rpc_method_handler(
                self._servicer.PullObject,
                request_deserializer=PullObjectRequest.FromString,
                response_serializer=answer_to_bytes,
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        self._server.add_registered_method_handlers(service, methods)


def _as_one_buffer(pieces: Sequence[Buffer]) -> Buffer:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _serialise(before: Any, number: int, pieces: Sequence[Buffer], after: Any) -> bytes:
    """Return the bytes of a message whose field `number` is the joined pieces; an empty field is omitted."""
    size = sum(len(piece) for piece in pieces)
    head = [bytes([number << 3 | _LENGTH]), _varint(size), *pieces] if size else []
    return b"".join((before.SerializeToString(), *head, after.SerializeToString()))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _split_content(data: bytes, content: int) -> tuple[bytes, memoryview] | None:
    """Split the bytes of a message into a large content field and the remaining fields.

    Returns None, so that protobuf parses the message, without a large content, or unless the bytes are fields of known
    wire types in ascending order that end where the message ends.
    """
    if len(data) < MIN_VIEW_BYTES:
        return None
    at, previous, found = 0, 0, None
    begins = ends = 0
    while at < len(data):
        start, tag = at, data[at]
        number, kind = tag >> 3, tag & 7
        if not previous < number < 16 or kind not in (_LENGTH, _VARINT):
            return None
        previous = number
        value, at = _read_varint(data, at + 1)
        if at < 0:
            return None
        if kind == _LENGTH:
            begin, at = at, at + value
            if at > len(data):
                return None
            if number == content:
                if value < MIN_VIEW_BYTES:
                    return None
                begins, ends, found = start, at, memoryview(data)[begin:at]
        elif number == content:
            return None
    return None if found is None else (data[:begins] + data[ends:], found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint of at most ten bytes and the offset after it; the offset is -1 if there is none."""
    value = 0
    for place in range(10):
        if at + place >= len(data):
            break
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return 0, -1
