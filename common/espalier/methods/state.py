"""The state of servers: named tensors and their network, and at the cloud the contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy, models
from espalier.wire.payload import Layout, TensorSpec, Weights
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
    weights : Weights
        The network's tensors under their own names, and the method's further tensors as "SECTION/NAME".
        Not modified in place; a step replaces them.
    population : int
        Clients in the run (N), participants of a round or not.
    round : int
        Finished rounds; in a method's step, the current round.
    peers : dict[str, pb.ArchitectureSpec]
        Descriptions of clients' own networks whose tensors are stored, by client.
    """

    architecture: pb.ArchitectureSpec
    weights: Weights
    population: int = 1
    round: int = 0
    peers: dict[str, pb.ArchitectureSpec] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor by name, as views."""
        return self.weights.views()

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the network's tensors that are not trained: running statistics, counters."""
        return frozenset(t.name for t in self.architecture.tensors if t.buffer)

    def section(self, name: str) -> dict[str, np.ndarray]:
        """Return the tensors of a section by their names within it."""
        head = name + "/"
        return {n.removeprefix(head): v for n, v in self.tensors.items() if n.startswith(head)}

    def add_section(self, name: str) -> None:
        """Add a tensor of zeros "NAME/TENSOR" for every trained tensor of the network."""
        zeros = {
            f"{name}/{t.name}": np.zeros_like(self.tensors[t.name])
            for t in self.architecture.tensors
            if not t.buffer
        }
        self.weights = Weights.pack(self.tensors | zeros)

    def assign(self, changed: Mapping[str, np.ndarray]) -> None:
        """Replace some tensors by others of the same shape; they are converted to the old dtypes."""
        if changed:
            layout, own = self.weights.layout, self.tensors
            dtypes = {t.name: own[t.name].dtype for t in layout.tensors}
            self.weights = Weights.fill(
                layout, own | {n: np.asarray(v, dtypes[n]) for n, v in changed.items()}
            )


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
    extra : dict[str, np.ndarray]
        State of the method or the selection that only the cloud has.
    notes : dict[str, float]
        Scalars of the newest window for the report; not in the checkpoint.
    """

    window: int = 0
    ema: Weights | None = None
    pruned: bool = False
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """Build the global model as a torch module."""
        return build_model(self.architecture, self.weights)

    def adopt(self, model: nn.Module) -> None:
        """Make a torch module the global model; the moving average is reset."""
        self.architecture = models.describe(model)
        self.weights = Weights.pack(models.model_arrays(model))
        self.ema = None


def build_model(architecture: pb.ArchitectureSpec, weights: Weights) -> nn.Module:
    """Build a torch module from an architecture and a payload that holds (at least) its tensors."""
    views = weights.views()
    return models.build_with(
        architecture, {t.name: torch.from_numpy(views[t.name].copy()) for t in architecture.tensors}
    )


def architecture_layout(architecture: pb.ArchitectureSpec) -> Layout:
    """Return the layout of a payload that holds just the architecture's tensors."""
    return Layout.from_proto(architecture.tensors, "cloud")


def trained_layout(architecture: pb.ArchitectureSpec, section: str = "") -> Layout:
    """Return the layout of a network's trained tensors, optionally in a section ("SECTION/NAME")."""
    whole = architecture_layout(architecture)
    buffers = {t.name for t in architecture.tensors if t.buffer}
    prefix = f"{section}/" if section else ""
    return Layout(
        tuple(TensorSpec(prefix + t.name, t.dtype, t.shape) for t in whole.tensors if t.name not in buffers)
    )
