"""DepthFL: sub-models of different depth with self-distillation between exits (Kim et al., ICLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier import lazy, models
from espalier.methods.feddyn import DynamicRegularizer, FedDyn
from espalier.methods.levels import DistillationSettings, LevelSettings
from espalier.methods.submodels import SubModels, depth_at
from espalier.tasks.classification import cross_entropy, single_precision
from espalier.training.forward_hooks import require_exits
from espalier.training.objectives import LocalRound, Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional

    from espalier_proto import espalier_pb2 as pb
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")

#: Rounds until the distillation between exits has its full weight.
RAMP = 300


class DepthFL(SubModels, FedDyn):
    """Algorithm 1.

    A client of depth d trains the first d stages and their exits. The loss of an exit is its cross-entropy plus
    its KL divergence from the client's other exits; FedDyn corrects the client drift, with h averaged per tensor
    over the clients that hold it. The global network predicts with the mean of all exits.
    """

    name = "depthfl"
    uses = (FedDyn.Settings, LevelSettings, DistillationSettings)
    own_selection = "uniform"
    families = ("exits",)

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the first level·D of D stages and exits."""
        return models.shortened(architecture, depth_at(level, models.depth_of(architecture)))

    def objective(self, round_: int) -> Objective:
        """Return the exits' cross-entropies and divergences, and the dynamic regulariser."""
        return ExitDistillation() + DynamicRegularizer(self.settings.of(FedDyn.Settings).dyn_alpha)


class ExitDistillation(Objective):
    """DepthFL's loss of a network with d exits (Kim et al., ICLR 2023, section 3).

    ``sum_i [CE(z_i, y) + lambda_t / (d - 1) sum_{j != i} KL(softmax(z_j) || softmax(z_i))]``, where d is the
    depth of the client's own network. With one exit or ``distillation=false`` only the cross-entropies remain.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Compute the round's lambda."""
        require_exits(model)
        distills = local.settings.of(DistillationSettings).distillation
        self._weight = consistency_weight(local.round) if distills else 0.0

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the loss over all exits."""
        logits = single_precision(require_exits(model).exits(images))
        total = cross_entropy(logits, labels)
        if self._weight == 0 or len(logits) == 1:
            return total
        return total + self._weight / (len(logits) - 1) * mutual_divergence(logits)


def consistency_weight(round_: int) -> float:
    """Return ``lambda_t = exp(-5 (1 - min(t, 300) / 300)^2)`` with t = round - 1.

    A sigmoid-shaped ramp: 0.0067 in round 1, when the exits are untrained, and 1 from round 301 on.
    """
    remaining = 1 - min(round_ - 1, RAMP) / RAMP
    return math.exp(-5 * remaining**2)


def mutual_divergence(logits: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i sum_{j != i} KL(softmax(z_j) || softmax(z_i))``, batch means, temperature 1.

    The teachers softmax(z_j) are constants; otherwise an exit would also move towards the exits it teaches. The
    authors' code adds 1e-7 to the teachers to avoid log 0, which is not needed in log space.
    """
    own = [functional.log_softmax(z, 1) for z in logits]
    teachers = [log_p.detach() for log_p in own]
    pairs = [
        functional.kl_div(own[i], teachers[j], reduction="batchmean", log_target=True)
        for i in range(len(own))
        for j in range(len(own))
        if i != j
    ]
    return torch.stack(pairs).sum()
