"""The Monitor service, which serves monitoring clients, and gRPC's health service, on a port of their own."""

# The methods of a gRPC servicer are named as in its .proto file.
# ruff: noqa: N802

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from espalier.errors import AddressError
from espalier.monitor.health_service import HealthService
from espalier.security.transport import parse_address
from espalier_proto import monitor_pb2 as mpb
from espalier_proto.monitor_pb2_grpc import MonitorServicer, add_MonitorServicer_to_server

#: Version of proto/espalier_proto/monitor.proto; raised when a message changes its meaning.
SCHEMA = 1
#: Number of the newest faults in a snapshot.
FAULTS_SHOWN = 10

WORKERS = 16
#: A watcher occupies a worker until it hangs up; the others serve health checks and single requests.
WATCHERS = 8
INTERVAL, SHORTEST, LONGEST = 1.0, 0.2, 60.0

Source = Callable[[], mpb.TreeStatus]


class Servicer(MonitorServicer):
    """Serves snapshots of a source; all requests are read-only."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._slots = threading.BoundedSemaphore(WATCHERS)
        self.ended = threading.Event()

    def GetStatus(self, request: mpb.StatusRequest, context: grpc.ServicerContext) -> mpb.TreeStatus:
        """Return one snapshot."""
        return self._source()

    def Watch(self, request: mpb.WatchRequest, context: grpc.ServicerContext) -> Iterator[mpb.TreeStatus]:
        """Yield a snapshot every `interval` seconds until the caller cancels."""
        interval = request.interval or INTERVAL
        if not SHORTEST <= interval <= LONGEST:  # NaN fails here, too
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"interval {interval:g} s; give {SHORTEST:g} to {LONGEST:g}"
            )
        if not self._slots.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{WATCHERS} clients watch already; try again, or ask once",
            )
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            while context.is_active() and not self.ended.is_set():
                yield self._source()
                gone.wait(interval)
        finally:
            self._slots.release()


class MonitorServer:
    """Serves status snapshots at an address; a context manager.

    Parameters
    ----------
    address : str
        HOST:PORT; port 0 chooses a free one (see `address` after the start).
    certificates : tuple of bytes, optional
        CA certificate, certificate and private key, PEM; None serves without TLS.
    source : callable
        Returns the newest snapshot; called from several threads.
    healthy : bool
        Initial answer of the health service; see `set_health`.

    Raises
    ------
    AddressError
        On entering, if the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        certificates: tuple[bytes, bytes, bytes] | None,
        source: Source,
        *,
        healthy: bool = True,
    ) -> None:
        self.address = address
        self._servicer, self._health = Servicer(source), HealthService()
        self._server = grpc.server(
            ThreadPoolExecutor(WORKERS, thread_name_prefix="monitor"),
            maximum_concurrent_rpcs=WORKERS,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4096)],
        )
        add_MonitorServicer_to_server(self._servicer, self._server)
        add_HealthServicer_to_server(self._health, self._server)
        self._certificates = certificates
        self.set_health(healthy)

    def set_health(self, healthy: bool) -> None:
        """Set the answer of the health service."""
        self._health.set("", HealthCheckResponse.SERVING if healthy else HealthCheckResponse.NOT_SERVING)

    def __enter__(self) -> MonitorServer:
        host = parse_address(self.address, listen=True)
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(self.address)
            else:
                authority, certificate, private_key = self._certificates
                credentials = grpc.ssl_server_credentials(
                    ((private_key, certificate),), root_certificates=authority, require_client_auth=False
                )
                port = self._server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise AddressError(
                f"--monitor {self.address}: the port is in use or the host is not this machine's; "
                "give another, or none"
            ) from error
        self.address = str(host._replace(port=port))
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._servicer.ended.set()
        self._server.stop(0.5).wait()
