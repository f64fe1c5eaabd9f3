"""The clients of an edge: their names, bound to node keys, and their hellos."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from espalier.errors import StateError, WireError
from espalier.names import check_sender
from espalier.security.name_registry import Claims
from espalier.wire import control
from espalier.wire.hello import check_client_hello, version_mismatch
from espalier_edge.fleet.server import InlineFleet, InlineGrid
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.edge")


@dataclass(frozen=True)
class Member:
    """A client that has sent its hello.

    Attributes
    ----------
    node_id : int
        Its node at this edge.
    hello : pb.ClientHello
        The hello.
    since : str
        When its node was last activated.
    """

    node_id: int
    hello: pb.ClientHello
    since: str = ""

    @property
    def labels(self) -> np.ndarray:
        """Label counts, shape (classes,)."""
        return np.asarray(self.hello.histogram.counts, dtype=np.float64)


class Roster:
    """The clients that an edge can call.

    Parameters
    ----------
    fleet : InlineFleet
        The edge's Fleet server.
    names : Claims
        Which key may use which name.
    """

    def __init__(self, fleet: InlineFleet, names: Claims) -> None:
        self._fleet = fleet
        self._names = names
        self._members: dict[int, Member] = {}
        self._refused: dict[int, str] = {}  # nodes whose hello was refused, and when they were activated
        self._mismatches: set[tuple[str, str]] = set()
        self.faults: list[pb.Fault] = []

    def reset(self) -> None:
        """Forget all hellos, as another run may ask for noisy histograms."""
        self._members.clear()
        self._refused.clear()
        self._mismatches.clear()

    def clients(self) -> dict[str, Member]:
        """Return the clients that are connected now, by name."""
        online = {n.node_id for n in self._fleet.nodes()}
        return {k.hello.name: k for node, k in sorted(self._members.items()) if node in online}

    def name_of(self, node_id: int) -> str:
        """Return the name of a node, or "node ID" if it has not sent a hello."""
        member = self._members.get(node_id)
        return member.hello.name if member else f"node {node_id}"

    def refresh(self, grid: InlineGrid, request: ConfigRecord, deadline: float) -> None:
        """Request a hello from every connected node that is new or has restarted.

        A node whose hello is invalid is excluded and reported as a fault; one that does not answer in time is asked
        again at the next refresh.

        Parameters
        ----------
        grid : InlineGrid
            The run's grid.
        request : ConfigRecord
            The cloud's request (run, epsilon of the label histogram).
        deadline : float
            Seconds to wait for answers.
        """
        nodes = {n.node_id: n for n in self._fleet.nodes()}
        since = {i: n.last_activated_at for i, n in nodes.items()}
        self._members = {i: k for i, k in self._members.items() if since.get(i) == k.since}
        self._refused = {i: at for i, at in self._refused.items() if since.get(i) == at}
        unknown = [i for i in nodes if i not in self._members and i not in self._refused]
        start = time.monotonic()
        for reply in grid.exchange(self._hello_requests(unknown, request), deadline=deadline):
            node_id = reply.metadata.src_node_id
            try:
                hello = control.read_control(pb.ClientHello, reply, f"node {node_id}")
                check_client_hello(hello, hello.name or f"node {node_id}")
                check_sender(hello.name)
                self._names.claim(hello.name, nodes[node_id].public_key)
            except (WireError, StateError) as error:
                log.warning("%s", error)
                self._refused[node_id] = since[node_id]
                self.faults.append(_refusal(error, node_id, reply))
                continue
            self._check_versions(hello)
            # A client that reconnected with the same key replaces its previous entry.
            self._members = {i: k for i, k in self._members.items() if k.hello.name != hello.name}
            hello.link_seconds = time.monotonic() - start
            hello.public_key = nodes[node_id].public_key
            self._members[node_id] = Member(node_id, hello, since[node_id])

    def _check_versions(self, hello: pb.ClientHello) -> None:
        """Report once per run a client whose versions differ from the edge's; it participates anyway."""
        fault = version_mismatch(hello.facts.versions)
        if fault and (hello.name, fault) not in self._mismatches:
            self._mismatches.add((hello.name, fault))
            log.warning("client %s: %s", hello.name, fault)
            self.faults.append(pb.Fault(tier="edge", node=hello.name, kind="version", detail=fault))

    @staticmethod
    def _hello_requests(nodes: list[int], request: ConfigRecord) -> Iterator[Message]:
        for node_id in nodes:
            yield Message(RecordDict({control.CONFIG: request}), node_id, control.HELLO)


def _refusal(error: WireError | StateError, node_id: int, reply: Message) -> pb.Fault:
    """Return the fault of a refused hello; a StateError is the edge's own failure to store the name."""
    if isinstance(error, WireError):
        return pb.Fault(tier="edge", node=error.sender, kind="refused", detail=error.fault)
    name = control.read_control(pb.ClientHello, reply, f"node {node_id}").name
    return pb.Fault(tier="edge", node=name, kind="refused", detail=f"its name is not kept: {error}")
