"""FedProx's proximal term (Li et al., MLSys 2020, arXiv 1812.06127, eq. 2)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from espalier.training.named_state import trained
from espalier.training.objectives import LocalRound, Objective


class SquaredDistance:
    """The trained parameters of a network against the received ones.

    The distance is over the *parameters*: a running statistic is not trained, so it is no part of it. All
    parameters are joined first, because a small U-Net has some hundred of them and is trained step by step.
    """

    def __init__(self, model: nn.Module, local: LocalRound) -> None:
        self._parameters = list(trained(model).values())
        start = (local.received[name].to(p) for name, p in trained(model).items())
        self.received = torch.cat([tensor.flatten() for tensor in start])

    def flat(self) -> Tensor:
        """Return theta, shape (parameters,), with its gradient."""
        return torch.cat([p.flatten() for p in self._parameters])

    def squared(self, flat: Tensor) -> Tensor:
        """Return ||theta - w||^2: the square of the norm, not the norm, of all parameters together."""
        return (flat - self.received).square().sum()


class Proximal(Objective):
    """``mu/2 ||theta - w||^2``, which draws a client's network back to the one it received.

    Its gradient is ``mu (theta - w)``. With SGD's momentum it enters the momentum buffer too, and clipping
    sees it; the paper's perturbed gradient descent has neither.

    Parameters
    ----------
    mu : float
        Weight of the term; 0 is FedAvg.
    """

    depends_on = "weights"

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the received parameters."""
        self._distance = SquaredDistance(model, local)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term's value; it does not depend on the batch."""
        return 0.5 * self._mu * self._distance.squared(self._distance.flat())
