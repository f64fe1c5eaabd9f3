"""What servers hold: named tensors, the network they belong to, and at the cloud what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from espalier.wire.payload import Layout, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn


@dataclass
class ServerState:
    """The tensors of an edge or of the cloud.

    Attributes
    ----------
    architecture : pb.ArchitectureSpec
        The network.
    weights : Weights
        The network's tensors under their own names, and the method's further ones as "SECTION/NAME".
        Never written to; a step puts new ones in their place.
    population : int
        Clients in the run (N), whether they take part in a round or not.
    round : int
        Rounds finished; in a method's step, the round that is being finished.
    peers : dict[str, pb.ArchitectureSpec]
        Clients' own networks whose tensors are held, by client.
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
        """Give every trained tensor of the network a companion "NAME/TENSOR" of zeros."""
        zeros = {
            f"{name}/{t.name}": np.zeros_like(self.tensors[t.name])
            for t in self.architecture.tensors
            if not t.buffer
        }
        self.weights = Weights.pack(self.tensors | zeros)

    def assign(self, changed: Mapping[str, np.ndarray]) -> None:
        """Replace some tensors by others of the same shape and dtype."""
        if changed:
            layout, own = self.weights.layout, self.tensors
            dtypes = {t.name: own[t.name].dtype for t in layout.tensors}
            self.weights = Weights.fill(
                layout, own | {n: np.asarray(v, dtypes[n]) for n, v in changed.items()}
            )


@dataclass
class CloudState(ServerState):
    """What the cloud holds between windows: everything a checkpoint must keep.

    Attributes
    ----------
    window : int
        Windows finished.
    ema : Weights or None
        Exponential moving average of the network, when `ema-decay` is on.
    pruned : bool
        Whether the network was pruned in this run.
    extra : dict[str, np.ndarray]
        What the method or the selection keeps at the cloud alone.
    notes : dict[str, float]
        Scalars of the newest window for the report; not kept.
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
        """Make a torch module the global model; its moving average starts anew when the shapes change."""
        from espalier.models.architecture import describe
        from espalier.models.arrays import model_arrays

        self.architecture = describe(model)
        self.weights = Weights.pack(model_arrays(model))
        self.ema = None


def build_model(architecture: pb.ArchitectureSpec, weights: Weights) -> nn.Module:
    """Build a torch module from an architecture and a payload that holds (at least) its tensors."""
    import torch

    from espalier.models.architecture import build_with

    views = weights.views()
    return build_with(
        architecture, {t.name: torch.from_numpy(views[t.name].copy()) for t in architecture.tensors}
    )


def architecture_layout(architecture: pb.ArchitectureSpec) -> Layout:
    """Return the layout of a payload that holds just the architecture's tensors."""
    return Layout.from_proto(architecture.tensors, "cloud")
