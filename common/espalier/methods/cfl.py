"""CFL: clustered federated learning by the cosines of updates (Sattler et al., TNNLS 2020, arXiv 1910.01991)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import Positive, PositiveInt, SettingsGroup
from espalier.methods.aggregate import MAX_WEIGHT, Aggregate, Arrays, Forwarded
from espalier.methods.base import CloudState, Deployed, Inquiry, Method, ServerState, Update
from espalier.methods.clustering import bipartition, cosine_matrix, gram_matrix, should_split, update_norms
from espalier.methods.ifca import CLUSTER as CLUSTERS
from espalier.methods.ifca import cluster
from espalier.methods.planning import Member
from espalier.wire.sections import Payload, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings

#: Section of `CloudState.memory`: the cluster of each client.
MEMBERSHIP = SectionId("membership")
#: Forwarded sections: a client's Δ, and its weight and cluster.
DELTA, ABOUT = SectionId("delta"), SectionId("about")
WEIGHT, CLUSTER = "weight", "cluster"


class CFL(Method):
    """Algorithms 1 to 3.

    All clients of a cluster train from its model. A cluster with a small mean update (‖mean Δ‖ < ε1) and a large
    update of some client (max ‖Δ_i‖ > ε2) is stationary although its clients are not. It is split so that the
    largest cosine between the two parts is as small as possible, and each part continues with its own mean.

    The cloud needs every client's Δ, so edges forward updates instead of aggregating them. With several rounds per
    window an edge averages within clusters between its reports, and forwards the updates of its last round and the
    mean of the models they started from.
    """

    class Settings(SettingsGroup):
        """When and how a cluster splits."""

        cfl_mean_norm: Positive = Field(
            default=0.4, description="a cluster splits only if its mean update is shorter (eps1)"
        )
        cfl_max_norm: Positive = Field(
            default=1.6, description="and only if one of its clients' updates is longer (eps2)"
        )
        cfl_from_round: PositiveInt = Field(default=20, description="first round that may split")
        cfl_linkage: Literal["single", "complete"] = Field(
            default="single", description="optimal bipartition, or the one of the authors' code"
        )

    name = "cfl"
    uses = (Settings,)
    has_one_model = False
    own_weighting = "uniform"
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Require the updates of all clients without a lossy codec."""
        faults = []
        if settings.fraction < 1 or cls.chosen(settings, "selection") != "uniform":
            faults.append(
                "fraction: cfl compares the updates of all clients; set fraction=1, selection=uniform"
            )
        if cls.chosen(settings, "codec") in ("qsgd", "top-k"):
            faults.append("codec: cfl splits by cosines, which a lossy codec reduces; set codec=none or fp16")
        return faults

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start with one cluster."""
        state.payload = Payload({cluster(0): state.weights})

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each client's cluster; a client that joins later starts in the first."""
        member = state.memory.get(MEMBERSHIP, {})
        return {name: str(int(member.get(name, np.zeros(1))[0])) for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the model of a cluster."""
        source = pb.SectionName(name=CLUSTERS, member=key)
        sources = {t.name: source for t in state.architecture.tensors}
        return pb.View(architecture=state.architecture, sources=sources)

    # --- edge and cloud ------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Forward Δ; add the received model to its cluster's mean."""
        weight = self.weight_of(update)
        aggregate.mean(update.received, weight)
        [(section, trained)] = update.sections.items()
        change = {n: a - update.received[section][n] for n, a in trained.items()}
        about = {WEIGHT: np.array(weight), CLUSTER: np.array(int(section.member))}
        aggregate.forward(update.name, {DELTA: change, ABOUT: about})

    def check_forwarded(self, forwarded: Mapping[str, Forwarded], rows: Arrays, server: ServerState) -> None:
        """Refuse a Δ that does not fit its cluster's model, or lacks its cluster and weight."""
        super().check_forwarded(forwarded, rows, server)
        for client, sections in forwarded.items():
            about = sections.get(ABOUT, {})
            weight, number = about.get(WEIGHT), about.get(CLUSTER)
            if weight is None or number is None or weight.shape or number.shape or number.dtype.kind != "i":
                raise ValueError(f"an update of {client} without its cluster and weight")
            if not 0 < float(weight) <= MAX_WEIGHT:
                raise ValueError(f"an update of {client} of the weight {float(weight)}")
            whole, change = server.section(cluster(int(number))), sections.get(DELTA, {})
            if not whole or _shapes(change) != _shapes(whole):
                raise ValueError(
                    f"an update of {client} that does not fit the model of cluster {int(number)}"
                )

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Update every cluster's model by the mean update of its clients."""
        self._move(server, aggregate, _membership(aggregate))

    def central_step(self, state: CloudState, aggregate: Aggregate) -> None:
        """Split the clusters that meet the criterion, then update every cluster."""
        member = _membership(aggregate)
        for clients in _groups(member).values():
            if leaving := self._leaving(state, aggregate, clients):
                new = 1 + max(int(n) for n in state.members(CLUSTERS))
                origin = cluster(member[leaving[0]])
                member |= dict.fromkeys(leaving, new)
                state.payload = state.payload.replaced({cluster(new): state.payload[origin]})
        noted = {client: np.array([number]) for client, number in member.items()}
        state.memory[MEMBERSHIP] = {**state.memory.get(MEMBERSHIP, {}), **noted}
        self._move(state, aggregate, member)

    def _leaving(self, state: CloudState, aggregate: Aggregate, clients: list[str]) -> list[str]:
        """Return the clients that leave a cluster; empty if it is not split."""
        trained = [t.name for t in state.architecture.tensors if not t.buffer]
        updates = [{n: aggregate.forwarded[c][DELTA][n] for n in trained} for c in clients]
        weights = np.array([float(aggregate.forwarded[c][ABOUT][WEIGHT]) for c in clients])
        mean, longest = update_norms(gram_matrix(updates), weights)
        if not should_split(mean, longest, len(clients), state.round, self.settings.of(CFL.Settings)):
            return []
        _, leaving = bipartition(cosine_matrix(updates), self.settings.of(CFL.Settings).cfl_linkage)
        return [clients[i] for i in leaving]

    @staticmethod
    def _move(server: ServerState, aggregate: Aggregate, member: Mapping[str, int]) -> None:
        """Set every cluster's model to the mean received model of its clients plus their mean update."""
        started = server.payload.views()
        for section, means in aggregate.means(started).items():
            started[section] = {**started[section], **means}
        moved: dict[SectionId, dict[str, np.ndarray]] = {}
        origins = _membership(aggregate)
        for number, clients in _groups(member).items():
            changes = [aggregate.forwarded[c][DELTA] for c in clients]
            weights = [float(aggregate.forwarded[c][ABOUT][WEIGHT]) for c in clients]
            target = moved.setdefault(cluster(number), {})
            for name, base in started[cluster(origins[clients[0]])].items():
                if base.dtype.kind == "f":
                    shares = (base.dtype.type(w / sum(weights)) for w in weights)
                    target[name] = base + sum(p * c[name] for p, c in zip(shares, changes, strict=True))
                else:
                    target[name] = base + np.max([c[name] for c in changes], axis=0)
        server.assign(moved)

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return every cluster's model with its clients."""
        member = {n: int(v[0]) for n, v in state.memory.get(MEMBERSHIP, {}).items()}
        return [
            Deployed(
                f"cluster {number + 1}", state.architecture, state.payload[cluster(number)], tuple(clients)
            )
            for number, clients in sorted(_groups(member or {"": 0}).items())
        ]


def _membership(aggregate: Aggregate) -> dict[str, int]:
    """Return the cluster of each client whose Δ was forwarded."""
    return {c: int(sections[ABOUT][CLUSTER]) for c, sections in aggregate.forwarded.items()}


def _shapes(arrays: Arrays) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    return {n: (a.dtype, a.shape) for n, a in arrays.items()}


def _groups(member: Mapping[str, int]) -> dict[int, list[str]]:
    """Return the clients of every cluster, in the order of their names."""
    groups: dict[int, list[str]] = {}
    for client, number in sorted(member.items()):
        groups.setdefault(number, []).append(client)
    return groups
