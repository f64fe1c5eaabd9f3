"""Is a process well? Asked over gRPC's own health service, or of a node's state folder."""

from __future__ import annotations

from common.errors import EspalierError
from common.monitor.channel import open_channel
from common.security import Security


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
