"""The members of a run as the cloud knows them: its edges, and the clients of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from espalier.config.run_settings import RunSettings
from espalier.config.timeouts import EDGE_HELLO, EDGE_REFUSAL, RETURN_HELLO, WATCH_CALL
from espalier.errors import EspalierError, WireError
from espalier.methods.planning import Member
from espalier.names import check_sender
from espalier.security.name_registry import Claims
from espalier.wire import control
from espalier.wire.hello import check_client_hello, version_mismatch
from espalier_proto import espalier_pb2 as pb
from espalier_server.client_keys import ClientKeys
from espalier_server.superlink.grid import TreeGrid

log = logging.getLogger("espalier.cloud")

#: Seconds between checks for edges and clients that have not joined yet.
PATIENCE = 0.5
#: Seconds between polls for replies outside a window.
UNHURRIED = 0.3
#: Seconds for which an edge's client list is considered fresh; a client that joins later waits for the next window.
HEARD = 5.0


class Node(Protocol):
    """A connected node, as Flower's Grid describes it."""

    node_id: int
    public_key: bytes
    last_activated_at: str


@dataclass(frozen=True)
class SettledMember:
    """The properties of a client that must not change in a reproducible run: its edges and its data."""

    edges: tuple[str, ...]
    samples: int
    labels: tuple[float, ...]

    @classmethod
    def of(cls, member: Member) -> SettledMember:
        """Return the properties of a member."""
        return cls(member.edges, member.samples, tuple(member.labels.tolist()))

    def difference(self, hello: pb.ClientHello) -> str:
        """Return how a hello differs from these properties, "" if it does not."""
        same = (self.samples, list(self.labels)) == (hello.samples, list(hello.histogram.counts))
        return "" if same else "its images or labels are not those it had when the run began"


