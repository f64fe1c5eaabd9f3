"""FedPhD: federated pruning with hierarchical learning of diffusion models (arXiv 2507.06449)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy, models
from espalier.methods.base import CloudState, Inquiry, Method
from espalier.methods.homogeneity import sh_score
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import LocalResult, LocalRound, Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from espalier.config.run_config import FlatValue, RunConfig
else:
    torch = lazy.load("torch")


class FedPhD(Method):
    """Algorithm 1.

    In every round each participant draws its edge with p_e ∝ ReLU(a·mu(q'_e) − n_e + b) and trains E epochs from
    that edge's model, and the edge averages by samples. Every rg rounds the cloud averages the edges with rho_e ∝
    ReLU(n_e + a·mu_e + b). Until round R_s the loss includes the group-norm penalty. The aggregation that reaches
    R_s is followed by structured pruning with group L2 importance, and training continues with the smaller
    network.
    """

    name = "fedphd"
    tasks = ("diffusion",)
    own_edge_choice = "homogeneity"
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse a pruning round after the last round."""
        if settings.pruning_ratio == 0 or settings.prune_round <= settings.rounds:
            return []
        return [
            f"prune-at: round {settings.prune_at} is after the last one (rounds={settings.rounds}), so nothing "
            f"would be pruned; set prune-at to at most {settings.rounds}, or pruning-ratio=0"
        ]

    @classmethod
    def defaults_by_rounds(cls, settings: RunConfig) -> dict[str, FlatValue]:
        """Return the pruning round."""
        return {"prune-at": settings.prune_round}

    def objective(self, round_: int) -> Objective:
        """Return the DDPM loss, with the group-norm penalty in the rounds before pruning."""
        sparse = self._prunes and round_ <= self.settings.prune_round
        return DDPMLoss() + GroupNormPenalty(self.settings.sparse_weight) if sparse else DDPMLoss()

    def edge_share(self, samples: float, last_samples: float, labels: np.ndarray) -> float:
        """Return rho_e without normalisation."""
        s = self.settings
        n = samples if s.rho_count == "window" else last_samples
        return (
            max(n + s.aggregation_a * sh_score(labels, s.homogeneity_form) + s.aggregation_b, 0.0)
            if n
            else 0.0
        )

    def after_window(self, state: CloudState) -> None:
        """Prune once, after the central aggregation that reaches R_s."""
        if self._prunes and not state.pruned and state.round >= self.settings.prune_round:
            self.prune(state)

    @property
    def _prunes(self) -> bool:
        return self.settings.pruning_ratio > 0

    def prune(self, state: CloudState) -> None:
        """Remove the `pruning-ratio` of every group's channels with the smallest group L2 norm."""
        state.adopt(models.prune(state.model(), self.settings.pruning_ratio))
        state.pruned = True


class FedPhDOneShot(FedPhD):
    """FedPhD-OS: the random initial network is pruned before round 1 and trained without the penalty."""

    name = "fedphd-os"

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Accept every `prune-at`, which is not used."""
        return []

    def objective(self, round_: int) -> Objective:
        """Return the DDPM loss without a penalty."""
        return DDPMLoss()

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Prune the initial network."""
        if self._prunes:
            self.prune(state)

    def after_window(self, state: CloudState) -> None:
        """Do nothing: the network was pruned before the first round."""


class GroupNormPenalty(Objective):
    """The penalty of the sparse phase: ``weight * sum_W ||W||_2``, with the norm of whole tensors.

    The sum is over all trainable parameters with "weight" in their names, including GroupNorm scales. The penalty
    prepares the network for pruning, so it is 0 for a network that is already pruned.

    Parameters
    ----------
    weight : float or None
        Factor of the penalty; None uses the run's ``sparse-weight``.
    """

    depends_on = "weights"

    def __init__(self, weight: float | None = None) -> None:
        self._given = weight
        self._factor = 0.0
        self._weights: list[Tensor] = []

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Collect the weights; none if the factor is 0 or the network is pruned."""
        self._factor = local.settings.sparse_weight if self._given is None else self._given
        self._weights = []
        if self._factor > 0 and not models.is_reduced(model):
            named = model.named_parameters()
            self._weights = [p for name, p in named if "weight" in name and p.requires_grad]

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the penalty; it does not depend on the batch."""
        if not self._weights:
            return images.new_zeros(())
        return self._factor * self._norms().sum()

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the penalty's last value."""
        if not self._weights:
            return {}
        with torch.no_grad():
            value = float(self._factor * self._norms().sum())
        self._weights = []
        return {"sparse-penalty": value} if math.isfinite(value) else {}

    def _norms(self) -> Tensor:
        # One fused call: a U-Net has some hundred weights, and small ones are trained on CPUs.
        return torch.stack(torch._foreach_norm(self._weights))
