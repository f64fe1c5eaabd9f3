"""An inline Flower server: the Fleet API (gRPC) for nodes, and grids for runs, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import DESCRIPTOR
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH
from flwr.supercore.interceptors import (
    RpcErrorTranslationServerInterceptor,
    create_fleet_runtime_version_server_interceptor,
)
from flwr.supercore.task_identity import TaskIdentity
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from espalier.errors import AddressError, StateError
from espalier.flower.framing import add_fleet
from espalier.flower.memory import unmap_large_blocks_on_free
from espalier.monitor.health_service import HealthService
from espalier.security.keys import canonical
from espalier_edge.fleet.grid import InlineGrid
from espalier_edge.fleet.servicer import FleetState, InlineFleetServicer

__all__ = ["InlineFleet", "InlineGrid"]

WORKERS = 4000  # threads are created on demand; most of them hold polls
# Maximum size of a connection's read buffer. By default gRPC grows it to the largest read, up to a chunk of 5 MiB, and
# never shrinks it: about 4 MB per connection after K large replies.
READ_AHEAD = 64 << 10
TICK = 0.5
PAUSE = 5.0  # a longer gap between ticks means that this process was suspended
AFTER_PAUSE = 15.0  # seconds after which every live node has sent a heartbeat


def _filter_call_logs(record: logging.LogRecord) -> bool:
    """Drop what Flower's servicer logs for every reply and registration; refusals are reported by `on_refused`."""
    text = record.getMessage()
    if "/RegisterNode][ApiError:2001]" in text or "No SuperNode found with the given public key" in text:
        return False
    return record.levelno >= logging.WARNING or not text.startswith("[Fleet.")


