"""Grids that call the apps of their nodes directly, to run a tree in one process in tests and benches.

The code of the tiers runs unchanged; only the network is replaced. Payloads are passed without serialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from espalier.flower.node_state import load_or_make_key
from espalier.flower.resident import Fab

App = Callable[[Message, Context], Message]


@dataclass
class LocalNode:
    """A node whose app is called in this process.

    Attributes
    ----------
    node_id : int
        Its id at its server.
    key : bytes
        Its public key, or a placeholder for one.
    app : callable
        Returns the reply to a message.
    config : Mapping
        Its node config.
    online : bool
        Whether it is online.
    """

    node_id: int
    key: bytes
    app: App
    config: Mapping[str, Any] = field(default_factory=dict)
    online: bool = True

    @property
    def info(self) -> NodeInfo:
        """Its record at the server."""
        return NodeInfo(node_id=self.node_id, public_key=self.key, last_activated_at="always")


def client_node(node_id: int, app: App, config: Mapping[str, Any]) -> LocalNode:
    """Return a node with a key in its state folder, which its app can sign with, as a resident node has."""
    path = Path(config["state"]) / "node.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    key = public_key_to_bytes(load_or_make_key(path).public_key())
    return LocalNode(node_id, key, app, {**config, "key": str(path)})


class LocalGrid:
    """The streaming grid of a cloud or an edge over nodes in this process; replies arrive in the order of messages."""

    def __init__(self, nodes: Iterable[LocalNode], run_id: int = 1) -> None:
        # Flower's Message takes its sender from the TaskIdentity.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
        self._nodes = {n.node_id: n for n in nodes}
        self._contexts = {
            n.node_id: Context(run_id, n.node_id, dict(n.config), RecordDict(), {})
            for n in self._nodes.values()
        }
        self.closed = False
        self.late = 0

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are online."""
        return sorted(i for i, n in self._nodes.items() if n.online)

    def get_nodes(self) -> list[NodeInfo]:
        """Nodes that are online."""
        return [self._nodes[i].info for i in self.get_node_ids()]

    def exchange(self, messages: Iterable[Message], **_: object) -> Iterator[Message]:
        """Call the app of each message's node and yield its reply; an exception in the app becomes an Error reply."""
        for message in messages:
            node = self._nodes.get(message.metadata.dst_node_id)
            if node is None or not node.online:
                yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node is offline"), reply_to=message)
                continue
            try:
                reply = node.app(message, self._contexts[node.node_id])
            except Exception as error:  # noqa: BLE001 - an app may raise anything
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
            yield reply

    def collect_late(self) -> None:
        """Do nothing: no reply is ever late."""

    def close(self) -> None:
        """Close the grid."""
        self.closed = True


class LocalFleet:
    """Stands in for the Fleet server of an edge."""

    def __init__(self, nodes: Iterable[LocalNode]) -> None:
        self._nodes = list(nodes)

    def nodes(self) -> list[NodeInfo]:
        """Nodes that are online."""
        return [n.info for n in self._nodes if n.online]

    def open_run(self, *, fab: Fab | None = None, run_config: Mapping[str, Any] | None = None) -> LocalGrid:
        """Return the grid of a run."""
        return LocalGrid(self._nodes)


class LocalCloud:
    """Stands in for the uplink of an edge."""

    def fetch_fab(self, run_id: int) -> Fab | None:
        """Return None: there is no app bundle."""
        return None

    def run_is_over(self, run_id: int) -> bool:
        """Return True: a new run may start at any time."""
        return True
