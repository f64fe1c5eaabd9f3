"""What a SuperLink's Control API tells of its nodes: which are online, whether a run goes on or not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import AddressError

#: Seconds that a node's lease outlasts its newest heartbeat: twice Flower's smallest interval.
LEASE = 20.0


@dataclass(frozen=True)
class Node:
    """A node of a SuperLink: its public key, whether it is online, and its last sign of life (Unix seconds)."""

    public_key: bytes
    online: bool
    last_seen: float


def list_nodes(control: str, root_certificates: str = "") -> list[Node]:
    """Ask a SuperLink for its nodes.

    Parameters
    ----------
    control : str
        HOST:PORT of its Control API.
    root_certificates : str
        PEM file to check its certificate against; "" where the port is plain.

    Raises
    ------
    AddressError
        It does not answer.
    """
    try:
        client = ControlHttpClient.from_server_address(
            control,
            not root_certificates,
            Path(root_certificates).read_bytes() if root_certificates else None,
            [RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )
        answer = client.ListNodes(ListNodesRequest())
    except Exception as error:
        raise AddressError(f"the Control API at {control} does not answer: {error}") from error
    return [_node(info) for info in answer.nodes_info if info.status != NodeStatus.UNREGISTERED]


def _node(info: object) -> Node:
    online = getattr(info, "status", "") == NodeStatus.ONLINE
    ended = getattr(info, "last_deactivated_at", "")
    until = float(getattr(info, "online_until", 0.0) or 0.0)
    last = until - LEASE if online or not ended else datetime.fromisoformat(ended).timestamp()
    return Node(getattr(info, "public_key", b""), online, max(last, 0.0))
