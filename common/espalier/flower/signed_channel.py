"""A channel to the Fleet service of a server, whose calls are signed with the node's key."""

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
from espalier.flower.node_resources import ChannelPool
from espalier.flower.upstreams import Upstream, UpstreamUnavailableError


class _VersionInterceptor(grpc.UnaryUnaryClientInterceptor):
    """Sends the Flower version, as a SuperNode does.

    Flower's own interceptor exits the process when a server refuses the version; here only that session fails.
    """

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        metadata = self._metadata.append_to_grpc_metadata(details.metadata)
        return continuation(details._replace(metadata=metadata), request)


class SignedChannel:
    """A signed connection to a server, over a gRPC channel from a pool.

    Starting a call and closing take the same lock, as gRPC crashes the process when a call is started on a channel
    that another thread has closed.
    """

    def __init__(self, upstream: Upstream, key: ec.EllipticCurvePrivateKey, channels: ChannelPool) -> None:
        self._channels = channels
        self._shared = channels.acquire(upstream)
        signed = NodeAuthClientInterceptor(key, key.public_key())
        channel = grpc.intercept_channel(self._shared.channel, _VersionInterceptor(), signed)
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
        """Start a call of the Fleet service and return it; :func:`espalier.flower.upstreams.call_result` waits for it.

        Raises
        ------
        UpstreamUnavailableError
            If the channel is closed.
        """
        with self._lock:
            if self._closed:
                raise UpstreamUnavailableError("the connection was closed")
            call = getattr(self._stub, method).future(request, timeout=timeout, metadata=metadata)
            self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def close(self) -> None:
        """Cancel the calls in progress, which raise UpstreamUnavailableError, and refuse new ones."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for call in list(self._calls):
            call.cancel()
        self._channels.release(self._shared)
