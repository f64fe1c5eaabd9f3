"""State of the servers: the network and the sections of tensors, and at the cloud the contents of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy, models
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import MODEL, Payload, SectionId, Sections
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy.load("torch")


@dataclass
class ServerState:
    """The tensors of an edge or of the cloud.

    Attributes
    ----------
    architecture : pb.ArchitectureSpec
        The network.
    payload : Payload
        The network's tensors in the section `MODEL`, and the method's other sections. It is not modified in place: a
        step replaces sections.
    population : int
        Number of clients in the run (N), whether or not they participate in a round.
    round : int
        Finished rounds; in a method's step, the current round.
    peers : dict[str, pb.ArchitectureSpec]
        Descriptions of clients' own networks whose tensors are stored, by client.
    """

    architecture: pb.ArchitectureSpec
    payload: Payload
    population: int = 1
    round: int = 0
    peers: dict[str, pb.ArchitectureSpec] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """The network's tensors; empty if the servers have no network."""
        return self.payload.get(MODEL) or Weights.pack({})

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The network's tensors by name, as views."""
        return self.weights.views()

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the network's tensors that are not trained: running statistics, counters."""
        return frozenset(t.name for t in self.architecture.tensors if t.buffer)

    def section(self, section: SectionId) -> dict[str, np.ndarray]:
        """Return the tensors of a section by name, as views; {} if there is no such section."""
        return self.payload[section].views() if section in self.payload else {}

    def members(self, name: str) -> list[str]:
        """Return the members of the sections with this name, in order."""
        return [section.member for section in self.payload if section.name == name]

    def put(self, sections: Sections) -> None:
        """Add or replace sections; the layout may change."""
        self.payload = self.payload.replaced({s: Weights.pack(arrays) for s, arrays in sections.items()})

    def add_section(self, section: SectionId) -> None:
        """Add a section with zeros for every trained tensor of the network."""
        own = self.tensors
        trained = [t.name for t in self.architecture.tensors if not t.buffer]
        self.put({section: {name: np.zeros_like(own[name]) for name in trained}})

    def assign(self, changed: Sections) -> None:
        """Replace some tensors by others of the same shapes; they are converted to the existing dtypes."""
        replaced = {}
        for section, arrays in changed.items():
            if arrays:
                own = self.section(section)
                new = own | {n: np.asarray(v, own[n].dtype) for n, v in arrays.items()}
                replaced[section] = Weights.fill(self.payload[section].layout, new)
        self.payload = self.payload.replaced(replaced)


@dataclass
class CloudState(ServerState):
    """The cloud's state between windows: the contents of a checkpoint.

    Attributes
    ----------
    window : int
        Finished windows.
    ema : Weights or None
        Exponential moving average of the network, when `ema-decay` is on.
    pruned : bool
        Whether the network was pruned in this run.
    memory : dict[SectionId, dict[str, np.ndarray]]
        State of the method or the selection that only the cloud has.
    notes : dict[str, float]
        Scalars of the last window for the report; not in the checkpoint.
    """

    window: int = 0
    ema: Weights | None = None
    pruned: bool = False
    memory: dict[SectionId, dict[str, np.ndarray]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """Build the global model as a torch module."""
        return build_model(self.architecture, self.weights)

    def adopt(self, model: nn.Module) -> None:
        """Replace the global model by a torch module, and reset the moving average."""
        self.architecture = models.describe(model)
        self.payload = self.payload.replaced({MODEL: Weights.pack(models.model_arrays(model))})
        self.ema = None


def build_model(architecture: pb.ArchitectureSpec, weights: Weights) -> nn.Module:
    """Build a torch module from an architecture and a payload that contains its tensors."""
    views = weights.views()
    return models.build_with(
        architecture, {t.name: torch.from_numpy(views[t.name].copy()) for t in architecture.tensors}
    )


def architecture_layout(architecture: pb.ArchitectureSpec) -> Layout:
    """Return the layout of a network's tensors."""
    return Layout.from_proto(architecture.tensors, "cloud")


def trained_layout(architecture: pb.ArchitectureSpec) -> Layout:
    """Return the layout of a network's trained tensors."""
    buffers = {t.name for t in architecture.tensors if t.buffer}
    return Layout(tuple(t for t in architecture_layout(architecture).tensors if t.name not in buffers))
