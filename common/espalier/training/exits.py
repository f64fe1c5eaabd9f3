"""What networks with several exits minimise: DepthFL's self-distillation, InclusiveFL's last exit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.models.exits import ExitNetwork
from espalier.tasks.classification import cross_entropy, single_precision
from espalier.training.objectives import LocalRound, Objective, TrainingError

#: Rounds until the exits teach each other with full weight.
RAMP = 300


def consistency_weight(round_: int) -> float:
    """Return ``lambda_t = exp(-5 (1 - min(t, 300) / 300)^2)`` with t = round - 1.

    A sigmoid-shaped ramp: 0.0067 in round 1, when the exits know nothing worth teaching, 1 from round 301 on.
    """
    remaining = 1 - min(round_ - 1, RAMP) / RAMP
    return math.exp(-5 * remaining**2)


def mutual_divergence(logits: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i sum_{j != i} KL(softmax(z_j) || softmax(z_i))``, batch means, temperature 1.

    The teachers softmax(z_j) are constants: without that an exit would also move towards those it teaches.
    The authors' code adds 1e-7 to the teachers against log 0, for which there is no need in log space.
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


class ExitDistillation(Objective):
    """DepthFL's loss of a network with d exits (Kim et al., ICLR 2023, section 3).

    ``sum_i [CE(z_i, y) + lambda_t / (d - 1) sum_{j != i} KL(softmax(z_j) || softmax(z_i))]``, where d is the
    depth of the client's own network. One exit, or ``distillation=false``, leaves the cross-entropies.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the round's lambda."""
        _exits_of(model)
        self._weight = consistency_weight(local.round) if local.settings.distillation else 0.0

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the loss over all exits."""
        logits = single_precision(_exits_of(model).exits(images))
        total = cross_entropy(logits, labels)
        if self._weight == 0 or len(logits) == 1:
            return total
        return total + self._weight / (len(logits) - 1) * mutual_divergence(logits)


class LastExit(Objective):
    """Cross-entropy of the deepest exit alone, the only one of InclusiveFL (Liu et al., KDD 2022)."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """See that there are exits."""
        _exits_of(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy; the other exits are not even computed."""
        network = _exits_of(model)
        logits: Tensor = network.exit(network.depth)(network.maps(images)[-1])
        return functional.cross_entropy(logits.float(), labels)


def _exits_of(model: nn.Module) -> ExitNetwork:
    if not isinstance(model, ExitNetwork):
        raise TrainingError("this method trains networks with exits; set model=depth-cnn or depth-resnet18")
    return model
