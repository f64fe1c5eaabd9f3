"""The edges and clients of a run: which are connected, and which clients are members."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from espalier.config.timeouts import EDGE_HELLO, RETURN_HELLO
from espalier.errors import WireError
from espalier.methods.planning import Member
from espalier.names import check_sender
from espalier.security.name_registry import Claims
from espalier.wire import control
from espalier.wire.hello import check_client_hello, version_mismatch
from espalier_proto import espalier_pb2 as pb
from espalier_server.client_keys import ClientKeys
from espalier_server.planning.edge_messages import (
    hello_messages,
    request_progress,
    send_done,
    send_refusals,
)
from espalier_server.planning.members import (
    FrozenMember,
    check_level,
    check_reproducible,
    check_same_data_shape,
)
from espalier_server.superlink.grid import TreeGrid

log = logging.getLogger("espalier.cloud")

#: Seconds for which an edge's client list is considered fresh; a client that joins later waits for the next window.
ROSTER_AGE = 5.0


class Node(Protocol):
    """A connected node, as Flower's Grid describes it."""

    node_id: int
    public_key: bytes
    last_activated_at: str


@dataclass
class Tree:
    """Edges and clients of a run.

    Parameters
    ----------
    grid : TreeGrid
        The run's grid.
    names : Claims
        Node key of each edge name.
    run : str
        Espalier's run id.
    histogram_epsilon : float
        Epsilon of the Laplace noise that clients add to their label counts; 0: none.
    keys : ClientKeys
        Node key of each client name.
    smallest_level : float
        Level of the smallest sub-model of the run, if devices set their levels; else 0.
    reproducible : bool
        Whether the members are fixed when the run begins, so that later joins and departures do not change results.
    faults : list of pb.Fault
        Faults of hellos since the list was last cleared.
    """

    grid: TreeGrid
    names: Claims
    run: str
    histogram_epsilon: float
    keys: ClientKeys
    smallest_level: float = 0.0
    reproducible: bool = False
    faults: list[pb.Fault] = field(default_factory=list)
    _edges: dict[int, pb.EdgeHello] = field(default_factory=dict)
    _clients: dict[str, pb.ClientHello] = field(default_factory=dict)
    _links: dict[str, dict[str, float]] = field(default_factory=dict)
    _reported: set[tuple[str, str]] = field(default_factory=set)
    _since: dict[int, str] = field(default_factory=dict)
    _last_hello: dict[int, float] = field(default_factory=dict)
    _unresponsive: set[int] = field(default_factory=set)
    _unsent_refusals: dict[int, dict[str, str]] = field(default_factory=dict)
    _frozen: dict[str, FrozenMember] = field(default_factory=dict)

    # --- members -----------------------------------------------------------------------------------

    def edges(self) -> dict[str, int]:
        """Return the node id of every edge that is connected, serves this run and answers, by name."""
        connected = set(self.grid.get_node_ids()) - self._unresponsive
        return {e.name: n for n, e in sorted(self._edges.items()) if n in connected and not e.busy_with}

    def busy_edges(self) -> dict[str, str]:
        """Return the run that each edge serves instead of this one, by edge name."""
        return {e.name: e.busy_with for e in self._edges.values() if e.busy_with}

    def name_of(self, node_id: int) -> str:
        """Return the name of a node, or "node ID" if it has not sent a hello."""
        return self._edges[node_id].name if node_id in self._edges else f"node {node_id}"

    def since(self) -> dict[int, str]:
        """Return since when each node is connected; the time changes when a node restarts."""
        return {n.node_id: n.last_activated_at for n in self.grid.get_nodes()}

    def members(self) -> list[Member]:
        """Return the clients that can participate now, each with the edges that it is connected to.

        In a reproducible run these are the fixed members, connected or not: a message to one that is not connected
        fails and is sent again.
        """
        edges_of = {name: list(m.edges) for name, m in self._frozen.items()} or self.connected_clients()
        return [
            Member(
                name=name,
                samples=self._clients[name].samples,
                labels=np.asarray(self._clients[name].histogram.counts, dtype=np.float64),
                edges=tuple(sorted(edges)),
                level=self._clients[name].level,
                model=self._clients[name].model,
                memory=self._clients[name].facts.memory_bytes,
                speed=self._clients[name].facts.speed,
                links=self._links.get(name, {}),
            )
            for name, edges in sorted(edges_of.items())
            if name in self._clients
        ]

    def connected_clients(self) -> dict[str, list[str]]:
        """Return the edges of each client that is connected and whose key is valid."""
        edges_of: dict[str, list[str]] = {}
        keys = self.keys.in_force()  # a client may have been revoked since its hello
        for edge, node in self.edges().items():
            for client in self._edges[node].clients:
                if client.name in keys:
                    edges_of.setdefault(client.name, []).append(edge)
        return edges_of

    @property
    def population(self) -> int:
        """Number of clients that have joined this run (N), whether or not they are connected now."""
        return len(self._frozen or self._clients)

    # --- members of a reproducible run -------------------------------------------------------------

    def freeze_members(self, members: Mapping[str, FrozenMember] | None = None) -> None:
        """Fix the members from now on; None fixes the current ones if the run is reproducible."""
        if members is None:
            members = {m.name: FrozenMember.of(m) for m in self.members()} if self.reproducible else {}
        self._frozen = dict(members)

    @property
    def frozen_members(self) -> dict[str, FrozenMember]:
        """The fixed members by name, if they are fixed."""
        return dict(self._frozen)

    def absent(self) -> list[str]:
        """Return the fixed members that are not connected to all of their edges, as "CLIENT at EDGE"."""
        edges_of = self.connected_clients()
        return [
            f"{name} at {edge}"
            for name, member in sorted(self._frozen.items())
            for edge in member.edges
            if edge not in edges_of.get(name, [])
        ]

    def hello_of(self, client: str) -> pb.ClientHello:
        """Return the hello of a client."""
        return self._clients[client]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the clients agreed on."""
        channels, height, width = next(iter(self._clients.values())).image_shape
        return channels, height, width

    @property
    def classes(self) -> tuple[str, ...]:
        """Label names in label order that the clients agreed on."""
        return tuple(next(iter(self._clients.values())).classes)

    # --- hellos ------------------------------------------------------------------------------------

    def refresh(self, *, all_edges: bool = False) -> None:
        """Exchange hellos with the edges, which list their clients.

        An edge that does not reply is not assigned participants until it does.

        Parameters
        ----------
        all_edges : bool
            Request hellos from all edges; otherwise only from those that restarted, or whose client list, from a hello
            or a report, is older than `ROSTER_AGE`.
        """
        nodes = {n.node_id: n for n in self.grid.get_nodes()}
        outdated = [i for i in nodes if all_edges or not self._is_fresh(nodes[i])]
        known = [i for i in outdated if i in self._edges and not self._edges[i].busy_with and not all_edges]
        self._exchange_hellos([i for i in outdated if i not in known], nodes, EDGE_HELLO)
        self._exchange_hellos(known, nodes, RETURN_HELLO)

    def _is_fresh(self, node: Node) -> bool:
        """Whether the client list of an edge is recent and the edge has not restarted since."""
        edge = self._edges.get(node.node_id)
        return (
            edge is not None
            and not edge.busy_with
            and time.monotonic() - self._last_hello[node.node_id] < ROSTER_AGE
            and node.node_id not in self._unresponsive
            and self._since.get(node.node_id) == node.last_activated_at
        )

    def _exchange_hellos(self, node_ids: list[int], nodes: Mapping[int, Node], deadline: float) -> None:
        self._unresponsive.update(i for i in node_ids if i in self._edges)
        messages = hello_messages(self.run, self.histogram_epsilon, node_ids)
        for reply in self.grid.exchange(messages, deadline=deadline):
            node_id = reply.metadata.src_node_id
            try:
                hello = control.read_control(pb.EdgeHello, reply, f"node {node_id}")
                check_sender(hello.name)
                self.names.claim(hello.name, nodes[node_id].public_key)
            except WireError as error:
                self._refuse(error.sender, error.fault)
                continue
            self._since[node_id] = nodes[node_id].last_activated_at
            self.learn(node_id, hello)
        refusals, self._unsent_refusals = self._unsent_refusals, {}
        send_refusals(self.grid, self.run, refusals)

    def learn(self, node_id: int, hello: pb.EdgeHello) -> None:
        """Store an edge's list of clients.

        A client is refused and reported as a fault if its hello or node key is invalid, if it cannot train any
        sub-model of the run, or if its classes or image shape differ from those of the other clients.
        """
        # An edge that reconnected under a new node id replaces its previous entry.
        self._edges = {i: e for i, e in self._edges.items() if e.name != hello.name}
        self._last_hello[node_id] = time.monotonic()
        self._edges[node_id] = accepted = pb.EdgeHello()
        accepted.CopyFrom(hello)
        accepted.ClearField("clients")
        self._unresponsive.discard(node_id)
        if fault := version_mismatch(hello.facts.versions):
            self._report(hello.name, "version", fault)
        self.faults.extend(hello.faults)
        for client in hello.clients:
            try:
                self._check(client)
            except WireError as error:
                if (error.sender, error.fault) not in self._reported:
                    self._unsent_refusals.setdefault(node_id, {})[client.name] = error.fault
                self._refuse(error.sender, error.fault)
                continue
            accepted.clients.append(client)
            self._clients[client.name] = client
            self._links.setdefault(client.name, {})[hello.name] = client.link_seconds

    def _check(self, client: pb.ClientHello) -> None:
        """Check a client's hello, its node key, and that it can be a member of the run; raises WireError."""
        check_client_hello(client, client.name)
        check_sender(client.name)
        self.keys.claim(client.name, client.public_key)
        check_level(client, self.smallest_level)
        if self.reproducible:
            check_reproducible(client, self._frozen)
        other = next((c for n, c in self._clients.items() if n != client.name), None)
        if other is not None:
            check_same_data_shape(client, other)

    def _refuse(self, sender: str, fault: str) -> None:
        self._report(sender, "refused", fault)

    def _report(self, sender: str, kind: str, fault: str) -> None:
        """Report a fault of an edge or client, once."""
        if (sender, fault) not in self._reported:
            self._reported.add((sender, fault))
            log.warning("%s: %s: %s", sender, kind, fault)
            self.faults.append(pb.Fault(tier="cloud", node=sender, kind=kind, detail=fault))

    def roster(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return the connected edges and clients with the facts of their hellos: the ``roster`` event."""
        edges: dict[str, dict[str, object]] = {}
        for name, node in self.edges().items():
            hello = self._edges[node]
            edges[name] = {
                "versions": dict(hello.facts.versions),
                "clients": sorted(client.name for client in hello.clients),
            }
        clients: dict[str, dict[str, object]] = {}
        for member in self.members():
            facts = self._clients[member.name].facts
            clients[member.name] = {
                "samples": member.samples,
                "edges": list(member.edges),
                "device": facts.device,
                "versions": dict(facts.versions),
            }
        return {"edges": edges, "clients": clients}

    # --- messages outside a window -----------------------------------------------------------------

    def progress(self, window: int) -> dict[int, pb.Progress]:
        """Return the progress of each edge by node id; an edge that is still at an earlier window abandons it."""
        nodes = list(self.edges().values())
        return request_progress(self.grid, self.run, window, nodes, self.name_of)

    def finish(self) -> None:
        """Notify the edges that the run has ended."""
        send_done(self.grid, list(self.edges().values()))
