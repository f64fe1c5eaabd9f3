"""What a client minimises on an ensemble of base networks (Split-Mix, Hong et al., ICLR 2022)."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from espalier.models.bases import members
from espalier.tasks.classification import cross_entropy
from espalier.training.objectives import Objective


class BaseLosses(Objective):
    """The sum of every base network's own cross-entropy.

    The base networks share no parameter, so the gradient of the sum is each one's own, and a step on the sum
    is one step of each. Their logits are averaged to decide, never to train: a loss of the mean would couple
    them.
    """

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the sum of the cross-entropies."""
        return cross_entropy([network(images).float() for network in members(model).values()], labels)
