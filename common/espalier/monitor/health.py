"""Health checks over gRPC's health service, and the versions and clock of a server."""

from __future__ import annotations

import time
from dataclasses import dataclass

from espalier.errors import EspalierError
from espalier.monitor.channel import open_channel
from espalier.security.transport import Security


@dataclass(frozen=True)
class ServerFacts:
    """Versions of a server, and by how many seconds this machine's clock is ahead of the server's."""

    versions: dict[str, str]
    ahead: float


def ask_facts(address: str, security: Security, *, timeout: float = 5.0) -> ServerFacts | None:
    """Ask a server for its versions and time; None if it reports none, as a stock SuperLink.

    Raises
    ------
    EspalierError
        The server does not answer.
    """
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest
    from grpc_health.v1.health_pb2_grpc import HealthStub

    from espalier.monitor.health_service import TIME_KEY, VERSION_KEYS

    with open_channel(address, security) as channel:
        asked = time.time()
        try:
            _, call = HealthStub(channel).Check.with_call(HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            # Any other error means that the server answers but does not offer the service to this caller.
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return None
        metadata = dict(call.initial_metadata())
        middle = (asked + time.time()) / 2
    if TIME_KEY not in metadata:
        return None
    versions = {name: str(metadata[key]) for name, key in VERSION_KEYS.items() if key in metadata}
    return ServerFacts(versions, middle - float(metadata[TIME_KEY]))


def check_health(address: str, security: Security, *, timeout: float = 5.0, server_name: str = "") -> None:
    """Ask grpc.health.v1 of an edge, or of the Monitor port of a cloud.

    Parameters
    ----------
    address : str
        HOST:PORT.
    security : Security
        How to connect.
    timeout : float
        Seconds to wait for the answer.
    server_name : str
        Name that the certificate must be valid for, if it is not the host of the address.

    Raises
    ------
    EspalierError
        If it is not healthy; with the reason.
    """
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    with open_channel(address, security, server_name) as channel:
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout)
    if answer.status != HealthCheckResponse.SERVING:
        status = HealthCheckResponse.ServingStatus.Name(answer.status).lower().replace("_", " ")
        raise EspalierError(f"{address} is {status}")