@dataclass
class Tree:
    """Edges and clients of a run.

    Parameters
    ----------
    grid : TreeGrid
        The run's grid.
    names : Claims
        Which node key owns which edge name.
    run : str
        Espalier's run id.
    histogram_epsilon : float
        Epsilon of the Laplace noise that clients are asked to put on their label counts; 0: none.
    keys : ClientKeys
        Which node key is which client's.
    smallest_level : float
        Smallest sub-model of the run, where levels are set at the devices.
    reproducible : bool
        Whether who takes part is settled when the run begins, so that nobody's coming or going matters.
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
    _noted: set[tuple[str, str]] = field(default_factory=set)
    _since: dict[int, str] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _silent: set[int] = field(default_factory=set)
    _untold: dict[int, dict[str, str]] = field(default_factory=dict)
    _settled: dict[str, SettledMember] = field(default_factory=dict)

    # --- members -----------------------------------------------------------------------------------

    def edges(self) -> dict[str, int]:
        """Return the node id of every edge that is connected, serves this run and answers, by name."""
        there = set(self.grid.get_node_ids()) - self._silent
        return {e.name: n for n, e in sorted(self._edges.items()) if n in there and not e.busy_with}

    def name_of(self, node_id: int) -> str:
        """Return the name of a node, or "node ID" if it has not sent a hello."""
        return self._edges[node_id].name if node_id in self._edges else f"node {node_id}"

    def since(self) -> dict[int, str]:
        """Return since when each node is connected; the time changes when a node restarts."""
        return {n.node_id: n.last_activated_at for n in self.grid.get_nodes()}

    def members(self) -> list[Member]:
        """Return the clients that can participate now, each with the edges that it is connected to.

        In a reproducible run these are the settled ones, here or not: what is sent to one that is away
        fails, and is sent again.
        """
        reach = {name: list(known.edges) for name, known in self._settled.items()} or self._reach()
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
            for name, edges in sorted(reach.items())
            if name in self._clients
        ]

    def _reach(self) -> dict[str, list[str]]:
        reach: dict[str, list[str]] = {}
        keys = self.keys.in_force()  # a client may have been revoked since its hello
        for edge, node in self.edges().items():
            for client in self._edges[node].clients:
                if client.name in keys:
                    reach.setdefault(client.name, []).append(edge)
        return reach

    @property
    def population(self) -> int:
        """Number of clients that have joined this run (N), whether or not they are connected now."""
        return len(self._settled or self._clients)

    # --- members of a reproducible run -------------------------------------------------------------

    def settle(self, members: Mapping[str, SettledMember] | None = None) -> None:
        """Fix the members from now on; None fixes the current ones if the run is reproducible."""
        if members is None:
            members = {m.name: SettledMember.of(m) for m in self.members()} if self.reproducible else {}
        self._settled = dict(members)

    @property
    def settled(self) -> dict[str, SettledMember]:
        """The fixed members by name, if they are fixed."""
        return dict(self._settled)

    def absent(self) -> list[str]:
        """Return which fixed members, or connections of them to edges, are missing now."""
        reach = self._reach()
        return [
            f"{name} at {edge}"
            for name, known in sorted(self._settled.items())
            for edge in known.edges
            if edge not in reach.get(name, [])
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

    def gather(self, settings: RunSettings, cancelled: Callable[[], bool]) -> None:
        """Wait until `min-edges` edges and `min-clients` clients have joined.

        In a reproducible run, until everybody who takes part is here, each client at all of its edges.

        Raises
        ------
        EspalierError
            If they have not within `hello-timeout` seconds; it says who has, and who is busy. Also if there are
            more than a reproducible run expects.
        """
        end = time.monotonic() + settings.hello_timeout
        while not cancelled():
            self.greet(everyone=True)
            edges, members = self.edges(), self.members()
            missing = self._missing(settings) if self.reproducible else []
            if len(edges) >= settings.min_edges and len(members) >= settings.min_clients and not missing:
                return
            if time.monotonic() > end and missing:
                raise EspalierError(
                    f"a reproducible run waits for everybody, and lacks {', '.join(missing[:5])} after "
                    f"{settings.hello_timeout:g} s; start what is missing and resume the run"
                )
            if time.monotonic() > end:
                busy = [f"{e.name} serves run {e.busy_with}" for e in self._edges.values() if e.busy_with]
                raise EspalierError(
                    f"{len(edges)} of {settings.min_edges} edges and {len(members)} of "
                    f"{settings.min_clients} clients joined within {settings.hello_timeout:g} s"
                    + (f"; {'; '.join(busy)}" if busy else "")
                    + "; start the missing ones or lower min-edges and min-clients"
                )
            time.sleep(PATIENCE)

    def _missing(self, settings: RunSettings) -> list[str]:
        """Return what a reproducible run still waits for; raises EspalierError if more joined than expected."""
        if self._settled:
            return self.absent()
        reach, edges = self._reach(), self.edges()
        for found, expected, what in (
            (len(edges), settings.min_edges, "edges"),
            (len(reach), settings.min_clients, "clients"),
        ):
            if found > expected:
                raise EspalierError(
                    f"{found} {what} joined, and min-{what}={expected}; in a reproducible run give their exact "
                    "number, or chance decides who takes part"
                )
        homes = {name: max(self._clients[name].homes, 1) for name in reach}
        return [f"{n} at {homes[n] - len(e)} of its edges" for n, e in reach.items() if len(e) < homes[n]]

    def greet(self, *, everyone: bool = False) -> None:
        """Exchange hellos with the edges, which list their clients.

        An edge that was asked and does not answer gets no part in a window until it does.

        Parameters
        ----------
        everyone : bool
            Ask all edges; else those that said so within the last seconds, in a hello or with a report, are asked only
            if they were started again since.
        """
        nodes = {n.node_id: n for n in self.grid.get_nodes()}
        asked = [i for i in nodes if everyone or not self._is_known(nodes[i])]
        known = [i for i in asked if i in self._edges and not self._edges[i].busy_with and not everyone]
        self._say_hello([i for i in asked if i not in known], nodes, EDGE_HELLO)
        self._say_hello(known, nodes, RETURN_HELLO)

    def _is_known(self, node: Node) -> bool:
        edge = self._edges.get(node.node_id)
        return (
            edge is not None
            and not edge.busy_with
            and time.monotonic() - self._heard[node.node_id] < HEARD
            and node.node_id not in self._silent
            and self._since.get(node.node_id) == node.last_activated_at
        )

    def _say_hello(self, asked: list[int], nodes: Mapping[int, Node], deadline: float) -> None:
        self._silent.update(i for i in asked if i in self._edges)
        for reply in self.grid.exchange(self._hellos(asked), deadline=deadline):
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
        self._tell()

    def learn(self, node_id: int, hello: pb.EdgeHello) -> None:
        """Store an edge's list of clients.

        A client whose hello is not sound, whose node key is another's or does not count, that can train none
        of the run's sub-models, or whose classes or image shape are not those of the clients before it, is
        left out and reported.
        """
        # An edge that reconnected under a new node id replaces its previous entry.
        self._edges = {i: e for i, e in self._edges.items() if e.name != hello.name}
        self._heard[node_id] = time.monotonic()
        self._edges[node_id] = sound = pb.EdgeHello()
        sound.CopyFrom(hello)
        sound.ClearField("clients")
        self._silent.discard(node_id)
        if fault := version_mismatch(hello.facts.versions):
            self._note(hello.name, "version", fault)
        self.faults.extend(hello.faults)
        for client in hello.clients:
            try:
                check_client_hello(client, client.name)
                check_sender(client.name)
                self.keys.claim(client.name, client.public_key)
                self._agree(client)
            except WireError as error:
                if (error.sender, error.fault) not in self._noted:
                    self._untold.setdefault(node_id, {})[client.name] = error.fault
                self._refuse(error.sender, error.fault)
                continue
            sound.clients.append(client)
            self._clients[client.name] = client
            self._links.setdefault(client.name, {})[hello.name] = client.link_seconds

    def _agree(self, client: pb.ClientHello) -> None:
        if 0 < client.level < self.smallest_level:
            raise WireError(
                client.name,
                f"its level {client.level:g} is below the smallest of levels ({self.smallest_level:g}); "
                "add a smaller one there or raise the client's --level",
            )
        if self.reproducible and client.facts.device != "cpu":
            raise WireError(
                client.name,
                f"it trains on {client.facts.device}, and reproducible=true is for CPUs; "
                "start it with --device cpu",
            )
        if self._settled and client.name not in self._settled:
            raise WireError(
                client.name, "it came after a reproducible run had begun; it waits for the next one"
            )
        if self._settled and (fault := self._settled[client.name].difference(client)):
            raise WireError(client.name, f"{fault}; bring its data back, or start a new run")
        other = next((c for n, c in self._clients.items() if n != client.name), None)
        if other is None:
            return
        if list(client.classes) != list(other.classes):
            raise WireError(
                client.name,
                f"its classes {list(client.classes)[:5]}… are not those of {other.name} "
                f"({list(other.classes)[:5]}…); name its data folders alike",
            )
        if list(client.image_shape) != list(other.image_shape):
            raise WireError(
                client.name,
                f"its images are {list(client.image_shape)}, those of {other.name} "
                f"{list(other.image_shape)} (channels, height, width)",
            )

    def _hellos(self, nodes: list[int]) -> Iterator[Message]:
        request = ConfigRecord({"run": self.run, "histogram-epsilon": self.histogram_epsilon})
        for node_id in nodes:
            yield Message(RecordDict({control.CONFIG: request}), node_id, control.HELLO)

    def _refuse(self, sender: str, fault: str) -> None:
        self._note(sender, "refused", fault)

    def _note(self, sender: str, kind: str, fault: str) -> None:
        """Report a fault of an edge or client, once."""
        if (sender, fault) not in self._noted:
            self._noted.add((sender, fault))
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

    def _tell(self) -> None:
        """Send excluded clients the reason, through one edge each, so that it appears in their logs."""
        untold, self._untold = self._untold, {}
        messages = []
        for node, faults in untold.items():
            record = ConfigRecord({"run": self.run, "clients": list(faults), "faults": list(faults.values())})
            messages.append(Message(RecordDict({control.CONFIG: record}), node, control.REFUSAL))
        for reply in self.grid.exchange(messages, deadline=EDGE_REFUSAL) if messages else ():
            if reply.has_error():
                log.warning(
                    "node %s passed no refusal on: %s", reply.metadata.src_node_id, reply.error.reason
                )

    # --- during a window ---------------------------------------------------------------------------

    def progress(self, window: int) -> dict[int, pb.Progress]:
        """Return the progress of every edge by node; an edge still at an earlier window abandons that window."""
        about = ConfigRecord({"run": self.run, "window": window})
        messages = [
            Message(RecordDict({control.CONFIG: about}), n, control.PROGRESS) for n in self.edges().values()
        ]
        found = {}
        for reply in self.grid.exchange(messages, deadline=WATCH_CALL, first_wait=UNHURRIED):
            node_id = reply.metadata.src_node_id
            if reply.has_error():
                continue
            try:
                found[node_id] = control.read_control(pb.Progress, reply, self.name_of(node_id))
            except WireError as error:  # the replies of other edges remain valid
                log.warning("%s", error)
        return found

    def dismiss(self) -> None:
        """Notify every edge that the run has ended."""
        messages = [Message(RecordDict(), n, control.DONE) for n in self.edges().values()]
        for reply in self.grid.exchange(messages, deadline=10.0):
            if reply.has_error():
                log.warning(
                    "node %s did not take the end of the run: %s",
                    reply.metadata.src_node_id,
                    reply.error.reason,
                )
