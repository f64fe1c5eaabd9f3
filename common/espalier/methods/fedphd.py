"""FedPhD: federated pruning with hierarchical learning of diffusion models (arXiv 2507.06449)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from espalier import lazy, models
from espalier.config.fields import Count, NonNegative, SettingsGroup, setting_error
from espalier.config.run_settings import Groups
from espalier.methods.base import CloudState, Inquiry, Method
from espalier.methods.homogeneity import ScoreSettings, sh_score
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import LocalResult, LocalRound, Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from espalier.config.fields import FlatValue
    from espalier.config.run_settings import RunSettings
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

    class Settings(SettingsGroup):
        """The cloud's weights and the share of pruned channels."""

        aggregation_a: float = Field(
            default=5000.0, description="a of the cloud weights, rho_e ~ ReLU(n_e + a mu_e + b)"
        )
        aggregation_b: float = Field(default=0.0, description="b of the cloud weights")
        rho_count: Literal["window", "last-round"] = Field(
            default="window", description="samples that n_e counts: those of the window, or of its last round"
        )
        pruning_ratio: float = Field(
            default=0.2, description="share of the channels that pruning removes; 0: no pruning"
        )

        @field_validator("pruning_ratio")
        @classmethod
        def _check_ratio(cls, value: float) -> float:
            if not 0 <= value < 1:
                raise setting_error(
                    f"{value} is out of range; give 0 (no pruning) or a number in (0, 1), e.g. 0.2"
                )
            return value

    class SparseTraining(SettingsGroup):
        """The rounds before the pruning."""

        sparse_weight: NonNegative = Field(
            default=1e-5, description="weight of the group-norm penalty before pruning"
        )
        prune_at: Count = Field(
            default=0, description="round R_s after which the model is pruned; 0: a third of the rounds"
        )

    name = "fedphd"
    uses: ClassVar[Groups] = (Settings, SparseTraining)
    tasks = ("diffusion",)
    own_edge_choice = "homogeneity"
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse a pruning round after the last round."""
        if settings.of(FedPhD.Settings).pruning_ratio == 0 or prune_round(settings) <= settings.rounds:
            return []
        return [
            f"prune-at: round {prune_round(settings)} is after the last one (rounds={settings.rounds}), so nothing "
            f"would be pruned; set prune-at to at most {settings.rounds}, or pruning-ratio=0"
        ]

    @classmethod
    def defaults_by_rounds(cls, settings: RunSettings) -> dict[str, FlatValue]:
        """Return the pruning round."""
        return {"prune-at": prune_round(settings)}

    def objective(self, round_: int) -> Objective:
        """Return the DDPM loss, with the group-norm penalty in the rounds before pruning."""
        if not self._prunes or round_ > prune_round(self.settings):
            return DDPMLoss()
        return DDPMLoss() + GroupNormPenalty(self.settings.of(FedPhD.SparseTraining).sparse_weight)

    def edge_share(self, samples: float, last_samples: float, labels: np.ndarray) -> float:
        """Return rho_e without normalisation."""
        s, form = self.settings.of(FedPhD.Settings), self.settings.of(ScoreSettings).homogeneity_form
        n = samples if s.rho_count == "window" else last_samples
        return max(n + s.aggregation_a * sh_score(labels, form) + s.aggregation_b, 0.0) if n else 0.0

    def after_window(self, state: CloudState) -> None:
        """Prune once, after the central aggregation that reaches R_s."""
        if self._prunes and not state.pruned and state.round >= prune_round(self.settings):
            self.prune(state)

    @property
    def _prunes(self) -> bool:
        return self.settings.of(FedPhD.Settings).pruning_ratio > 0

    def prune(self, state: CloudState) -> None:
        """Remove the `pruning-ratio` of every group's channels with the smallest group L2 norm."""
        state.adopt(models.prune(state.model(), self.settings.of(FedPhD.Settings).pruning_ratio))
        state.pruned = True


def prune_round(settings: RunSettings) -> int:
    """Return R_s, the round after which the model is pruned: `prune-at`, or a third of the rounds if that is 0."""
    return settings.of(FedPhD.SparseTraining).prune_at or max(1, round(settings.rounds / 3))


class FedPhDOneShot(FedPhD):
    """FedPhD-OS: the random initial network is pruned before round 1 and trained without the penalty."""

    name = "fedphd-os"
    uses = (FedPhD.Settings,)

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Return no faults: there is no pruning round."""
        return []

    @classmethod
    def defaults_by_rounds(cls, settings: RunSettings) -> dict[str, FlatValue]:
        """Return no settings: there is no pruning round."""
        return {}

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
    weight : float
        Factor of the penalty, ``sparse-weight``.
    """

    depends_on = "weights"

    def __init__(self, weight: float) -> None:
        self._factor = weight
        self._weights: list[Tensor] = []

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Collect the weights; none if the factor is 0 or the network is pruned."""
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
