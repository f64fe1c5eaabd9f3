"""A method: one federated algorithm seen from all three tiers (DESIGN §4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from common.methods.aggregation import Aggregation, SampleWeighted
from common.methods.planning import AtRandom, ByHomogeneity, EdgeChoice, Fixed
from common.run.config import RunConfig
from common.wire.payload import Layout, Weights
from proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from common.learning.objectives import Objective


@dataclass
class CloudState:
    """What the cloud holds between windows: everything a checkpoint must keep.

    Attributes
    ----------
    architecture : pb.ArchitectureSpec
        The global model's network.
    weights : Weights
        Its parameters, in the architecture's order.
    window, round : int
        Windows and rounds finished.
    ema : Weights or None
        Exponential moving average of the global model, when `ema-decay` is on.
    pruned : bool
        Whether the network was pruned in this run.
    extra : dict[str, np.ndarray]
        Further state of the method.
    """

    architecture: pb.ArchitectureSpec
    weights: Weights
    window: int = 0
    round: int = 0
    ema: Weights | None = None
    pruned: bool = False
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """Build the global model as a torch module."""
        return build_model(self.architecture, self.weights)

    def adopt(self, model: nn.Module) -> None:
        """Make a torch module the global model; its moving average starts anew when the shapes change."""
        from common.models.architecture import describe

        self.architecture = describe(model)
        self.weights = Weights.pack({n: t.detach().cpu().numpy() for n, t in model.state_dict().items()})
        self.ema = None


def build_model(architecture: pb.ArchitectureSpec, weights: Weights) -> nn.Module:
    """Build a torch module from an architecture and its weights."""
    import torch

    from common.models.architecture import build_with

    return build_with(architecture, {n: torch.from_numpy(v.copy()) for n, v in weights.views().items()})


def architecture_layout(architecture: pb.ArchitectureSpec) -> Layout:
    """Return the layout of a payload that holds just the architecture's tensors."""
    return Layout.from_proto(architecture.tensors, "cloud")


class Method:
    """One algorithm; the subclasses read like their papers' boxes.

    Tier code calls the parts below and knows no method by name. The module of a method imports
    without torch, because an edge only adds up; what trains is imported where it is used.

    Parameters
    ----------
    settings : RunConfig
        The run's configuration.
    """

    #: Name in `-c method=…`.
    name: ClassVar[str]
    #: Whether edges pass on every client's update instead of adding them up.
    forward: ClassVar[bool] = False
    #: The rule behind `edge-choice=auto`.
    own_edge_choice: ClassVar[str] = "random"

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Return the faults of a configuration that only this method sees, one line each, key first."""
        return []

    # --- client, every round ---------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return what a client minimises in a round."""
        from common.learning.objectives import DDPMLoss

        return DDPMLoss()

    # --- edge, every round -----------------------------------------------------------------------

    def edge_aggregation(self) -> Aggregation:
        """Return how an edge turns its clients' updates into its next model."""
        return SampleWeighted()

    # --- cloud, every window ---------------------------------------------------------------------

    def edge_choice(self) -> EdgeChoice:
        """Return the rule by which a client gets its edge."""
        s = self.settings
        rule = self.own_edge_choice if s.edge_choice == "auto" else s.edge_choice
        rules: dict[str, EdgeChoice] = {
            "homogeneity": ByHomogeneity(s.selection_a, s.selection_b, s.homogeneity_form),
            "random": AtRandom(),
            "fixed": Fixed(),
        }
        return rules[rule]

    def cloud_aggregation(self) -> Aggregation:
        """Return how the cloud turns the edges' models into the next global model."""
        return SampleWeighted()

    def before_run(self, state: CloudState) -> None:
        """Change the initial state; called once, before the first window."""

    def after_window(self, state: CloudState) -> None:
        """Change the state after a central aggregation."""
