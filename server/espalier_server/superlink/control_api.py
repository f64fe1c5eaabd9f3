"""Calls of a SuperLink's Control API that list, register and unregister its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from espalier.errors import AddressError

#: Seconds from a node's last heartbeat to the end of its lease: twice Flower's shortest heartbeat interval.
LEASE = 20.0


@dataclass(frozen=True)
class Node:
    """A node of a SuperLink: its public key, whether it is online, and its last heartbeat (Unix seconds)."""

    public_key: bytes
    online: bool
    last_seen: float


def list_nodes(control: str, root_certificates: str = "") -> list[Node]:
    """Return the nodes of a SuperLink.

    Parameters
    ----------
    control : str
        HOST:PORT of its Control API.
    root_certificates : str
        PEM file to verify its certificate with; "" for a port without TLS.

    Raises
    ------
    AddressError
        The SuperLink does not answer.
    """
    try:
        answer = _client(control, root_certificates).ListNodes(ListNodesRequest())
    except Exception as error:
        raise AddressError(f"the Control API at {control} does not answer: {error}") from error
    return [_node(info) for info in answer.nodes_info if info.status != NodeStatus.UNREGISTERED]


def register_node(control: str, root_certificates: str, public_key: bytes, name: str) -> int:
    """Admit a node by its public key, as `flwr supernode register KEY.pub --name NAME` does; return its id.

    Raises
    ------
    AddressError
        The SuperLink does not answer, or refuses the key, e.g. because it was registered before.
    """
    request = RegisterNodeRequest(public_key=public_key, name=name)
    try:
        return int(_client(control, root_certificates).RegisterNode(request).node_id)
    except Exception as error:
        raise AddressError(f"the Control API at {control} did not register the node: {error}") from error


def unregister_node(control: str, root_certificates: str, node_id: int) -> None:
    """End a node's admission, as `flwr supernode unregister` does.

    Raises
    ------
    AddressError
        The SuperLink does not answer or does not know the node.
    """
    try:
        _client(control, root_certificates).UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    except Exception as error:
        raise AddressError(f"the Control API at {control} did not unregister the node: {error}") from error


def _client(control: str, root_certificates: str) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(
        control,
        not root_certificates,
        Path(root_certificates).read_bytes() if root_certificates else None,
        [RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
    )


def _node(info: object) -> Node:
    online = getattr(info, "status", "") == NodeStatus.ONLINE
    ended = getattr(info, "last_deactivated_at", "")
    until = float(getattr(info, "online_until", 0.0) or 0.0)
    last = until - LEASE if online or not ended else datetime.fromisoformat(ended).timestamp()
    return Node(getattr(info, "public_key", b""), online, max(last, 0.0))
