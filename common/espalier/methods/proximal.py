"""The squared distance between trained and received parameters, the proximal term of FedProx and FedDyn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier import lazy
from espalier.training.named_state import trainable_parameters
from espalier.training.objectives import LocalRound

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy.load("torch")


class SquaredDistance:
    """``||theta - w||^2`` of a network's trainable parameters theta and their received values w.

    Running statistics are not parameters and do not count. The parameters are concatenated first: a small U-Net
    has some hundred of them, and one operation on all is faster than one operation on each.

    Parameters
    ----------
    model : nn.Module
        The network in training.
    local : LocalRound
        Holds w as `received`.
    """

    def __init__(self, model: nn.Module, local: LocalRound) -> None:
        self._parameters = list(trainable_parameters(model).values())
        start = (local.received[name].to(p) for name, p in trainable_parameters(model).items())
        self.received = torch.cat([tensor.flatten() for tensor in start])

    def flat(self) -> Tensor:
        """Return theta, shape (parameters,), with its gradient."""
        return torch.cat([p.flatten() for p in self._parameters])

    def squared(self, flat: Tensor) -> Tensor:
        """Return ||theta - w||^2 for theta as `flat` returns it: the square of the norm, not the norm."""
        return (flat - self.received).square().sum()
