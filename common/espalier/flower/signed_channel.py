"""A node's line to one of its homes: calls of the Fleet service, signed with the node's key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from espalier.flower.framing import object_calls
from espalier.flower.node_resources import Channels
from espalier.flower.upstreams import Home, HomeUnavailable


class _VersionInterceptor(grpc.UnaryUnaryClientInterceptor):
    """Says which Flower version this is, as a SuperNode does.

    Flower's own interceptor ends the whole process when a server refuses the version; here it is one home's fault.
    """

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        metadata = self._metadata.append_to_grpc_metadata(details.metadata)
        return continuation(details._replace(metadata=metadata), request)


class Line:
    """A line to a home, over a channel of its own or one that other nodes of the process use, too.

    Every call is begun under a lock that closing takes too: gRPC crashes the process when a call is begun on a channel
    that was closed meanwhile.
    """

    def __init__(self, home: Home, key: ec.EllipticCurvePrivateKey, channels: Channels) -> None:
        self._channels = channels
        self._trunk = channels.take(home)
        signed = NodeAuthClientInterceptor(key, key.public_key())
        channel = grpc.intercept_channel(self._trunk.channel, _VersionInterceptor(), signed)
        self._stub = FleetStub(channel)
        self._stub.__dict__.update(object_calls(channel))
        self._lock = threading.Lock()
        self._calls: set[Any] = set()
        self._closed = False

    def begin(
        self,
        method: str,
        request: Any,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
    ) -> Any:
        """Begin a call of the Fleet service and return it; see :func:`espalier.flower.upstreams.outcome`.

        Raises
        ------
        HomeUnavailable
            If the line was closed.
        """
        with self._lock:
            if self._closed:
                raise HomeUnavailable("the connection was closed")
            call = getattr(self._stub, method).future(request, timeout=timeout, metadata=metadata)
            self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def close(self) -> None:
        """End the calls under way with HomeUnavailable, and refuse later ones."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for call in list(self._calls):
            call.cancel()
        self._channels.leave(self._trunk)
