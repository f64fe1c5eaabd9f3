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
from espalier.methods.aggregate import Aggregate, Arrays, Forwarded
from espalier.methods.base import CloudState, ServerState, Update
from espalier.methods.own_models import OwnModels, OwnModelSettings
from espalier.methods.planning import Member
from espalier.methods.state import architecture_layout
from espalier.training.forward_hooks import ForwardCapture, RunningMean, require_classifier, single_output
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import PEER, Layouts, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")

#: Section of a copy that a client sends, and the forwarded section of its description.
COPY, ABOUT = SectionId("copy"), SectionId("about")
SPEC = "architecture"


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

    def is_for(self, key: str, section: SectionId) -> bool:
        """Return whether a section is another client's copy."""
        return section != peer_section(key.partition("@")[2])

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the distillation from the peers."""
        return super().objective(round_) + PeerDistillation(
            self.settings.of(CoDistillation.Settings).peer_weight,
            self.settings.of(CoDistillation.Settings).peer_burn_in,
        )

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Store the network, and return a copy in rounds with an exchange."""
        super().publish(trained, local)
        return {COPY: trained} if self.sends(local.round) else {}

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Describe the copy."""
        if self.sends(report.round):
            report.architecture.CopyFrom(models.describe(model))

    def reply_layouts(
        self, architecture: pb.ArchitectureSpec, sent: Layouts, names: Sequence[str], report: pb.ClientReport
    ) -> Layouts:
        """Return the tensors of the described network."""
        if not self.sends(report.round):
            return {}
        if not report.architecture.tensors:
            raise ValueError("a copy of its network without a description")
        return {COPY: Layout.from_proto(report.architecture.tensors, report.client)}

    # --- servers -------------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Forward a copy with its description."""
        aggregate.mean({}, 1.0)
        if COPY in update.extra:
            spec = np.frombuffer(update.report.architecture.SerializeToString(), np.uint8)
            aggregate.forward(update.name, {COPY: update.extra[COPY], ABOUT: {SPEC: spec}})

    def check_forwarded(self, forwarded: Mapping[str, Forwarded], rows: Arrays, server: ServerState) -> None:
        """Refuse a copy that does not match its description."""
        super().check_forwarded(forwarded, rows, server)
        for client, sections in forwarded.items():
            expected = architecture_layout(_described(client, sections))
            copy = Layout.of(sections.get(COPY, {}))
            if fault := expected.difference(expected.in_order(copy)):
                raise ValueError(f"a copy of {client}'s network: {fault}")

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Replace the old copies by the new ones."""
        copies = {}
        for client, sections in sorted(aggregate.forwarded.items()):
            spec = _described(client, sections)
            copies[peer_section(client)] = Weights.fill(architecture_layout(spec), sections[COPY])
            server.peers[client] = spec
        server.payload = server.payload.replaced(copies)


def _described(client: str, sections: Forwarded) -> pb.ArchitectureSpec:
    """Return the description of a copy; raises ValueError if it is missing or invalid."""
    data = sections.get(ABOUT, {}).get(SPEC)
    if data is None or data.dtype != np.uint8:
        raise ValueError(f"a copy of {client}'s network without a description")
    try:
        return pb.ArchitectureSpec.FromString(data.tobytes())
    except DecodeError as error:
        raise ValueError(f"a copy of {client}'s network with a description that is truncated") from error


def peer_section(client: str) -> SectionId:
    """Return the section of a client's network at the servers."""
    return SectionId(PEER, client)


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
        Its `peers` are the descriptions, its `sections` have the tensors. The client's own network is skipped.

    Raises
    ------
    WireError
        A network cannot be built; the message names its client.
    """
    networks = []
    for name, description in local.peers.items():
        if name == local.name:
            continue
        arrays = local.sections.get(peer_section(name), {})
        try:
            networks.append(
                models.build_with(description, {n: models.to_tensor(a) for n, a in arrays.items()})
            )
        except ValueError as error:
            raise WireError("the servers", f"{name}'s network cannot be built ({error})") from error
    return networks
