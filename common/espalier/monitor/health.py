"""Is a process well? Asked over gRPC's own health service, or of a node's state folder."""

from __future__ import annotations

import time
from dataclasses import dataclass

from espalier.errors import EspalierError
from espalier.monitor.channel import open_channel
from espalier.security.transport import Security


@dataclass(frozen=True)
class ServerFacts:
    """What a server of ours tells of itself: versions, and by how many seconds our clock is ahead of its."""

    versions: dict[str, str]
    ahead: float


def ask_facts(address: str, security: Security, *, timeout: float = 5.0) -> ServerFacts | None:
    """Ask a server for its versions and time; None where it tells none, as a stock SuperLink.

    Raises
    ------
    EspalierError
        Nobody answers.
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
            # It answers, and has no such service, or one that this caller may not ask.
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return None
        told = dict(call.initial_metadata())
        middle = (asked + time.time()) / 2
    if TIME_KEY not in told:
        return None
    versions = {name: str(told[key]) for name, key in VERSION_KEYS.items() if key in told}
    return ServerFacts(versions, middle - float(told[TIME_KEY]))


def check_health(address: str, security: Security, *, timeout: float = 5.0, server_name: str = "") -> None:
    """Ask grpc.health.v1 of an edge, or of the Monitor port of a cloud.

    Parameters
    ----------
    address : str
        HOST:PORT.
    security : Security
        How to connect.
    timeout : float
        Seconds the answer may take.
    server_name : str
        Name that the certificate must hold, where it is not the address's host.

    Raises
    ------
    EspalierError
        If it is not well; with the reason.
    """
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    with open_channel(address, security, server_name) as channel:
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout)
    if answer.status != HealthCheckResponse.SERVING:
        status = HealthCheckResponse.ServingStatus.Name(answer.status).lower().replace("_", " ")
        raise EspalierError(f"{address} is {status}")
