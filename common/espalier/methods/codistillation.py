"""Co-distillation: clients teach each other by copies of their networks (Anil et al., ICLR 2018, arXiv 1804.03235)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from espalier.methods.base import CloudState, ServerState, Update
from espalier.methods.own_models import OwnModels
from espalier.methods.planning import Member
from espalier.methods.state import architecture_layout
from espalier.methods.tally import Arrays, Tally
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.objectives import LocalRound, Objective

COPY, SPEC = "copy/", "about/architecture"


class CoDistillation(OwnModels):
    """Algorithm 1 with stale copies.

    Every `peer-every` rounds a client sends a copy of its network. Each edge keeps its clients' newest
    copies, and the cloud those of all, which it hands to the edges with every window. After the burn-in
    the loss carries the cross-entropy against the mean prediction of the others' copies on the same batch.
    """

    name = "codistillation"

    def sends(self, round_: int) -> bool:
        """Tell whether copies are exchanged after a round."""
        return round_ % self.settings.peer_every == 0

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each client's model, and whose copy it needs not."""
        models = super().assign(state, picked, members, round_)
        return {name: f"{model}@{name}" for name, model in models.items()}

    def is_for(self, key: str, name: str) -> bool:
        """Tell whether a tensor is of another client's copy."""
        return not name.startswith(_key(key.partition("@")[2], ""))

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the peers' term."""
        from espalier.training.peers import Peers

        return super().objective(round_) + Peers(self.settings.peer_weight, self.settings.peer_burn_in)

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Keep the network, and send a copy when it is time."""
        super().publish(trained, local)
        return {COPY + name: array for name, array in trained.items()} if self.sends(local.round) else {}

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Describe the copy."""
        from espalier.models.architecture import describe

        if self.sends(report.round):
            report.architecture.CopyFrom(describe(model))

    def reply_layout(
        self, architecture: pb.ArchitectureSpec, sent: Layout, names: Sequence[str], report: pb.ClientReport
    ) -> Layout:
        """Return the tensors of the described network."""
        if not self.sends(report.round):
            return Layout(())
        if not report.architecture.tensors:
            raise ValueError("no description of its network, of which a copy is due")
        own = Layout.from_proto(report.architecture.tensors, report.client)
        return Layout(tuple(TensorSpec(COPY + t.name, t.dtype, t.shape) for t in own.tensors))

    # --- servers -------------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Pass a copy on, its description beside it."""
        tally.mean({}, 1.0)
        if update.extra:
            spec = np.frombuffer(update.report.architecture.SerializeToString(), np.uint8)
            copy = {n.removeprefix(COPY): a for n, a in update.extra.items()}
            tally.forward(update.name, {SPEC: spec, **copy})

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Refuse a copy that is not what its description says."""
        super().check_passed(stacks, rows, server)
        for client, stack in stacks.items():
            spec = _described(client, stack)
            copy = {n: a for n, a in stack.items() if n != SPEC}
            if fault := architecture_layout(spec).difference(
                architecture_layout(spec).in_order(Layout.of(copy))
            ):
                raise ValueError(f"a copy of {client}'s network: {fault}")

    def step(self, server: ServerState, tally: Tally) -> None:
        """Put the new copies in the place of the old ones."""
        tensors = dict(server.tensors)
        for client, stack in sorted(tally.stacks.items()):
            spec = _described(client, stack)
            tensors = {n: a for n, a in tensors.items() if not n.startswith(_key(client, ""))}
            tensors |= {_key(client, t.name): stack[t.name] for t in architecture_layout(spec).tensors}
            server.peers[client] = spec
        server.weights = Weights.pack(tensors)


def _described(client: str, stack: Arrays) -> pb.ArchitectureSpec:
    """Return the description beside a copy; raises ValueError where it is none."""
    data = stack.get(SPEC)
    if data is None or data.dtype != np.uint8:
        raise ValueError(f"a copy of {client}'s network without a description")
    try:
        return pb.ArchitectureSpec.FromString(data.tobytes())
    except DecodeError as error:
        raise ValueError(f"a copy of {client}'s network with a description that is truncated") from error


def _key(client: str, name: str) -> str:
    return f"peer/{client}/{name}"