class UnknownMethodInterceptor(grpc.ServerInterceptor):
    """Refuses methods that the Fleet service does not have, on which Flower's interceptors fail."""

    _HEAD = "/flwr.proto.Fleet/"
    _KNOWN = frozenset(DESCRIPTOR.services_by_name["Fleet"].methods_by_name)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call, None if there is none."""
        head, name = handler_call_details.method.rpartition("/")[::2]
        if head + "/" == self._HEAD and name not in self._KNOWN:
            return None
        return continuation(handler_call_details)


class InlineFleet:
    """Flower's Fleet server in this process, without a SuperLink, an HTTP hop or further processes.

    Parameters
    ----------
    address : str
        HOST:PORT to listen on; port 0 lets the system choose (see :attr:`port`).
    certificates : tuple of bytes, optional
        CA certificate, server certificate and private key, PEM; by default without TLS.
    require_keys : bool
        Admit only nodes whose key was passed to :meth:`register_key`.
    on_refused : callable, optional
        Called, from several threads, with the public key and the address of a node that was not admitted.
    upload_slots : int
        Number of big replies that may be in memory at a time; further uploads are queued.
    """

    def __init__(
        self,
        address: str,
        *,
        certificates: tuple[bytes, bytes, bytes] | None = None,
        require_keys: bool = False,
        on_refused: Callable[[bytes, str], None] | None = None,
        upload_slots: int = 2,
    ) -> None:
        logging.getLogger("flwr").addFilter(_filter_call_logs)
        unmap_large_blocks_on_free()
        self._address = address
        self._certificates = certificates
        self.fleet = FleetState(upload_slots)
        self.fleet.on_late_reply = self._count_late
        self._servicer = InlineFleetServicer(self.fleet, require_keys, on_refused or (lambda key, peer: None))
        self._server: grpc.Server | None = None
        self._health = HealthService()
        self._grids: dict[int, InlineGrid] = {}
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._watch_nodes, name="fleet watch", daemon=True)
        self.port = 0

    def start(self) -> None:
        """Start listening.

        Raises
        ------
        AddressError
            If the server cannot listen on the address.
        """
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fleet")
        self._server = grpc.server(
            pool,
            maximum_concurrent_rpcs=WORKERS,
            options=[
                ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
                ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
                ("grpc.max_concurrent_streams", WORKERS),
                ("grpc.keepalive_time_ms", 210_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.experimental.tcp_max_read_buffer_size", READ_AHEAD),
                ("grpc.so_reuseport", 0),  # a second server on the same port is an error
            ],
            interceptors=[
                UnknownMethodInterceptor(),
                RpcErrorTranslationServerInterceptor(),
                NodeAuthServerInterceptor(self.fleet.state_factory),
                create_fleet_runtime_version_server_interceptor(),
            ],
        )
        add_fleet(self._servicer, self._server)
        add_HealthServicer_to_server(self._health, self._server)
        try:
            if self._certificates is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                authority, certificate, private_key = self._certificates
                credentials = grpc.ssl_server_credentials(
                    ((private_key, certificate),), root_certificates=authority, require_client_auth=False
                )
                self.port = self._server.add_secure_port(self._address, credentials)
        except RuntimeError as fault:
            certificate_hint = (
                ", or the certificate is not a server certificate" if self._certificates else ""
            )
            raise AddressError(
                f"cannot listen on {self._address}: the port is in use or the host is not this machine's"
                f"{certificate_hint}"
            ) from fault
        if not self.port:
            raise AddressError(f"cannot listen on {self._address}: it is not a HOST:PORT of this machine")
        self._server.start()
        self._health.set("", HealthCheckResponse.SERVING)
        self._watch.start()

    def stop(self, grace: float = 1.0) -> None:
        """Close all grids and stop listening; calls in progress have `grace` seconds to finish."""
        self._stopped.set()
        for grid in list(self._grids.values()):
            grid.close()
        self._health.enter_graceful_shutdown()
        if self._server is not None:
            self._server.stop(grace).wait()
        if self._watch.is_alive():
            self._watch.join(2 * TICK)

    # Nodes --------------------------------------------------------------------------------------

    def register_key(self, public_key: bytes, name: str) -> None:
        """Admit a node by its public key.

        Parameters
        ----------
        public_key : bytes
            PEM or OpenSSH.
        name : str
            Listed by :meth:`nodes`.

        Raises
        ------
        StateError
            If it is not a public key on a NIST curve.
        """
        pem = canonical(public_key, name)
        if self.fleet.state.get_node_id_by_public_key(pem) is None:
            self.fleet.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, pem, 0, name=name)

    def drop_key(self, public_key: bytes) -> None:
        """Revoke the admission of a node: its next call is refused, and its outstanding messages count as lost.

        Parameters
        ----------
        public_key : bytes
            PEM or OpenSSH; ignored if it is not registered.
        """
        pem = canonical(public_key, "a node")
        state = self.fleet.state
        with state.lock:
            node_id = state.get_node_id_by_public_key(pem)
            if node_id is None:
                return
            state.delete_node(NOOP_FLWR_AID, node_id)
            del state.node_public_key_to_node_id[pem]  # otherwise Flower never accepts the key again

    def nodes(self) -> list[NodeInfo]:
        """Return the nodes that are online, with their public keys."""
        with self.fleet.state.lock:
            online = self.fleet.state.get_node_info(statuses=[NodeStatus.ONLINE])
            copies = []
            for node in online:
                copy = NodeInfo()
                copy.CopyFrom(node)
                copies.append(copy)
            return copies

    def _watch_nodes(self) -> None:
        """Mark nodes offline, abandon stalled uploads, and detect that this process was paused."""
        fleet = self.fleet
        ticked = time.monotonic()
        while not self._stopped.wait(TICK):
            now = time.monotonic()
            if now - ticked > PAUSE:
                fleet.trust_after = now + AFTER_PAUSE
            ticked = now
            with fleet.state.lock:
                fleet.state.get_node_info(
                    statuses=[NodeStatus.ONLINE]
                )  # marks nodes offline whose lease ended
            for upload in fleet.uploads.stalled():
                fleet.abandon_upload(upload.instruction_id)

    # Runs ---------------------------------------------------------------------------------------

    def open_run(
        self, *, fab: Fab | None = None, run_config: Mapping[str, bool | int | float | str] | None = None
    ) -> InlineGrid:
        """Start a run, whose ServerApp is this process, and return its grid.

        Parameters
        ----------
        fab : Fab, optional
            App bundle for stock SuperNodes to fetch. Resident nodes never run it.
        run_config : mapping, optional
            Overrides of the app's configuration.
        """
        state = self.fleet.state
        fab_hash = state.store_fab(fab) if fab is not None else None
        fab_id, fab_version = get_metadata_from_config(get_fab_config(fab.content)) if fab else (None, None)
        run_id = state.create_run(
            fab_id,
            fab_version,
            fab_hash,
            dict(run_config or {}),
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        task_id = state.get_run_info(run_ids=[run_id])[0].primary_task_id
        if task_id is None or state.claim_task(task_id) is None or not state.activate_task(task_id):
            raise StateError("Flower's link state did not start the run; check that flwr is 1.39")
        # This process runs the task itself and sends no heartbeats for it: without a token the task never expires,
        # even if the process is suspended for an hour.
        with state.lock_task_store:
            record = state.task_token_store.pop(task_id)
            state.task_token_to_task_id.pop(record.token, None)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, SUPERLINK_NODE_ID
        grid = InlineGrid(self.fleet, run_id, task_id, on_close=self._forget)
        self._grids[run_id] = grid
        return grid

    def _forget(self, run_id: int) -> None:
        self._grids.pop(run_id, None)

    def _count_late(self, run_id: int) -> None:
        grid = self._grids.get(run_id)
        if grid is not None:
            grid.count_late()
