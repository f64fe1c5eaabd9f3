"""Co-distillation: clients distil from copies of each other's networks (Anil et al., ICLR 2018, arXiv 1804.03235)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import Field

from espalier import lazy, models
from espalier.config.fields import Count, NonNegative, PositiveInt, SettingsGroup
from espalier.errors import WireError
from espalier.methods.base import CloudState, ServerState, Update
from espalier.methods.own_models import OwnModels, OwnModelSettings
from espalier.methods.planning import Member
from espalier.methods.state import architecture_layout
from espalier.methods.tally import Arrays, Tally
from espalier.training.forward_hooks import ForwardCapture, RunningMean, require_classifier, single_output
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")

#: Sections of a reply that holds a copy of a client's network, of the description that is forwarded with it, and of the
#: servers' copies.
COPY, SPEC, PEER = "copy/", "about/architecture", "peer/"


class CoDistillation(OwnModels):
    """Algorithm 1 with stale copies.

    Every `peer-every` rounds a client sends a copy of its network. An edge stores its clients' newest copies, the cloud
    those of all clients, and it sends them to the edges with every window. After the burn-in the local loss adds the
    cross-entropy against the mean prediction of the other clients' copies on the same batch.
    """

    class Settings(SettingsGroup):
        """When and how strongly peers count."""

        peer_weight: NonNegative = Field(default=1.0, description="weight of the peers' mean")
        peer_every: PositiveInt = Field(default=1, description="rounds between two exchanges")
        peer_burn_in: Count = Field(default=1, description="first rounds without peers")

    name = "codistillation"
    uses = (Settings, OwnModelSettings)

    def sends(self, round_: int) -> bool:
        """Return whether copies are exchanged after a round."""
        return round_ % self.settings.of(CoDistillation.Settings).peer_every == 0

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each client's model and its name, so that its own copy is not sent to it."""
        models = super().assign(state, picked, members, round_)
        return {name: f"{model}@{name}" for name, model in models.items()}

    def is_for(self, key: str, name: str) -> bool:
        """Return whether a tensor belongs to another client's copy."""
        return not name.startswith(_key(key.partition("@")[2], ""))

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the distillation from the peers."""
        return super().objective(round_) + PeerDistillation(
            self.settings.of(CoDistillation.Settings).peer_weight,
            self.settings.of(CoDistillation.Settings).peer_burn_in,
        )

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Store the network, and return a copy in rounds with an exchange."""
        super().publish(trained, local)
        return {COPY + name: array for name, array in trained.items()} if self.sends(local.round) else {}

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Describe the copy."""
        if self.sends(report.round):
            report.architecture.CopyFrom(models.describe(model))

    def reply_layout(
        self, architecture: pb.ArchitectureSpec, sent: Layout, names: Sequence[str], report: pb.ClientReport
    ) -> Layout:
        """Return the tensors of the described network."""
        if not self.sends(report.round):
            return Layout(())
        if not report.architecture.tensors:
            raise ValueError("a copy of its network without a description")
        own = Layout.from_proto(report.architecture.tensors, report.client)
        return Layout(tuple(TensorSpec(COPY + t.name, t.dtype, t.shape) for t in own.tensors))

    # --- servers -------------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Forward a copy with its description."""
        tally.mean({}, 1.0)
        if update.extra:
            spec = np.frombuffer(update.report.architecture.SerializeToString(), np.uint8)
            copy = {n.removeprefix(COPY): a for n, a in update.extra.items()}
            tally.forward(update.name, {SPEC: spec, **copy})

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Refuse a copy that does not match its description."""
        super().check_passed(stacks, rows, server)
        for client, stack in stacks.items():
            spec = _described(client, stack)
            copy = {n: a for n, a in stack.items() if n != SPEC}
            if fault := architecture_layout(spec).difference(
                architecture_layout(spec).in_order(Layout.of(copy))
            ):
                raise ValueError(f"a copy of {client}'s network: {fault}")

    def step(self, server: ServerState, tally: Tally) -> None:
        """Replace the old copies by the new ones."""
        tensors = dict(server.tensors)
        for client, stack in sorted(tally.stacks.items()):
            spec = _described(client, stack)
            tensors = {n: a for n, a in tensors.items() if not n.startswith(_key(client, ""))}
            tensors |= {_key(client, t.name): stack[t.name] for t in architecture_layout(spec).tensors}
            server.peers[client] = spec
        server.weights = Weights.pack(tensors)


def _described(client: str, stack: Arrays) -> pb.ArchitectureSpec:
    """Return the description of a copy; raises ValueError if it is missing or invalid."""
    data = stack.get(SPEC)
    if data is None or data.dtype != np.uint8:
        raise ValueError(f"a copy of {client}'s network without a description")
    try:
        return pb.ArchitectureSpec.FromString(data.tobytes())
    except DecodeError as error:
        raise ValueError(f"a copy of {client}'s network with a description that is truncated") from error


def _key(client: str, name: str) -> str:
    return f"{PEER}{client}/{name}"


class PeerDistillation(Objective):
    """``weight`` times the cross-entropy against the mean prediction of the peers on the same batch.

    Algorithm 1: the teacher is the mean of the *other* clients' softmax outputs; their networks are frozen copies from
    an earlier round. Without peers and during the burn-in the term is 0.

    Parameters
    ----------
    weight : float
        Weight of the term.
    burn_in : int
        First rounds of the run without the term.
    peers : callable
        Returns the other clients' networks of a round, of any architectures: :func:`received_peers`. They are moved to
        the device, put into evaluation mode and not trained.
    """

    def __init__(
        self,
        weight: float,
        burn_in: int = 0,
        peers: Callable[[LocalRound], Iterable[nn.Module]] | None = None,
    ) -> None:
        self._weight, self._burn_in, self._peers = weight, burn_in, peers or received_peers
        self._outputs = ForwardCapture()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Freeze the peers after the burn-in."""
        network, device = require_classifier(model, "co-distillation"), next(model.parameters()).device
        self._mean = RunningMean()
        self._active = tuple(self._peers(local)) if local.round > self._burn_in else ()
        for peer in self._active:
            classes = require_classifier(peer, "co-distillation").classes
            if classes != network.classes:
                raise TrainingError(
                    f"a peer's network has {classes} classes, this client's {network.classes}"
                )
            peer.to(device).eval().requires_grad_(False)
        self._outputs.attach(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        output = self._outputs.take()
        if not self._active:
            return images.new_zeros(())
        with torch.no_grad():
            outputs = [single_output(peer(images), "co-distillation").softmax(1) for peer in self._active]
            teacher = torch.stack(outputs).mean(0)
        value = functional.cross_entropy(single_output(output, "co-distillation"), teacher)
        self._mean.add(value)
        return self._weight * value

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the term."""
        self._outputs.release()
        return self._mean.report("peer-loss")


def received_peers(local: LocalRound) -> list[nn.Module]:
    """Build the other clients' networks from their descriptions and tensors.

    Parameters
    ----------
    local : LocalRound
        Its `peers` are the descriptions, its `aux` has the tensors as "peer/CLIENT/TENSOR". The client's own network
        is skipped.

    Raises
    ------
    WireError
        A network cannot be built; the message names its client.
    """
    networks = []
    for name, description in local.peers.items():
        if name == local.name:
            continue
        prefix = f"{PEER}{name}/"
        arrays = {n.removeprefix(prefix): a for n, a in local.aux.items() if n.startswith(prefix)}
        try:
            networks.append(
                models.build_with(description, {n: models.to_tensor(a) for n, a in arrays.items()})
            )
        except ValueError as error:
            raise WireError("the servers", f"{name}'s network cannot be built ({error})") from error
    return networks
