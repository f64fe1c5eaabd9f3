"""CFL: clustered federated learning by the cosines of updates (Sattler et al., TNNLS 2020, arXiv 1910.01991)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import Positive, PositiveInt, SettingsGroup
from espalier.methods.base import CloudState, Deployed, Inquiry, Method, ServerState, Update
from espalier.methods.clustering import bipartition, cosine_matrix, gram_matrix, should_split, update_norms
from espalier.methods.planning import Member
from espalier.methods.tally import MAX_WEIGHT, Arrays, Tally
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings

#: Prefix of `CloudState.extra`: the cluster of each client.
MEMBER = "cluster/"
#: Arrays that are forwarded with Δ.
WEIGHT, CLUSTER = "about/weight", "about/cluster"


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
        state.weights = Weights.pack({_key(0, n): a for n, a in state.tensors.items()})

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each client's cluster; a client that joins later starts in the first."""
        return {name: str(int(state.extra.get(MEMBER + name, np.zeros(1))[0])) for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the model of a cluster."""
        names = [t.name for t in state.architecture.tensors]
        return pb.View(architecture=state.architecture, sources={n: _key(int(key), n) for n in names})

    # --- edge and cloud ------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Forward Δ; add the received model to its cluster's mean."""
        weight = self.weight_of(update)
        tally.mean(update.received, weight)
        cluster = int(next(iter(update.arrays)).partition("/")[0].removeprefix("cluster"))
        about = {WEIGHT: np.array(weight), CLUSTER: np.array(cluster)}
        change = {n.partition("/")[2]: a - update.received[n] for n, a in update.arrays.items()}
        tally.forward(update.name, about | change)

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Refuse a Δ that does not fit its cluster's model, or lacks its cluster and weight."""
        super().check_passed(stacks, rows, server)
        for client, stack in stacks.items():
            weight, cluster = stack.get(WEIGHT), stack.get(CLUSTER)
            if (
                weight is None
                or cluster is None
                or weight.shape
                or cluster.shape
                or cluster.dtype.kind != "i"
            ):
                raise ValueError(f"an update of {client} without its cluster and weight")
            if not 0 < float(weight) <= MAX_WEIGHT:
                raise ValueError(f"an update of {client} of the weight {float(weight)}")
            whole = server.section(f"cluster{int(cluster)}")
            plain = {n: a for n, a in stack.items() if "/" not in n}
            if not whole or {n: (a.dtype, a.shape) for n, a in plain.items()} != {
                n: (a.dtype, a.shape) for n, a in whole.items()
            }:
                raise ValueError(
                    f"an update of {client} that does not fit the model of cluster {int(cluster)}"
                )

    def step(self, server: ServerState, tally: Tally) -> None:
        """Update every cluster's model by the mean update of its clients."""
        self._move(server, tally, {c: int(stack[CLUSTER]) for c, stack in tally.stacks.items()})

    def central_step(self, state: CloudState, tally: Tally) -> None:
        """Split the clusters that meet the criterion, then update every cluster."""
        member = {c: int(stack[CLUSTER]) for c, stack in tally.stacks.items()}
        for clients in _groups(member).values():
            if leaving := self._leaving(state, tally, clients):
                new = 1 + max(int(n.partition("/")[0].removeprefix("cluster")) for n in state.tensors)
                member |= dict.fromkeys(leaving, new)
                template = state.section(f"cluster{int(tally.stacks[leaving[0]][CLUSTER])}")
                state.weights = Weights.pack(state.tensors | {_key(new, n): a for n, a in template.items()})
        state.extra |= {MEMBER + client: np.array([cluster]) for client, cluster in member.items()}
        self._move(state, tally, member)

    def _leaving(self, state: CloudState, tally: Tally, clients: list[str]) -> list[str]:
        """Return the clients that leave a cluster; empty if it is not split."""
        trained = [t.name for t in state.architecture.tensors if not t.buffer]
        updates = [{n: tally.stacks[c][n] for n in trained} for c in clients]
        weights = np.array([float(tally.stacks[c][WEIGHT]) for c in clients])
        mean, longest = update_norms(gram_matrix(updates), weights)
        if not should_split(mean, longest, len(clients), state.round, self.settings.of(CFL.Settings)):
            return []
        _, leaving = bipartition(cosine_matrix(updates), self.settings.of(CFL.Settings).cfl_linkage)
        return [clients[i] for i in leaving]

    @staticmethod
    def _move(server: ServerState, tally: Tally, member: Mapping[str, int]) -> None:
        """Set every cluster's model to the mean received model of its clients plus their mean update."""
        started, moved = server.tensors | tally.means(server.tensors), {}
        for cluster, clients in _groups(member).items():
            stacks = [tally.stacks[c] for c in clients]
            total = sum(float(s[WEIGHT]) for s in stacks)
            origin = int(stacks[0][CLUSTER])
            for name in (n for n in stacks[0] if "/" not in n):
                base = started[_key(origin, name)]
                if base.dtype.kind == "f":
                    mean = sum(base.dtype.type(float(s[WEIGHT]) / total) * s[name] for s in stacks)
                    moved[_key(cluster, name)] = base + mean
                else:
                    moved[_key(cluster, name)] = base + np.max([s[name] for s in stacks], axis=0)
        server.assign(moved)

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return every cluster's model with its clients."""
        member = {n.removeprefix(MEMBER): int(v[0]) for n, v in state.extra.items() if n.startswith(MEMBER)}
        return [
            Deployed(
                f"cluster {cluster + 1}",
                state.architecture,
                Weights.pack(state.section(f"cluster{cluster}")),
                tuple(clients),
            )
            for cluster, clients in sorted(_groups(member or {"": 0}).items())
        ]


def _groups(member: Mapping[str, int]) -> dict[int, list[str]]:
    """Return the clients of every cluster, in the order of their names."""
    groups: dict[int, list[str]] = {}
    for client, cluster in sorted(member.items()):
        groups.setdefault(cluster, []).append(client)
    return groups


def _key(cluster: int, name: str) -> str:
    return f"cluster{cluster}/{name}"
