"""FedProx: FedAvg with a proximal term in the local loss (Li et al., MLSys 2020, arXiv 1812.06127)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from espalier.config.fields import NonNegative, SettingsGroup
from espalier.methods.base import Method
from espalier.methods.proximal import SquaredDistance
from espalier.training.objectives import LocalRound, Objective

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


class FedProx(Method):
    """Algorithm 2: clients minimise F_k(θ) + μ/2 ‖θ − w‖²; servers average by samples."""

    class Settings(SettingsGroup):
        """Weight of the proximal term."""

        prox_mu: NonNegative = Field(default=0.01, description="weight mu of the proximal term")

    name = "fedprox"
    uses = (Settings,)
    per_example_loss = True

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the proximal term."""
        return super().objective(round_) + ProximalTerm(self.settings.of(FedProx.Settings).prox_mu)


class ProximalTerm(Objective):
    """Equation 2: ``mu/2 ||theta - w||^2``, which keeps a client's network near the received one.

    Its gradient ``mu (theta - w)`` also enters SGD's momentum buffer and the clipping of gradients; the paper's
    perturbed gradient descent has neither.

    Parameters
    ----------
    mu : float
        Weight of the term; 0 is FedAvg.
    """

    depends_on = "weights"

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the received parameters w."""
        self._distance = SquaredDistance(model, local)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term's value; it does not depend on the batch."""
        return 0.5 * self._mu * self._distance.squared(self._distance.flat())
