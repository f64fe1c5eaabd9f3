"""What a client tells of the model it received, before it trains: its loss (q-FFL), its gradient (DivFL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor, nn

from espalier.seeds import seed_for
from espalier.tasks.base import base_objective, dataset_gradient, dataset_loss
from espalier.training.objectives import LocalResult, LocalRound, Objective

if TYPE_CHECKING:
    from espalier.data.imageset import ImageSet

#: Section of a reply that holds the gradient at the received model.
GRADIENT = "gradient/"


class ReceivedLoss(Objective):
    """Reports F_k(w), the loss at the received model over all local data, as "received-loss" (q-FFL).

    Li et al., ICLR 2020, arXiv 1905.10497: the loss *before* training, not the mean loss while training; like
    the authors' code, plus 1e-10, so that a power of it is defined. It has no gradient.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Measure."""
        self._value = 1e-10 + dataset_loss(*_at_received(model, local, "received loss"))

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: it only measures."""
        return images.new_zeros(())

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the loss."""
        return {"received-loss": self._value}


class ReceivedGradient(Objective):
    """Sends the full-batch gradient at the received model in the section "gradient/" (DivFL).

    Balakrishnan et al., ICLR 2022, section 3: clients are alike where these gradients are.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Measure."""
        self._gradient = dataset_gradient(*_at_received(model, local, "received gradient"))

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: it only measures."""
        return images.new_zeros(())

    def extra(self) -> dict[str, np.ndarray]:
        """Return the gradient."""
        return {GRADIENT + name: gradient for name, gradient in self._gradient.items()}


def _at_received(
    model: nn.Module, local: LocalRound, purpose: str
) -> tuple[nn.Module, Objective, ImageSet, torch.device, int, Generator]:
    """Return what a measurement at the received model takes; its noise hangs on client and round alone."""
    settings, device = local.settings, next(model.parameters()).device
    objective = base_objective(settings)
    objective.begin(model, local)
    generator = torch.Generator(device=device)
    generator.manual_seed(seed_for(settings.seed, local.name, local.round, purpose))
    return model, objective, local.require_data(), device, settings.batch_size, generator
