"""FedPhD: federated pruning with hierarchical learning of diffusion models (arXiv 2507.06449)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Inquiry, Method
from espalier.methods.homogeneity import sh_score

if TYPE_CHECKING:
    from espalier.config.run_config import FlatValue, RunConfig
    from espalier.training.objectives import Objective


class FedPhD(Method):
    """Algorithm 1.

    Every round, a picked client draws its edge with p_e ∝ ReLU(a·mu(q'_e) − n_e + b), trains E
    epochs from that edge's model, and the edge averages by samples. Every rg rounds the cloud
    averages the edges with rho_e ∝ ReLU(n_e + a·mu_e + b). Until round R_s the loss carries the
    group-norm penalty; the aggregation that reaches R_s is followed by structured pruning with
    group L2 importance, and training goes on with the smaller network.
    """

    name = "fedphd"
    tasks = ("diffusion",)
    own_edge_choice = "homogeneity"
    sample_wise = True

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse a pruning round that the run never reaches."""
        if settings.pruning_ratio == 0 or settings.prune_round <= settings.rounds:
            return []
        return [
            f"prune-at: round {settings.prune_at} is past the last one (rounds={settings.rounds}), so nothing "
            f"would be pruned; set prune-at to at most {settings.rounds}, or pruning-ratio=0"
        ]

    @classmethod
    def by_rounds(cls, settings: RunConfig) -> dict[str, FlatValue]:
        """Return the pruning round."""
        return {"prune-at": settings.prune_round}

    def objective(self, round_: int) -> Objective:
        """Return the DDPM loss, with the sparsity penalty in the rounds before the pruning."""
        from espalier.training.objectives import DDPMLoss, GroupNormPenalty

        sparse = self._prunes and round_ <= self.settings.prune_round
        return DDPMLoss() + GroupNormPenalty(self.settings.sparse_weight) if sparse else DDPMLoss()

    def edge_share(self, samples: float, last_samples: float, labels: np.ndarray) -> float:
        """Return rho_e, not normalised."""
        s = self.settings
        n = samples if s.rho_count == "window" else last_samples
        return (
            max(n + s.aggregation_a * sh_score(labels, s.homogeneity_form) + s.aggregation_b, 0.0)
            if n
            else 0.0
        )

    def after_window(self, state: CloudState) -> None:
        """Prune once, right after the central aggregation that reaches R_s."""
        if self._prunes and not state.pruned and state.round >= self.settings.prune_round:
            self.prune(state)

    @property
    def _prunes(self) -> bool:
        return self.settings.pruning_ratio > 0

    def prune(self, state: CloudState) -> None:
        """Remove `pruning-ratio` of the channels of every group, the ones of least group L2 norm."""
        from espalier.models.pruning import prune

        state.adopt(prune(state.model(), self.settings.pruning_ratio))
        state.pruned = True


class FedPhDOneShot(FedPhD):
    """FedPhD-OS: the random initial network is pruned before round 1 and trained without the penalty."""

    name = "fedphd-os"

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Accept every `prune-at`: it is not looked at."""
        return []

    def objective(self, round_: int) -> Objective:
        """Return the plain DDPM loss."""
        from espalier.training.objectives import DDPMLoss

        return DDPMLoss()

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Prune the initial network."""
        if self._prunes:
            self.prune(state)

    def after_window(self, state: CloudState) -> None:
        """Keep the network that was pruned at the start."""
